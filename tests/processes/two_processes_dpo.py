"""
Worker of `test_dpo_processes.py`: trains every case and saves what this process saw to `<folder>/<rank>of<world>.pt`.
"""

from pathlib import Path

import trl
from datasets import Dataset
from tiny import weights
from tiny.dpo import build, pairs

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.kto import KTOConfig, KTOTrainer

BATCH = 4
COLUMNS = {
    "p": lambda i: 0.1 + 0.8 * (i % 5) / 5,
    "w": lambda i: 1 + i % 3,
    "good": lambda i: i % 4,
    "bad": lambda i: 1,
}
REWARDS = {"chosen_reward_column": "good", "rejected_reward_column": "bad"}

# The names of TRL on the left, ours on the right: equal bit for bit, in one process as in two.
SAME = {
    "sigmoid": "gpo_logistic",
    "sppo_hard": "sppo",
}
CASES = {f"TRL {name}": {"trl": True, "loss_type": [name]} for name in SAME}
CASES |= {f"ours {name}": {"loss_type": [entry]} for name, entry in SAME.items()}
CASES |= {
    "IPO with probabilities and weights": {
        "loss_type": ["psipo_identity"],
        "preference_prob_column": "p",
        "pair_weight_column": "w",
    },
    "scores and a logit, mixed": {
        "loss_type": ["rpo_bwd_kl", "psipo_logit", "sigmoid"],  # not sft: TRL's mean over the tokens of a process
        "loss_weights": [1.0, 0.1, 0.5],
        "logp_reduction": "mean",
        "preference_prob_column": "p",
        **REWARDS,
    },
    "precompute": {"loss_type": ["gpo_squared"], "precompute_ref_log_probs": True, "pair_weight_column": "w"},
    "LoRA": {"loss_type": ["dpop"], "kind": "lora", "loss_kwargs": {"dpop": {"lam": 2.0}}},
    "no reference": {"loss_type": ["simpo"]},
    "a beta of the batch": {"loss_type": ["beta_dpo"]},
    "BCO": {"kto": True, "loss_type": "bco", "train_sampling_strategy": "random", "undesirable_weight": 0.5},
    "a filter": {"loss_type": ["beta_dpo"], "loss_kwargs": {"beta_dpo": {"alpha": 0.1, "keep": 0.5}}},
}


def write_rows(folder: Path):
    """Files, for the processes to share a cache: TRL's precomputed references need that."""
    for name, count in (("train", 16), ("eval", 8)):
        pairs(count, **COLUMNS).to_json(folder / f"{name}.jsonl")


def rows(folder: Path, name: str, world_size: int) -> Dataset:
    return Dataset.from_json(str(folder / f"{name}.jsonl"), cache_dir=str(folder / f"cache{world_size}"))


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for name, options in CASES.items():
        options = {"kind": "full" if name == "no reference" else "reference", **options}
        classes = (trl.DPOTrainer, trl.DPOConfig) if options.pop("trl", False) else (DPOTrainer, DPOConfig)
        classes = (KTOTrainer, KTOConfig) if options.pop("kto", False) else classes
        trainer = build(
            *classes,
            model,
            folder,
            train_dataset=rows(folder, "train", world_size),
            eval_dataset=rows(folder, "eval", world_size),
            per_device_train_batch_size=BATCH // world_size,
            per_device_eval_batch_size=BATCH // world_size,
            eval_strategy="epoch",
            optim="sgd",
            learning_rate=0.05,
            **options,
        )
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        results[name] = {"weights": weights(trainer), "log": trainer.state.log_history}
    return results
