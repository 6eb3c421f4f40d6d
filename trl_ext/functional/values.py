r"""
What a critic is for: generalised advantage estimation, the critic's loss, and how much of the returns it explains.

Symbols: \\(V_t\\) value of the state *before* token \\(t\\); \\(t'\\) the next trainable token after \\(t\\); \\(m\\)
the mask. Untrainable tokens (tool output, padding) are skipped: the episode goes on at the next trainable one.
"""

import warnings
from typing import Any

import torch

from .reductions import is_constant, reward_to_go, weighted_mean, weighted_std, whiten
from .rewards import RewardBatch

CRITIC_NOISE = (
    "All rewards of the batch are equal; advantages are centred but not scaled, because scaling would amplify the "
    "noise of the critic and of the KL."
)


def lambda_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> torch.Tensor:
    r"""
    Generalised advantages of token rewards.

    $$ \delta_t = r_t + \gamma V_{t'} - V_t,\qquad A_t = \delta_t + \gamma\lambda A_{t'} $$

    Schulman et al., 2015, Eq. 11–16 (https://huggingface.co/papers/1506.02438). After the last trainable token
    \\(V_{t'}\\) is the last column of `values` and \\(A_{t'} = 0\\). \\(\lambda = 0\\): \\(A = \delta\\), the least
    variance; \\(\lambda = 1\\): reward-to-go minus \\(V\\), unbiased for any \\(V\\).

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`):
            Token rewards.
        values (`torch.Tensor` of shape `(N, T + 1)`):
            Values, in the unit of the reward; in the last column that of the state in which the row stopped, 0 if
            the episode ended there.
        mask (`torch.Tensor` of shape `(N, T)`):
            Nonzero for trainable tokens. Whatever stands elsewhere is not read, NaN included.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per trainable token, in (0, 1].
        lam (`float`, *optional*, defaults to `0.95`):
            \\(\lambda\\), in [0, 1].

    Returns:
        `torch.Tensor` of shape `(N, T)`, float64: Advantages, in the unit of the reward; 0 at untrainable tokens.

    Raises:
        `ValueError`: If `lam` or `gamma` is out of range.

    Example:

    >>> values = torch.tensor([[0.5, 9.0, 0.25, 0.0]])
    >>> lambda_advantages(torch.tensor([[0.0, 9.0, 1.0]]), values, torch.tensor([[1, 0, 1]]), lam=1.0)
    tensor([[0.5000, 0.0000, 0.7500]], dtype=torch.float64)
    """
    if not (isinstance(lam, int | float) and 0.0 <= lam <= 1.0):
        raise ValueError(f"lam must be a number in [0, 1], got {lam!r}.")
    trainable, width = mask.bool(), mask.size(1)
    rewards, own = (x.double().where(trainable, 0.0) for x in (rewards, values[:, :-1]))
    # Position of the first trainable token from t on; `width`, the last column of the values, where there is none.
    first = torch.where(trainable, torch.arange(width, device=mask.device), width)
    first = first.flip(1).cummin(1).values.flip(1)
    following = torch.nn.functional.pad(first[:, 1:], (0, 1), value=width)
    after = torch.cat([own, values[:, -1:].double()], dim=1).gather(1, following)
    delta = (rewards + gamma * after - own).where(trainable, 0.0)
    # Without λ nothing is summed; `reward_to_go` refuses to discount by 0, and checks gamma.
    sums = reward_to_go(delta, trainable, gamma if lam == 0.0 else gamma * lam)
    return delta if lam == 0.0 else sums


def _token_rewards(batch: RewardBatch, whiten_rewards: bool) -> torch.Tensor:
    if not whiten_rewards:
        return batch.rewards
    weights = batch.trainable.double()
    return whiten(batch.rewards, weights) + weighted_mean(batch.rewards, weights)


def _values(batch: RewardBatch) -> torch.Tensor:
    if batch.values is None:
        raise ValueError("advantage_estimator='gae' needs a critic. Use trl_ext.PPOConfig and PPOTrainer.")
    return batch.values


def lambda_returns(
    batch: RewardBatch, *, gamma: float = 1.0, lam: float = 0.95, whiten_rewards: bool = False
) -> torch.Tensor:
    r"""
    What the critic learns: \\(R_t = V_t + A_t^{(\lambda)}\\), the λ-return.

    $$ R_t = (1-\lambda)\sum_{n<K}\lambda^{n-1}G^{(n)}_t + \lambda^{K-1}G^{(K)}_t $$

    over the \\(K\\) trainable tokens from \\(t\\) on, \\(G^{(n)}\\) being the sum of \\(n\\) rewards and the value
    after them. With \\(\lambda = 1\\) it does not contain \\(V\\), except where a row was cut off.

    Args:
        batch ([`RewardBatch`]):
            Rewards, and values.
        gamma, lam:
            As for [`lambda_advantages`].
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            As for [`gae`].

    Returns:
        `torch.Tensor` of shape `(N, T)`, float64: Targets, in the unit of the reward; 0 at tokens that cannot learn.
    """
    values, trainable = _values(batch), batch.trainable
    advantages = lambda_advantages(_token_rewards(batch, whiten_rewards), values, trainable, gamma, lam)
    return (values[:, :-1].double() + advantages).where(trainable, 0.0)


def advantage_std(batch: RewardBatch, **options: Any) -> torch.Tensor:
    """
    What [`gae`] divides by.

    Args:
        batch ([`RewardBatch`]):
            Rewards, and values.
        options:
            Those of `gae`.

    Returns:
        `torch.Tensor` (0-d), float64: σ of the advantages in the unit of the reward; 1 where they are not divided.
    """
    if not options.get("whiten_advantages", True) or _only_noise(batch, options.get("gamma", 1.0)):
        return torch.ones((), dtype=torch.float64)
    return weighted_std(gae(batch, **{**options, "whiten_advantages": False}), batch.trainable.double())


def _only_noise(batch: RewardBatch, gamma: float) -> bool:
    """Whether the reward-to-go, the KL left out, is the same at every trainable token."""
    to_go = reward_to_go(batch.without_kl, batch.trainable, gamma)
    return bool(is_constant(to_go, batch.trainable, dim=(0, 1)))


def gae(
    batch: RewardBatch,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_advantages: bool = True,
    whiten_rewards: bool = False,
) -> torch.Tensor:
    r"""
    Generalised advantages of a critic's values (PPO), whitened over the trainable tokens of the global batch.

    $$ \hat A_{i,t} = m_{i,t}\,\frac{A_{i,t}-\mu}{\sqrt{\sigma^2+10^{-8}}} $$

    Schulman et al., 2017 (https://huggingface.co/papers/1707.06347), with \\(A\\) of [`lambda_advantages`] and the
    biased variance. Expectation of the policy gradient: the true one for \\(\lambda = 1\\) without whitening, whatever
    the values are; with whitening times the common factor 1/σ; with \\(\lambda < 1\\) biased by the critic's errors.

    Args:
        batch ([`RewardBatch`]):
            Rewards, and values. If the reward-to-go without the KL is constant over the batch, the advantages are
            centred but not scaled: what is left is noise.
        gamma, lam:
            As for `lambda_advantages`.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            `False`: \\(A\\) as it is.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Replace the token rewards by \\((r - \mu_r)/\sigma_r + \mu_r\\) first.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Dimensionless advantages (in the unit of the reward if not whitened).

    Raises:
        `ValueError`: If the batch has no values, or an option is out of range.
    """
    weights = batch.trainable.double()
    rewards = _token_rewards(batch, whiten_rewards)
    advantages = lambda_advantages(rewards, _values(batch), batch.trainable, gamma, lam)
    if whiten_advantages and _only_noise(batch, gamma):
        if batch.trainable.any():
            warnings.warn(CRITIC_NOISE, stacklevel=2)
        advantages = advantages - weighted_mean(advantages, weights)
    elif whiten_advantages:
        advantages = whiten(advantages, weights)
    return advantages.where(batch.trainable, 0.0).to(batch.outcome.dtype)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float | None
) -> torch.Tensor:
    r"""
    Squared error of each value, pessimistically clipped as PPO clips the ratio.

    $$ \ell_t=\tfrac12\max\!\big((V_t-R_t)^2,\ (V^{old}_t+\mathrm{clip}(V_t-V^{old}_t,-c,c)-R_t)^2\big) $$

    A value may come from the far side of its target freely, but moves towards it by \\(c\\) only.

    Args:
        values, old_values, returns (`torch.Tensor` of shape `(B, T)`):
            Values \\(V\\) now, with gradient; those the completions were scored with; targets \\(R\\).
        cliprange (`float`, *optional*):
            \\(c\\), in the unit of the reward. `None`: no clip.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Loss of each token, in the square of the unit of the reward.

    Example:

    >>> old, returns = torch.tensor([0.2, 0.2]), torch.tensor([1.0, 1.0])
    >>> clipped_value_loss(torch.tensor([0.3, 0.5]), old, returns, 0.2)
    tensor([0.2450, 0.1800])
    """
    error = (values - returns).square()
    if cliprange is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def explained_variance(targets: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""
    Share of the variance of the targets that the values explain.

    $$ 1 - \mathrm{Var}(G - V) / \mathrm{Var}(G) $$

    Args:
        targets, values (`torch.Tensor` of shape `(N, T)`):
            \\(G\\) and \\(V\\), finite everywhere.
        weights (`torch.Tensor` of shape `(N, T)`):
            Non-negative weights.

    Returns:
        `torch.Tensor` (0-d), float64: At most 1; 0 for values that are constant; NaN where the targets do not vary.

    Example:

    >>> g = torch.tensor([[1.0, 0.0]])
    >>> explained_variance(g, g / 2, torch.ones(1, 2))
    tensor(0.7500, dtype=torch.float64)
    """

    def variance(x: torch.Tensor) -> torch.Tensor:
        return weighted_mean((x - weighted_mean(x, weights)).square(), weights)

    targets, values = targets.double(), values.double()
    total = variance(targets)
    return torch.where(total < 1e-12, torch.nan, 1 - variance(targets - values) / total)


def value_metrics(batch: RewardBatch, advantages: torch.Tensor, **options: Any) -> dict[str, float]:
    """
    What is logged of the values of a generation batch. Explained variance is that of the λ = 1 target, which, unlike
    the λ-return, does not contain the values themselves.

    Args:
        batch ([`RewardBatch`]):
            Rewards, and values.
        advantages (`torch.Tensor` of shape `(N, T)`):
            Not read.
        options:
            Those of [`gae`].

    Returns:
        `dict[str, float]`: `value/mean`, `value/return_mean` (reward-to-go) and `value/explained_variance`.
    """
    weights = batch.trainable.double()
    own = {name: options[name] for name in ("gamma", "whiten_rewards") if name in options}
    values = _values(batch)[:, :-1].double().where(batch.trainable, 0.0)
    to_go = lambda_returns(batch, lam=1.0, **own)
    return {
        "value/mean": weighted_mean(values, weights).item(),
        "value/return_mean": weighted_mean(to_go, weights).item(),
        "value/explained_variance": explained_variance(to_go, values, weights).item(),
    }
