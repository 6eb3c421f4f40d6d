"""Our columns on their way from the data to the loss, past the model, which gets every key that TRL does not know."""

from collections.abc import Mapping
from typing import Any

import torch

from ..foreign import option
from ..input_checks import checked_number, require_columns, require_numbers

# The key that a column has in a batch, and the option that names the column.
OPTIONS = {
    "pair_prob": "preference_prob_column",
    "pair_chosen_reward": "chosen_reward_column",
    "pair_rejected_reward": "rejected_reward_column",
    "pair_weight": "pair_weight_column",
}


def columns_of(config: Any) -> dict[str, str]:
    """Our columns that the config names, by their key in a batch."""
    columns = {key: option(config, name) for key, name in OPTIONS.items()}
    return {key: column for key, column in columns.items() if column is not None}


def check_columns(dataset: Any, name: str, columns: Mapping[str, str]) -> None:
    """Refuses a data set without our columns, or with something in them that is no number in its range."""
    require_columns(dataset, name, [*columns.values()])
    for key, column in columns.items():
        require_numbers(dataset, name, key, column)


def without_our_columns(inputs: dict, columns: Mapping[str, str]) -> tuple[dict, dict[str, torch.Tensor]]:
    """A batch as TRL makes it, and our columns."""
    ours = {key: inputs[key] for key in columns if key in inputs}
    return {key: value for key, value in inputs.items() if key not in columns}, ours


class CollatorWithColumns:
    """TRL's collator, and our columns as float32 tensors of shape `(B,)`."""

    def __init__(self, collator: Any, columns: Mapping[str, str]):
        self.collator = collator
        self.columns = dict(columns)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        ours = {
            key: torch.tensor([self._value(key, column, example) for example in examples], dtype=torch.float32)
            for key, column in self.columns.items()
        }
        return {**self.collator(examples), **ours}

    def _value(self, key: str, column: str, example: dict[str, Any]) -> float:
        if column not in example:
            raise ValueError(f"The dataset has no column {column!r}; it has {sorted(example)}.")
        return checked_number(key, column, example[column])
