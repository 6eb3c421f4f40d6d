"""
Worker of `test_vllm_processes.py`: completions from the stand-in for vLLM, in both modes, full and LoRA. Saves what
this process saw to `<folder>/<rank>of<world>.pt`.

    python -m torch.distributed.run --nproc_per_node 2 two_processes_vllm.py MODEL FOLDER WORLD_SIZE [fsdp2]
"""

import sys
from pathlib import Path

if "fsdp2" in sys.argv:
    import fsdp2

    fsdp2.switch_on()

import torch
from launch import leave
from tiny import build, logged
from tiny.fake_vllm import Engine, install

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo.critic import whole

CASES = {
    f"{mode}, {name}": (mode, lora, options)
    for mode in ("server", "colocate")
    for name, lora, options in (
        ("full", False, {}),
        ("LoRA", True, {}),
        ("greedy", False, {"advantage_estimator": "remax"}),
        ("asleep", True, {"vllm_enable_sleep_mode": True}),
    )
}


def run(model: str, folder: Path, world_size: int) -> dict:
    install(model)
    results = {}
    for name, (mode, lora, options) in CASES.items():
        torch.manual_seed(0)  # of an adapter's first weights
        Engine.made.clear()
        settings = {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward", "beta": 0.1, **options}
        trainer = build(
            GRPOTrainer, GRPOConfig, model, folder, lora=lora, use_vllm=True, vllm_mode=mode, learning_rate=0.05,
            per_device_train_batch_size=8 // world_size, **settings,
        )  # fmt: skip
        trainer.train()
        results[name] = {
            "wrapped": type(trainer.model_wrapped).__name__,
            "log": logged(trainer),
            "weights": {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()},
            "asked": [[rows for rows, _ in engine.requests] for engine in Engine.made],
        }
    return results


if __name__ == "__main__":
    model, folder, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    leave(run(model, folder, world_size), folder, world_size)
