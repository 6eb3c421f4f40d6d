"""What is refused, or warned about, of the KL before a model loads; as in `checks`."""

import math
from typing import Any

from ...functional.kl import KL_ESTIMATORS
from ...lookup import lookup
from ..input_checks import warn_user
from ..shared_prefix import INSTEAD_OF_FSDP1, flat_sharding, is_compiled
from .checks import DEFAULT_ESTIMATOR, estimator_row, kl_choice, refuse_without

K1_IN_LOSS = (
    "kl_estimator='k1' in the loss is unbiased but has several times the gradient variance of 'k2' and 'k3', whose "
    "gradient is the same in expectation."
)


def check_kl(options: Any) -> None:
    """Refuses options of the KL that do nothing or the wrong thing, and warns about questionable ones."""
    name = options.advantage_estimator
    placement, estimator = kl_choice(options)
    if placement is None or estimator is None:
        refuse_without(options, ["kl_target"], "kl_estimator or kl_placement")
        if name is not None and estimator_row(name).kl_placement == "reward" and options.beta != 0.0:
            warn_user(
                f"The paper of {name!r} puts k1 in the reward; with kl_placement unset the KL stays in TRL's loss."
            )
        check_controller(options)
        return
    if options.beta == 0.0:
        raise ValueError(
            "kl_estimator/kl_placement have no effect with beta=0.0: TRL loads no reference model. Set beta > 0 or "
            "remove them."
        )
    if not options.beta > 0.0:
        raise ValueError(f"beta must be positive, got {options.beta}.")
    if placement not in DEFAULT_ESTIMATOR:
        raise ValueError(f"kl_placement must be 'loss', 'reward' or 'sequence', got {placement!r}.")
    if estimator != "exact":
        lookup(estimator, KL_ESTIMATORS, also=["exact"], option="kl_estimator")
    checks = {"loss": _check_kl_in_loss, "reward": check_kl_in_reward, "sequence": _check_kl_of_completions}
    checks[placement](options, estimator)
    check_controller(options)


def _check_kl_in_loss(options: Any, name: str) -> None:
    corrected = options.use_bias_correction_kl
    if name == "k1" and not corrected:
        raise ValueError(
            "kl_estimator='k1' in the loss with use_bias_correction_kl=False has an expected gradient of zero: noise, "
            "no penalty. Use 'k2' or 'k3', keep use_bias_correction_kl=True, or set kl_placement='reward'."
        )
    if name == "exact":
        _check_exact(options, "kl_estimator='exact'", "Use")
    if name == "k1":
        warn_user(K1_IN_LOSS)
    if name == "k3" and not corrected:
        warn_user(
            "kl_estimator='k3' with use_bias_correction_kl=False minimises the forward KL(ref‖policy), not "
            "KL(policy‖ref)."
        )
    if name == "k2" and not corrected and options._rollouts_reused:
        warn_user(
            "kl_estimator='k2' without use_bias_correction_kl is biased when rollouts are reused (num_iterations or "
            "steps_per_generation)."
        )
    _warn_of_sequence_ratio(options)


def _warn_of_sequence_ratio(options: Any) -> None:
    if options.importance_sampling_level == "sequence":
        warn_user(
            "The KL keeps the token-level ratio; TRL's own path would use the sequence ratio, whose KL gradient is "
            "not that of KL(policy‖ref)."
        )


def _check_kl_of_completions(options: Any, name: str) -> None:
    if name != "exact":
        raise ValueError(
            "kl_placement='sequence' charges a token for the KL of later ones, which only 'exact' knows without the "
            f"noise of their sampling. Remove kl_estimator={name!r}, or use kl_placement='reward' with 'k1'."
        )
    if not options.use_bias_correction_kl:
        raise ValueError(
            "kl_placement='sequence' weights the KL of later tokens by the ratio of policy to sampler, without which "
            "its gradient is that of no KL where rollouts are reused. Remove use_bias_correction_kl=False."
        )
    _check_exact(options, "kl_placement='sequence'", "Use kl_placement='loss' with")
    _warn_of_sequence_ratio(options)
    if options.per_device_train_batch_size == 1 and options.world_size == 1:
        warn_user(
            "kl_placement='sequence' takes its baseline from the other completions of a micro-batch, and "
            "per_device_train_batch_size=1 leaves none: the same gradient on average, with more noise."
        )


def _check_exact(options: Any, what: str, instead: str) -> None:
    if flat_sharding(options):
        raise ValueError(
            f"{what} reads the weight of the LM head of the reference, which FSDP1 keeps as a part of one flat row of "
            f"numbers. {INSTEAD_OF_FSDP1}; or {instead[0].lower()}{instead[1:]} 'k2' or 'k3'."
        )
    if is_compiled(options):
        raise ValueError(
            f"{what} reads hidden states through a hook, which a compiled model leaves out. {instead} 'k2' or 'k3', "
            "or train without torch_compile and ACCELERATE_DYNAMO_BACKEND."
        )
    if options.sync_ref_model and options._rollouts_reused:
        raise ValueError(
            f"{what} reads hidden states and head of one reference, and sync_ref_model changes it between them when "
            "rollouts are reused (num_iterations or steps_per_generation). Use ref_refresh_steps, which moves it "
            "between generation batches."
        )


def check_kl_in_reward(options: Any, name: str) -> None:
    """Refuses estimators that are wrong in the reward, and advantages that cannot hold a KL."""
    if name in ("k2", "k3"):
        raise ValueError(
            f"kl_estimator={name!r} in the reward is a biased penalty that vanishes near the reference. Only 'k1' is "
            "right in the reward; use it, or kl_placement='loss'."
        )
    if name == "exact":
        raise ValueError(
            "kl_estimator='exact' in the reward has no gradient for its own token. Use kl_placement='loss' or "
            "kl_estimator='k1'."
        )
    if options.advantage_estimator is None:
        raise ValueError(
            "kl_placement='reward' changes the advantages, so advantage_estimator must be set; 'group_relative' is "
            "TRL's own normalisation."
        )
    if estimator_row(options.advantage_estimator).steps == "needed":
        raise ValueError(
            f"{options.advantage_estimator!r} normalises step rewards, and a KL penalty belongs to no step. Use "
            "kl_placement='loss'."
        )
    if name != "k1":
        warn_user(
            f"{name!r} is used as a reward penalty. Its gradient is that of the KL only if its value is "
            "log(policy/ref) per token."
        )


def check_controller(options: Any) -> None:
    """Refuses options of the adaptive `beta` that do nothing or the wrong thing."""
    if options.kl_target is None:
        refuse_without(options, ["kl_horizon", "kl_target_unit"], "kl_target")
        return
    for option in ("kl_target", "kl_horizon"):
        value = getattr(options, option)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{option} must be a positive number, got {value!r}.")
    if options.kl_target_unit not in (None, "token", "sequence"):
        raise ValueError(f"kl_target_unit must be 'token' or 'sequence', got {options.kl_target_unit!r}.")
