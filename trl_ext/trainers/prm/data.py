"""From rows of prompt, steps and labels to token ids with the labels at the places where scores are read."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, Sequence, Value
from trl.trainer.utils import global_then_local_main_first, pad

from ...functional.step_objectives import STEP_OBJECTIVES
from ...rewards.step_format import StepFormat
from ..input_checks import column_names, require_columns, rows_of, warn_user

COLUMNS = ["prompt", "completions", "labels"]
ENCODED = ["input_ids", "places", "targets"]
IGNORED = -100
_FEATURES = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "places": Sequence(Value("int32")),
        "targets": Sequence(Value("float32")),
        "cut": Value("int32"),
    }
)


class Selection(NamedTuple):
    """
    Which labels of a row are kept; the others become `None`.

    Args:
        last_only (`bool`):
            The last step's alone.
        after_good_only (`bool`):
            Those of steps whose predecessor is not labelled bad, or has no label: of the step after a dead prefix,
            what was rolled out says nothing.
        threshold (`float`):
            Smallest label that counts as good.
    """

    last_only: bool = False
    after_good_only: bool = False
    threshold: float = 0.5

    def of(self, labels: list) -> list:
        kept = [label if j == len(labels) - 1 or not self.last_only else None for j, label in enumerate(labels)]
        if self.after_good_only:
            bad = [label is not None and label < self.threshold for label in [1.0, *labels]]
            kept = [None if follows_bad else label for label, follows_bad in zip(kept, bad, strict=False)]
        return kept


ALL = Selection()


def check_labels(steps: Any, labels: Any, row: int, name: str, probability: bool) -> None:
    """Refuses a row whose labels do not fit its steps."""
    if len(steps) != len(labels):
        raise ValueError(
            f"Row {row} of {name} has {len(steps)} completions and {len(labels)} labels; each step needs one, or None."
        )
    low, high = (0.0, 1.0) if probability else (-math.inf, math.inf)
    for label in labels:
        if label is not None and not (
            isinstance(label, int | float) and math.isfinite(label) and low <= label <= high
        ):
            what = (
                "no probability; a label is True, False, a number from 0 to 1"
                if probability
                else ("no finite number; with objective='regression' a label is one")
            )
            raise ValueError(f"Label {label!r} of row {row} of {name} is {what}, or None.")


def check_rows(dataset: Any, name: str, objective: str) -> None:
    """Refuses a data set before a model loads. The rows of a stream are checked when they are read."""
    if {*ENCODED} <= {*column_names(dataset)}:
        return
    require_columns(dataset, name, COLUMNS)
    probability = STEP_OBJECTIVES[objective].probability
    pairs = zip(rows_of(dataset, "completions"), rows_of(dataset, "labels"), strict=True)
    for (row, steps), (_, labels) in pairs:
        check_labels(steps, labels, row, name, probability)


def encode(
    row: dict[str, Any],
    index: int,
    tokenizer: Any,
    step_format: StepFormat,
    max_length: int | None,
    selection: "Selection",
    name: str,
) -> dict[str, Any]:
    """A row as the model reads it: its ids, the places of its labelled steps, their labels, and how many were cut."""
    labels, probability = row["labels"], STEP_OBJECTIVES[step_format.objective].probability
    check_labels(row["completions"], labels, index, name, probability)
    ids, places = step_format.encode(tokenizer, row["prompt"], row["completions"])
    labels = selection.of(labels)
    steps = [(place, float(label)) for place, label in zip(places, labels, strict=True) if label is not None]
    kept = [step for step in steps if max_length is None or step[0] < max_length]
    return {
        "input_ids": ids[:max_length],
        "places": [place for place, _ in kept],
        "targets": [label for _, label in kept],
        "cut": len(steps) - len(kept),
    }


def encoded(
    dataset: Any, name: str, tokenizer: Any, step_format: StepFormat, args: Any, selection: Selection = ALL
) -> Any:
    """
    The data set with [`ENCODED`] as its columns, without the rows of which no label is left. Once encoded, as it is.

    Raises:
        `ValueError`: If nothing is left.
    """
    if {*ENCODED} <= {*column_names(dataset)}:
        return dataset
    require_columns(dataset, name, COLUMNS)
    options = {
        "tokenizer": tokenizer, "step_format": step_format, "max_length": args.max_length, "selection": selection,
        "name": name,
    }  # fmt: skip
    here, other = {}, {}
    if isinstance(dataset, Dataset):
        here, other = (
            {"num_proc": args.dataset_num_proc, "desc": f"{word} {name}"} for word in ("Encoding", "Filtering")
        )
    with global_then_local_main_first():
        rows = dataset.map(
            encode,
            with_indices=True,
            fn_kwargs=options,
            remove_columns=column_names(dataset),
            features=_FEATURES,
            **here,
        )
        kept = rows.filter(_has_labels, **other)
    if isinstance(dataset, Dataset):
        _warn_of_what_is_lost(name, len(rows), len(kept), sum(rows["cut"]), args.max_length)
    if next(iter(kept), None) is None:
        raise ValueError(f"{name} has no labelled step within max_length={args.max_length} tokens.")
    return kept.remove_columns("cut")


def _has_labels(row: dict[str, Any]) -> bool:
    return len(row["places"]) > 0


def _warn_of_what_is_lost(name: str, rows: int, kept: int, cut: int, max_length: int | None) -> None:
    lost = [f"{rows - kept} of {rows} rows have no label and are left out"] if kept < rows else []
    lost += [f"{cut} labels lie beyond max_length={max_length} and are lost"] if cut else []
    if lost:
        warn_user(f"{name}: {'; '.join(lost)}.")


@dataclass
class StepCollator:
    """
    A batch of encoded rows, padded on the right: the models are causal, so that no score depends on it.

    `labels` are the places, because transformers counts the labels of an accumulation window as those that are not
    -100, and a number that somebody regresses on may be that one; `targets` are the labels.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Says what pads.
        pad_to_multiple_of (`int`, *optional*):
            Padded length.
    """

    tokenizer: Any
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"], dtype=torch.long) for row in rows]
        places = [torch.tensor(row["places"], dtype=torch.long) for row in rows]
        targets = [torch.tensor(row["targets"], dtype=torch.float32) for row in rows]
        width = {"pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id, **width),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, **width),
            "labels": pad(places, padding_value=IGNORED),
            "targets": pad(targets, padding_value=IGNORED),
        }
