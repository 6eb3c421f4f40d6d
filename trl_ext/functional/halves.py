"""The half within a prompt of estimators whose other half crosses prompts, for a trainer that sees one at a time."""

import torch

from .rewards import RewardBatch, reward_at_end
from .token_advantages import _group_baseline


def token_rewards(batch: RewardBatch) -> torch.Tensor:
    r"""
    Token rewards, without the KL: the half of [`reinforce`] and [`reinforce_plus_plus`] within a prompt.

    Args:
        batch ([`RewardBatch`]):
            Rewards of the completions of one prompt, or of several.

    Returns:
        `torch.Tensor` of shape `(N, T)`, float64: In the unit of the reward; NaN in rows that take no part.

    Example:

    >>> outcome, scored = reward_at_end(torch.tensor([1.0, torch.nan]), torch.ones(2, 2))
    >>> token_rewards(RewardBatch(outcome, scored, torch.ones(2, 2), num_generations=2))
    tensor([[0., 1.],
            [nan, nan]], dtype=torch.float64)
    """
    return batch.without_kl.masked_fill(~batch.scorable[:, None], torch.nan)


def centred_token_rewards(batch: RewardBatch) -> torch.Tensor:
    r"""
    Token rewards, without the KL, the group's mean outcome taken off the last trainable token: the half of
    [`reinforce_plus_plus_baseline`] within a prompt. Their reward-to-go is \\(G_{i,t} - b_g\\).

    Args:
        batch ([`RewardBatch`]):
            Rewards of the completions of one prompt, or of several.

    Returns:
        `torch.Tensor` of shape `(N, T)`, float64: In the unit of the reward; NaN in rows without scorable sibling.

    Example:

    >>> outcome, scored = reward_at_end(torch.tensor([1.0, 0.0]), torch.ones(2, 2))
    >>> centred_token_rewards(RewardBatch(outcome, scored, torch.ones(2, 2), num_generations=2))
    tensor([[ 0.0000,  0.5000],
            [ 0.0000, -0.5000]], dtype=torch.float64)
    """
    baseline, compared = _group_baseline(batch)
    at_end, _ = reward_at_end(baseline, batch.mask)
    return (batch.without_kl - at_end).masked_fill(~compared[:, None], torch.nan)
