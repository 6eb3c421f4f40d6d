"""Relatives of DPO: lengths, falling log-probs, no reference, two targets."""

import torch

from ..reductions import SATURATION
from .margin_losses import logistic
from .pairs import PairBatch


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
            Weight \\(\lambda\\) of the penalty, at least 0.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    if not lam >= 0.0:
        raise ValueError(f"lam must be at least 0, got {lam!r}.")
    return logistic(batch.beta * (batch.margin - lam * torch.relu(-batch.chosen_logratios)))


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


def rrhf(batch: PairBatch, *, sft_weight: float = 1.0) -> torch.Tensor:
    r"""
    Ranking of mean log-probs, and likelihood of the chosen completion; no reference, and no \\(\beta\\).

    $$ \max(0,\ \bar l_l - \bar l_w) - c\,\bar l_w $$

    Yuan et al., 2023 (https://huggingface.co/papers/2304.05302), for two completions. \\(c\\) is `sft_weight`. Both
    terms are means over the tokens here, as in the authors' code, which puts a weight on the first; the paper's second
    term is the sum, \\(c\\) = the length. With sums in the batch, [`PairBatch.per_token`] makes them means. Where the
    order is right already, only the second term has a gradient.

    Args:
        batch ([`PairBatch`]):
            Pairs.
        sft_weight (`float`, *optional*, defaults to `1.0`):
            Weight \\(c\\) of the likelihood, at least 0.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair, in nats per token.
    """
    if not sft_weight >= 0.0:
        raise ValueError(f"sft_weight must be at least 0, got {sft_weight!r}.")
    return torch.relu(batch.rejected_logps - batch.chosen_logps) - sft_weight * batch.chosen_logps


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
    target = (batch.preference_prob - 0.5) * (1 / batch.beta)
    return (batch.chosen_logratios - target).square() + (batch.rejected_logratios + target).square()


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
            Half the bound of the clip, \\(R\\), positive.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    if not bound > 0.0:
        raise ValueError(f"bound must be positive, got {bound!r}.")
    chosen, rejected = (r.clamp(max=SATURATION).exp() for r in (batch.chosen_logratios, batch.rejected_logratios))
    # The exponentials first: in float32 a sum of 20 and e²⁰ has lost the 20 before the difference is taken.
    difference = (chosen - rejected) + batch.margin
    return logistic((batch.beta * difference).clamp(-2 * bound, 2 * bound))


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
            Weight \\(c\\) of the calibration, at least 0.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    if not coefficient >= 0.0:
        raise ValueError(f"coefficient must be at least 0, got {coefficient!r}.")
    target = 1 / (2 * batch.beta)
    calibration = (batch.chosen_logratios - target).square() + (batch.rejected_logratios + target).square()
    return logistic(batch.margin) + coefficient * calibration
