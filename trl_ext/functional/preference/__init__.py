r"""
Losses of preference pairs, and the table of them.

A *pair loss* takes a [`PairBatch`] and returns a `torch.Tensor` of shape `(B,)`; its options are keyword arguments.
Two families are often confused. A *margin loss* is a function of \\(t\\); \\(\Psi\\) is a function of a probability.
Soft labels are added to every margin loss by [`gpo`], the regression target to every \\(\Psi\\) by [`psipo`].

Values and gradients are finite up to |r| = 10⁴ nats. Half precision is read as float32; beyond 10¹⁹ the squares are
infinite there, never NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from .beta_dpo import BETA_FLOOR, batch_beta, beta_dpo, kept_pairs, moving_statistics
from .margin_losses import (
    MARGIN_LOSSES,
    exponential,
    gpo,
    hinge,
    logistic,
    savage,
    squared,
    truncated_quadratic,
)
from .moving_margins import MovingMargins
from .pairs import GlobalMargins, PairBatch
from .psi import PSIS, identity, logit, psipo, psipo_target
from .rewards import ODPO_FLOOR, margin_dpo, odpo, odpo_metrics, rpo_bwd_kl, rpo_fwd_kl, rpo_sq, rpo_sq_target
from .unpaired import UNPAIRED_LOSSES, MovingRewards, UnpairedBatch, UnpairedLoss, bco
from .variants import cal_dpo, chipo, dpop, length_dpo, rrhf, simpo, sppo

__all__ = [
    "BETA_FLOOR",
    "MARGIN_LOSSES",
    "ODPO_FLOOR",
    "PREFERENCE_LOSSES",
    "PSIS",
    "UNPAIRED_LOSSES",
    "GlobalMargins",
    "Loss",
    "LossState",
    "MovingMargins",
    "MovingRewards",
    "PairBatch",
    "UnpairedBatch",
    "UnpairedLoss",
    "batch_beta",
    "bco",
    "beta_dpo",
    "cal_dpo",
    "chipo",
    "dpop",
    "exponential",
    "gpo",
    "hinge",
    "identity",
    "kept_pairs",
    "length_dpo",
    "logistic",
    "logit",
    "margin_dpo",
    "moving_statistics",
    "odpo",
    "odpo_metrics",
    "psipo",
    "psipo_target",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "rpo_sq",
    "rpo_sq_target",
    "rrhf",
    "savage",
    "simpo",
    "sppo",
    "squared",
    "truncated_quadratic",
]


class LossState(Protocol):
    """What goes on from batch to batch in one entry of `loss_type`; made by `Loss.state`."""

    def observe(self, margins: torch.Tensor, offset: int, training: bool) -> GlobalMargins:
        """
        Called once per micro-batch, before the loss, with the margins of all processes, `(N,)`, in nats, and the place
        of the first of our own among them. The result is `PairBatch.global_margins` of the loss.
        """

    def step(self) -> None:
        """Called once per optimizer step, after the last `observe` of its micro-batches."""

    def state(self) -> dict[str, Any]:
        """Numbers and lists for a checkpoint, as JSON has them."""

    def restore(self, state: dict[str, Any]) -> None:
        """The counterpart of `state`."""

    def metrics(self, batch: PairBatch) -> dict[str, float]:
        """Numbers to log of a batch that the loss has seen, the same in every process."""


class Loss(NamedTuple):
    """
    A row of [`PREFERENCE_LOSSES`]: the loss, and everything that is known about it. `None` in `prob` and `scores`
    means unknown, as for a function at a dotted path.
    """

    function: Callable[..., torch.Tensor]
    prob: bool | None = False  # reads `preference_prob`
    scores: bool | None = False  # needs `reward_margin`
    reference: bool = True  # reads the log-probs of the reference
    per_token: bool = False  # log-probs are means over the tokens unless `logp_reduction` says otherwise
    psi: bool = False  # takes the function that the option `psi` names, as the keyword `psi`
    target: Callable[..., torch.Tensor] | None = None  # margin that a regression asks for; takes the loss's options
    state: Callable[..., LossState] | None = None  # of a seed and the loss's options
    metrics: Callable[[PairBatch], dict[str, torch.Tensor]] | None = None  # one number per pair each, to be averaged
    method: str = ""  # as in the model card
    paper: str = ""  # key in `papers.py`


PREFERENCE_LOSSES: dict[str, Loss] = {
    "psipo": Loss(psipo, prob=True, psi=True, target=psipo_target, method="ΨPO", paper="psipo"),
    "psipo_identity": Loss(
        partial(psipo, psi=identity),
        prob=True,
        target=partial(psipo_target, psi=identity),
        method="IPO",
        paper="psipo",
    ),
    "psipo_logit": Loss(
        partial(psipo, psi=logit), prob=True, target=partial(psipo_target, psi=logit), method="ΨPO", paper="psipo"
    ),
    **{
        f"gpo_{name}": Loss(partial(gpo, margin_loss=margin_loss), prob=True, method="GPO", paper="gpo")
        for name, margin_loss in MARGIN_LOSSES.items()
    },
    "rpo_sq": Loss(rpo_sq, scores=True, target=rpo_sq_target, method="RPO", paper="rpo"),
    "rpo_bwd_kl": Loss(rpo_bwd_kl, scores=True, method="RPO", paper="rpo"),
    "rpo_fwd_kl": Loss(rpo_fwd_kl, scores=True, method="RPO", paper="rpo"),
    "odpo": Loss(odpo, scores=True, metrics=odpo_metrics, method="ODPO", paper="odpo"),
    "margin_dpo": Loss(margin_dpo, scores=True),
    "dpop": Loss(dpop, method="DPO-Positive", paper="dpop"),
    "length_dpo": Loss(length_dpo, method="R-DPO", paper="length_dpo"),
    "simpo": Loss(simpo, reference=False, per_token=True, method="SimPO", paper="simpo"),
    "rrhf": Loss(rrhf, reference=False, per_token=True, method="RRHF", paper="rrhf"),
    "sppo": Loss(sppo, prob=True, method="SPPO", paper="sppo"),
    "chipo": Loss(chipo, method="χPO", paper="chipo"),
    "cal_dpo": Loss(cal_dpo, method="Cal-DPO", paper="cal_dpo"),
    "beta_dpo": Loss(beta_dpo, state=MovingMargins, method="β-DPO", paper="beta_dpo"),
}
