"""DPO with a β of the batch; its moving mean and deviation are kept by `MovingMargins`."""

import torch

from .margin_losses import logistic
from .pairs import GlobalMargins, PairBatch

BETA_FLOOR = 1e-3  # least β of a batch for `beta_dpo`, 1/nats: a batch far below the usual margin would turn its sign


def moving_statistics(
    margins: torch.Tensor, before: tuple[float, float] | None = None, *, momentum: float = 0.9
) -> tuple[float, float]:
    r"""
    Exponential moving averages of the mean and the standard deviation of the margins of a batch.

    $$ M_0 \leftarrow m M_0 + (1-m)\,\mathrm{mean}(u),\qquad s \leftarrow m s + (1-m)\,\mathrm{std}(u) $$

    They start at the mean and the standard deviation of the first batch. A margin that is not finite is left out: one
    would make every later average NaN. While the policy is still the reference all
    margins are equal; an \\(s\\) of 0 says nothing about the margins to come and is replaced, not averaged.

    Args:
        margins (`torch.Tensor` of shape `(N,)`):
            Margins of the batch, of all processes, float64, in nats.
        before (`tuple[float, float]`, *optional*):
            \\(M_0\\) and \\(s\\) so far; they stay where no margin is finite. `None`: this is the first batch, and 0
            is both where no margin is finite.
        momentum (`float`, *optional*, defaults to `0.9`):
            Weight \\(m\\) of what was before.

    Returns:
        `tuple[float, float]`: New \\(M_0\\) and \\(s\\), in nats; the deviation of a single pair is 0.

    Example:

    >>> moving_statistics(torch.tensor([1.0, 3.0, 5.0]), before=(0.0, 1.0), momentum=0.75)
    (0.75, 1.25)
    """
    margins = margins[margins.isfinite()]
    if not len(margins):
        return before or (0.0, 0.0)
    mean, std = margins.mean().item(), margins.std(correction=min(1, len(margins) - 1)).item()
    if before is None:
        return mean, std
    moving_mean, moving_std = before
    if moving_std:
        std = momentum * moving_std + (1 - momentum) * std
    return momentum * moving_mean + (1 - momentum) * mean, std


def kept_pairs(global_margins: GlobalMargins, keep: float | None) -> torch.Tensor:
    r"""
    The pairs that the filter of [`beta_dpo`] keeps.

    \\(K\\) of the \\(N\\) pairs, the integer part of `keep` \\(\cdot\,N\\) and at least one, drawn one after the
    other without replacement, each with probability

    $$ \propto \exp\Big(-\frac{(u - M_0)^2}{2 s^2}\Big) $$

    among those that are left; all equally likely if \\(s = 0\\). Drawn as the \\(K\\) largest of the logarithm of that
    weight plus Gumbel noise: the same law, also where the weights themselves would all be rounded to 0.

    Args:
        global_margins ([`GlobalMargins`]):
            Margins of all processes, and the noise.
        keep (`float`, *optional*):
            Share of the pairs to keep, above 0 and at most 1; \\(1 - \rho\\) of the paper. `None`: all.

    Returns:
        `torch.Tensor` of shape `(N,)`: Whether each pair is kept. All are without `keep` or noise.
    """
    if keep is not None and not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep!r}.")
    kept = torch.ones_like(global_margins.margins, dtype=torch.bool)
    if keep is None or global_margins.noise is None:
        return kept
    distance, std = global_margins.margins - global_margins.moving_mean, global_margins.moving_std
    log_weight = -(distance / std).square() / 2 if std else torch.zeros_like(distance)
    order = (log_weight - (-global_margins.noise.log()).log()).argsort(descending=True)
    count = max(1, int(keep * len(kept) + 1e-6))  # 0.7 · 10 is 7, whatever the rounding
    kept[order[count:]] = False
    return kept


def batch_beta(batch: PairBatch, *, alpha: float = 0.6, keep: float | None = None) -> float:
    r"""
    The \\(\beta\\) of a batch for [`beta_dpo`], in 1/nats.

    $$ \beta_b = \max\big(\beta\,[1 + \alpha\,(\mathrm{mean}_b\,u - M_0)],\ 10^{-3}\big) $$

    Args:
        batch, alpha, keep: As for [`beta_dpo`].

    Returns:
        `float`: \\(\beta_b\\), the same in every process, without graph.

    Raises:
        `ValueError`: If `alpha` is negative, or \\(\beta\\) below 10⁻³.
    """
    if not alpha >= 0.0:
        raise ValueError(f"alpha must be at least 0, got {alpha!r}.")
    if batch.beta < BETA_FLOOR:
        raise ValueError(f"beta must be at least {BETA_FLOOR}, the least that beta_dpo uses, got {batch.beta!r}.")
    known = _margins_of_all(batch)
    mean = known.margins[kept_pairs(known, keep)].mean().item()
    return max(batch.beta * (1 + alpha * (mean - known.moving_mean)), BETA_FLOOR)


def beta_dpo(batch: PairBatch, *, alpha: float = 0.6, keep: float | None = None) -> torch.Tensor:
    r"""
    DPO whose \\(\beta\\) grows with the margins of the batch: [`batch_beta`].

    $$ \ell(\beta_b\,u),\qquad \beta_b = \beta\,[1 + \alpha\,(\mathrm{mean}_b\,u - M_0)] $$

    Wu et al., 2024 (https://huggingface.co/papers/2407.08639), whose \\(\beta_0\\) is `beta`. The mean is over the
    pairs of all processes, \\(M_0\\) the moving mean of earlier batches. No gradient flows through \\(\beta_b\\),
    which is clamped at 10⁻³ from below. \\(u\\) is the log-ratio margin, as in the authors' code, and not the reward
    margin \\(\beta u\\): \\(\alpha\\) is in 1/nats, and one for reward margins is to be multiplied by \\(\beta\\).
    The authors' code moves \\(M_0\\) before it is used, which without the filter is the factor \\(m\\) on
    \\(\alpha\\).

    With `keep`, the filter of the paper: only the pairs of [`kept_pairs`] count, in the loss, whose mean is over
    them, and in the mean of \\(u\\), but all of them move \\(M_0\\) and \\(s\\). \\(s\\) is read here as a moving
    standard deviation with the momentum of \\(M_0\\).

    Without `global_margins` the batch is taken for the first of all, and \\(\beta_b = \beta\\).

    Args:
        batch ([`PairBatch`]):
            Pairs, and in `global_margins` the margins of all processes.
        alpha (`float`, *optional*, defaults to `0.6`):
            Slope \\(\alpha\\) of \\(\beta_b\\), in 1/nats, at least 0.
        keep (`float`, *optional*):
            As for [`kept_pairs`]; 0.8 in the authors' example.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair; with `keep` times N/K, or 0 for a pair left out, so that its
        mean over all pairs is the mean over those kept.

    """
    losses = logistic(batch_beta(batch, alpha=alpha, keep=keep) * batch.margin)
    known = _margins_of_all(batch)
    kept = kept_pairs(known, keep)
    own = kept[known.offset : known.offset + len(losses)].to(losses.device)
    return torch.where(own, losses, 0.0) * (len(kept) / int(kept.sum()))


def _margins_of_all(batch: PairBatch) -> GlobalMargins:
    if batch.global_margins is None:
        margins = batch.margin.detach().to(torch.float64)
        return GlobalMargins(margins, 0, *moving_statistics(margins))
    return batch.global_margins
