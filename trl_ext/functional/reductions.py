"""
Masked and weighted reductions that the estimators share.

Sums are taken in float64 and the result has the dtype of the values: a finite input gives NaN in no dtype, and an
infinity only where the result itself is too large for it.
"""

import torch

SATURATION = 20.0  # e²⁰ ≈ 4.9e8; beyond it an exponential goes on as a straight line, or stays


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""
    Mean over all entries, $$ \mu = \sum w\,x \big/ \sum w, $$ and 0 if all weights are 0.

    Args:
        values (`torch.Tensor`):
            Values \\(x\\), finite everywhere.
        weights (`torch.Tensor` broadcastable to `values`):
            Non-negative weights \\(w\\); a 0/1 mask gives the masked mean.

    Returns:
        `torch.Tensor` (0-d): Mean, in the unit of `values`.
    """
    total = weights.expand_as(values).double().sum()
    mean = (values.double() * weights).sum() / total
    return torch.where(total > 0, mean, 0.0).to(values.dtype)


def whiten(values: torch.Tensor, weights: torch.Tensor, correction: torch.Tensor | float = 0.0) -> torch.Tensor:
    r"""
    Centre and scale to unit variance over all entries together:

    $$ \mu = \frac{\sum w\,x}{\sum w},\qquad \sigma^2 = \frac{\sum w\,(x-\mu)^2}{\sum w - c},\qquad
       \frac{x-\mu}{\sqrt{\sigma^2 + 10^{-8}}} $$

    Two passes: the one-pass form \\(E[x^2]-E[x]^2\\) loses a small variance beside a large mean.

    Args:
        values (`torch.Tensor`):
            Values \\(x\\), finite everywhere.
        weights (`torch.Tensor` broadcastable to `values`):
            Non-negative weights \\(w\\).
        correction (`float`, *optional*, defaults to `0.0`):
            Degrees of freedom \\(c\\) in the unit of the weights: 0 for the biased variance, 1 for Bessel's. Where
            nothing would remain, the biased variance is used.

    Returns:
        `torch.Tensor` of the shape of `values`: Dimensionless. Entries of weight 0 are transformed too; mask them.

    Example:

    >>> whiten(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    tensor([-1.,  0.,  1.])
    """
    dtype, values = values.dtype, values.double()
    return ((values - weighted_mean(values, weights)) / weighted_std(values, weights, correction)).to(dtype)


def weighted_std(values: torch.Tensor, weights: torch.Tensor, correction: torch.Tensor | float = 0.0) -> torch.Tensor:
    r"""
    What [`whiten`] divides by: \\(\sqrt{\sigma^2 + 10^{-8}}\\).

    Args:
        values, weights, correction:
            As for [`whiten`].

    Returns:
        `torch.Tensor` (0-d), float64: In the unit of `values`.
    """
    values = values.double()
    total = weights.expand_as(values).double().sum()
    variance = weighted_mean((values - weighted_mean(values, weights)).square(), weights)
    if correction:
        variance = torch.where(total > correction, variance * total / (total - correction), variance)
    return (variance + 1e-8).sqrt()


def is_constant(values: torch.Tensor, where: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    r"""
    Whether the selected entries are equal up to rounding: max − min ≤ 10⁻⁶ · max(1, max |x|).

    Args:
        values (`torch.Tensor`):
            Values, finite where selected.
        where (`torch.Tensor` of the shape of `values`, bool):
            Entries to compare.
        dim (`int` or `tuple[int, ...]`):
            Axes to compare along.

    Returns:
        `torch.Tensor` (bool), `dim` kept with size 1: `True` also where fewer than two entries are selected.
    """
    highest = values.masked_fill(~where, -torch.inf).amax(dim, keepdim=True)
    lowest = values.masked_fill(~where, torch.inf).amin(dim, keepdim=True)
    size = values.masked_fill(~where, 0.0).abs().amax(dim, keepdim=True).clamp(min=1.0)
    return highest - lowest <= 1e-6 * size


def reward_to_go(
    rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, discount: str = "trainable"
) -> torch.Tensor:
    r"""
    Discounted sum of the rewards from each trainable token on:

    $$ G_{i,t} = m_{i,t}\,\big(r_{i,t} + \gamma\,G_{i,t'}\big), $$

    \\(t'\\) being the next trainable token after \\(t\\). Untrainable tokens (tool output, padding) are skipped: they
    neither end the sum nor, with `discount="trainable"`, take part in the discount.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`):
            Token rewards, finite everywhere. Rewards at untrainable tokens are not counted.
        mask (`torch.Tensor` of shape `(N, T)`):
            Nonzero for trainable tokens.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token, in (0, 1].
        discount (`str`, *optional*, defaults to `"trainable"`):
            Which tokens discount: `"trainable"` ones only, or `"all"`.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Reward-to-go, in the unit of `rewards`; 0 at untrainable tokens.

    Raises:
        `ValueError`: If `gamma` or `discount` is outside the values above.

    Example:

    >>> reward_to_go(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]]), gamma=0.5)
    tensor([[0.5000, 0.0000, 1.0000]])
    """
    if not (isinstance(gamma, int | float) and 0.0 < gamma <= 1.0):
        raise ValueError(f"gamma must be a number in (0, 1], got {gamma!r}.")
    if discount not in ("trainable", "all"):
        raise ValueError(f"discount must be 'trainable' or 'all', got {discount!r}.")
    trainable = mask.bool()
    total = torch.where(trainable, rewards, 0.0).double()
    if gamma == 1.0 and total.device.type == "cpu":  # elsewhere a cumsum need not repeat its sums in one order
        return torch.where(trainable, total.flip(1).cumsum(1).flip(1), 0.0).to(rewards.dtype)
    factor = torch.full_like(total, gamma)
    if discount == "trainable":
        factor = factor.masked_fill(~trainable, 1.0)
    # `total[t]` holds the sum over the window [t, t + shift), `factor[t]` the discount across it; each pass doubles
    # the window, so T tokens take log2(T) passes.
    shift = 1
    while shift < total.size(1):
        after = torch.nn.functional.pad(total[:, shift:], (0, shift))
        total = total + factor * after
        factor = factor * torch.nn.functional.pad(factor[:, shift:], (0, shift))
        shift *= 2
    return torch.where(trainable, total, 0.0).to(rewards.dtype)


def aggregated(
    per_token_loss: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    *,
    num_items: torch.Tensor | float,
    max_completion_length: int,
    num_processes: int = 1,
    accumulation: int = 1,
    steps_per_generation: int = 1,
) -> torch.Tensor:
    r"""
    One loss per token as one number, as TRL's GRPO does it for its own loss of each `loss_type`:

    | `loss_type` | result |
    |---|---|
    | `grpo`, `sapo` | \\(\mathrm{mean}_i\big(\sum_t m\,\ell / \max(\sum_t m, 1)\big) / A\\) |
    | `bnpo` | \\(\sum m\,\ell / \max(\sum m, 1) / A\\) |
    | `dr_grpo` | \\(\sum m\,\ell / (B \cdot L) / A\\) |
    | `luspo` | \\(\mathrm{mean}_i(\sum_t m\,\ell) / A\\) |
    | `dapo`, `cispo`, `vespo` | \\(\sum m\,\ell \big/ \big(\max(M, 1) \cdot A / (P S)\big)\\) |

    The sum of the results of an accumulation window is the loss of the window; data-parallel processes average.

    Args:
        per_token_loss (`torch.Tensor` of shape `(B, T)`):
            Loss \\(\ell\\) of each token of a micro-batch, finite everywhere.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero for trainable tokens, \\(m\\).
        loss_type (`str`):
            One of TRL's.
        num_items (`torch.Tensor` (0-d) or `float`):
            Trainable tokens of the generation batch of all processes, \\(M\\).
        max_completion_length (`int`):
            Longest completion allowed, \\(L\\).
        num_processes (`int`, *optional*, defaults to `1`):
            Processes, \\(P\\).
        accumulation (`int`, *optional*, defaults to `1`):
            Micro-batches of this accumulation window, \\(A\\); 1 in evaluation.
        steps_per_generation (`int`, *optional*, defaults to `1`):
            Micro-batches of a generation batch, \\(S\\); 1 in evaluation.

    Returns:
        `torch.Tensor` (0-d): In the unit of the loss.

    Raises:
        `ValueError`: If `loss_type` is none of TRL's.

    Example:

    >>> loss = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> aggregated(loss, torch.tensor([[1, 1], [1, 0]]), "bnpo", num_items=3, max_completion_length=2)
    tensor(2.)
    """
    of_rows = (per_token_loss * mask).sum(1)
    if loss_type in ("grpo", "sapo"):
        return (of_rows / mask.sum(1).clamp(min=1.0)).mean() / accumulation
    if loss_type == "bnpo":
        return of_rows.sum() / mask.sum().clamp(min=1.0) / accumulation
    if loss_type == "dr_grpo":
        return of_rows.sum() / (len(mask) * max_completion_length) / accumulation
    if loss_type == "luspo":
        return of_rows.mean() / accumulation
    if loss_type in ("dapo", "cispo", "vespo"):
        items = torch.as_tensor(num_items).clamp(min=1.0)
        return of_rows.sum() / (items / num_processes * accumulation / steps_per_generation)
    raise ValueError(f"loss_type must be one of TRL's, got {loss_type!r}.")
