r"""
Advantages for several attempts at a prompt: what the best of them is worth, and groups without a signal.

Symbols as in `functional.advantages`; \\(n\\) scorable completions of a prompt.
"""

import warnings

import torch

from .reductions import is_constant
from .rewards import RewardBatch
from .token_advantages import KL_NOISE


def pass_at_k(batch: RewardBatch, *, k: int = 2, scale: bool = True) -> torch.Tensor:
    r"""
    What a completion adds to the best of `k` attempts (Pass@k training).

    $$ A_i = \frac{M_i - \bar M}{\sigma},\qquad M_i = \mathrm{mean}_{s \ni i} \max_{j \in s} S_j,\qquad
       \bar M = \mathrm{mean}_s \max_{j \in s} S_j,\qquad
       \sigma^2 = \mathrm{mean}_s \big(\max_{j \in s} S_j - \bar M\big)^2 $$

    over all sets \\(s\\) of `k` scorable completions of the prompt. Chen et al., 2025, analytical form
    (https://huggingface.co/papers/2508.10751). They have rewards 0 and 1: with \\(c\\) ones,
    \\(\bar M = 1 - \binom{n-c}{k}/\binom{n}{k}\\) and \\(\sigma^2 = \bar M (1 - \bar M)\\); a one gets
    \\((1 - \bar M)/\sigma\\), a zero \\((1 - \bar M - \binom{n-c-1}{k-1}/\binom{n-1}{k-1})/\sigma\\). For any other
    rewards the maximum takes the place of success, as in Walder and Karkhanis, 2025
    (https://huggingface.co/papers/2505.15201).

    Without `scale` the expected policy gradient is \\((G - k)/(G k)\\) times that of the expected maximum of `k`
    completions. \\(\sigma\\) reweights prompts, as in `group_relative`, which `k=1` is but for the biased standard
    deviation.

    Args:
        batch ([`RewardBatch`]):
            Rewards. A group of at most `k` scorable completions, and one whose sets all have one maximum, gets 0. A
            group whose returns differ by the KL alone is not divided.
        k (`int`, *optional*, defaults to `2`):
            Attempts of which the best counts; less than `num_generations`.
        scale (`bool`, *optional*, defaults to `True`):
            Whether to divide by \\(\sigma\\).

    Returns:
        `torch.Tensor` of shape `(N,)`: Dimensionless advantages (in the unit of the reward without `scale`).

    Raises:
        `ValueError`: If an option is out of range.

    Example:

    >>> ends, ones = torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.ones(4, 1)
    >>> pass_at_k(RewardBatch(ends, ones.bool(), ones, 4), k=2)  # half of the pairs have the one
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number >= 1, got {k!r}.")
    _check_switch("scale", scale)
    scorable = batch.group(batch.scorable)
    returns = batch.group(batch.rewards.sum(1))
    order = returns.masked_fill(~scorable, -torch.inf).argsort(dim=1, descending=True, stable=True)
    known, falling = scorable.gather(1, order), returns.where(scorable, 0.0).gather(1, order)
    number = scorable.sum(1, keepdim=True).double()
    after = (number - 1 - torch.arange(order.size(1), device=order.device)).clamp(min=0)  # lower ones, as far as known
    enough = number > k

    is_best = _choices(after, k - 1)  # sets of which a completion is the best
    weights = (is_best / _choices(number, k)).where(known & enough, 0.0)
    mean = (weights * falling).sum(1, keepdim=True)
    better = (_choices(after - 1, k - 2) * falling).where(known, 0.0)  # of a set that a lower one is in, too
    better = better.cumsum(1) - better
    with_row = (is_best * falling + better) / _choices(number - 1, k - 1)
    found = (with_row - mean).where(known & enough, 0.0)
    if scale:
        deviation = (weights * (falling - mean).square()).sum(1, keepdim=True).sqrt()
        found = _divided(batch, found, deviation)
    return batch.per_completion(torch.zeros_like(found).scatter(1, order, found))


def best_of_group(batch: RewardBatch, *, scale: bool = False) -> torch.Tensor:
    r"""
    By how much the best completion of the prompt is better than the second; 0 for all others.

    $$ A_i = \max_j S_j - \max_{j \ne i} S_j $$

    Tang et al., 2025 (https://huggingface.co/papers/2503.19595): the maximum of the group with a leave-one-out
    baseline. The mean over the group of the expected policy gradient is 1/G times the gradient of the expected maximum
    of G completions. The estimator `grpo_passk` of verl is that with `scale`, up to its eps of 1e-6.

    Args:
        batch ([`RewardBatch`]):
            Rewards. A row without scorable sibling gets 0.
        scale (`bool`, *optional*, defaults to `False`):
            Whether to divide by the standard deviation of the group's returns (Bessel's). A group whose returns differ
            by the KL alone is not divided.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward (dimensionless with `scale`).

    Raises:
        `ValueError`: If `scale` is neither true nor false.
    """
    _check_switch("scale", scale)
    scorable = batch.group(batch.scorable)
    known = batch.group(batch.rewards.sum(1)).masked_fill(~scorable, -torch.inf)
    best = known.max(1, keepdim=True)
    others = known.scatter(1, best.indices, -torch.inf).amax(1, keepdim=True)
    ahead = (best.values - others).where(scorable.sum(1, keepdim=True) > 1, 0.0)
    found = torch.zeros_like(known).scatter(1, best.indices, ahead)
    if scale:
        centred, degrees = batch.centred(batch.rewards), (scorable.sum(1, keepdim=True) - 1).clamp(min=1)
        found = _divided(batch, found, (centred.square().sum(1, keepdim=True) / degrees).sqrt())
    return batch.per_completion(found)


def gpg(batch: RewardBatch, *, correction: str = "groups") -> torch.Tensor:
    r"""
    Return minus the mean of the group, times what groups without a signal take away from the batch (GPG).

    $$ A_i = \alpha\,(S_i - \bar S_g),\qquad \alpha = \frac{N}{N - N_0} $$

    Chu et al., 2025 (https://huggingface.co/papers/2504.02546), with their \\(F_{\mathrm{norm}} = 1\\); \\(N\\)
    scorable completions of the batch, \\(N_0\\) of them in groups whose outcomes are all equal. Their loss is a mean
    over the tokens of the batch, TRL's `loss_type="dapo"`, without a ratio, that is with one update per batch. Bias:
    that of `group_mean`, times \\(\alpha\\), which is common to the batch.

    Args:
        batch ([`RewardBatch`]):
            Rewards.
        correction (`str`, *optional*, defaults to `"groups"`):
            What \\(N - N_0\\) counts: completions in `"groups"` with a signal (the paper), or those with a `"nonzero"`
            return (verl). 1 if there are none.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward.

    Raises:
        `ValueError`: If `correction` is none of the two.

    Example:

    >>> ends, ones = torch.tensor([[1.0], [0.0], [1.0], [1.0]]), torch.ones(4, 1)
    >>> gpg(RewardBatch(ends, ones.bool(), ones, 2))
    tensor([ 1., -1.,  0.,  0.])
    """
    if correction not in ("groups", "nonzero"):
        raise ValueError(f"correction must be 'groups' or 'nonzero', got {correction!r}.")
    scorable = batch.group(batch.scorable)
    if correction == "groups":
        counted = scorable & ~is_constant(batch.group(batch.without_kl.sum(1)), scorable, dim=1)
    else:
        counted = scorable & (batch.group(batch.rewards.sum(1)) != 0)
    alpha = scorable.sum().double() / counted.sum().clamp(min=1)
    return batch.per_completion(alpha * batch.centred(batch.rewards))


def _choices(n: torch.Tensor, k: int) -> torch.Tensor:
    """Ways to choose `k` of `n`, float64: 0 where there are none, and, so that one may divide, 1 for `n` < 0."""
    n = n.clamp(min=0).double()
    ways = torch.ones_like(n) if k >= 0 else torch.zeros_like(n)
    for j in range(k):
        ways = ways * (n - j).clamp(min=0) / (j + 1)
    return ways


def _divided(batch: RewardBatch, found: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """`(prompts, G)` over the deviation of each group; 0 where that is rounding, undivided where it is the KL's."""
    outcomes, scorable = batch.group(batch.without_kl.sum(1)), batch.group(batch.scorable)
    size = batch.group(batch.rewards.sum(1)).where(scorable, 0.0).abs().amax(1, keepdim=True).clamp(min=1.0)
    divided = torch.where(deviation > 1e-6 * size, found / deviation, 0.0)
    if batch.kl_penalty is None:
        return divided
    kl_only = is_constant(outcomes, scorable, dim=1) & (found != 0).any(1, keepdim=True)
    if kl_only.any():
        warnings.warn(KL_NOISE.format("of a group"), stacklevel=3)
    return torch.where(kl_only, found, divided)


def _check_switch(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")
