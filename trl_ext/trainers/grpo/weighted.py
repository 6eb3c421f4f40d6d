"""From what reward functions gave to rewards of completions and of steps, as functions; for every trainer."""

from typing import Any

import torch

from ...functional.advantages import Estimator
from ...functional.rewards import RewardBatch, reward_at_steps
from .checks import FIELDS_OF_ESTIMATORS, takes
from .reward_calls import RewardCalls

NOTHING_TO_CLIP = (
    "reward_clip_range clips the reward of a completion, but every reward function returned step rewards. Remove it."
)
SINGLE_STEPS = (
    "Each of the {} completions of {} is one step: none has step_separator={!r} between two pieces of text. Rewards "
    "of steps are rewards of whole completions then. Set step_separator to what the policy writes between steps, or "
    "step_ends_function."
)


def options_of(row: Estimator, options: Any) -> dict[str, Any]:
    """What the function of an estimator is given by name."""
    own = {name: getattr(options, name) for name in FIELDS_OF_ESTIMATORS if takes(row.function, name)}
    return {**(options.advantage_kwargs or {}), **own}


def weighted_returns(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, names: list[str], clip_range: list[float] | None
) -> torch.Tensor:
    """Weighted sum of the rewards of each completion, `(N,)` float64, NaN where no function scored it."""
    rewards_per_func = rewards_per_func.cpu() if rewards_per_func.device.type == "mps" else rewards_per_func
    infinite = rewards_per_func.isinf().nonzero()
    if len(infinite):
        row, column = infinite[0].tolist()
        raise ValueError(
            f"Reward function {names[column]!r} returned {rewards_per_func[row, column].item()} for completion {row}; "
            "a reward is a finite number, or None for a completion that cannot be scored."
        )
    returns = (rewards_per_func.double() * weights.to(rewards_per_func.device, torch.float64)).nansum(1)
    if clip_range is not None:
        returns = returns.clamp(*clip_range)
    return returns.masked_fill(rewards_per_func.isnan().all(1), torch.nan)


def weighted_steps(
    calls: RewardCalls, process: list[int], weights: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Of the completions of `calls`, `(B, width)` each: weighted sum of the rewards that the functions `process` gave to
    steps, where there is one, and where a step ends.
    """
    ends = calls.cuts.ends
    _, is_end = reward_at_steps([[0.0] * len(row) for row in ends], ends, width)
    rewards, scored = torch.zeros(is_end.shape, dtype=torch.float64), torch.zeros_like(is_end)
    for index in process:
        values, found = reward_at_steps(calls.steps_of(index), ends, width)
        rewards += weights[index].double().cpu() * values
        scored |= found
    return rewards, scored, is_end


def checked_advantages(name: str, advantages: Any, batch: RewardBatch) -> torch.Tensor:
    """What a function at a dotted path returned, 0 at untrainable tokens; raises what is wrong with it."""
    shape = batch.outcome.shape
    if not isinstance(advantages, torch.Tensor) or advantages.shape not in (shape, shape[:1]):
        got = tuple(advantages.shape) if isinstance(advantages, torch.Tensor) else type(advantages).__name__
        raise ValueError(
            f"advantage_estimator={name!r} returned {got}; it must return a tensor of shape (N,) or (N, T), here "
            f"{tuple(shape[:1])} or {tuple(shape)}."
        )
    if advantages.dim() == 2:
        advantages = advantages.where(batch.mask.bool(), 0.0)
    if not advantages.isfinite().all():
        raise ValueError(f"advantage_estimator={name!r} returned a NaN or infinite advantage.")
    return advantages
