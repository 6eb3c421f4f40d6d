"""What is refused of a reference that moves, in one sentence, before a model loads."""

from typing import Any

from accelerate.utils import is_peft_model

from .input_checks import is_number, quoted
from .shared_prefix import INSTEAD_OF_FSDP1, flat_sharding

ADAPTER = "ref"  # the name under which TRL looks for a reference
_TRIGGERS = "ref_refresh_steps or ref_refresh_kl"
# Optimisers whose state is not, or not only, where torch's have it.
_NOT_EMPTIED = ("galore", "apollo", "lomo", "schedule_free")


def refreshes(options: Any) -> bool:
    """Whether a config, seen through `Options`, asks for a reference that moves."""
    return options.ref_refresh_steps is not None or options.ref_refresh_kl is not None


def check_reference(options: Any, pairs: bool = False) -> None:
    """Refuses options that cannot be honoured. `pairs`: of a trainer of pairs, whose log-ratios are no KL."""
    if pairs and options.ref_refresh_kl is not None:
        raise ValueError(
            "ref_refresh_kl needs a KL, and the log-ratios of pairs are none: the completions were not sampled from "
            "the policy. Use ref_refresh_steps."
        )
    _check_values(options)
    if not refreshes(options):
        for name in ("ref_refresh_alpha", "ref_refresh_optimizer", "ref_total_kl"):
            if getattr(options, name) not in (None, False):
                raise ValueError(f"{name} is read only with {_TRIGGERS}; set one of them, or remove it.")
        return
    if not pairs and options.beta == 0.0:
        raise ValueError("beta=0.0 uses no reference, so there is none to refresh. Set beta, or remove ref_refresh_*.")
    if options.sync_ref_model:
        raise ValueError("ref_refresh_* and sync_ref_model both move the reference. Remove one.")
    if options.precompute_ref_log_probs:
        raise ValueError(
            "precompute_ref_log_probs asks the first reference once and for all, and ref_refresh_* moves it. Remove "
            "one."
        )
    if flat_sharding(options):
        raise ValueError(
            "ref_refresh_* copies weights one by one, and FSDP1 keeps a part of one flat row of numbers. "
            f"{INSTEAD_OF_FSDP1}."
        )
    if options.ref_refresh_optimizer:
        _check_optimizer(options)


def _check_values(options: Any) -> None:
    steps, kl, alpha = options.ref_refresh_steps, options.ref_refresh_kl, options.ref_refresh_alpha
    if steps is not None and not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1):
        raise ValueError(f"ref_refresh_steps must be a whole number >= 1, got {steps!r}.")
    if kl is not None and not (is_number(kl) and kl > 0.0):
        raise ValueError(f"ref_refresh_kl must be a positive number, in nats per token, got {kl!r}.")
    if alpha is not None and not (is_number(alpha) and 0.0 < alpha <= 1.0):
        raise ValueError(f"ref_refresh_alpha must be a number in (0, 1], got {alpha!r}.")
    for name in ("ref_refresh_optimizer", "ref_total_kl"):
        if getattr(options, name) not in (None, False, True):
            raise ValueError(f"{name} must be true or false, got {getattr(options, name)!r}.")


def _check_optimizer(options: Any) -> None:
    name = str(getattr(options.optim, "value", options.optim))
    engine = "DeepSpeed" if options.deepspeed_plugin is not None else None
    if other := engine or next((f"optim={name!r}" for kind in _NOT_EMPTIED if kind in name), None):
        raise ValueError(
            f"ref_refresh_optimizer empties the state of an optimizer of torch's kind, and {other} keeps its own "
            "elsewhere. Remove one."
        )


def check_policy(options: Any, given: dict[str, Any]) -> None:
    """Refuses adapters of which no second one can be the reference. `given`: the arguments of a trainer."""
    model: Any = given.get("model")
    config = given.get("peft_config")
    if not isinstance(model, str | None) and is_peft_model(model):
        if ADAPTER in model.peft_config:
            raise ValueError(
                f"The policy has an adapter {ADAPTER!r} already, which is the name of the reference's; rename it, or "
                "remove ref_refresh_*."
            )
        if "default" not in model.peft_config:
            raise ValueError(
                f"The policy's adapter must be called 'default', as TRL wants it; it has "
                f"{quoted(model.peft_config)}. Load it without adapter_name."
            )
        config = model.peft_config["default"]
    if config is None:
        return
    if given.get("ref_model") is not None:
        raise ValueError(
            "ref_refresh_* copies the policy into the reference, and a policy with an adapter cannot be copied into "
            "ref_model. Do not pass ref_model."
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"ref_refresh_* keeps the reference as a second adapter, which {type(config).__name__} cannot have. Use "
            "LoRA, or train without an adapter."
        )
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(
            f"ref_refresh_* keeps the reference as a second adapter, and bias={bias!r} trains biases of the base "
            "model, which both would share. Use bias='none'."
        )
    if options.use_vllm and (whole := getattr(config, "modules_to_save", None)):
        raise ValueError(
            "ref_refresh_* keeps the reference as a second adapter, whose copies of modules_to_save="
            f"{sorted(whole)} TRL would send to vLLM, which has no such weights. Leave one of them out."
        )
    if options.ref_refresh_alpha not in (None, 1.0):
        raise ValueError(
            f"ref_refresh_alpha={options.ref_refresh_alpha} needs a policy without an adapter: a mixture of the "
            "factors of two adapters is no mixture of what they do. Use 1.0."
        )
