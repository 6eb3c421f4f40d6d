"""
Worker of `test_async_processes.py`: trains every case on given conversations and saves what this process saw to
`<folder>/<rank>of<world>.pt`.
"""

from pathlib import Path

import torch
from tiny import logged
from tiny.engine import build, group, lengths, outcome

from trl_ext.trainers.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

CASES = {
    "a group": {"advantage_estimator": "leave_one_out"},
    "over the step": {"advantage_estimator": "reinforce_plus_plus_baseline"},
    "steps": {
        "advantage_estimator": "process_group_relative", "functions": (outcome, lengths), "step_separator": "b",
    },
    "KL in the reward": {
        "advantage_estimator": "reinforce_plus_plus", "lora": True, "beta": 0.2, "kl_placement": "reward",
    },
    "KL in the loss": {
        "advantage_estimator": "reinforce", "lora": True, "beta": 0.2, "kl_estimator": "k2", "kl_target": 0.01,
        "kl_horizon": 50.0,
    },
}  # fmt: skip


class Recorder(AsyncGRPOTrainer):
    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        rows = {}
        for batch in batches:
            for position in range(int(batch["segment_id"].max()) + 1):
                own = (batch["token_index"] >= 0) & (batch["segment_id"] == position)
                rows[tuple(batch["old_log_probs"][own].tolist())] = batch["advantages"][own].clone()
        self.__dict__.setdefault("seen", []).append(rows)
        return batches, count


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for name, options in CASES.items():
        settings = {"per_device_train_batch_size": 8 // world_size, "max_steps": 3, "learning_rate": 0.05, **options}
        groups = [group(number) for number in range(24)]
        trainer = build(Recorder, AsyncGRPOConfig, model, folder / name, groups=groups, **settings)
        assert trainer.accelerator.num_processes == world_size
        torch.manual_seed(1)
        for key, parameter in trainer.model.named_parameters():
            if "lora_B" in key:  # so that the policy is not its reference
                parameter.data.normal_(0, 0.3)
        trainer.train()
        results[name] = {
            "seen": trainer.seen,
            "weights": {key: p.detach().clone() for key, p in trainer.model.named_parameters()},
            "log": logged(trainer),
        }
    return results
