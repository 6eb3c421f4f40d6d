"""
How right the labels of steps that `trl-ext label-steps` writes are, on the clock task, where a program knows.

    python -m recipes.clock.labels FOLDER [FOLDER ...]
"""

import argparse
from pathlib import Path

from recipes.clock.accuracy import read_rows
from recipes.clock.task import process_reward


def first_error(labels: list[float | None]) -> int | None:
    """Index of the first step that is labelled 0; `None` where there is none."""
    return next((j for j, label in enumerate(labels) if label == 0.0), None)


def compare(rows: list[dict]) -> tuple[float, float]:
    """
    Labels against the program's, which judges each line given the lines before it.

    After the first error the two differ by design: a label says whether the answer can still end right.

    Args:
        rows (`list[dict]`):
            Labelled answers, with `prompt`, `completions` and `labels`.

    Returns:
        `tuple[float, float]`: Share of the answers whose first error, or its absence, is that of the program; and of
        the lines up to and with that error, the share that is labelled above 0 where it is right and 0 where not. A
        line without a label does not agree.
    """
    exact = agreed = lines = 0
    for row in rows:
        (right,) = process_reward([row["prompt"]], [row["completions"]], [row["completions"]])
        error = first_error(right)
        exact += first_error(row["labels"]) == error
        known = right if error is None else right[: error + 1]
        lines += len(known)
        agreed += sum(
            label is not None and (label > 0) == (reward > 0)
            for label, reward in zip(row["labels"], known, strict=False)
        )
    return exact / len(rows), agreed / lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare labels of steps with the program's, on the clock task.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="output_dir of trl-ext label-steps")
    for folder in parser.parse_args().folders:
        rows = read_rows(folder / "train.jsonl")
        exact, agreed = compare(rows)
        right = sum(row["outcome"] for row in rows) / len(rows)
        print(
            f"{folder}: {len(rows)} answers, {right:.2f} right; first error exact in {exact:.2f}, agreement up to it "
            f"{agreed:.2f}"
        )


if __name__ == "__main__":
    main()
