"""The options of our DPO trainer, and what is refused before a model loads."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from trl.trainer.dpo_config import DPOConfig as _DPOConfig

from ...functional.preference_losses import (
    MARGIN_TARGETS,
    MEAN_BY_DEFAULT,
    PREFERENCE_LOSSES,
    PSIS,
    READS_PROB,
    READS_REWARDS,
    REFERENCE_FREE,
    PairBatch,
    psipo,
    psipo_target,
)
from ...lookup import import_path, lookup
from ..input_checks import is_number

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


class PairLoss(NamedTuple):
    """One of our entries in `loss_type`, ready to be called."""

    name: str  # as the user wrote it
    weight: float
    loss: Callable[[PairBatch], torch.Tensor]
    target: Callable[[PairBatch], torch.Tensor] | None  # margin that a regression loss asks for
    mean: bool  # whether log-probs are means over the tokens
    entry: str  # key of `PREFERENCE_LOSSES`, "psipo", or the dotted path


@dataclass
class DPOConfig(_DPOConfig):
    r"""
    TRL's [`~trl.DPOConfig`] and the options below. With none of them set and only TRL's names in `loss_type`, training
    is TRL's, bit for bit.

    Parameters:
        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            TRL's names, entries of `trl_ext.functional.preference_losses.PREFERENCE_LOSSES`, `"psipo"` (see `psi`), or
            dotted paths to functions of a [`~trl_ext.functional.preference_losses.PairBatch`]; mixed at will, and
            weighted with `loss_weights`.
        psi (`str`, *optional*):
            \\(\Psi\\) of `loss_type="psipo"`: `"identity"` (IPO), `"logit"`, or a dotted path to a non-decreasing
            function of a probability.
        logp_reduction (`str`, *optional*):
            `"sum"` or `"mean"` over the scored tokens of a completion. `None`: the objective's own, a sum, but the
            mean for `simpo`; TRL's names keep TRL's.
        preference_prob_column (`str`, *optional*):
            Column of the probability, in [0, 1], that the chosen completion is preferred. `None`: `1 -
            label_smoothing`.
        chosen_reward_column, rejected_reward_column (`str`, *optional*):
            Columns of the scores of the two completions, for the reward-aware losses.
        reward_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the difference of the two scores.
        sample_weight_column (`str`, *optional*):
            Column of non-negative weights of the pairs. The loss is the mean over the pairs of weight times loss.
        loss_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments per entry of `loss_type`, such as `{"psipo_logit": {"eps": 0.01}}`.
        callbacks (`list[str]`, *optional*):
            Dotted paths of [`~transformers.TrainerCallback`] classes to add to the trainer, made without arguments.
            One with an attribute `trainer`, such as `trl_ext.trainers.dpo.samples.SampledMetrics`, is given the
            trainer.
    """

    _VALID_DICT_FIELDS = [*_DPOConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    psi: str | None = field(
        default=None,
        metadata={"help": "Psi of loss_type 'psipo': 'identity', 'logit', or a dotted path."},
    )
    logp_reduction: str | None = field(
        default=None,
        metadata={
            "help": "'sum' or 'mean' over the scored tokens of a completion. Default: the objective's own; TRL's "
            "names keep TRL's."
        },
    )
    preference_prob_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the probability that the chosen completion is preferred. Default: 1 - label_smoothing."
        },
    )
    chosen_reward_column: str | None = field(
        default=None,
        metadata={"help": "Column of the score of the chosen completion, for the reward-aware losses."},
    )
    rejected_reward_column: str | None = field(
        default=None,
        metadata={"help": "Column of the score of the rejected completion, for the reward-aware losses."},
    )
    reward_scale: float = field(
        default=1.0,
        metadata={"help": "Factor on the difference of the scores of the chosen and the rejected completion."},
    )
    sample_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column of non-negative weights of the pairs."},
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Keyword arguments per entry of loss_type, such as \'{"psipo_logit": {"eps": 0.01}}\'.'},
    )
    callbacks: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted paths of TrainerCallback classes to add to the trainer."},
    )

    def __post_init__(self):
        super().__post_init__()
        for path in self.callbacks or []:
            import_path(path)
        self._check_columns()
        if self.logp_reduction not in (None, "sum", "mean"):
            raise ValueError(f"logp_reduction must be 'sum' or 'mean', got {self.logp_reduction!r}.")
        if (self.psi is None) == ("psipo" in self.loss_type):
            raise ValueError("psi and loss_type 'psipo' need each other; set both, or neither.")
        native, ours = self._split_losses()
        self._check_loss_kwargs(ours)
        self._check_label_smoothing(native, ours)
        if ours:
            self._check_ours(native, ours)
        elif self._takes_over or self.chosen_reward_column is not None:
            raise ValueError(
                "logp_reduction and the columns of probabilities, rewards and weights have no effect with loss_type "
                f"{self.loss_type}; remove them, or add a loss that reads them."
            )

    @property
    def _takes_over(self) -> bool:
        """Whether an option is set that TRL's implementation of its own names could not honour."""
        options = (self.logp_reduction, self.preference_prob_column, self.sample_weight_column)
        return any(option is not None for option in options)

    @property
    def _columns(self) -> dict[str, str]:
        """Columns of ours, by the key that they have in a batch."""
        columns = {
            "pair_prob": self.preference_prob_column,
            "pair_chosen_reward": self.chosen_reward_column,
            "pair_rejected_reward": self.rejected_reward_column,
            "pair_weight": self.sample_weight_column,
        }
        return {key: column for key, column in columns.items() if column is not None}

    def _split_losses(self) -> tuple[dict[str, list], list[PairLoss]]:
        """TRL's part of `loss_type` and `loss_weights`, and ours."""
        native: dict[str, list] = {"loss_type": [], "loss_weights": []}
        ours = []
        for name, weight in zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True):
            if name in TRL_LOSSES and (name == "sft" or not self._takes_over):
                native["loss_type"].append(name)
                native["loss_weights"].append(weight)
                continue
            entry, reduction = SAME_AS_TRL.get(name, (name, "mean" if name in MEAN_BY_DEFAULT else "sum"))
            if entry in TRL_LOSSES:
                raise ValueError(
                    f"loss_type {name!r} is TRL's and cannot take logp_reduction, preference_prob_column or "
                    f"sample_weight_column; only {sorted(SAME_AS_TRL)} of TRL's names can."
                )
            if name == "sigmoid_norm" and self.logp_reduction == "sum":
                raise ValueError(
                    "loss_type 'sigmoid_norm' is the mean over tokens and contradicts logp_reduction='sum'; use "
                    "'sigmoid' for the sum."
                )
            target: Callable | None
            if entry == "psipo":
                psi = lookup(self.psi or "", PSIS)
                loss, target = partial(psipo, psi), partial(psipo_target, psi)
            else:
                loss = lookup(entry, PREFERENCE_LOSSES, also=[*TRL_LOSSES, "psipo"])
                target = MARGIN_TARGETS.get(entry)
            mean = (self.logp_reduction or reduction) == "mean"
            ours.append(PairLoss(name, weight, loss, target, mean, entry))
        return native, ours

    def _check_columns(self):
        if (self.chosen_reward_column is None) != (self.rejected_reward_column is None):
            raise ValueError(
                "chosen_reward_column and rejected_reward_column must be set both or neither, got "
                f"{self.chosen_reward_column!r} and {self.rejected_reward_column!r}."
            )
        if not is_number(self.reward_scale):
            raise ValueError(f"reward_scale must be a finite number, got {self.reward_scale!r}.")

    def _check_loss_kwargs(self, ours):
        options = self.loss_kwargs
        if not isinstance(options, dict | None) or not all(isinstance(v, dict) for v in (options or {}).values()):
            raise ValueError(
                "loss_kwargs must map entries of loss_type to mappings of option to value, such as "
                f"{{'psipo_logit': {{'eps': 0.01}}}}, got {options!r}."
            )
        active = {loss.name: loss for loss in ours}
        for name, values in (options or {}).items():
            if name not in active:
                raise ValueError(
                    f"loss_kwargs is for {name!r}, which is not among the losses of trl_ext in loss_type "
                    f"({sorted(active)})."
                )
            _, *known = inspect.signature(active[name].loss).parameters.values()
            if any(option.kind is option.VAR_KEYWORD for option in known):
                continue
            names = sorted(option.name for option in known)
            for key, value in values.items():
                if key not in names:
                    raise ValueError(f"loss_kwargs has no {key!r} for {name!r}; it takes {names}.")
                if active[name].entry in {*PREFERENCE_LOSSES, "psipo"} and not is_number(value):
                    raise ValueError(f"loss_kwargs {key!r} of {name!r} must be a finite number, got {value!r}.")

    def _check_label_smoothing(self, native, ours):
        names = {*native["loss_type"]}
        if self.label_smoothing == 0.0 or names & READS_LABEL_SMOOTHING:
            return
        if ours and not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {self.label_smoothing}.")
        for loss in ours:
            if loss.entry in PREFERENCE_LOSSES and loss.entry not in READS_PROB:
                raise ValueError(f"label_smoothing is not read by loss_type {loss.name!r}; set it to 0.")
        for name in sorted(names & SAME_AS_TRL.keys()):
            entry, reduction = SAME_AS_TRL[name]
            mean = " and logp_reduction 'mean'" if reduction == "mean" else ""
            purpose = "conservative DPO" if name == "sigmoid" else "soft labels"
            warnings.warn(
                f"TRL ignores label_smoothing with loss_type {name!r}. For {purpose} use loss_type {entry!r}{mean} "
                "(the same loss with soft labels).",
                stacklevel=4,
            )

    def _check_ours(self, native, ours):
        entries = {loss.entry for loss in ours}
        custom = {entry for entry in entries if entry not in PREFERENCE_LOSSES and entry != "psipo"}
        if not self.beta > 0.0:
            raise ValueError(f"beta must be positive, got {self.beta}.")
        if self.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} is not available with the losses of trl_ext "
                f"({sorted(loss.name for loss in ours)}), which are defined for 'reverse_kl'."
            )
        if "sft" in native["loss_type"]:
            for option, active in (
                ("sample_weight_column", self.sample_weight_column is not None),
                ("use_weighting", self.use_weighting),
            ):
                if active:
                    raise ValueError(f"loss_type 'sft' is TRL's, which cannot weight it; remove it or {option}.")
        if self.preference_prob_column is not None and not entries & {*READS_PROB, "psipo", *custom}:
            raise ValueError(f"preference_prob_column is read by none of loss_type {self.loss_type}; remove it.")
        if self.chosen_reward_column is not None and not entries & {*READS_REWARDS, *custom}:
            raise ValueError(f"The reward columns are read by none of loss_type {self.loss_type}; remove them.")
        for loss in ours:
            if loss.entry in READS_REWARDS and self.chosen_reward_column is None:
                raise ValueError(
                    f"loss_type {loss.name!r} compares scores of the two completions; set chosen_reward_column and "
                    "rejected_reward_column."
                )
            name = self.psi or "" if loss.entry == "psipo" else loss.entry.removeprefix("psipo_")
            psi = lookup(name, PSIS) if loss.entry == "psipo" or name in PSIS else None
            if psi is not None and self.preference_prob_column is None:
                slope = psi(torch.tensor(1.0)) - psi(torch.tensor(0.0))
                if not torch.as_tensor(slope).isfinite():
                    raise ValueError(
                        f"loss_type {loss.name!r} needs preference_prob_column: its Ψ is infinite at 0 or 1, and with "
                        "hard labels E[Ψ(label)] = Ψ(0) + (Ψ(1) - Ψ(0))·p, so a finite Ψ collapses to IPO and an "
                        "infinite one diverges. Without probabilities use 'psipo_identity'."
                    )
            if loss.entry in {*PREFERENCE_LOSSES, "psipo"}:  # the loss itself knows which values it takes
                one = torch.ones(1)
                pair = PairBatch(one, one, one, one, one, one, prob=one / 2, beta=self.beta, reward_margin=one)
                loss.loss(pair, **self._kwargs_of(loss))
        if self._reference_free:
            for option in ("precompute_ref_log_probs", "sync_ref_model"):
                if getattr(self, option):
                    raise ValueError(f"{option} has no effect: loss_type {self.loss_type} reads no reference model.")

    def _kwargs_of(self, loss: PairLoss) -> dict[str, Any]:
        return self.loss_kwargs.get(loss.name, {}) if isinstance(self.loss_kwargs, dict) else {}

    @property
    def _reference_free(self) -> bool:
        native, ours = self._split_losses()
        return bool(ours) and {*native["loss_type"]} <= {"sft"} and {loss.entry for loss in ours} <= REFERENCE_FREE
