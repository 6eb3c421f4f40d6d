"""
Worker of `test_ppo_processes.py`: trains every case and saves what this process saw to `<folder>/<rank>of<world>.pt`.

    python -m torch.distributed.run --nproc_per_node 2 two_processes_ppo.py MODEL FOLDER WORLD_SIZE [fsdp2]
"""

import sys
from pathlib import Path

if "fsdp2" in sys.argv:
    import fsdp2

    fsdp2.switch_on()

import torch
from launch import leave
from tiny import build, logged, scripted_rollout
from two_processes import by_step, some_fail

from trl_ext.sharded import whole
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

BATCH = 8
STEPS = {"reward_funcs": [by_step, some_fail], "step_separator": "b"}
CASES = {
    "full": {},
    "LoRA": {"lora": True},
    "LoRA, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "everything": {
        "bootstrap_truncated": True, "missing_eos_penalty": 0.5, "whiten_rewards": True, "gamma": 0.9,
        "critic_lam": 1.0,
    },
    "steps and outcomes": STEPS,
    "reused": {"num_iterations": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "lora": True},
}  # fmt: skip
FSDP2 = {"full": CASES["full"], "LoRA, accumulated": {**CASES["accumulated"], "gradient_checkpointing": True}}


class Recorder(PPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        seen = {name: output[name] for name in ("advantages", "returns", "old_values")}
        self.__dict__.setdefault("seen", []).append(seen)
        return output


def run(model: str, folder: Path, world_size: int, cases=CASES) -> dict:
    results = {}
    for name, options in cases.items():
        torch.manual_seed(0)  # of an adapter's first weights
        trainer = build(
            Recorder,
            PPOConfig,
            model,
            folder,
            **{
                "per_device_train_batch_size": BATCH // world_size, "num_generations": 1, "num_iterations": 1,
                "max_steps": 4, "optim": "sgd", "learning_rate": 0.05, "critic_learning_rate": 0.1,
                "rollout_func": scripted_rollout, "reward_funcs": some_fail, **options,
            },
        )  # fmt: skip
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        results[name] = {
            "wrapped": type(trainer.model_wrapped).__name__,
            "seen": trainer.seen,
            "policy": {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()},
            "critic": {name: whole(p.detach()).clone() for name, p in trainer.critic.named_parameters().items()},
            "log": logged(trainer),
        }
    return results


def resumed(model: str, folder: Path) -> list[dict]:
    """Of a run that was not interrupted, and of one that goes on from its second step; with full fine-tuning, LoRA."""
    found = []
    for lora in (False, True):
        options = {"num_generations": 1, "rollout_func": scripted_rollout, "lora": lora, "num_iterations": 1}
        for start in (None, 2):
            torch.manual_seed(0)
            trainer = build(
                PPOTrainer, PPOConfig, model, folder / str(lora), max_steps=4, save_strategy="steps", save_steps=2,
                **options,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=start and str(folder / str(lora) / f"checkpoint-{start}"))
            named = {**dict(trainer.model.named_parameters()), **trainer.critic.named_parameters()}
            found.append({name: whole(p.detach()).clone() for name, p in named.items()})
    return found


if __name__ == "__main__":
    model, folder, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sharded = "fsdp2" in sys.argv
    results = run(model, folder, world_size, FSDP2 if sharded else CASES)
    if sharded:
        results = {**results, "resumed": resumed(model, folder)}
    leave(results, folder, world_size)
