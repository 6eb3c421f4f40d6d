"""Metrics of a batch as pure functions; nothing here acts on training."""

import math
from typing import Any

import torch

from ...functional.kl import k1, k2, k3
from ...functional.reductions import SATURATION, is_constant, weighted_mean
from ...functional.rewards import RewardBatch

_KL_MEANS = ("kl", "kl/k1", "kl/k2", "kl/k3", "kl/saturated")


def kl_sums(
    per_token_kl: torch.Tensor,
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    old_logps: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """
    Sums over the trainable tokens of this process, `(8,)`: KL in use, ratio · k1, ratio · k2, ratio · k3 (nats),
    tokens with a log-ratio beyond ±20, trainable tokens, completions that have any, completions. All arguments are
    `(B, T)`.
    """
    trainable = mask.bool()
    logps, ref_logps, old_logps = (x.float().where(trainable, 0.0) for x in (logps, ref_logps, old_logps))
    ratio = (logps - old_logps).clamp(-SATURATION, SATURATION).exp()
    estimates = [ratio * estimator(logps, ref_logps) for estimator in (k1, k2, k3)]
    saturated = ((logps - ref_logps).abs() > SATURATION).float()
    counts = [trainable.sum(), trainable.any(1).sum(), torch.tensor(len(mask)).to(mask.device)]
    return torch.stack([x.sum().float() for x in (per_token_kl.detach(), *estimates, saturated, *counts)])


def kl_metrics(sums: torch.Tensor, beta: float | None = None) -> dict[str, float]:
    """Means over the trainable tokens of all processes, of the summed [`kl_sums`]; and `kl/beta`, if it is given."""
    tokens = max(sums[-3].item(), 1.0)
    means = {name: total / tokens for name, total in zip(_KL_MEANS, sums.tolist(), strict=False)}
    return means if beta is None else {**means, "kl/beta": beta}


def _per_token(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)


def mean_advantages(advantages: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """One number per completion for the completions table: the mean over its trainable tokens."""
    mask = mask.to(torch.float64)
    return ((_per_token(advantages, mask).double() * mask).sum(1) / mask.sum(1).clamp(min=1.0)).tolist()


def advantage_metrics(batch: RewardBatch, advantages: torch.Tensor, outcomes: bool) -> dict[str, float]:
    """
    `advantages/mean` and `advantages/std` over the trainable tokens of scored completions; with `outcomes`, whether
    there are rewards of completions, `advantages/frac_groups_zero_std`, the prompts whose completions have one reward.
    """
    per_token, weights = _per_token(advantages, batch.mask).double(), batch.trainable.double()
    mean = weighted_mean(per_token, weights)
    std = math.sqrt(weighted_mean((per_token - mean).square(), weights).item())
    metrics = {"advantages/mean": mean.item(), "advantages/std": std}
    if outcomes and batch.num_generations > 1:
        metrics["advantages/frac_groups_zero_std"] = frac_groups_zero_std(batch)
    return metrics


def frac_groups_zero_std(batch: RewardBatch) -> float:
    """The fraction of prompts whose scored completions all have one reward."""
    returns, scored = batch.group(batch.outcome.sum(1)), batch.group(batch.outcome_scored.any(1))
    return is_constant(returns, scored, dim=1).double().mean().item()


def step_metrics(batch: RewardBatch, step_ends: torch.Tensor, advantages: torch.Tensor) -> dict[str, Any]:
    """
    Metrics of the steps of a generation batch of all processes; NaN where there is nothing to measure. `step_ends`,
    `(N, T)`, bool: where a step ends, scored or not.

    `process/steps_mean`, `steps_max`: steps per completion. `step_reward_mean`: over the scored steps;
    `step_reward/<j>`: over the scored j-th steps, up to the tenth. `frac_steps_unscored`. `frac_groups_zero_std`:
    prompts whose scored steps all have the same reward. `steps_advantage_corr`, `steps_abs_advantage_corr`:
    correlation, over the completions with trainable tokens, of the number of steps with the advantage of the first
    trainable token, and with its size.
    """
    assert batch.steps is not None and batch.steps_scored is not None
    rewards, scored = batch.steps.double(), batch.steps_scored
    count, number = step_ends.sum(1).double(), step_ends.cumsum(1)
    metrics = {
        "steps_mean": count.mean().item(),
        "steps_max": count.max().item(),
        "step_reward_mean": rewards[scored].mean().item(),
        "frac_steps_unscored": 1.0 - (scored.sum() / step_ends.sum()).item(),
    }
    for j in range(1, min(10, int(count.max())) + 1):
        metrics[f"step_reward/{j}"] = rewards[scored & (number == j)].mean().item()
    pooled = (-1, batch.num_generations * step_ends.size(1))
    constant = is_constant(rewards.reshape(pooled), scored.reshape(pooled), dim=1)
    metrics["frac_groups_zero_std"] = constant.double().mean().item()
    trainable = batch.mask.bool()
    first = _per_token(advantages, trainable).gather(1, trainable.long().argmax(1, keepdim=True))[:, 0].double()
    rows = trainable.any(1)
    for name, values in (("steps_advantage_corr", first), ("steps_abs_advantage_corr", first.abs())):
        both = torch.stack([count[rows], values[rows]])
        metrics[name] = torch.corrcoef(both)[0, 1].item() if rows.sum() > 1 else math.nan
    return {f"process/{name}": value for name, value in metrics.items()}
