"""What reward functions may return, and one sentence for each thing that they must not."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch


class Fault(ValueError):
    """What a reward function must not return, in a sentence; any other exception is the function's own."""


def said(error: Exception) -> str:
    """Class and text of an exception, in one line of a message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Parameters of a reward function; none where it does not say."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled code need not have one
        return {}


def _number(reward: Any) -> float | None:
    """A reward as a Python number, NaN for `None`; `None` for anything but a finite number of float32 or NaN."""
    if reward is None:
        return math.nan
    try:
        value = float(reward) if not isinstance(reward, str | bytes) else math.inf
    except (TypeError, ValueError, OverflowError):
        return None
    return None if abs(value) > torch.finfo(torch.float32).max else value


def values_of(name: str, result: Any, num_completions: int, one_per_completion: bool) -> list:
    """What a function returned, one entry per completion: a number (NaN: not scored), `None`, or a list."""
    if isinstance(result, str | bytes | Mapping | Set) or not _has_rows(result):
        raise Fault(f"Reward function {name!r} returned {result!r}; it must return a list, one reward per completion.")
    rewards = list(result)
    if len(rewards) != num_completions:
        raise Fault(
            f"The reward function {name!r} returned {len(rewards)} rewards, but {num_completions} were expected (one "
            "per completion)."
        )
    values = []
    for i, reward in enumerate(rewards):
        value = reward.tolist() if hasattr(reward, "tolist") else reward
        if one_per_completion and value is not reward and isinstance(value, list) and len(value) == 1:
            value = value[0]  # of a tensor of shape (N, 1), as models return them
        if value is not None and not isinstance(value, list | tuple) and (value := _number(value)) is None:
            raise Fault(
                f"Reward function {name!r} returned {reward!r} for completion {i}; a reward is a finite number, or "
                "None for a completion that cannot be scored."
            )
        values.append(value)
    return values


def _has_rows(result: Any) -> bool:
    if hasattr(result, "ndim"):
        return result.ndim > 0
    return hasattr(result, "__iter__") or hasattr(result, "__getitem__")


def checked_steps(name: str, values: list, ends: list[list[int]]) -> list[list[float | None]]:
    """Step rewards with `None` for those not scored; raises the first thing that is wrong with them."""
    rewards: list[list[float | None]] = []
    for i, (row, steps) in enumerate(zip(values, ends, strict=True)):
        row = [None] * len(steps) if row is None else list(row)
        if len(row) != len(steps):
            raise Fault(
                f"Reward function {name!r} returned {len(row)} step rewards for completion {i}, which has "
                f"{len(steps)} steps. Return one number per entry of completion_steps[{i}], and None for a step that "
                "cannot be scored."
            )
        row = [value.tolist() if hasattr(value, "tolist") else value for value in row]
        for j, value in enumerate(row):
            if value is not None and (not isinstance(value, numbers.Real) or _number(value) is None):
                raise Fault(
                    f"Reward function {name!r} returned {value!r} for step {j} of completion {i}; a step reward is a "
                    "finite number or None."
                )
        rewards.append([None if value is None or math.isnan(value) else float(value) for value in row])
    return rewards
