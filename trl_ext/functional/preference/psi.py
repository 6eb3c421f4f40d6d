r"""
\\(\Psi\\)PO: \\(\Psi\\), a function of a probability, `(B,)` to `(B,)`, and the regression to the margin that it asks
for.

Not to be confused with a margin loss, which is a function of a margin.
"""

from collections.abc import Callable

import torch

from .pairs import PairBatch


def identity(prob: torch.Tensor) -> torch.Tensor:
    r"""\\(\Psi(p) = p\\): IPO."""
    return prob


def logit(prob: torch.Tensor) -> torch.Tensor:
    r"""\\(\Psi(p) = \log\frac{p}{1-p}\\): the reward of the Bradley-Terry model. Infinite at 0 and 1."""
    return torch.logit(prob)


PSIS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"identity": identity, "logit": logit}


def psipo_target(
    batch: PairBatch, *, psi: Callable[[torch.Tensor], torch.Tensor], eps: float | None = None
) -> torch.Tensor:
    r"""
    Margin at which [`psipo`] is zero, `(B,)`, nats: \\((\Psi(p) - \Psi(1-p)) / (2\tau)\\).

    Args:
        batch, psi, eps:
            As for [`psipo`].

    Returns:
        `torch.Tensor` of shape `(B,)`: Target of each pair.

    Raises:
        `ValueError`: If it is not finite, or if `eps` is not between 0 and ½.
    """
    if eps is not None and not 0.0 < eps < 0.5:
        raise ValueError(f"eps must be between 0 and 0.5, got {eps!r}.")
    prob = batch.preference_prob if eps is None else batch.preference_prob.clamp(eps, 1 - eps)
    difference = psi(prob) - psi(1 - prob)
    if not isinstance(difference, torch.Tensor) or difference.shape != prob.shape:
        got = tuple(difference.shape) if isinstance(difference, torch.Tensor) else f"a {type(difference).__name__}"
        raise ValueError(f"Ψ must map a tensor of probabilities, (B,), to a tensor of that shape, got {got}.")
    if not difference.isfinite().all():
        worst = prob[~difference.isfinite()][0].item()
        raise ValueError(
            f"Ψ is infinite at a preference probability of {worst:g}, and so is the target margin. With hard labels "
            "E[Ψ(label)] = Ψ(0) + (Ψ(1) - Ψ(0))·p: a finite Ψ collapses to IPO and an infinite one diverges. Give "
            "probabilities strictly between 0 and 1, set eps in loss_kwargs to clamp them to [eps, 1 - eps], or use "
            "psipo_identity."
        )
    # The factor is a Python number: TRL's 1 / (2 * beta) is rounded to float32 in the same place.
    return difference * (1 / (2 * batch.beta))


def psipo(batch: PairBatch, *, psi: Callable[[torch.Tensor], torch.Tensor], eps: float | None = None) -> torch.Tensor:
    r"""
    Squared distance of the margin from the one that \\(\Psi\\)PO asks for.

    $$ \Big(u - \frac{\Psi(p) - \Psi(1-p)}{2\tau}\Big)^2 $$

    Azar et al., 2023 (https://huggingface.co/papers/2310.12036); their \\(\tau\\) is `beta`, their \\(h_\pi\\) is
    \\(u\\). With \\(\Psi\\) the identity and \\(p = 1\\) this is their Eq. 17, target \\(1/(2\tau)\\). The objective,
    \\(\max_\pi \mathbb E[\Psi(p^*(y \succ y'))] - \tau\,\mathrm{KL}(\pi\|\pi_{\mathrm{ref}})\\) with \\(y'\\) from the
    distribution that both completions were drawn from, is met exactly iff \\(\Psi(p) + \Psi(1-p)\\) is constant, as
    for the identity and the logit. Any other \\(\Psi\\) acts through its antisymmetric part
    \\((\Psi(p) - \Psi(1-p))/2\\): \\(p^2\\) for instance is the identity.

    Args:
        batch ([`PairBatch`]):
            Pairs.
        psi (`Callable`):
            Non-decreasing function on [0, 1]: an entry of `PSIS`, or any `(B,)` to `(B,)`.
        eps (`float`, *optional*):
            Clamp `preference_prob` to [eps, 1 − eps] first. Needed for \\(p\\) = 0 or 1 if \\(\Psi\\) is infinite
            there.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair, in nats².

    Raises:
        `ValueError`: If the target is infinite.

    Example:

    >>> logps, ones = torch.tensor([5.0, 0.0]), torch.ones(2)
    >>> pairs = PairBatch(logps, 0 * ones, 0 * ones, 0 * ones, ones, ones, preference_prob=ones, beta=0.1)
    >>> psipo(pairs, psi=identity)
    tensor([ 0., 25.])
    """
    return (batch.margin - psipo_target(batch, psi=psi, eps=eps)).square()
