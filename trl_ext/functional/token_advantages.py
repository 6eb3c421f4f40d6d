r"""
Advantages from rewards-to-go, one per token: REINFORCE, ReMax and REINFORCE++. Symbols as in `functional.advantages`.
"""

import warnings
from typing import NamedTuple

import torch

from .reductions import is_constant, reward_to_go, weighted_mean, weighted_std
from .rewards import RewardBatch

KL_NOISE = (
    "All outcome rewards {} are equal while the KL is in the reward; advantages are centred but not scaled, because "
    "scaling would amplify KL noise."
)


def reinforce(batch: RewardBatch, *, gamma: float = 1.0, discount: str = "trainable") -> torch.Tensor:
    r"""
    Reward-to-go without baseline (REINFORCE): unbiased, and of the largest variance of all.

    $$ A_{i,t} = G_{i,t} = m_{i,t}\,\big(r_{i,t} + \gamma\,G_{i,t'}\big) $$

    Williams, 1992 (https://doi.org/10.1007/BF00992696). See [`~trl_ext.functional.reductions.reward_to_go`].

    Args:
        batch ([`RewardBatch`]):
            Rewards.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token, in (0, 1].
        discount (`str`, *optional*, defaults to `"trainable"`):
            Which tokens discount: `"trainable"` ones only, or `"all"`.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Advantages, in the unit of the reward.
    """
    return reward_to_go(batch.rewards, batch.trainable, gamma, discount).to(batch.outcome.dtype)


def remax(batch: RewardBatch) -> torch.Tensor:
    r"""
    Reward-to-go minus the return of the greedy answer to the prompt (ReMax).

    $$ A_{i,t} = m_{i,t}\,\big(G_{i,t} - b(x_i)\big) $$

    Li et al., 2023, Algorithm 1 (https://huggingface.co/papers/2310.10505), without discount. The baseline
    \\(b(x)\\) is fixed by prompt and policy, so that the expected policy gradient is the true one, for any number of
    completions per prompt, and with a KL in the reward too: that of the tokens to come, where the authors' code takes
    that of the token alone; \\(b\\) has none. With step rewards \\(b\\) is the whole return of the greedy answer:
    unbiased too, but a poor baseline for late tokens, whose rewards-to-go lack the earlier steps.

    Args:
        batch ([`RewardBatch`]):
            Rewards, and `baseline`, the return of the greedy answer; NaN where it was not scored, then the row gets 0.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Advantages, in the unit of the reward.

    Raises:
        `ValueError`: If there is no `baseline`.

    Example:

    >>> outcome, ones = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
    >>> remax(RewardBatch(outcome, ones.bool(), ones, 2, baseline=torch.tensor([0.25, 0.25])))
    tensor([[ 0.7500,  0.7500],
            [-0.2500, -0.2500]])
    """
    learns, baseline = _above_greedy(batch)
    advantages = reward_to_go(batch.rewards, learns) - baseline[:, None]
    return advantages.where(learns, 0.0).to(batch.outcome.dtype)


def _above_greedy(batch: RewardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that can be compared with a greedy answer, `(N, T)`, bool, and the baseline, float64, 0 where unknown."""
    if batch.baseline is None:
        raise ValueError("remax needs the returns of greedy answers; set baseline of the batch.")
    return batch.trainable & ~batch.baseline.isnan()[:, None], batch.baseline.double().nan_to_num()


def baseline_metrics(batch: RewardBatch, advantages: torch.Tensor) -> dict[str, float]:
    """
    What is logged of the greedy answers of a generation batch; NaN where there is nothing to measure.

    Args:
        batch ([`RewardBatch`]):
            Rewards, and `baseline`.
        advantages (`torch.Tensor` of shape `(N, T)`):
            Those of [`remax`].

    Returns:
        `dict[str, float]`: `remax/baseline`, mean return of the greedy answers; `remax/frac_baseline_unscored`, the
        share of the prompts whose answer was not scored; `remax/advantage_positive`, the share of the completions
        that are better than it, the KL in the reward subtracted.
    """
    learns, baseline = _above_greedy(batch)
    known, compared = ~batch.baseline.isnan(), learns.any(1)  # type: ignore[union-attr]
    of_first = advantages.gather(1, learns.long().argmax(1, keepdim=True))[:, 0]
    return {
        "remax/baseline": baseline[known].mean().item(),
        "remax/frac_baseline_unscored": (~known).double().mean().item(),
        "remax/advantage_positive": (of_first[compared] > 0).double().mean().item(),
    }


class Spread(NamedTuple):
    """Values of the trainable tokens before normalisation, `(N, T)`, their weights, and what they are divided by."""

    values: torch.Tensor
    weights: torch.Tensor
    std: torch.Tensor

    def normalised(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, centred and divided, `(N, T)`; 0 at tokens without weight."""
        centred = self.values - weighted_mean(self.values, self.weights)
        return (centred / self.std).where(self.weights > 0, 0.0).to(dtype)


def _spread(
    values: torch.Tensor,
    without_kl: torch.Tensor | None,
    trainable: torch.Tensor,
    weighting: str,
    correction: int,
    norm: str,
) -> Spread:
    """What whitens `values`, `(N, T)`, over the trainable tokens; or only centres them if `without_kl` is constant."""
    if weighting not in ("token", "sequence"):
        raise ValueError(f"weighting must be 'token' or 'sequence', got {weighting!r}.")
    if norm not in ("whiten", "center"):
        raise ValueError(f"norm must be 'whiten' or 'center', got {norm!r}.")
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 (biased variance) or 1 (Bessel's), got {correction!r}.")
    weights = trainable.to(values)
    if weighting == "sequence":
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
    if norm == "whiten" and without_kl is not None and is_constant(without_kl, trainable, dim=(0, 1)):
        warnings.warn(KL_NOISE.format("of the batch"), stacklevel=4)
        norm = "center"
    one = torch.ones((), dtype=values.dtype, device=values.device)
    return Spread(values, weights, weighted_std(values, weights, correction) if norm == "whiten" else one)


def rewards_to_go(
    batch: RewardBatch,
    *,
    weighting: str = "token",
    correction: int = 0,
    norm: str = "whiten",
    gamma: float = 1.0,
    discount: str = "trainable",
) -> Spread:
    """
    What [`reinforce_plus_plus`] normalises.

    Args:
        batch, weighting, correction, norm, gamma, discount:
            As there.

    Returns:
        [`Spread`]: Rewards-to-go, their weights, and σ (1 where they are not divided).

    Example:

    >>> batch = RewardBatch(torch.tensor([[0.0, 1.0]]), torch.tensor([[False, True]]), torch.ones(1, 2), 1)
    >>> rewards_to_go(batch).values
    tensor([[1., 1.]], dtype=torch.float64)
    """
    values = reward_to_go(batch.rewards, batch.trainable, gamma, discount)
    without_kl = None
    if batch.kl_penalty is not None:
        without_kl = reward_to_go(batch.without_kl, batch.trainable, gamma, discount)
    return _spread(values, without_kl, batch.trainable, weighting, correction, norm)


def reinforce_plus_plus(
    batch: RewardBatch,
    *,
    weighting: str = "token",
    correction: int = 0,
    norm: str = "whiten",
    gamma: float = 1.0,
    discount: str = "trainable",
) -> torch.Tensor:
    r"""
    Reward-to-go, normalised over all trainable tokens of the global batch (REINFORCE++).

    $$ A_{i,t} = m_{i,t}\,\frac{G_{i,t}-\mu}{\sqrt{\sigma^2+10^{-8}}},\qquad
       \mu=\frac1n\sum m\,G,\qquad \sigma^2=\frac1n\sum m\,(G-\mu)^2 $$

    Hu et al., 2025, v9 Eq. 4–5 (https://huggingface.co/papers/2501.03262); any `num_generations` ≥ 1. Their appendix
    B.2 sets the advantage to 0 before the last token, against their Eq. 4; this follows Eq. 4. Bias: the common factor
    1/σ, whose error vanishes with the batch. Dividing by σ divides a KL in the reward too: its effective coefficient
    is β/σ.

    Args:
        batch ([`RewardBatch`]):
            Rewards. If the reward-to-go without the KL is constant over the batch, it is centred but not scaled.
        weighting (`str`, *optional*, defaults to `"token"`):
            Weight of a token in μ and σ: `"token"` (1) or `"sequence"` (\\(1/n_i\\), so that every completion counts
            the same).
        correction (`int`, *optional*, defaults to `0`):
            0: biased variance. 1: Bessel's, over tokens, or over rows with `weighting="sequence"`.
        norm (`str`, *optional*, defaults to `"whiten"`):
            `"whiten"`, or `"center"` to subtract μ only (a batch-mean baseline).
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token, in (0, 1].
        discount (`str`, *optional*, defaults to `"trainable"`):
            Which tokens discount: `"trainable"` ones only, or `"all"`.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Dimensionless advantages (in the unit of the reward with `norm="center"`).
    """
    spread = rewards_to_go(
        batch, weighting=weighting, correction=correction, norm=norm, gamma=gamma, discount=discount
    )
    return spread.normalised(batch.outcome.dtype)


def above_the_group(
    batch: RewardBatch, *, weighting: str = "token", correction: int = 0, norm: str = "whiten", gamma: float = 1.0
) -> Spread:
    """
    What [`reinforce_plus_plus_baseline`] normalises.

    Args:
        batch, weighting, correction, norm, gamma:
            As there.

    Returns:
        [`Spread`]: Rewards-to-go minus the group's mean outcome, their weights, and σ (1 where they are not divided).
    """
    if gamma != 1.0:
        raise ValueError(
            f"gamma must be 1.0 for 'reinforce_plus_plus_baseline', whose baseline is an undiscounted return, got "
            f"{gamma!r}. Use 'reinforce_plus_plus' to discount."
        )
    baseline, compared = _group_baseline(batch)
    trainable = batch.mask.bool() & compared[:, None]
    values = (reward_to_go(batch.rewards, trainable) - baseline[:, None]).where(trainable, 0.0)
    without_kl = None
    if batch.kl_penalty is not None:
        without_kl = (reward_to_go(batch.without_kl, trainable) - baseline[:, None]).where(trainable, 0.0)
    return _spread(values, without_kl, trainable, weighting, correction, norm)


def _group_baseline(batch: RewardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean outcome of the row's group, `(N,)`, and the rows that have a scorable sibling, `(N,)`, bool."""
    scorable = batch.group(batch.scorable)
    baseline = batch.group(batch.without_kl.sum(1)) - batch.centred(batch.without_kl)
    # Recentring over the batch would hand a row without sibling −μ/σ although nothing is known about it.
    return baseline.flatten(), (scorable & (scorable.sum(1, keepdim=True) > 1)).flatten()


def reinforce_plus_plus_baseline(
    batch: RewardBatch, *, weighting: str = "token", correction: int = 0, norm: str = "whiten", gamma: float = 1.0
) -> torch.Tensor:
    r"""
    Reward-to-go minus the group's mean outcome, normalised over all trainable tokens of the global batch.

    $$ x_{i,t} = G_{i,t} - b_g,\qquad b_g = \mathrm{mean}_{j\in g} \sum_t (r_{j,t} + p_{j,t}),\qquad
       A_{i,t} = m_{i,t}\,\frac{x_{i,t}-\mu}{\sqrt{\sigma^2+10^{-8}}} $$

    Hu et al., 2025, v9 Eq. 6–8 (REINFORCE++ w/ baseline, https://huggingface.co/papers/2501.03262). The group mean
    excludes the KL penalty \\(p\\) and includes the row itself. A row without scorable sibling gets 0.

    Args:
        batch, weighting, correction, norm:
            As for [`reinforce_plus_plus`].
        gamma (`float`, *optional*, defaults to `1.0`):
            Only 1.0: the baseline is an undiscounted return.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Dimensionless advantages (in the unit of the reward with `norm="center"`).
    """
    spread = above_the_group(batch, weighting=weighting, correction=correction, norm=norm, gamma=gamma)
    return spread.normalised(batch.outcome.dtype)


def left_out_to_go(
    batch: RewardBatch, *, process_weight: float = 1.0, outcome_weight: float = 1.0, norm: str = "whiten"
) -> Spread:
    """
    What [`prime`] normalises.

    Args:
        batch, process_weight, outcome_weight, norm:
            As there.

    Returns:
        [`Spread`]: Rewards-to-go of both sources, each less its group's.

    Raises:
        `ValueError`: If there are no step rewards, or a KL penalty, or if `norm` is unknown.
    """
    if batch.steps is None or batch.steps_scored is None:
        raise ValueError("prime needs step rewards; set steps and steps_scored of the batch.")
    if batch.kl_penalty is not None:
        raise ValueError("prime takes no kl_penalty, which is of neither source. Put it into the loss.")
    rewards = process_weight * _left_out(batch, batch.steps, batch.steps_scored)
    rewards = rewards + outcome_weight * _left_out(batch, batch.outcome, batch.outcome_scored)
    return _spread(reward_to_go(rewards, batch.trainable), None, batch.trainable, "token", 1, norm)


def _left_out(batch: RewardBatch, rewards: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Rewards of one source where they were given, less those of the group, `(N, T)`, float64; 0 elsewhere."""
    rewards = rewards.double().where(given, 0.0)
    means, has = batch.group(rewards.sum(1) / given.sum(1).clamp(min=1)), batch.group(given.any(1))
    count, total = (x.sum(1, keepdim=True).expand_as(x).reshape(-1, 1) for x in (has.double(), means))
    return ((count * rewards - total) / (count - 1).clamp(min=1)).where(given & (count > 1), 0.0)


def prime(
    batch: RewardBatch, *, process_weight: float = 1.0, outcome_weight: float = 1.0, norm: str = "whiten"
) -> torch.Tensor:
    r"""
    Step rewards and outcomes, each less those of the other completions of the prompt, as reward-to-go (PRIME).

    $$ x^s_{i,t} = \frac{n_g}{n_g-1}\,r^s_{i,t} - \frac{1}{n_g-1}\sum_{j\in g}\bar r^s_j,\qquad
       A_{i,t} = m_{i,t}\,\frac{X_{i,t}-\mu}{\sqrt{\sigma^2+10^{-8}}},\quad
       X_{i,t} = \sum_{u\ge t}\sum_s w_s\,x^s_{i,u} $$

    Cui et al., 2025, §3.3 (https://huggingface.co/papers/2502.01456), as its authors' program computes it, with
    rewards of an implicit process-reward model on every token. \\(\bar r^s_j\\) is the mean of the rewards of source
    \\(s\\) in row \\(j\\), \\(n_g\\) the rows of the prompt that have one; for outcomes \\(x\\) is the advantage of
    `leave_one_out`. For rewards of steps it is no exact leave-one-out baseline: a row's own rewards are in it, and
    what is subtracted grows with the number of steps. Mean and (Bessel's) deviation are over the trainable tokens of
    the batch: where all outcomes are equal and the step rewards all but 0, their noise becomes advantages of unit
    size.

    Args:
        batch ([`RewardBatch`]):
            Rewards of steps, and of outcomes. No `kl_penalty`.
        process_weight, outcome_weight (`float`, *optional*, default to `1.0`):
            \\(w_s\\). With `"whiten"` only their ratio matters.
        norm (`str`, *optional*, defaults to `"whiten"`):
            `"whiten"`, or `"center"`: not divided.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Dimensionless advantages.

    Raises:
        `ValueError`: If there are no step rewards, or a KL penalty, or if `norm` is unknown.
    """
    spread = left_out_to_go(batch, process_weight=process_weight, outcome_weight=outcome_weight, norm=norm)
    return spread.normalised(batch.outcome.dtype)
