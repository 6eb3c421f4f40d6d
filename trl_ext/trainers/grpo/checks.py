"""What is refused, or warned about, before a model loads. `options` is a [`GRPOConfig`] seen through `Options`."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...functional.advantages import ADVANTAGE_ESTIMATORS, Estimator
from ...functional.rewards import RewardBatch
from ...lookup import import_path, lookup
from ...rewards import ProcessRewardModel
from ...rewards.step_format import refuse_escapes
from ..input_checks import column_names, datasets_of, quoted, require_columns, require_texts, warn_user
from .reward_calls import STEP_COLUMNS

DEFAULT_ESTIMATOR = {"loss": "k3", "reward": "k1", "sequence": "exact"}  # of the KL, by placement
TEXT_OPTIONS = ("advantage_estimator", "kl_estimator", "kl_placement", "kl_target_unit", "step_ends_function")
FIELDS_OF_ESTIMATORS = ("process_weight", "outcome_weight")  # options of an estimator that are fields of the config
NEEDS_CRITIC = "advantage_estimator={!r} needs a critic. Use trl_ext.PPOConfig and PPOTrainer."


def estimator_row(name: str) -> Estimator:
    """The row of an entry, or one for the function at a dotted path, of which nothing is known."""
    found = lookup(name, ADVANTAGE_ESTIMATORS, option="advantage_estimator")
    return found if isinstance(found, Estimator) else Estimator(found, per_token=None, steps="added")


def kl_choice(options: Any) -> tuple[str | None, str | None]:
    """Placement and estimator in force, with what is unset filled in; both `None` with TRL's own KL."""
    if options.kl_estimator is None and options.kl_placement is None:
        return None, None
    placement = options.kl_placement or "loss"
    return placement, options.kl_estimator or DEFAULT_ESTIMATOR.get(placement, "k3")


def names_of(wanted: Callable[[Estimator], bool]) -> str:
    """The entries whose row is as wanted, as they stand in a sentence."""
    return quoted(name for name, row in ADVANTAGE_ESTIMATORS.items() if wanted(row))


def refuse_without(options: Any, names: list[str], needed: str) -> None:
    """Refuses options that are read only together with another one."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is read only with {needed}; set that too, or remove it.")


def check_texts(options: Any) -> None:
    """Refuses anything but a text where one is meant; YAML reads `false`, `no` and `off` as a truth value."""
    for name in TEXT_OPTIONS:
        value = getattr(options, name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r}. Leave it out for TRL's own.")


# Advantages


def check_num_generations(options: Any) -> None:
    """Refuses one completion per prompt where completions are compared."""
    name = options.advantage_estimator
    if estimator_row(name).siblings:
        raise ValueError(
            f"advantage_estimator={name!r} compares completions of one prompt and needs num_generations >= 2, got 1. "
            f"These accept 1: {names_of(lambda row: not row.siblings and not row.values)}."
        )


def check_advantages(options: Any) -> None:
    """Refuses options of the advantage estimator that do nothing or the wrong thing."""
    row = check_estimator(options)
    if row is None:
        return
    if options.scale_rewards != "group":
        raise ValueError(
            f"scale_rewards={options.scale_rewards!r} is not read when advantage_estimator is set. For 'none' use "
            "advantage_estimator='group_mean'; for 'batch' leave advantage_estimator unset."
        )
    if options.multi_objective_aggregation == "normalize_then_sum":
        raise ValueError(
            "advantage_estimator works on the weighted sum of the rewards; "
            "multi_objective_aggregation='normalize_then_sum' is not available with it."
        )
    if row.per_token:
        refuse_per_token(options)


def check_estimator(options: Any) -> Estimator | None:
    """The same of those options that every trainer has. Returns the row of the estimator, if one is set."""
    name = options.advantage_estimator
    if name is None:
        refuse_without(options, ["advantage_kwargs", "reward_clip_range"], "advantage_estimator")
        return None
    row = estimator_row(name)
    if row.values and not options._makes_critic:
        raise ValueError(NEEDS_CRITIC.format(name))
    _check_estimator_options(name, row, options)
    needed = row.completions(**(options.advantage_kwargs or {})) if row.completions is not None else 1
    if options.num_generations < needed:
        raise ValueError(
            f"advantage_estimator={name!r} with advantage_kwargs={options.advantage_kwargs} needs num_generations >= "
            f"{needed}, got {options.num_generations}."
        )
    _check_clip_range(options.reward_clip_range)
    if row.on_policy and options._rollouts_reused:
        warn_user(f"{name!r} is derived for exactly on-policy updates; rollouts are reused here.")
    return row


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether an estimator has an option `name`."""
    return name in _options_of(function) or (name in FIELDS_OF_ESTIMATORS and name in _parameters(function))


def _row_takes(option: str, row: Estimator) -> bool:
    return takes(row.function, option)


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [*inspect.signature(function).parameters][1:]


def _options_of(function: Callable[..., Any]) -> list[str]:
    """Options that `advantage_kwargs` may hold: those that are no fields of the config."""
    return sorted(name for name in _parameters(function) if name not in FIELDS_OF_ESTIMATORS)


def _check_estimator_options(name: str, row: Estimator, options: Any) -> None:
    given = options.advantage_kwargs
    if not isinstance(given, dict | None):
        raise ValueError(f"advantage_kwargs must be a mapping of option to value, got {given!r}.")
    parameters = inspect.signature(row.function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        allowed = _options_of(row.function)
        for key in given or {}:
            if key not in allowed:
                raise ValueError(f"advantage_kwargs has no {key!r} for {name!r}; it takes {allowed}.")
    if name in ADVANTAGE_ESTIMATORS:
        # The estimator itself knows which values it takes: ask it, on two completions of one token.
        one, rewards = torch.ones(2, 1), torch.tensor([[0.0], [1.0]])
        steps = {"steps": rewards, "steps_scored": one.bool()} if row.steps == "needed" else {}
        extras = {
            "baseline": torch.zeros(2) if row.baseline else None,
            "values": torch.zeros(2, 2) if row.values else None,
        }
        row.function(RewardBatch(rewards, one.bool(), one, 2, **steps, **extras), **given or {})


def _check_clip_range(clip_range: Any) -> None:
    if clip_range is None:
        return
    try:
        low, high = clip_range
        ordered = low < high
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise ValueError(f"reward_clip_range must be two numbers, the lower one first, got {clip_range!r}.")


def refuse_per_token(options: Any) -> None:
    """Refuses what would silently change its meaning with one advantage per token."""
    name = options.advantage_estimator
    if options.importance_sampling_level == "sequence":
        raise ValueError(
            f"advantage_estimator={name!r} gives one advantage per token, but importance_sampling_level='sequence' "
            "uses one ratio per completion: its gradient is that of the mean advantage, so the per-token signal "
            "vanishes. Use 'token'."
        )
    for option, active in (
        ("loss_type='vespo'", options.loss_type == "vespo"),
        ("off_policy_mask_threshold", options.off_policy_mask_threshold is not None),
    ):
        if active:
            raise ValueError(
                f"{option} reads the sign of one advantage per completion and is not available with "
                f"advantage_estimator={name!r}."
            )


# Steps


def check_cuts(options: Any) -> None:
    """Refuses options that say where steps end and cannot be honoured."""
    if not isinstance(options.step_separator, str) or not options.step_separator:
        raise ValueError(f"step_separator must be a text of at least one character, got {options.step_separator!r}.")
    refuse_escapes("step_separator", options.step_separator)
    if options.step_ends_function is not None:
        import_path(options.step_ends_function, "step_ends_function")
        if options.step_separator != "\n":
            raise ValueError(
                "step_ends_function finds the steps by itself, so step_separator is not read. Remove one."
            )


def check_steps(options: Any) -> None:
    """Refuses options for rewards of steps that cannot be honoured."""
    name = options.advantage_estimator
    check_cuts(options)
    for option, default in (("step_separator", "\n"), ("step_ends_function", None)):
        if name is None and getattr(options, option) != default:
            raise ValueError(f"{option} is read only with advantage_estimator; set that too, or remove it.")
    row = None if name is None else estimator_row(name)
    for option in FIELDS_OF_ESTIMATORS:
        weight = getattr(options, option)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"{option} must be a number, got {weight!r}. Use 0 to leave a source out.")
        if weight != 1.0 and not (row is not None and takes(row.function, option)):
            raise ValueError(
                f"{option} is read only with an advantage_estimator that takes it: "
                f"{names_of(partial(_row_takes, option))}."
            )
    if options.process_reward_model is not None:
        ProcessRewardModel.from_options(options.process_reward_model)
        if row is None or row.steps == "refused":
            raise ValueError(
                f"process_reward_model gives one reward per step, which advantage_estimator={name!r} cannot use. Use "
                f"{names_of(lambda row: row.steps == 'needed')}."
            )


# Data


def makes_own_prompts(given: dict[str, Any]) -> bool:
    """A rollout_func or environment may use other prompts, so the prompt column is not checked."""
    return given.get("environment_factory") is not None or given.get("rollout_func") is not None


def check_given(given: dict[str, Any], options: Any) -> None:
    """Refuses arguments of the trainer that its options cannot work with."""
    name = options.advantage_estimator
    if name is not None and estimator_row(name).baseline:
        for argument in ("environment_factory", "rollout_func"):
            if given.get(argument) is not None:
                raise ValueError(
                    f"advantage_estimator={name!r} generates a greedy answer of its own, which {argument} does not "
                    f"offer. Use {names_of(lambda row: not (row.siblings or row.baseline or row.values))}."
                )
    check_data(given, options)


def check_data(given: dict[str, Any], options: Any, tokenizer: Any = None) -> None:
    """Refuses data sets that cannot be trained on; with the tokenizer, also texts without a token."""
    for name in ("train_dataset", "eval_dataset"):
        for dataset in datasets_of(given.get(name)):
            for column in STEP_COLUMNS if options.advantage_estimator is not None else ():
                if column in column_names(dataset):
                    raise ValueError(
                        f"{name} has a column {column!r}, the name under which reward functions are given the steps "
                        "with advantage_estimator. Rename the column."
                    )
            if not makes_own_prompts(given):
                require_columns(dataset, name, ["prompt"])
                require_texts(dataset, name, ["prompt"], tokenizer)
