"""
Worker of `test_reference_processes.py`: trains every case, and saves what this process saw to `<folder>/<rank>of2.pt`.
"""

from pathlib import Path

import tiny
import tiny.dpo as tiny_dpo
import torch
from two_processes import some_fail

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

BATCH = 8
SAMPLES = (tiny.build, GRPOTrainer, GRPOConfig)
PAIRS = (tiny_dpo.build, DPOTrainer, DPOConfig)
OF_SAMPLES = {"beta": 0.1, "num_iterations": 2, "rollout_func": tiny.scripted_rollout, "reward_funcs": some_fail}
AT_A_KL = {"ref_refresh_steps": None, "ref_refresh_kl": 1e-4, "learning_rate": 0.5}
CASES = {
    "full": (SAMPLES, {**OF_SAMPLES, "ref_refresh_alpha": 0.5, "ref_total_kl": True}),
    "LoRA": (SAMPLES, {**OF_SAMPLES, "lora": True, "ref_refresh_optimizer": True}),
    "LoRA, at a KL": (SAMPLES, {**OF_SAMPLES, "lora": True, **AT_A_KL}),
    "pairs": (PAIRS, {"kind": "reference"}),
    "pairs, LoRA": (PAIRS, {"kind": "lora"}),
}


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for name, ((build, *classes), options) in CASES.items():
        torch.manual_seed(0)  # of an adapter's first weights
        settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 6, "ref_refresh_steps": 2, **options}
        trainer = build(*classes, model, folder, per_device_train_batch_size=BATCH // world_size, **settings)
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        results[name] = {
            "weights": tiny.weights(trainer),
            "reference": [reference.detach().clone() for _, reference in trainer._moving.reference.pairs()],
            "log": tiny.logged(trainer),
        }
    return results
