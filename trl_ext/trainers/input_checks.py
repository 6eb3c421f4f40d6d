"""What is wrong with a data set or a tokenizer, said before training begins and on all processes alike."""

import difflib
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..lookup import did_you_mean

# What data sets call the columns that TRL reads.
_ALSO_CALLED = {
    "prompt": ("question", "problem", "instruction", "query", "input", "messages"),
    "completion": ("response", "answer", "output", "text"),
    "label": ("labels", "desirable", "score", "rating", "feedback"),
    "chosen": ("preferred", "accepted", "winner", "better", "positive"),
    "rejected": ("dispreferred", "loser", "worse", "negative"),
}


def datasets_of(given: Any) -> list:
    """The data sets in an argument of a trainer: none, one, or the values of a dictionary."""
    return [] if given is None else list(given.values()) if isinstance(given, dict) else [given]


def column_names(dataset: Any) -> list[str]:
    """Names of the columns; those of the first row where a data set does not know them."""
    return getattr(dataset, "column_names", None) or ([] if dataset is None else list(next(iter(dataset), {})))


def require_columns(dataset: Any, name: str, columns: list[str]) -> None:
    """Refuses a data set without one of `columns`; `name` stands for it in the sentence."""
    for column in columns:
        names = column_names(dataset)
        if column not in names:
            raise ValueError(f"{name} has no column {column!r}; it has {sorted(names)}{_advice(column, names)}")


def _advice(column: str, names: list[str]) -> str:
    """The end of the sentence about a missing column: which one may be meant, and what to do."""
    if column not in _ALSO_CALLED:  # the name is the user's own
        return did_you_mean(column, names)
    meant = [name for name in _ALSO_CALLED[column] if name in names] + difflib.get_close_matches(column, names, n=1)
    if meant:
        return f". Rename one: dataset.rename_column({meant[0]!r}, {column!r})."
    return f". Rename a column to {column!r}, or make it with dataset.map."


def require_texts(dataset: Any, name: str, columns: list[str], tokenizer: Any = None) -> None:
    """
    Refuses rows in which one of `columns` is neither a text nor a conversation.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data. Columns that it does not have are left out.
        name (`str`):
            What the sentence calls it.
        columns (`list[str]`):
            Columns to read.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Refuse also a text that it turns into no token at all.
    """
    empty_is_no_token = tokenizer is not None and not tokenizer("")["input_ids"]
    for column in columns:
        for row, value in rows_of(dataset, column):
            if not isinstance(value, str | list) or value == []:
                raise ValueError(
                    f"Column {column!r} must hold texts or conversations, got {value!r}{place_of(row, name)}."
                )
            if empty_is_no_token and value == "":
                raise ValueError(
                    f"Column {column!r} must hold texts of at least one token, got {value!r}{place_of(row, name)}. "
                    "Remove the row."
                )


def require_numbers(dataset: Any, name: str, key: str, column: str) -> None:
    """Refuses rows in which `column`, read as `key` of a pair, holds what [`checked_number`] does not take."""
    for row, value in rows_of(dataset, column):
        checked_number(key, column, value, place_of(row, name))


def checked_number(key: str, column: str, value: Any, where: str = "") -> float:
    """`value`, if it is a finite number in the range of `key`: a probability, a weight, or a reward."""
    low, high = {"pair_prob": (0.0, 1.0), "pair_weight": (0.0, math.inf)}.get(key, (-math.inf, math.inf))
    if not is_number(value) or not low <= value <= high:
        allowed = {"pair_prob": "a number in [0, 1]", "pair_weight": "a finite number >= 0"}
        raise ValueError(f"Column {column!r} must hold {allowed.get(key, 'finite numbers')}, got {value!r}{where}.")
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_eos(tokenizer: Any) -> None:
    """Refuses a tokenizer that does not know how a text ends."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so that no completion could end. Set tokenizer.eos_token and "
            "pass it as processing_class."
        )


def place_of(row: int, name: str) -> str:
    """The row, as it stands in a sentence about a data set that is called `name`."""
    return f" in row {row} of {name.replace('The', 'the')}"


def rows_of(dataset: Any, column: str) -> Iterator[tuple[int, Any]]:
    """Rows of a column; none of a stream, which cannot be read twice, or of rows that are made when they are read."""
    if isinstance(dataset, Dataset) and column in dataset.column_names and dataset.format["type"] != "custom":
        batches = dataset.select_columns([column]).with_format(None).iter(batch_size=1000)
        yield from enumerate(value for batch in batches for value in batch[column])


def quoted(names: Iterable[str]) -> str:
    """Names as they stand in a sentence: `'a', 'b'`."""
    return ", ".join(map(repr, names))


def warn_user(message: str) -> None:
    """Warns at the line outside trl_ext, TRL and what is below that led here: Python shows a line of the user's."""
    below = [str(Path("site-packages", name)) for name in ("trl", "transformers", "accelerate", "torch")]
    inside = (str(Path(__file__).parents[1]), *below, "<string>")
    frame, depth = sys._getframe(1), 2
    while frame.f_back and any(place in frame.f_code.co_filename for place in inside):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
