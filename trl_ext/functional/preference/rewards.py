r"""Reward-aware losses: \\(\Delta\\), the difference of two external scores, in place of a label."""

import torch
import torch.nn.functional as F

from .margin_losses import logistic
from .pairs import PairBatch

ODPO_FLOOR = 1e-6  # least external margin, dimensionless: the logarithm needs a positive one


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
    return (batch.beta * batch.margin - required_reward_margin(batch)).square()


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
    return _bernoulli_kl(required_reward_margin(batch), batch.beta * batch.margin)


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
    return _bernoulli_kl(batch.beta * batch.margin, required_reward_margin(batch))


def rpo_sq_target(batch: PairBatch) -> torch.Tensor:
    r"""
    Margin at which [`rpo_sq`] is zero: \\(\Delta/\beta\\).

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Margin of each pair, in nats.
    """
    return required_reward_margin(batch) * (1 / batch.beta)


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
    return logistic(batch.beta * batch.margin - alpha * required_reward_margin(batch).clamp(min=ODPO_FLOOR).log())


def odpo_metrics(batch: PairBatch) -> dict[str, torch.Tensor]:
    """
    What the trainer logs beside the loss of [`odpo`].

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.

    Returns:
        `dict[str, torch.Tensor]`: `rewards/offset_clamped`, `(B,)`, whether the offset is clamped because the chosen
        completion does not have the higher score.
    """
    return {"rewards/offset_clamped": required_reward_margin(batch) < ODPO_FLOOR}


def margin_dpo(batch: PairBatch) -> torch.Tensor:
    r"""
    DPO with the external margin as offset: \\(\ell(\beta u - \Delta)\\).

    Args:
        batch ([`PairBatch`]):
            Pairs with `reward_margin`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    return logistic(batch.beta * batch.margin - required_reward_margin(batch))


def required_reward_margin(batch: PairBatch) -> torch.Tensor:
    r"""
    \\(\Delta\\) of each pair.

    Args:
        batch ([`PairBatch`]):
            Pairs.

    Returns:
        `torch.Tensor` of shape `(B,)`: Score of the chosen completion minus that of the rejected one.

    Raises:
        `ValueError`: If the pairs have none.
    """
    if batch.reward_margin is None:
        raise ValueError("This loss compares the scores of the two completions; the pairs have no reward_margin.")
    return batch.reward_margin


def _bernoulli_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL(Bern σ(a) ‖ Bern σ(b)), nats."""
    yes = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    return yes + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))
