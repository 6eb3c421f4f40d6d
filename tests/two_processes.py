"""
Worker of `test_processes.py`: trains every case and saves what this process saw to `<folder>/<rank>of<world>.pt`.

    python -m torch.distributed.run --nproc_per_node 2 two_processes.py MODEL FOLDER WORLD_SIZE
"""

import sys
from pathlib import Path

import torch
from tiny import build, logged, scripted_rollout, weights

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

BATCH = 8


def some_fail(completions, completion_ids, **kwargs):
    """A reward of the completion alone, so that it does not depend on the process; some are not scored."""
    return [None if sum(ids) % 5 == 0 else (sum(ids) % 7) / 7 for ids in completion_ids]


CASES = {name: {"advantage_estimator": name} for name in ADVANTAGE_ESTIMATORS}
CASES |= {
    f"{name}, KL in the reward": {"advantage_estimator": name, "kl_placement": "reward", "beta": 0.1}
    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "group_relative")
}
CASES |= {
    f"{name} in the loss": {"kl_estimator": name, "beta": 0.1, "num_iterations": 2}
    for name in ("k1", "k2", "k3", "exact")
}
CASES |= {
    "adaptive beta": {"kl_estimator": "k2", "beta": 0.1, "kl_target": 0.01, "kl_horizon": 100.0},
    "a group across processes": {"advantage_estimator": "leave_one_out", "num_generations": 8},
    "weighted by sequence": {
        "advantage_estimator": "reinforce_plus_plus",
        "advantage_kwargs": {"weighting": "sequence", "correction": 1},
    },
}


class Recorder(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("seen", []).append(output["advantages"])
        return output


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for name, options in CASES.items():
        trainer = build(
            Recorder,
            GRPOConfig,
            model,
            folder,
            per_device_train_batch_size=BATCH // world_size,
            max_steps=4,
            optim="sgd",
            learning_rate=0.1,
            reward_funcs=some_fail,
            rollout_func=scripted_rollout,
            **options,
        )
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        results[name] = {
            "advantages": trainer.seen,
            "weights": weights(trainer),
            "log": logged(trainer),
            "table": list(trainer._logs["advantages"]),
        }
    return results


if __name__ == "__main__":
    model, folder, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    results = run(model, folder, world_size)
    torch.save(results, folder / f"{torch.distributed.get_rank()}of{world_size}.pt")
    torch.distributed.destroy_process_group()
