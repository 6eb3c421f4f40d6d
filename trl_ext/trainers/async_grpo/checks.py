"""
What is refused, or warned about, before a model loads. `options` is an [`AsyncGRPOConfig`] seen through `Options`; the
checks of GRPO hold as far as they can.
"""

import math
from typing import Any

from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from ...functional.advantages import ADVANTAGE_ESTIMATORS, Estimator
from ...functional.kl import KL_ESTIMATORS
from ...lookup import lookup
from ..grpo.checks import DEFAULT_ESTIMATOR, check_estimator, estimator_row, names_of, refuse_without
from ..grpo.kl_checks import K1_IN_LOSS, check_controller, check_kl_in_reward
from ..input_checks import is_number, warn_user


def row_in_halves(name: str) -> Estimator:
    """The row of an estimator that says what is done within a prompt; a function at a dotted path is all of that."""
    row = estimator_row(name)
    return row if name in ADVANTAGE_ESTIMATORS else row._replace(within=row.function)


def kl_choice(options: Any) -> tuple[str | None, str | None]:
    """Placement and estimator in force; both `None` without a KL."""
    if not options.beta:
        return None, None
    placement = options.kl_placement or "loss"
    return placement, options.kl_estimator or DEFAULT_ESTIMATOR.get(placement, "k3")


def check_advantages(options: Any) -> None:
    """As for GRPO; and refuses estimators that have no half within a prompt, and what only whole batches know."""
    name = options.advantage_estimator
    if check_estimator(options) is None:
        return
    row = row_in_halves(name)
    if row.within is None:
        raise ValueError(
            f"advantage_estimator={name!r} is not available with AsyncGRPOTrainer, which scores one prompt at a time "
            f"and samples nothing else. These are: {names_of(lambda row: row.within is not None)}."
        )
    if row.across is not None and (options.advantage_kwargs or {}).get("discount", "trainable") != "trainable":
        raise ValueError(
            "advantage_kwargs: discount='all' counts the tokens of tools too, of which AsyncGRPOTrainer keeps none. "
            "Use 'trainable'."
        )


def check_reward_weights(options: Any) -> None:
    """Refuses weights that are no numbers, or that nothing reads."""
    weights = options.reward_weights
    if weights is None:
        return
    if options.advantage_estimator is None:
        raise ValueError(
            "reward_weights is read only with advantage_estimator: without it TRL's trainer adds the rewards up. Set "
            "that too, or remove it."
        )
    if not isinstance(weights, list | tuple) or not all(map(is_number, weights)):
        raise ValueError(f"reward_weights must be a list of numbers, one for each reward function, got {weights!r}.")


def check_kl(options: Any) -> None:
    """Refuses options of the KL that do nothing or the wrong thing, and warns about questionable ones."""
    if not is_number(options.beta) or options.beta < 0.0:
        raise ValueError(f"beta must be a finite number >= 0, got {options.beta!r}.")
    placement, estimator = kl_choice(options)
    if placement is None or estimator is None:
        refuse_without(options, ["kl_estimator", "kl_placement", "kl_target", "kl_horizon", "kl_target_unit"], "beta")
        return
    if placement not in ("loss", "reward"):
        raise ValueError(f"kl_placement must be 'loss' or 'reward' with AsyncGRPOTrainer, got {placement!r}.")
    if estimator == "exact":
        raise ValueError(
            "kl_estimator='exact' reads logits, which AsyncGRPOTrainer does not keep. Use 'k2' or 'k3' in the loss, "
            "'k1' in the reward."
        )
    lookup(estimator, KL_ESTIMATORS, option="kl_estimator")
    name = options.advantage_estimator
    if placement == "reward":
        check_kl_in_reward(options, estimator)
        if row_in_halves(name).across is None:
            raise ValueError(
                f"advantage_estimator={name!r} needs the KL of all completions of a prompt where it scores them, "
                "before there is a reference. Use kl_placement='loss', or one of these: "
                f"{names_of(lambda row: row.across is not None)}."
            )
    elif estimator == "k1":
        warn_user(K1_IN_LOSS)
    if options.kl_placement is None and name is not None and estimator_row(name).kl_placement == "reward":
        warn_user(f"The paper of {name!r} puts k1 in the reward; with kl_placement unset the KL is in the loss.")
    check_controller(options)


def check_process_reward_model(options: Any) -> None:
    """Refuses a process-reward model that would silently run elsewhere than its options say."""
    if options.process_reward_model is not None and options.process_reward_model.get("device") != "cpu":
        raise ValueError(
            "process_reward_model: AsyncGRPOTrainer calls reward functions in a process without accelerator, where "
            "the model runs on the CPU. Say so with device: cpu, or pass a reward function that asks a server."
        )


def check_arguments(given: dict[str, Any], options: Any) -> None:
    """Refuses arguments of the trainer that the options cannot be honoured with."""
    if options.beta and given.get("peft_config") is None:
        raise ValueError(
            "beta > 0 needs a peft_config: the reference is the policy without its adapter. Pass one (use_peft: "
            "true), or use GRPOTrainer, which loads a reference model."
        )
    name = options.advantage_estimator
    if name is None:
        return
    worker = given.get("rollout_worker")
    if worker is not None and not isinstance(worker, AsyncRolloutWorker):
        raise ValueError(
            f"advantage_estimator={name!r} has no effect with a rollout_worker of type {type(worker).__name__}, which "
            "computes advantages itself. Use TRL's AsyncRolloutWorker or a subclass of it, or remove the option."
        )
    functions, environment = given.get("reward_funcs"), given.get("environment_factory")
    count = len(functions) if isinstance(functions, list) else int(functions is not None)
    count += options.process_reward_model is not None
    weights = options.reward_weights
    # What else rewards, an environment or somebody's rollout loop, is known in the rollout process only.
    if weights is not None and len(weights) != count and worker is None and environment is None:
        raise ValueError(f"reward_weights has {len(weights)} entries for {count} reward functions; give one for each.")
    row = row_in_halves(name)
    if row.steps == "needed" and not count and worker is None:
        raise ValueError(f"advantage_estimator={name!r} needs a reward function that returns one list per completion.")
    turns = (given.get("tools") or environment is not None) and options.max_tool_calling_iterations != 0
    gamma = (options.advantage_kwargs or {}).get("gamma", 1.0)
    if row.across is not None and turns and not math.isclose(gamma, 1.0):
        raise ValueError(
            f"advantage_kwargs: gamma={gamma!r} with tools or an environment: a conversation may become several "
            "training rows, and a reward-to-go ends with its row. Use gamma=1.0, or max_tool_calling_iterations=0."
        )
