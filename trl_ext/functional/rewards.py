r"""
The rewards of one generation batch, as every advantage estimator sees them.

Every reward is a token reward: an outcome sits on the last trainable token of its completion, the reward of a step on
the last token of the step, a KL penalty on every trainable token.

Axes: `N` completions of all processes, rows of one prompt adjacent; `T` ≥ 1 tokens; `G` completions per prompt.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from functools import cached_property

import torch


@dataclasses.dataclass(frozen=True, eq=False)  # tensors have no truth value
class RewardBatch:
    r"""
    What an estimator sees. Statistics are taken in float64 and over the rows of all processes.

    A row without any reward is *unscorable*: it is left out of every statistic and gets the advantage 0. 0 is a
    reward, so `outcome_scored` and `steps_scored` say where one was given.

    Args:
        outcome (`torch.Tensor` of shape `(N, T)`):
            Outcome rewards, from [`reward_at_end`]; 0 where none was given.
        outcome_scored (`torch.Tensor` of shape `(N, T)`, bool):
            Where an outcome reward was given.
        mask (`torch.Tensor` of shape `(N, T)`):
            Nonzero for trainable tokens: TRL's `completion_mask` times its tool mask.
        num_generations (`int`):
            Completions per prompt, \\(G\\).
        steps (`torch.Tensor` of shape `(N, T)`, *optional*):
            Step rewards, from [`reward_at_steps`]; 0 where none was given.
        steps_scored (`torch.Tensor` of shape `(N, T)`, bool, *optional*):
            Where a step reward was given.
        kl_penalty (`torch.Tensor` of shape `(N, T)`, *optional*):
            \\(\beta\\) times the KL of each token, in the unit of the reward, to be subtracted.
        baseline (`torch.Tensor` of shape `(N,)`, *optional*):
            Return of the greedy answer to the row's prompt.
        values (`torch.Tensor` of shape `(N, T + 1)`, *optional*):
            What a critic expects of the rewards from each token on; in the last column, of those after the row: 0
            where the episode has ended.

    Raises:
        `ValueError`: If a shape is not as above.

    Example:

    >>> outcome, scored = reward_at_end(torch.tensor([1.0, 0.0]), torch.ones(2, 3))
    >>> RewardBatch(outcome, scored, torch.ones(2, 3), num_generations=2).centred(outcome)
    tensor([[ 0.5000, -0.5000]], dtype=torch.float64)
    """

    outcome: torch.Tensor
    outcome_scored: torch.Tensor
    mask: torch.Tensor
    num_generations: int
    steps: torch.Tensor | None = None
    steps_scored: torch.Tensor | None = None
    kl_penalty: torch.Tensor | None = None
    baseline: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.outcome.dim() != 2 or self.outcome.size(1) < 1:
            raise ValueError(f"outcome must be of shape (N, T) with T >= 1, got {tuple(self.outcome.shape)}.")
        rows, width = self.outcome.shape
        shapes = {"baseline": (rows,), "values": (rows, width + 1)}
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), shapes.get(field.name, (rows, width))
            if isinstance(value, torch.Tensor) and value.shape != expected:
                raise ValueError(
                    f"{field.name} must be of shape {expected} with an outcome of {(rows, width)}, got "
                    f"{tuple(value.shape)}."
                )
        if not (isinstance(self.num_generations, int) and self.num_generations > 0) or rows % self.num_generations:
            raise ValueError(
                f"{rows} rows are no whole number of groups of num_generations={self.num_generations}. Give all "
                "completions of every prompt."
            )
        if (self.steps is None) != (self.steps_scored is None):
            raise ValueError("steps and steps_scored belong together; give both, or neither.")
        if not self.trainable.any():
            warnings.warn(
                "No completion of the batch has both a reward and a trainable token; all advantages are 0.",
                stacklevel=3,
            )

    @cached_property
    def without_kl(self) -> torch.Tensor:
        """Token rewards of outcomes and steps together, `(N, T)`, float64."""
        return self.outcome.double() if self.steps is None else self.outcome.double() + self.steps

    @cached_property
    def rewards(self) -> torch.Tensor:
        """Token rewards, the KL penalty subtracted, `(N, T)`, float64."""
        return self.without_kl if self.kl_penalty is None else self.without_kl - self.kl_penalty

    @cached_property
    def scorable(self) -> torch.Tensor:
        """Rows that were given a reward, `(N,)`, bool."""
        scored = self.outcome_scored if self.steps_scored is None else self.outcome_scored | self.steps_scored
        return scored.any(1)

    @cached_property
    def trainable(self) -> torch.Tensor:
        """Tokens that can learn something: trainable ones of scorable rows, `(N, T)`, bool."""
        return self.mask.bool() & self.scorable[:, None]

    def group(self, per_row: torch.Tensor) -> torch.Tensor:
        """`(N,)` as `(prompts, G)`."""
        return per_row.view(-1, self.num_generations)

    def centred(self, rewards: torch.Tensor) -> torch.Tensor:
        """Returns minus their mean over the scorable rows of the prompt, `(prompts, G)`, float64; 0 if unscorable."""
        returns, scorable = self.group(rewards.double().sum(1)), self.group(self.scorable)
        mean = returns.where(scorable, 0.0).sum(1, keepdim=True) / scorable.sum(1, keepdim=True).clamp(min=1)
        return (returns - mean).where(scorable, 0.0)

    def per_completion(self, advantages: torch.Tensor) -> torch.Tensor:
        """`(prompts, G)` or `(N,)` as `(N,)`, in the dtype of `outcome`; 0 in rows that cannot learn."""
        return advantages.flatten().where(self.trainable.any(1), 0.0).to(self.outcome.dtype)

    def outcomes_alone(self) -> "RewardBatch":
        """The same batch without its step rewards, in float64, so that sums with theirs are rounded once."""
        return dataclasses.replace(self, outcome=self.outcome.double(), steps=None, steps_scored=None)


def reward_at_end(returns: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Outcome rewards as token rewards: each on the last trainable token of its row.

    Not on the last attended token: an episode cut right after a tool result ends on an untrainable token, and a
    reward there would be lost by every reward-to-go. A row without trainable tokens carries its reward at position 0,
    where statistics over sequences see it and those over tokens do not.

    Args:
        returns (`torch.Tensor` of shape `(N,)`):
            Outcome rewards; NaN marks a completion that was not scored.
        mask (`torch.Tensor` of shape `(N, T)`):
            Nonzero for trainable tokens.

    Returns:
        `tuple` of `torch.Tensor`, both of shape `(N, T)`: `rewards` (finite) and `scored` (bool, where a reward was
        given; all `False` in rows that were not scored).

    Example:

    >>> rewards, scored = reward_at_end(torch.tensor([2.0]), torch.tensor([[1, 1, 0]]))
    >>> rewards
    tensor([[0., 2., 0.]])
    """
    positions = torch.arange(mask.size(1), device=mask.device)
    last = torch.where(mask.bool(), positions, 0).amax(1, keepdim=True)
    scored = (positions == last) & ~returns.isnan()[:, None]
    return torch.where(scored, returns[:, None], 0.0), scored


def reward_at_steps(
    step_rewards: Sequence[Sequence[float | None]], step_ends: Sequence[Sequence[int]], num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Step rewards as token rewards: each on the last token of its step.

    Args:
        step_rewards (`Sequence` of `B` sequences of `float` or `None`):
            Rewards of the steps of each completion; `None` (or NaN) for a step that was not scored.
        step_ends (`Sequence` of `B` sequences of `int`):
            Index of the last token of each of these steps.
        num_tokens (`int`):
            Number of columns of the result, \\(T\\).

    Returns:
        `tuple` of `torch.Tensor`, both of shape `(B, T)`: `rewards` (float32 as all rewards in TRL, finite) and
        `scored` (bool, where a reward was given).

    Raises:
        `ValueError`: If a completion has more rewards than steps, or fewer.

    Example:

    >>> reward_at_steps([[1.0, None]], [[1, 3]], num_tokens=4)
    (tensor([[0., 1., 0., 0.]]), tensor([[False,  True, False, False]]))
    """
    rewards = torch.full((len(step_ends), num_tokens), torch.nan)
    for row, (values, ends) in enumerate(zip(step_rewards, step_ends, strict=True)):
        for value, end in zip(values, ends, strict=True):
            rewards[row, end] = torch.nan if value is None else value
    scored = ~rewards.isnan()
    return rewards.where(scored, 0.0), scored
