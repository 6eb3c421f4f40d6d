"""
Worker of `test_packed_processes.py`: trains every case and saves what this process saw to `<rank>of<world>.pt`.
"""

from pathlib import Path

import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from tiny import build, weights
from tiny.dpo import build as build_dpo
from tiny.dpo import words
from tiny.packed import by_tokens, prompts, rollout

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

ON = {"shared_prefix": True}
LORA = {"lora": True, "gradient_checkpointing": True}


def nothing_to_save_elsewhere(prompts, trainer):
    """As `rollout`, but on the last process no two rows share a prompt, and no row is padded."""
    made = rollout(prompts, trainer)
    if PartialState().process_index == PartialState().num_processes - 1:
        made["prompt_ids"] = [[2 + i] * 12 for i in range(len(prompts))]
        made["completion_ids"] = [(ids * 30)[:28] for ids in made["completion_ids"]]
        made["logprobs"] = made["env_mask"] = [[1] * 28] * len(prompts)
    return made


def alike_on_the_first(completion_ids, **kwargs):
    """On the first process all rewards of a prompt are equal: its advantages are 0."""
    first = PartialState().process_index == 0
    return [0.5 if first else value for value in by_tokens(completion_ids)]


GRPO = {
    "LoRA, checkpointing, KL": {**LORA, "beta": 0.1},
    "full, accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "beta": 0.1},
    "reused rollouts": {"num_iterations": 2, "max_steps": 2, "beta": 0.1, "learning_rate": 0.02},
    "one process falls back": {**LORA, "rollout_func": nothing_to_save_elsewhere, "max_completion_length": 32},
    "rows left out on one process": {"reward_funcs": alike_on_the_first},
}
DPO = {"LoRA, checkpointing": {"kind": "lora", "gradient_checkpointing": True}, "full": {"kind": "reference"}}


def grpo(classes, model, folder, **options):
    settings = {
        "rollout_func": rollout, "reward_funcs": by_tokens, "train_dataset": prompts(), "optim": "sgd",
        "learning_rate": 0.5, "max_grad_norm": 1e9, "max_steps": 1, "per_device_train_batch_size": 4, **options,
    }  # fmt: skip
    return build(*classes, model, folder, **settings)


def dpo(classes, model, folder, **options):
    rows = range(16)
    columns = {"prompt": [words(3 * i + 7, 8) * 2 for i in rows], "chosen": [words(5 * i + 2, 9) for i in rows],
               "rejected": [words(11 * i + 3, 13) for i in rows]}  # fmt: skip
    settings = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 1e9, "max_steps": 1, **options}
    return build_dpo(*classes, model, folder, train_dataset=Dataset.from_dict(columns), **settings)


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for kind, make, cases, ours, theirs in (
        ("GRPO", grpo, GRPO, (GRPOTrainer, GRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)),
        ("DPO", dpo, DPO, (DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)),
    ):
        for case, options in cases.items():
            skip = {"skip_zero_advantages": True} if "left out" in case else {}
            for whose, classes, on in (("ours", ours, {**ON, **skip}), ("theirs", theirs, {})):
                trainer = make(classes, model, folder, **options, **on)
                assert trainer.accelerator.num_processes == world_size
                before = weights(trainer)
                trainer.train()
                update = torch.cat([(w - before[name]).flatten() for name, w in weights(trainer).items()])
                results[f"{kind}, {case}", whose] = {
                    "update": update, "counts": getattr(trainer, "shared_prefix_counts", None),
                }  # fmt: skip
    return results
