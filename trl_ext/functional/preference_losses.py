r"""
Losses of preference pairs.

Symbols: \\(r_w\\), \\(r_l\\) log-ratio policy over reference of the chosen and the rejected completion, in nats;
\\(u = r_w - r_l\\) the margin; \\(t = \beta u\\); \\(p\\) the probability that the chosen completion is preferred to
the rejected one; \\(\Delta\\) the difference of their external scores, chosen minus rejected, dimensionless;
\\(\ell(t) = -\log\sigma(t)\\). \\(\beta\\) is in 1/nats and is called τ in the papers of the regression losses.

Two families are often confused. A *margin loss* is a function of \\(t\\); \\(\Psi\\) is a function of a probability.
Soft labels are added to every margin loss by [`gpo`], the regression target to every \\(\Psi\\) by [`psipo`].

A *pair loss*, an entry of `PREFERENCE_LOSSES`, takes a [`PairBatch`] and returns a `torch.Tensor` of shape `(B,)`.
Values and gradients are finite up to |r| = 10⁴ nats in float32.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

SATURATION = 20.0  # e²⁰ ≈ 4.9e8; beyond it an exponential goes on as a straight line or stays


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """
    What a pair loss sees. Every tensor has shape `(B,)`.

    Args:
        chosen_logps, rejected_logps (`torch.Tensor`):
            Log-probabilities of the completions under the policy: sums over the scored tokens, or means, in nats.
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor`):
            The same under the reference.
        chosen_lengths, rejected_lengths (`torch.Tensor`):
            Number of scored tokens, at least 1.
        prob (`torch.Tensor`):
            Probability that the chosen completion is preferred, in [0, 1]; 1 is a hard label.
        beta (`float`):
            Regularisation strength, positive, in 1/nats. τ of the regression losses.
        reward_margin (`torch.Tensor`, *optional*):
            Score of the chosen completion minus that of the rejected one, scaled.
        chosen, rejected (`torch.Tensor`, *optional*):
            Log-ratios, policy over reference. Default: the differences of the above.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    prob: torch.Tensor
    beta: float
    reward_margin: torch.Tensor | None = None
    chosen: torch.Tensor = None  # type: ignore[assignment]
    rejected: torch.Tensor = None  # type: ignore[assignment]

    def __post_init__(self):
        for name in ("chosen", "rejected"):
            if getattr(self, name) is None:
                difference = getattr(self, f"{name}_logps") - getattr(self, f"ref_{name}_logps")
                object.__setattr__(self, name, difference)

    @property
    def margin(self) -> torch.Tensor:
        """Log-ratio of the chosen completion minus that of the rejected one, `(B,)`, nats."""
        return self.chosen - self.rejected

    def per_token(self) -> "PairBatch":
        """The same pairs, each sum over the tokens of a completion (of log-probs, of log-ratios) now a mean."""
        means = {}
        for side in ("chosen", "rejected"):
            for name in (f"{side}_logps", f"ref_{side}_logps", side):
                means[name] = getattr(self, name) / getattr(self, f"{side}_lengths")
        return dataclasses.replace(self, **means)


# Margin losses: functions of t, `(B,)` to `(B,)`


def logistic(t: torch.Tensor) -> torch.Tensor:
    r"""\\(\log(1 + e^{-t})\\). DPO: Rafailov et al., 2023, Eq. 7 (https://huggingface.co/papers/2305.18290)."""
    return -F.logsigmoid(t)


def hinge(t: torch.Tensor) -> torch.Tensor:
    r"""\\(\max(0, 1-t)\\). SLiC, as a loss of log-ratios (https://huggingface.co/papers/2402.05749)."""
    return torch.relu(1 - t)


def squared(t: torch.Tensor) -> torch.Tensor:
    r"""\\((1-t)^2\\). IPO with \\(\beta = 2\tau\\), times \\(4\tau^2\\)."""
    return (1 - t).square()


def exponential(t: torch.Tensor) -> torch.Tensor:
    r"""\\(e^{-t}\\); below t = −20 its tangent \\(e^{20}(1 - t - 20)\\), since \\(e^{-t}\\) overflows float32 at −88."""
    beyond = torch.relu(-t - SATURATION)
    return torch.exp((-t).clamp(max=SATURATION)) + math.exp(SATURATION) * beyond


def truncated_quadratic(t: torch.Tensor) -> torch.Tensor:
    r"""\\(\max(0, 1-t)^2\\)."""
    return torch.relu(1 - t).square()


def savage(t: torch.Tensor) -> torch.Tensor:
    r"""\\(1/(1+e^t)^2\\). Bounded by 1, and the only one of the six that is not convex."""
    return torch.sigmoid(-t).square()


MARGIN_LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "logistic": logistic,
    "hinge": hinge,
    "squared": squared,
    "exponential": exponential,
    "truncated_quadratic": truncated_quadratic,
    "savage": savage,
}


def gpo(margin_loss: Callable[[torch.Tensor], torch.Tensor], batch: PairBatch) -> torch.Tensor:
    r"""
    A margin loss under soft labels.

    $$ p\,f(\beta u) + (1-p)\,f(-\beta u) $$

    GPO: Tang et al., 2024 (https://huggingface.co/papers/2402.05749), who have hard labels, \\(p = 1\\). With
    \\(f\\) = [`logistic`] and constant \\(p = 1-\varepsilon\\) it is conservative DPO. Near the reference the loss is
    \\(f(0) + f'(0)\,\beta u + \tfrac12 f''(0)\,\beta^2u^2\\): one \\(\beta\\) means different things for different
    \\(f\\); match \\(f'(0)\beta\\).

    Args:
        margin_loss (`Callable`):
            Entry of `MARGIN_LOSSES`.
        batch ([`PairBatch`]):
            Pairs.
    """
    t = batch.beta * batch.margin
    return batch.prob * margin_loss(t) + (1 - batch.prob) * margin_loss(-t)


# Ψ: functions of a probability


def identity(prob: torch.Tensor) -> torch.Tensor:
    r"""\\(\Psi(p) = p\\): IPO."""
    return prob


def logit(prob: torch.Tensor) -> torch.Tensor:
    r"""\\(\Psi(p) = \log\frac{p}{1-p}\\): the reward of the Bradley-Terry model. Infinite at 0 and 1."""
    return torch.logit(prob)


PSIS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"identity": identity, "logit": logit}


def psipo_target(
    psi: Callable[[torch.Tensor], torch.Tensor], batch: PairBatch, *, eps: float | None = None
) -> torch.Tensor:
    r"""
    Margin at which [`psipo`] is zero, `(B,)`, nats: \\((\Psi(p) - \Psi(1-p)) / (2\tau)\\). Arguments as there.

    Raises:
        `ValueError`: If it is not finite, or if `eps` is not between 0 and ½.
    """
    if eps is not None and not 0.0 < eps < 0.5:
        raise ValueError(f"eps must be between 0 and 0.5, got {eps!r}.")
    prob = batch.prob if eps is None else batch.prob.clamp(eps, 1 - eps)
    difference = psi(prob) - psi(1 - prob)
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


def psipo(
    psi: Callable[[torch.Tensor], torch.Tensor], batch: PairBatch, *, eps: float | None = None
) -> torch.Tensor:
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
        psi (`Callable`):
            Non-decreasing function on [0, 1]: an entry of `PSIS`, or any `(B,)` to `(B,)`.
        batch ([`PairBatch`]):
            Pairs.
        eps (`float`, *optional*):
            Clamp `prob` to [eps, 1 − eps] first. Needed for \\(p\\) = 0 or 1 if \\(\Psi\\) is infinite there.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair, in nats².

    Raises:
        `ValueError`: If the target is infinite.
    """
    return (batch.margin - psipo_target(psi, batch, eps=eps)).square()


PREFERENCE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "psipo_identity": partial(psipo, identity),
    "psipo_logit": partial(psipo, logit),
    **{f"gpo_{name}": partial(gpo, margin_loss) for name, margin_loss in MARGIN_LOSSES.items()},
}
