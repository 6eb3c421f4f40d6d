r"""
Losses of preference pairs.

Symbols: \\(r_w\\), \\(r_l\\) log-ratio policy over reference of the chosen and the rejected completion, in nats;
\\(u = r_w - r_l\\) the margin; \\(t = \beta u\\); \\(p\\) the probability that the chosen completion is preferred to
the rejected one; \\(\Delta\\) the difference of their external scores, chosen minus rejected, dimensionless;
\\(\ell(t) = -\log\sigma(t)\\). \\(\beta\\) is in 1/nats and is called τ in the papers of the regression losses.

Two families are often confused. A *margin loss* is a function of \\(t\\); \\(\Psi\\) is a function of a probability.
Soft labels are added to every margin loss by [`gpo`], the regression target to every \\(\Psi\\) by [`psipo`].

A *pair loss*, an entry of `PREFERENCE_LOSSES`, takes a [`PairBatch`] and returns a `torch.Tensor` of shape `(B,)`.
Values and gradients are finite up to |r| = 10⁴ nats. Half precision is read as float32; beyond 10¹⁹ the squares are
infinite there, never NaN.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

SATURATION = 20.0  # e²⁰ ≈ 4.9e8; beyond it an exponential goes on as a straight line or stays
ODPO_FLOOR = 1e-6  # least external margin, dimensionless: the logarithm needs a positive one
BETA_FLOOR = 1e-3  # least β of a batch for `beta_dpo`, 1/nats: a batch far below the usual margin would turn its sign


@dataclasses.dataclass(frozen=True)
class GlobalMargins:
    """
    What [`beta_dpo`] knows beyond its own pairs: the batch of all processes, and the batches before.

    Args:
        margins (`torch.Tensor` of shape `(N,)`):
            Margin u of each pair of all processes, without graph, float64, in nats.
        first (`int`):
            Place among them of the first of the `B` pairs of this process.
        moving_mean, moving_std (`float`):
            Of the margins of earlier batches, from [`moving_statistics`], in nats.
        noise (`torch.Tensor` of shape `(N,)`, *optional*):
            Numbers drawn uniformly from [0, 1), float64, which decide what the filter keeps. `None`: it keeps all.
    """

    margins: torch.Tensor
    first: int
    moving_mean: float
    moving_std: float
    noise: torch.Tensor | None = None


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
        everyone ([`GlobalMargins`], *optional*):
            The margins of all processes, for [`beta_dpo`]. `None`: these pairs are all, and the first.
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
    everyone: GlobalMargins | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), torch.Tensor):
                wide = value.to(torch.promote_types(value.dtype, torch.float32))  # half precision holds no e²⁰
                object.__setattr__(self, field.name, wide)
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
    r"""
    \\(\log(1 + e^{-t})\\). DPO: Rafailov et al., 2023, Eq. 7 (https://huggingface.co/papers/2305.18290).

    Args:
        t (`torch.Tensor` of shape `(B,)`):
            Margin times \\(\beta\\).

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return -F.logsigmoid(t)


def hinge(t: torch.Tensor) -> torch.Tensor:
    r"""
    \\(\max(0, 1-t)\\). SLiC, as a loss of log-ratios (https://huggingface.co/papers/2402.05749).

    Args:
        t (`torch.Tensor` of shape `(B,)`):
            Margin times \\(\beta\\).

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return torch.relu(1 - t)


def squared(t: torch.Tensor) -> torch.Tensor:
    r"""
    \\((1-t)^2\\). IPO with \\(\beta = 2\tau\\), times \\(4\tau^2\\).

    Args:
        t (`torch.Tensor` of shape `(B,)`):
            Margin times \\(\beta\\).

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return (1 - t).square()


def exponential(t: torch.Tensor) -> torch.Tensor:
    r"""
    \\(e^{-t}\\); below t = −20 its tangent \\(e^{20}(1 - t - 20)\\): float32 overflows at −88.

    Args:
        t (`torch.Tensor` of shape `(B,)`):
            Margin times \\(\beta\\).

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    beyond = torch.relu(-t - SATURATION)
    return torch.exp((-t).clamp(max=SATURATION)) + math.exp(SATURATION) * beyond


def truncated_quadratic(t: torch.Tensor) -> torch.Tensor:
    r"""
    \\(\max(0, 1-t)^2\\).

    Args:
        t (`torch.Tensor` of shape `(B,)`):
            Margin times \\(\beta\\).

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return torch.relu(1 - t).square()


def savage(t: torch.Tensor) -> torch.Tensor:
    r"""
    \\(1/(1+e^t)^2\\). Bounded by 1, and the only one of the six that is not convex.

    Args:
        t (`torch.Tensor` of shape `(B,)`):
            Margin times \\(\beta\\).

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
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

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    t = batch.beta * batch.margin
    return _weighted(batch.prob, margin_loss(t)) + _weighted(1 - batch.prob, margin_loss(-t))


def _weighted(weight: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """The product, and 0 where `weight` is 0 and the loss infinite."""
    return torch.where(weight == 0, 0.0, weight * losses)


# Ψ: functions of a probability


def identity(prob: torch.Tensor) -> torch.Tensor:
    r"""
    \\(\Psi(p) = p\\): IPO.

    Args:
        prob (`torch.Tensor` of shape `(B,)`):
            Probability.

    Returns:
        `torch.Tensor` of shape `(B,)`: Its \\(\Psi\\).
    """
    return prob


def logit(prob: torch.Tensor) -> torch.Tensor:
    r"""
    \\(\Psi(p) = \log\frac{p}{1-p}\\): the reward of the Bradley-Terry model. Infinite at 0 and 1.

    Args:
        prob (`torch.Tensor` of shape `(B,)`):
            Probability.

    Returns:
        `torch.Tensor` of shape `(B,)`: Its \\(\Psi\\).
    """
    return torch.logit(prob)


PSIS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"identity": identity, "logit": logit}


def psipo_target(
    psi: Callable[[torch.Tensor], torch.Tensor], batch: PairBatch, *, eps: float | None = None
) -> torch.Tensor:
    r"""
    Margin at which [`psipo`] is zero, `(B,)`, nats: \\((\Psi(p) - \Psi(1-p)) / (2\tau)\\).

    Args:
        psi, batch, eps:
            As for [`psipo`].

    Returns:
        `torch.Tensor` of shape `(B,)`: Target of each pair.

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


def psipo(psi: Callable[[torch.Tensor], torch.Tensor], batch: PairBatch, *, eps: float | None = None) -> torch.Tensor:
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

    Example:

    >>> logps, ones = torch.tensor([5.0, 0.0]), torch.ones(2)
    >>> psipo(identity, PairBatch(logps, 0 * ones, 0 * ones, 0 * ones, ones, ones, prob=ones, beta=0.1))
    tensor([ 0., 25.])
    """
    return (batch.margin - psipo_target(psi, batch, eps=eps)).square()


# Reward-aware losses: Δ in place of a label


def rpo_sq(batch: PairBatch) -> torch.Tensor:
    r"""
    Squared distance of the implicit reward margin from the external one.

    $$ (\beta u - \Delta)^2 $$

    Reward-aware Preference Optimization, squared form, as in NeMo-Aligner. It is \\(\beta^2\\) times [`psipo`] with
    \\(\Psi\\) = logit and \\(p = \sigma(\Delta)\\).

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return (batch.beta * batch.margin - _reward_margin(batch)).square()


def rpo_bwd_kl(batch: PairBatch) -> torch.Tensor:
    r"""
    KL from the external to the implicit preference: soft labels \\(\sigma(\Delta)\\), less their entropy.

    $$ \mathrm{KL}\big(\mathrm{Bern}\,\sigma(\Delta) \,\|\, \mathrm{Bern}\,\sigma(\beta u)\big) $$

    Nvidia, 2024 (https://huggingface.co/papers/2406.11704).

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return _bernoulli_kl(_reward_margin(batch), batch.beta * batch.margin)


def rpo_fwd_kl(batch: PairBatch) -> torch.Tensor:
    r"""
    KL from the implicit to the external preference.

    $$ \mathrm{KL}\big(\mathrm{Bern}\,\sigma(\beta u) \,\|\, \mathrm{Bern}\,\sigma(\Delta)\big) $$

    https://huggingface.co/papers/2411.00062 and https://huggingface.co/papers/2502.00203. Unlike [`rpo_bwd_kl`] flat
    where the policy is sure and wrong.

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return _bernoulli_kl(batch.beta * batch.margin, _reward_margin(batch))


def odpo(batch: PairBatch, *, alpha: float = 1.0) -> torch.Tensor:
    r"""
    DPO with an offset that grows with the external margin.

    $$ \ell(\beta u - \alpha\log\Delta) $$

    Amini et al., 2024 (https://huggingface.co/papers/2402.10571). \\(\Delta\\) is clamped at 10⁻⁶ from below: the
    chosen completion should have the higher score.

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.
        alpha (`float`, *optional*, defaults to `1.0`):
            Factor \\(\alpha\\) on the logarithm.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return logistic(batch.beta * batch.margin - alpha * _reward_margin(batch).clamp(min=ODPO_FLOOR).log())


def margin_dpo(batch: PairBatch) -> torch.Tensor:
    r"""
    DPO with the external margin as offset: \\(\ell(\beta u - \Delta)\\).

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return logistic(batch.beta * batch.margin - _reward_margin(batch))


def _reward_margin(batch: PairBatch) -> torch.Tensor:
    if batch.reward_margin is None:
        raise ValueError("This loss compares the scores of the two completions; the pairs have no reward_margin.")
    return batch.reward_margin


def _bernoulli_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL(Bern σ(a) ‖ Bern σ(b)), nats."""
    yes = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    return yes + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))


# Lengths, falling log-probs, no reference, two targets


def dpop(batch: PairBatch, *, lam: float = 50.0) -> torch.Tensor:
    r"""
    DPO that penalises a fall of the chosen completion's log-prob below the reference's.

    $$ \ell\big(\beta\,(u - \lambda\max(0, -r_w))\big) $$

    Pal et al., 2024 (https://huggingface.co/papers/2402.13228), DPO-Positive; \\(\lambda = 50\\) is theirs, and
    can dominate the loss.

    Args:
        batch ([`PairBatch`]):
            Pairs.
        lam (`float`, *optional*, defaults to `50.0`):
            Weight \\(\lambda\\) of the penalty.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return logistic(batch.beta * (batch.margin - lam * torch.relu(-batch.chosen)))


def length_dpo(batch: PairBatch, *, alpha: float = 0.01) -> torch.Tensor:
    r"""
    DPO for the reward less \\(\alpha\\) per token.

    $$ \ell\big(\beta u + \alpha\,(n_w - n_l)\big) $$

    Park et al., 2024 (https://huggingface.co/papers/2403.19159), R-DPO. The sign follows from the optimum of reward −
    \\(\alpha\\) · length: a longer chosen completion explains part of the preference, so less margin is asked for.

    Args:
        batch ([`PairBatch`]):
            Pairs.
        alpha (`float`, *optional*, defaults to `0.01`):
            Price \\(\alpha\\) of a token.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return logistic(batch.beta * batch.margin + alpha * (batch.chosen_lengths - batch.rejected_lengths))


def simpo(batch: PairBatch, *, gamma: float = 0.5) -> torch.Tensor:
    r"""
    Margin of the mean log-probs, without a reference.

    $$ \ell\big(\beta\,(\bar l_w - \bar l_l) - \gamma\big) $$

    Meng et al., 2024 (https://huggingface.co/papers/2405.14734). `gamma` is \\(\gamma\\) itself; the authors' code
    asks for \\(\gamma/\beta\\). With sums in the batch, [`PairBatch.per_token`] makes them means.

    Args:
        batch ([`PairBatch`]):
            Pairs.
        gamma (`float`, *optional*, defaults to `0.5`):
            Offset \\(\gamma\\), dimensionless.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return logistic(batch.beta * (batch.chosen_logps - batch.rejected_logps) - gamma)


def sppo(batch: PairBatch) -> torch.Tensor:
    r"""
    Each completion's log-ratio has its own target.

    $$ \big(r_w - (p-\tfrac12)/\beta\big)^2 + \big(r_l + (p-\tfrac12)/\beta\big)^2 $$

    Wu et al., 2024, Eq. 4.7 (https://huggingface.co/papers/2405.00675); their \\(1/\eta\\) is `beta`, about 10⁻³.
    The authors' code halves it. \\(p = 1\\) is TRL's `sppo_hard`.

    Args:
        batch ([`PairBatch`]):
            Pairs.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair, in nats².
    """
    target = (batch.prob - 0.5) * (1 / batch.beta)
    return (batch.chosen - target).square() + (batch.rejected + target).square()


def chipo(batch: PairBatch, *, bound: float = 1.0) -> torch.Tensor:
    r"""
    DPO with a \\(\chi^2\\) term beside the KL.

    $$ \ell\big(\mathrm{clip}_{\pm 2R}\,\beta\,[\varphi(r_w) - \varphi(r_l)]\big),\qquad \varphi(r) = e^r + r $$

    Huang et al., 2024 (https://huggingface.co/papers/2407.13399); their \\(R\\) is `bound`. The exponent is clamped
    at 20. Beyond the clip the gradient is 0. A public reimplementation could not reproduce the paper's results.

    Args:
        batch ([`PairBatch`]):
            Pairs.
        bound (`float`, *optional*, defaults to `1.0`):
            Half the bound of the clip, \\(R\\).

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    phi_chosen, phi_rejected = (r.clamp(max=SATURATION).exp() + r for r in (batch.chosen, batch.rejected))
    return logistic((batch.beta * (phi_chosen - phi_rejected)).clamp(-2 * bound, 2 * bound))


def cal_dpo(batch: PairBatch, *, coefficient: float = 0.5) -> torch.Tensor:
    r"""
    Preference loss, and a calibration that gives each completion's log-ratio a target.

    $$ \ell(u) + c\,\big[(r_w - \tfrac1{2\beta})^2 + (r_l + \tfrac1{2\beta})^2\big] $$

    Xiao et al., 2024 (https://huggingface.co/papers/2412.14516); \\(c\\) is `coefficient`, ½ in the authors' code.
    There is no \\(\beta\\) in the first term.

    Args:
        batch ([`PairBatch`]):
            Pairs.
        coefficient (`float`, *optional*, defaults to `0.5`):
            Weight \\(c\\) of the calibration.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    target = 1 / (2 * batch.beta)
    calibration = (batch.chosen - target).square() + (batch.rejected + target).square()
    return logistic(batch.margin) + coefficient * calibration


# A β of the batch


def moving_statistics(
    margins: torch.Tensor, before: tuple[float, float] | None = None, *, momentum: float = 0.9
) -> tuple[float, float]:
    r"""
    Exponential moving averages of the mean and the standard deviation of the margins of a batch.

    $$ M_0 \leftarrow m M_0 + (1-m)\,\mathrm{mean}(u),\qquad s \leftarrow m s + (1-m)\,\mathrm{std}(u) $$

    They start at the mean and the standard deviation of the first batch. While the policy is still the reference all
    margins are equal; an \\(s\\) of 0 says nothing about the margins to come and is replaced, not averaged.

    Args:
        margins (`torch.Tensor` of shape `(N,)`):
            Margins of the batch, of all processes, float64, in nats.
        before (`tuple[float, float]`, *optional*):
            \\(M_0\\) and \\(s\\) so far. `None`: this is the first batch.
        momentum (`float`, *optional*, defaults to `0.9`):
            Weight \\(m\\) of what was before.

    Returns:
        `tuple[float, float]`: New \\(M_0\\) and \\(s\\), in nats; the deviation of a single pair is 0.

    Example:

    >>> moving_statistics(torch.tensor([1.0, 3.0, 5.0]), before=(0.0, 1.0), momentum=0.75)
    (0.75, 1.25)
    """
    mean, std = margins.mean().item(), margins.std(correction=min(1, len(margins) - 1)).item()
    if before is None:
        return mean, std
    moving_mean, moving_std = before
    if moving_std:
        std = momentum * moving_std + (1 - momentum) * std
    return momentum * moving_mean + (1 - momentum) * mean, std


def kept_pairs(everyone: GlobalMargins, keep: float | None) -> torch.Tensor:
    r"""
    The pairs that the filter of [`beta_dpo`] keeps.

    \\(K\\) of the \\(N\\) pairs, the integer part of `keep` \\(\cdot\,N\\) and at least one, drawn one after the
    other without replacement, each with probability

    $$ \propto \exp\Big(-\frac{(u - M_0)^2}{2 s^2}\Big) $$

    among those that are left; all equally likely if \\(s = 0\\). Drawn as the \\(K\\) largest of the logarithm of that
    weight plus Gumbel noise: the same law, also where the weights themselves would all be rounded to 0.

    Args:
        everyone ([`GlobalMargins`]):
            Margins of all processes, and the noise.
        keep (`float`, *optional*):
            Share of the pairs to keep, above 0 and at most 1; \\(1 - \rho\\) of the paper. `None`: all.

    Returns:
        `torch.Tensor` of shape `(N,)`: Whether each pair is kept. All are without `keep` or noise.

    Raises:
        `ValueError`: If `keep` is out of range.
    """
    if keep is not None and not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep!r}.")
    kept = torch.ones_like(everyone.margins, dtype=torch.bool)
    if keep is None or everyone.noise is None:
        return kept
    distance = everyone.margins - everyone.moving_mean
    log_weight = -(distance / everyone.moving_std).square() / 2 if everyone.moving_std else torch.zeros_like(distance)
    order = (log_weight - (-everyone.noise.log()).log()).argsort(descending=True)
    count = max(1, int(keep * len(kept) + 1e-6))  # 0.7 · 10 is 7, whatever the rounding
    kept[order[count:]] = False
    return kept


def batch_beta(batch: PairBatch, *, alpha: float = 0.6, keep: float | None = None) -> float:
    r"""
    The \\(\beta\\) of a batch for [`beta_dpo`], in 1/nats.

    $$ \beta_b = \max\big(\beta\,[1 + \alpha\,(\mathrm{mean}_b\,u - M_0)],\ 10^{-3}\big) $$

    Args:
        batch, alpha, keep:
            As for [`beta_dpo`].

    Returns:
        `float`: \\(\beta_b\\), the same in every process, without graph.

    Raises:
        `ValueError`: If `alpha` is negative, or \\(\beta\\) below 10⁻³.
    """
    if not alpha >= 0.0:
        raise ValueError(f"alpha must be at least 0, got {alpha!r}.")
    if batch.beta < BETA_FLOOR:
        raise ValueError(f"beta must be at least {BETA_FLOOR}, the least that beta_dpo uses, got {batch.beta!r}.")
    everyone = _everyone(batch)
    mean = everyone.margins[kept_pairs(everyone, keep)].mean().item()
    return max(batch.beta * (1 + alpha * (mean - everyone.moving_mean)), BETA_FLOOR)


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

    Without `everyone` the batch is taken for the first of all, and \\(\beta_b = \beta\\).

    Args:
        batch ([`PairBatch`]):
            Pairs, and in `everyone` the margins of all processes.
        alpha (`float`, *optional*, defaults to `0.6`):
            Slope \\(\alpha\\) of \\(\beta_b\\), in 1/nats, at least 0.
        keep (`float`, *optional*):
            Share of the pairs that the filter keeps, \\(1 - \rho\\); 0.8 in the authors' example. `None`: no filter.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair; with `keep` times N/K, or 0 for a pair left out, so that its
        mean over all pairs is the mean over those kept.

    Raises:
        `ValueError`: If `alpha`, `keep` or `beta` is out of range.
    """
    losses = logistic(batch_beta(batch, alpha=alpha, keep=keep) * batch.margin)
    everyone = _everyone(batch)
    kept = kept_pairs(everyone, keep)
    own = kept[everyone.first : everyone.first + len(losses)].to(losses.device)
    return torch.where(own, losses, 0.0) * (len(kept) / int(kept.sum()))


def _everyone(batch: PairBatch) -> GlobalMargins:
    if batch.everyone is not None:
        return batch.everyone
    margins = batch.margin.detach().to(torch.float64)
    return GlobalMargins(margins, 0, *moving_statistics(margins))


PREFERENCE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "psipo_identity": partial(psipo, identity),
    "psipo_logit": partial(psipo, logit),
    **{f"gpo_{name}": partial(gpo, margin_loss) for name, margin_loss in MARGIN_LOSSES.items()},
    "rpo_sq": rpo_sq,
    "rpo_bwd_kl": rpo_bwd_kl,
    "rpo_fwd_kl": rpo_fwd_kl,
    "odpo": odpo,
    "margin_dpo": margin_dpo,
    "dpop": dpop,
    "length_dpo": length_dpo,
    "simpo": simpo,
    "sppo": sppo,
    "chipo": chipo,
    "cal_dpo": cal_dpo,
    "beta_dpo": beta_dpo,
}

# What the entries read beside the log-ratios, the reduction they are defined with, and targets of the regressions.
READS_PROB = {"sppo", *(name for name in PREFERENCE_LOSSES if name.startswith(("psipo_", "gpo_")))}
READS_REWARDS = {"rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "odpo", "margin_dpo"}
REFERENCE_FREE = {"simpo"}
MEAN_BY_DEFAULT = {"simpo"}
MARGIN_TARGETS: dict[str, Callable[..., torch.Tensor]] = {
    "psipo_identity": partial(psipo_target, identity),
    "psipo_logit": partial(psipo_target, logit),
    "rpo_sq": lambda batch: _reward_margin(batch) * (1 / batch.beta),
}
