"""Order of the rows of a generation batch: rows of one prompt in one micro-batch, within the same optimizer step."""

import math
from typing import Any

import torch

_OF_IMAGES = ("pixel_values", "num_images", "token_type_ids", "mm_token_type_ids")


def keep_groups(micro_batches: list[dict[str, Any]], accumulation: int) -> list[dict[str, Any]]:
    """
    Redistributes shuffled rows over the micro-batches of an optimizer step, so that rows of one prompt are adjacent.

    Groups come in the order in which the shuffle first shows them; no random number is drawn, and no row moves to
    another optimizer step, so that every update is what it was.

    Args:
        micro_batches (`list[dict[str, Any]]`):
            Slices of one generation batch: tensors and lists of as many rows each, 0-d tensors, `None`.
        accumulation (`int`):
            Micro-batches of an optimizer step.

    Returns:
        `list[dict[str, Any]]`: As many micro-batches of as many rows; those given, with images.
    """
    window = math.gcd(len(micro_batches), accumulation)
    if window == 1 or any(micro_batches[0].get(name) is not None for name in _OF_IMAGES):
        return micro_batches  # rows of one micro-batch share a prompt in any order
    starts = range(0, len(micro_batches), window)
    return [batch for start in starts for batch in _sorted(micro_batches[start : start + window])]


def _sorted(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    size = len(batches[0]["prompt_ids"])
    prompts = torch.cat([torch.where(b["prompt_mask"].bool(), b["prompt_ids"], -1) for b in batches])
    seen: dict[tuple[int, ...], int] = {}
    group = [seen.setdefault(tuple(row), len(seen)) for row in prompts.tolist()]
    order = sorted(range(len(group)), key=group.__getitem__)
    chosen = [order[start : start + size] for start in range(0, len(order), size)]
    columns = {name: _column([batch[name] for batch in batches], chosen) for name in batches[0]}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(batches))]


def _column(values: list[Any], chosen: list[list[int]]) -> list[Any]:
    """One entry of the micro-batches, with the rows chosen for each."""
    first = values[0]
    if first is None or (isinstance(first, torch.Tensor) and first.ndim == 0):
        return values
    if isinstance(first, torch.Tensor):
        rows = torch.cat(values)
        return [rows[torch.tensor(indices, device=rows.device)] for indices in chosen]
    flat = [value for batch in values for value in batch]
    return [[flat[i] for i in indices] for indices in chosen]
