"""
Answers of the hard base to its own prompts, each line labelled right or wrong by the program: data for `trl-ext prm`.

    python -m recipes.clock.step_data [--output outputs/clock_steps] [--seed 0]

Eight answers to each prompt of `hard/data/train.jsonl` become `train.jsonl`, one to each held-out prompt `test.jsonl`.
Columns: `prompt`, the conversation; `completions`, the lines; `labels`, whether a line is right given the lines before
it, as in [`recipes.clock.task.step_rewards`].
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.clock.accuracy import read_rows, write_completions
from recipes.clock.task import last_text, step_rewards

HARD = Path(__file__).parent / "hard"
SAMPLES = 8


def labelled_steps(model, tokenizer, rows: list[dict], samples: int, seed: int = 0) -> list[dict]:
    """`samples` answers of the model to each of `rows`, at temperature 1, with a label for every line."""
    repeated = [row for row in rows for _ in range(samples)]
    labelled = []
    for start in range(0, len(repeated), 512):
        batch = repeated[start : start + 512]
        for row, answer in zip(batch, write_completions(model, tokenizer, batch, True, seed + start), strict=True):
            labels = [reward == 1.0 for reward in step_rewards(answer, last_text(row["prompt"]))]
            labelled.append(
                {"prompt": row["prompt"], "completions": answer.split("\n")[: len(labels)], "labels": labels}
            )
    return labelled


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Sample answers of the hard base, every line labelled by the program."
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/clock_steps"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums depend on the number of threads
    model = AutoModelForCausalLM.from_pretrained(HARD / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(HARD / "model")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, samples in (("train", SAMPLES), ("test", 1)):
        rows = labelled_steps(model, tokenizer, read_rows(HARD / "data" / f"{name}.jsonl"), samples, args.seed)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        labels = [label for row in rows for label in row["labels"]]
        print(f"{name}: {len(rows)} answers, {sum(labels) / len(labels):.3f} of {len(labels)} lines right")


if __name__ == "__main__":
    main()
