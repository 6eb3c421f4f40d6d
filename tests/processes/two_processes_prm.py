"""
Worker of `test_prm_processes.py`: trains every case and saves what this process saw to `<folder>/<rank>of<world>.pt`.
"""

from pathlib import Path

from datasets import Dataset
from tiny import weights
from tiny.prm import base, build, rows

CASES = {
    "classification": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "LoRA": {"kind_of_weights": "LoRA"},
    "language model": {"kind": "good_bad"},
    "regression": {"objective": "regression"},
}


def write(folder: Path) -> None:
    """Bases, and rows of 3, 1, 1 and 2 labelled steps: in two processes of two rows each, 4 and 3."""
    for kind in ("token_classifier", "good_bad"):
        base(folder / kind, kind)
    rows(8).to_json(folder / "train.jsonl")
    rows(7).to_json(folder / "eval.jsonl")  # so that the last batch has to be filled up


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for name, options in CASES.items():
        options = dict(options)
        sets = {
            f"{part}_dataset": Dataset.from_json(
                str(folder / f"{part}.jsonl"), cache_dir=str(folder / f"{world_size}")
            )
            for part in ("train", "eval")
        }
        trainer = build(
            str(folder / options.get("kind", "token_classifier")),
            folder / "out",
            options.pop("kind_of_weights", "full"),
            per_device_train_batch_size=4 // world_size,
            per_device_eval_batch_size=4 // world_size,
            eval_strategy="epoch",
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=1e9,
            **sets,
            **options,
        )
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        results[name] = {"weights": weights(trainer), "log": trainer.state.log_history}
    return results
