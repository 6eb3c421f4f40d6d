"""What is refused of the options of DPO and of `loss_type`, in one sentence, before a model loads."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ...functional.preference import PREFERENCE_LOSSES, PairBatch
from ..foreign import option
from ..input_checks import is_number, place_of, rows_of
from .losses import PSI_AND_LOSS, SAME_AS_TRL, TAKES_OVER, PairLoss, PairLosses, losses_with_psi


def check_columns(config: Any) -> None:
    """Refuses columns of scores, or a factor on them, that would not be read."""
    chosen, rejected, scale = (
        option(config, name) for name in ("chosen_reward_column", "rejected_reward_column", "reward_margin_scale")
    )
    if (chosen is None) != (rejected is None):
        raise ValueError(
            "chosen_reward_column and rejected_reward_column must be set both or neither, got "
            f"{chosen!r} and {rejected!r}."
        )
    if chosen is not None and chosen == rejected:
        raise ValueError(
            f"chosen_reward_column and rejected_reward_column are both {chosen!r}, so that every difference of scores "
            "is 0."
        )
    if not is_number(scale) or scale == 0.0:
        raise ValueError(f"reward_margin_scale must be a finite number and not 0, got {scale!r}.")
    if scale != 1.0 and chosen is None:
        raise ValueError(
            "reward_margin_scale is the factor on the difference of two scores; set chosen_reward_column and "
            "rejected_reward_column, or remove it."
        )


def check_loss_kwargs(config: Any) -> None:
    """Refuses `loss_kwargs` of another form than entry to option to value."""
    options = option(config, "loss_kwargs")
    if not isinstance(options, dict | None) or not all(isinstance(v, dict) for v in (options or {}).values()):
        raise ValueError(
            "loss_kwargs must map entries of loss_type to mappings of option to value, such as "
            f"{{'psipo_logit': {{'eps': 0.01}}}}, got {options!r}."
        )
    for name, given in (options or {}).items():
        if "psi" in given and (name not in PREFERENCE_LOSSES or PREFERENCE_LOSSES[name].psi):
            raise ValueError(
                f"psi is an option of its own and not one of loss_kwargs; write psi: {given['psi']} beside loss_type."
            )


def check_losses(config: Any, losses: PairLosses) -> None:
    """Refuses what the losses cannot honour, before a model loads."""
    names = [loss.name for loss in losses.ours]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"loss_type has {name!r} {names.count(name)} times; name it once, with the sum of its loss_weights."
            )
    if option(config, "psi") is not None and not any(loss.row.psi for loss in losses.ours):
        raise ValueError(PSI_AND_LOSS.format(losses_with_psi()))
    reads_reference = not losses.reference_free and not {*config.loss_type} <= {"sft"}
    if option(config, "ref_refresh_steps") is not None and not reads_reference:
        raise ValueError(f"ref_refresh_steps has no effect: loss_type {config.loss_type} reads no reference model.")
    _check_options(config, losses)
    _check_label_smoothing(config, losses)
    if not losses:
        if any(option(config, name) is not None for name in (*TAKES_OVER, "chosen_reward_column")):
            raise ValueError(
                "logp_reduction and the columns of probabilities, rewards and weights have no effect with loss_type "
                f"{config.loss_type}; remove them, or add a loss that reads them."
            )
        return
    _check_inherited(config, losses)
    _check_columns_are_read(config, losses)
    for loss in losses.ours:
        _check_one(config, loss)


def _check_options(config, losses):
    active = {loss.name: loss for loss in losses.ours}
    for name, values in (option(config, "loss_kwargs") or {}).items():
        if name not in active:
            raise ValueError(
                f"loss_kwargs is for {name!r}, which is not among the losses of trl_ext in loss_type "
                f"({sorted(active)})."
            )
        takes = active[name].takes()
        for key, value in values.items():
            if takes is not None and key not in takes:
                raise ValueError(f"loss_kwargs has no {key!r} for {name!r}; it takes {takes}.")
            if active[name].row.prob is not None and not is_number(value):
                raise ValueError(f"loss_kwargs {key!r} of {name!r} must be a finite number, got {value!r}.")


def _check_label_smoothing(config, losses):
    if config.label_smoothing == 0.0 or losses.hard_labels:
        return
    if losses and not 0.0 <= config.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {config.label_smoothing}.")
    for loss in losses.ours:
        if loss.row.prob is False:
            raise ValueError(f"label_smoothing is not read by loss_type {loss.name!r}; set it to 0.")
    for name in sorted({*losses.trls["loss_type"]} & SAME_AS_TRL.keys()):
        entry, reduction = SAME_AS_TRL[name]
        mean = " and logp_reduction 'mean'" if reduction == "mean" else ""
        purpose = "conservative DPO" if name == "sigmoid" else "soft labels"
        warnings.warn(
            f"TRL ignores label_smoothing with loss_type {name!r}. For {purpose} use loss_type {entry!r}{mean} "
            "(the same loss with soft labels).",
            stacklevel=5,
        )


def _check_inherited(config, losses):
    """Options of TRL's that our losses cannot take."""
    if not config.beta > 0.0:
        raise ValueError(f"beta must be positive, got {config.beta}.")
    if config.f_divergence_type != "reverse_kl":
        raise ValueError(
            f"f_divergence_type={config.f_divergence_type!r} is not available with the losses of trl_ext "
            f"({sorted(loss.name for loss in losses.ours)}), which are defined for 'reverse_kl'."
        )
    if "sft" in losses.trls["loss_type"]:
        weights = {
            "pair_weight_column": option(config, "pair_weight_column") is not None,
            "use_weighting": config.use_weighting,
        }
        for name, active in weights.items():
            if active:
                raise ValueError(f"loss_type 'sft' is TRL's, which cannot weight it; remove it or {name}.")
    if losses.reference_free:
        for name in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(config, name):
                raise ValueError(f"{name} has no effect: loss_type {config.loss_type} reads no reference model.")


def _check_columns_are_read(config, losses):
    rows = [loss.row for loss in losses.ours]
    if option(config, "preference_prob_column") is not None and all(row.prob is False for row in rows):
        raise ValueError(f"preference_prob_column is read by none of loss_type {config.loss_type}; remove it.")
    if option(config, "chosen_reward_column") is not None and all(row.scores is False for row in rows):
        raise ValueError(f"The reward columns are read by none of loss_type {config.loss_type}; remove them.")


def _check_one(config, loss):
    """A table's entry is asked itself which options it takes, with one pair; a user's function is left alone."""
    if loss.row.scores and option(config, "chosen_reward_column") is None:
        raise ValueError(
            f"loss_type {loss.name!r} compares scores of the two completions; set chosen_reward_column and "
            "rejected_reward_column."
        )
    if loss.row.prob is None:
        return
    loss(_pairs(config, [0.5]))
    if loss.row.prob and option(config, "preference_prob_column") is None:
        _check_hard_labels(loss, _pairs(config, [1.0]))
    if loss.name == "simpo" and config.beta == 0.1:
        warnings.warn(
            "loss_type 'simpo' with beta=0.1, which is TRL's default: SimPO's margin is one of means over the tokens, "
            "and its paper has 2 and more. Set beta.",
            stacklevel=5,
        )


def check_targets(config: Any, losses: PairLosses, dataset: Any, name: str) -> None:
    """Refuses a probability at which the target of a regression is infinite; rounded to float32, as in a batch."""
    column = option(config, "preference_prob_column")
    for loss in losses.ours:
        if column is None or not loss.row.prob or loss.row.target is None:
            continue
        first_row: dict[float, int] = {}
        for row, value in rows_of(dataset, column):
            first_row.setdefault(value, row)
        try:
            loss.target(_pairs(config, [*first_row]))
        except ValueError:
            for value, row in first_row.items():
                try:
                    loss.target(_pairs(config, [value]))
                except ValueError as error:
                    raise ValueError(f"Column {column!r} holds {value!r}{place_of(row, name)}: {error}") from None
            raise


def _pairs(config: Any, probs: list[float]) -> PairBatch:
    """Pairs about which nothing is known but their probabilities."""
    ones = torch.ones(len(probs))
    return PairBatch(ones, ones, ones, ones, ones, ones, torch.tensor(probs), beta=config.beta, reward_margin=ones)


def _check_hard_labels(loss: PairLoss, pair: PairBatch) -> None:
    psi = {"psi": loss.options["psi"]} if loss.row.psi else {}
    target: Callable | None = loss.row.target
    try:
        if target is not None:
            target(pair, **psi)  # without `eps`, which would hide a target that is chosen by the clamp
    except ValueError as error:
        raise ValueError(
            f"loss_type {loss.name!r} needs preference_prob_column: its Ψ is infinite at 0 or 1, and with hard labels "
            "E[Ψ(label)] = Ψ(0) + (Ψ(1) - Ψ(0))·p, so a finite Ψ collapses to IPO and an infinite one diverges. "
            "Without probabilities use 'psipo_identity'."
        ) from error
