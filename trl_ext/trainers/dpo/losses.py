"""`loss_type`, parsed: which entries are TRL's, which are ours, what each of ours needs, and the state of each."""

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...functional.preference import PREFERENCE_LOSSES, PSIS, Loss, LossState, PairBatch
from ...lookup import lookup
from ..foreign import option

TRL_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
# The names of TRL that our entries can express, and how TRL reduces the log-probs of a completion there.
SAME_AS_TRL = {
    "sigmoid": ("gpo_logistic", "sum"),
    "hinge": ("gpo_hinge", "sum"),
    "ipo": ("psipo_identity", "mean"),
    "sigmoid_norm": ("gpo_logistic", "mean"),
}
READS_LABEL_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}  # of TRL's own
# Options that TRL's implementation of its own names could not honour.
TAKES_OVER = ("logp_reduction", "preference_prob_column", "pair_weight_column")


@dataclass(frozen=True)
class PairLoss:
    """One of our entries in `loss_type`, ready to be called with a [`PairBatch`] of sums over tokens."""

    name: str  # as the user wrote it
    weight: float
    row: Loss
    per_token: bool  # whether the log-probs of a completion are means over its tokens
    options: dict[str, Any] = field(default_factory=dict)

    def view(self, batch: PairBatch) -> PairBatch:
        """The pairs with sums or means over the tokens, as this loss takes them."""
        return batch.per_token() if self.per_token else batch

    def __call__(self, view: PairBatch) -> torch.Tensor:
        """Loss of each pair, `(B,)`; a function of the user's may return something else, which is refused."""
        losses = self.row.function(view, **self.options)
        if not isinstance(losses, torch.Tensor) or losses.shape != view.preference_prob.shape:
            got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"loss_type {self.name!r} returned {got}; it must return one loss per pair, a tensor of shape "
                f"{tuple(view.preference_prob.shape)}."
            )
        return losses

    def target(self, view: PairBatch) -> torch.Tensor | None:
        """Margin that a regression asks for, `(B,)`, nats; `None` for another loss."""
        return None if self.row.target is None else self.row.target(view, **self.options)

    def takes(self) -> list[str] | None:
        """Names of the options that `loss_kwargs` can set, `None` for any."""
        function = self.row.function
        given = {*(function.keywords if isinstance(function, partial) else ()), *(["psi"] if self.row.psi else [])}
        _, *known = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            return None
        return sorted({parameter.name for parameter in known} - given)


@dataclass(frozen=True)
class PairLosses:
    """All of `loss_type`. False where nothing is ours, and then everything is TRL's."""

    ours: tuple[PairLoss, ...] = ()
    trls: dict[str, list] = field(default_factory=lambda: {"loss_type": [], "loss_weights": []})

    def __bool__(self) -> bool:
        return bool(self.ours)

    @property
    def reference_free(self) -> bool:
        """Whether none of the losses reads the reference."""
        return (
            bool(self) and {*self.trls["loss_type"]} <= {"sft"} and not any(loss.row.reference for loss in self.ours)
        )

    @property
    def hard_labels(self) -> bool:
        """Whether `label_smoothing` belongs to a loss of TRL's, so that ours take hard labels."""
        return bool(READS_LABEL_SMOOTHING & {*self.trls["loss_type"]})

    def states(self, seed: int) -> dict[str, LossState]:
        """New states of the losses that have one, by the name of the loss."""
        return {loss.name: loss.row.state(seed, **loss.options) for loss in self.ours if loss.row.state is not None}


def parse_losses(config: Any) -> PairLosses:
    """
    The one place where `loss_type` is read. The config asks when it is made, for its checks; the trainer asks once
    more when it is made, because a config may be changed in between and holds no functions.
    """
    ours, trls = [], PairLosses().trls
    takes_over = any(option(config, name) is not None for name in TAKES_OVER)
    for name, weight in zip(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type), strict=True):
        if name in TRL_LOSSES and (name == "sft" or not takes_over):
            trls["loss_type"].append(name)
            trls["loss_weights"].append(weight)
        else:
            ours.append(_pair_loss(config, name, weight))
    return PairLosses(tuple(ours), trls)


def _pair_loss(config: Any, name: str, weight: float) -> PairLoss:
    entry, reduction = SAME_AS_TRL.get(name, (name, None))
    wanted = option(config, "logp_reduction")
    if entry in TRL_LOSSES:
        raise ValueError(
            f"loss_type {name!r} is TRL's and cannot take {', '.join(TAKES_OVER[:-1])} or {TAKES_OVER[-1]}; only "
            f"{sorted(SAME_AS_TRL)} of TRL's names can."
        )
    if name == "sigmoid_norm" and wanted == "sum":
        raise ValueError(
            "loss_type 'sigmoid_norm' is the mean over tokens and contradicts logp_reduction='sum'; use 'sigmoid' for "
            "the sum."
        )
    found = lookup(entry, PREFERENCE_LOSSES, also=TRL_LOSSES, option="loss_type")
    row = found if isinstance(found, Loss) else Loss(found, prob=None, scores=None)  # a function of the user's
    kwargs = option(config, "loss_kwargs") or {}
    options = dict(kwargs.get(name, {}))
    if row.psi:
        if option(config, "psi") is None:
            raise ValueError(PSI_AND_LOSS.format(losses_with_psi()))
        options["psi"] = lookup(option(config, "psi"), PSIS, option="psi")
    reduction = wanted or reduction or ("mean" if row.per_token else "sum")
    return PairLoss(name, weight, row, reduction == "mean", options)


PSI_AND_LOSS = "psi and loss_type {} need each other; set both, or neither."


def losses_with_psi() -> str:
    """Names of the entries that take the option `psi`."""
    return " or ".join(repr(name) for name, row in PREFERENCE_LOSSES.items() if row.psi)
