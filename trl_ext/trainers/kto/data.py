"""What the data of an unpaired loss must have, and in which order they come."""

from collections.abc import Sequence
from typing import Any

from ..input_checks import column_names, place_of, require_columns, require_texts, rows_of, warn_user


def check_data(dataset: Any, name: str, loss_type: str) -> None:
    """Refuses a data set that is neither one of completions with labels nor one of pairs, which TRL takes apart."""
    columns = column_names(dataset)
    if {"image", "images"} & {*columns}:
        raise ValueError(f"loss_type {loss_type!r} is for texts; {name} has images.")
    if "chosen" in columns and "rejected" in columns:
        require_texts(dataset, name, ["prompt", "chosen", "rejected"])
        return
    require_columns(dataset, name, ["prompt", "completion", "label"])
    require_texts(dataset, name, ["prompt", "completion"])
    for row, label in rows_of(dataset, "label"):
        if label not in (True, False):  # 0 and 1 are equal to them
            raise ValueError(
                f"Column 'label' must hold true for good completions and false for bad ones, got "
                f"{label!r}{place_of(row, name)}."
            )


def check_both_kinds(labels: Sequence[bool], loss_type: str) -> None:
    """Refuses training data of one kind, of which nothing can be told apart."""
    if len({*labels}) == 1:
        kind = "good" if labels[0] else "bad"
        raise ValueError(
            f"loss_type {loss_type!r} tells good completions from bad ones, but all {len(labels)} rows of "
            f"train_dataset are {kind} ones (label {bool(labels[0])})."
        )


def warn_of_order(labels: Sequence[bool], batch_size: int, loss_type: str) -> None:
    """Warns where most optimizer steps of data in their own order would see one kind of completion only."""
    starts = range(0, len(labels) - batch_size + 1, batch_size)
    alike = sum(len({*labels[start : start + batch_size]}) == 1 for start in starts)
    if batch_size > 2 and alike > len(starts) / 2:
        warn_user(
            f"In {alike} of {len(starts)} optimizer steps of an epoch all completions have one label, because "
            f"train_sampling_strategy='sequential', TRL's default for KTO, keeps the order of the data. loss_type "
            f"{loss_type!r} does not need it: set train_sampling_strategy='random'."
        )
