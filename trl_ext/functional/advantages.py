"""
Advantage estimators: from the token rewards of a generation batch to what the loss multiplies with the ratio.

Every reward is a token reward: an outcome sits on the last trainable token of its completion, a KL penalty on every
trainable token. All estimators share one signature,

    (rewards, scored, completion_mask, num_generations, *, kl_penalty=None, **options) -> (N,) or (N, T)

with `rewards`, `scored` and `completion_mask` of shape `(N, T)`, T ≥ 1, rows of one prompt adjacent, over the whole
generation batch of all processes. `scored` marks where a reward was given (0 is a reward); a row without any is
*unscorable*: it is left out of every statistic and gets the advantage 0. `kl_penalty`, if given, is what was already
subtracted in `rewards`. Statistics are taken in float64; the result has the dtype of `rewards` and is 0 at untrainable
tokens, or, for one number per completion, in rows without trainable tokens.

Symbols: \\(S_i\\) sum of the token rewards of row \\(i\\), \\(\\bar S_g\\) its mean over the scorable rows of the
prompt, \\(G\\) `num_generations`, \\(n_i\\) trainable tokens of row \\(i\\).
"""

import warnings
from typing import Any

import torch

from .reductions import nearly_equal, reward_to_go, weighted_mean, whiten

_KL_NOISE = (
    "All outcome rewards {} are equal while the KL is in the reward; advantages are centred but not scaled, because "
    "scaling would amplify KL noise."
)


def _scorable(scored: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Rows that were given a reward, `(N,)` bool. Warns if no token of the batch can learn anything."""
    scorable = scored.any(1)
    if not (scorable & completion_mask.bool().any(1)).any():
        warnings.warn(
            "No completion of the batch has both a reward and a trainable token; all advantages are 0.", stacklevel=3
        )
    return scorable


def _centred_returns(
    rewards: torch.Tensor, scorable: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns S, S − group mean (0 if unscorable) and scorable, each `(prompts, G)`; the first two in float64."""
    returns = rewards.double().sum(1).view(-1, num_generations)
    valid = scorable.view(-1, num_generations)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = returns.where(valid, 0.0).sum(1, keepdim=True) / count
    return returns, (returns - mean).where(valid, 0.0), valid


def _per_completion(advantages: torch.Tensor, rewards: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """`(prompts, G)` to `(N,)` in the dtype of `rewards`, 0 in rows without trainable tokens."""
    return advantages.flatten().where(completion_mask.bool().any(1), 0.0).to(rewards.dtype)


def group_relative(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    kl_penalty: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Return relative to the siblings, in units of their standard deviation (GRPO).

    $$ A_i = \frac{S_i - \bar S_g}{\mathrm{std}_g(S) + 10^{-4}} $$

    Shao et al., 2024, §4.1.2 (https://huggingface.co/papers/2402.03300), with Bessel's standard deviation and the eps
    of TRL, whose default it equals. Bias: prompts are reweighted by 1/std, which does not vanish with the batch; with
    `G = 2` the size of the gap is erased (±0.707). A group of one gets 0.

    Args:
        rewards, scored, completion_mask, num_generations, kl_penalty:
            See the module. In a group whose returns are equal without the KL, the deviation is not divided by the
            standard deviation, which is that of the KL alone.

    Returns:
        `torch.Tensor` of shape `(N,)`: Dimensionless advantages.
    """
    scorable = _scorable(scored, completion_mask)
    _, centred, valid = _centred_returns(rewards, scorable, num_generations)
    degrees = (valid.sum(1, keepdim=True) - 1).clamp(min=1)
    scale = (centred.square().sum(1, keepdim=True) / degrees).sqrt() + 1e-4
    if kl_penalty is not None:
        outcome, *_ = _centred_returns(rewards.double() + kl_penalty, scorable, num_generations)
        kl_only = nearly_equal(outcome, valid, dim=1) & (centred != 0).any(1, keepdim=True)
        if kl_only.any():
            warnings.warn(_KL_NOISE.format("of a group"), stacklevel=2)
        scale = scale.masked_fill(kl_only, 1.0)
    return _per_completion(centred / scale, rewards, completion_mask)


def group_mean(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    kl_penalty: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Return minus the mean of the group.

    $$ A_i = S_i - \bar S_g $$

    Liu et al., 2025 (Dr. GRPO, https://huggingface.co/papers/2503.20783). The mean contains the row itself, so
    the expected policy gradient is \\((G-1)/G\\) times the true one; no other bias.

    Args:
        rewards, scored, completion_mask, num_generations, kl_penalty:
            See the module. `kl_penalty` is not needed.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward.
    """
    _, centred, _ = _centred_returns(rewards, _scorable(scored, completion_mask), num_generations)
    return _per_completion(centred, rewards, completion_mask)


def leave_one_out(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    kl_penalty: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Return minus the mean of the *other* completions of the prompt (RLOO).

    $$ A_i = S_i - \frac{1}{G-1}\sum_{j\ne i} S_j = \frac{G}{G-1}\,(S_i - \bar S_g) $$

    Ahmadian et al., 2024 (https://huggingface.co/papers/2402.14740). The expected policy gradient is the true
    one. A row without scorable sibling gets 0.

    Args:
        rewards, scored, completion_mask, num_generations, kl_penalty:
            See the module. `kl_penalty` is not needed.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward.
    """
    _, centred, valid = _centred_returns(rewards, _scorable(scored, completion_mask), num_generations)
    count = valid.sum(1, keepdim=True)
    return _per_completion(centred * count / (count - 1).clamp(min=1), rewards, completion_mask)


def length_weighted(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    kl_penalty: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Return minus the length-weighted mean of the group (OPO).

    $$ A_i = S_i - \frac{\sum_j n_j S_j}{\sum_j n_j},\qquad j \text{ over the scorable rows of the group} $$

    Hao et al., 2025 (https://huggingface.co/papers/2505.23585): the baseline of least variance if the squared
    norm of the score grows with the length; derived for exactly on-policy updates. The row itself enters the baseline
    with weight \\(n_i/\sum_j n_j\\).

    Args:
        rewards, scored, completion_mask, num_generations, kl_penalty:
            See the module. `kl_penalty` is not needed.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward.
    """
    returns, _, valid = _centred_returns(rewards, _scorable(scored, completion_mask), num_generations)
    length = completion_mask.bool().sum(1).view(-1, num_generations).where(valid, 0)
    baseline = (length * returns).sum(1, keepdim=True) / length.sum(1, keepdim=True).clamp(min=1)
    return _per_completion((returns - baseline).where(valid, 0.0), rewards, completion_mask)


def reinforce(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    kl_penalty: torch.Tensor | None = None,
    gamma: float = 1.0,
    discount: str = "trainable",
) -> torch.Tensor:
    r"""
    Reward-to-go without baseline (REINFORCE): unbiased, and of the largest variance of all.

    $$ A_{i,t} = G_{i,t} = m_{i,t}\,\big(r_{i,t} + \gamma\,G_{i,t'}\big) $$

    Williams, 1992 (https://doi.org/10.1007/BF00992696). See [`~trl_ext.functional.reductions.reward_to_go`].

    Args:
        rewards, scored, completion_mask, num_generations, kl_penalty:
            See the module. `num_generations` and `kl_penalty` are not needed.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token, in (0, 1].
        discount (`str`, *optional*, defaults to `"trainable"`):
            Which tokens discount: `"trainable"` ones only, or `"all"`.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Advantages, in the unit of the reward.
    """
    scorable = _scorable(scored, completion_mask)
    trainable = completion_mask.bool() & scorable[:, None]
    return reward_to_go(rewards.double(), trainable, gamma, discount).to(rewards.dtype)


def _normalised(
    values: torch.Tensor,
    outcome: torch.Tensor | None,
    trainable: torch.Tensor,
    weighting: str,
    correction: int,
    norm: str,
) -> torch.Tensor:
    """Centre `values` `(N, T)` over the trainable tokens and, unless `outcome` is constant there, whiten them."""
    if weighting not in ("token", "sequence"):
        raise ValueError(f"weighting must be 'token' or 'sequence', got {weighting!r}.")
    if norm not in ("whiten", "center"):
        raise ValueError(f"norm must be 'whiten' or 'center', got {norm!r}.")
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 (biased variance) or 1 (Bessel's), got {correction!r}.")
    weights = trainable.to(values)
    if weighting == "sequence":
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
    if norm == "whiten" and outcome is not None and nearly_equal(outcome, trainable, dim=(0, 1)):
        warnings.warn(_KL_NOISE.format("of the batch"), stacklevel=3)
        norm = "center"
    values = whiten(values, weights, correction) if norm == "whiten" else values - weighted_mean(values, weights)
    return values.where(trainable, 0.0)


def reinforce_plus_plus(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    kl_penalty: torch.Tensor | None = None,
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
        rewards, scored, completion_mask, num_generations, kl_penalty:
            See the module. If the reward-to-go without the KL is constant over the batch, it is centred but not
            scaled. `num_generations` is not needed.
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
    trainable = completion_mask.bool() & _scorable(scored, completion_mask)[:, None]
    values = reward_to_go(rewards.double(), trainable, gamma, discount)
    outcome = None
    if kl_penalty is not None:
        outcome = reward_to_go(rewards.double() + kl_penalty, trainable, gamma, discount)
    return _normalised(values, outcome, trainable, weighting, correction, norm).to(rewards.dtype)


def reinforce_plus_plus_baseline(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    kl_penalty: torch.Tensor | None = None,
    weighting: str = "token",
    correction: int = 0,
    norm: str = "whiten",
    gamma: float = 1.0,
) -> torch.Tensor:
    r"""
    Reward-to-go minus the group's mean outcome, normalised over all trainable tokens of the global batch.

    $$ x_{i,t} = G_{i,t} - b_g,\qquad b_g = \mathrm{mean}_{j\in g} \sum_t (r_{j,t} + p_{j,t}),\qquad
       A_{i,t} = m_{i,t}\,\frac{x_{i,t}-\mu}{\sqrt{\sigma^2+10^{-8}}} $$

    Hu et al., 2025, v9 Eq. 6–8 (REINFORCE++ w/ baseline, https://huggingface.co/papers/2501.03262). The group mean
    excludes the KL penalty \\(p\\) and includes the row itself. A row without scorable sibling gets 0.

    Args:
        rewards, scored, completion_mask, num_generations, kl_penalty, weighting, correction, norm:
            As for [`reinforce_plus_plus`].
        gamma (`float`, *optional*, defaults to `1.0`):
            Only 1.0: the baseline is an undiscounted return.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Dimensionless advantages (in the unit of the reward with `norm="center"`).
    """
    if gamma != 1.0:
        raise ValueError(
            f"gamma must be 1.0 for 'reinforce_plus_plus_baseline', whose baseline is an undiscounted return, got "
            f"{gamma!r}. Use 'reinforce_plus_plus' to discount."
        )
    scorable = _scorable(scored, completion_mask)
    undiscounted = rewards.double() if kl_penalty is None else rewards.double() + kl_penalty
    returns, centred, valid = _centred_returns(undiscounted, scorable, num_generations)
    baseline = (returns - centred).flatten()[:, None]
    # Recentring over the batch would hand a row without sibling −μ/σ although nothing is known about it.
    compared = (valid & (valid.sum(1, keepdim=True) > 1)).flatten()
    trainable = completion_mask.bool() & compared[:, None]
    values = (reward_to_go(rewards.double(), trainable) - baseline).where(trainable, 0.0)
    outcome = None
    if kl_penalty is not None:
        outcome = (reward_to_go(undiscounted, trainable) - baseline).where(trainable, 0.0)
    return _normalised(values, outcome, trainable, weighting, correction, norm).to(rewards.dtype)


ADVANTAGE_ESTIMATORS: dict[str, Any] = {
    "group_relative": group_relative,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "length_weighted": length_weighted,
    "reinforce": reinforce,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
# Entries that compare completions of one prompt, and entries that return `(N, T)`.
NEEDS_SIBLINGS = {
    "group_relative",
    "group_mean",
    "leave_one_out",
    "length_weighted",
    "reinforce_plus_plus_baseline",
}
PER_TOKEN = {"reinforce", "reinforce_plus_plus", "reinforce_plus_plus_baseline"}
