"""The KL penalty inside TRL's GRPO trainer: its options, the parent's product and the exact KL."""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from ...functional.kl import KL_ESTIMATORS
from ...lookup import lookup
from ...upstream import UpstreamChanged

RIGHT_ESTIMATOR = {"loss": "k3", "reward": "k1"}


def kl_choice(config: Any) -> tuple[str | None, Any]:
    """
    Placement and estimator in force, with what is unset filled in; both `None` with TRL's own KL.

    Args:
        config ([`GRPOConfig`]):
            A config, possibly TRL's own, which has none of the options.
    """
    estimator, placement = getattr(config, "kl_estimator", None), getattr(config, "kl_placement", None)
    if estimator is None and placement is None:
        return None, None
    placement = placement or "loss"
    return placement, estimator or RIGHT_ESTIMATOR[placement]


def check_kl(config: Any) -> None:
    """Refuses options of a [`GRPOConfig`] that do nothing or the wrong thing, and warns about questionable ones."""
    if config.kl_estimator is None and config.kl_placement is None:
        if config.kl_target is not None:
            raise ValueError(
                "kl_target adapts the beta of our KL; set kl_estimator or kl_placement too, or remove it."
            )
        if config.advantage_estimator == "reinforce_plus_plus" and config.beta != 0.0:
            _warn(
                "REINFORCE++ (arXiv 2501.03262, Eq. 4) puts k1 in the reward; with kl_placement unset the KL stays in "
                "TRL's loss."
            )
    else:
        if config.beta == 0.0:
            raise ValueError(
                "kl_estimator/kl_placement have no effect with beta=0.0: TRL loads no reference model. Set beta > 0 "
                "or remove them."
            )
        if not config.beta > 0.0:
            raise ValueError(f"beta must be positive, got {config.beta}.")
        if config.kl_placement not in (None, "loss", "reward"):
            raise ValueError(f"kl_placement must be 'loss' or 'reward', got {config.kl_placement!r}.")
        placement, name = kl_choice(config)
        if name != "exact":
            lookup(name, KL_ESTIMATORS, also=["exact"])
        if placement == "loss":
            _check_kl_in_loss(config, name)
        else:
            _check_kl_in_reward(config, name)
    _check_controller(config)


def _check_kl_in_loss(config: Any, name: str) -> None:
    corrected = config.use_bias_correction_kl
    if name == "k1" and not corrected:
        raise ValueError(
            "kl_estimator='k1' in the loss with use_bias_correction_kl=False has an expected gradient of zero: noise, "
            "no penalty. Use 'k2' or 'k3', keep use_bias_correction_kl=True, or set kl_placement='reward'."
        )
    plugin = config.deepspeed_plugin
    sharded = config.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if name == "exact" and (sharded or (plugin is not None and plugin.zero_stage == 3)):
        raise ValueError(
            "kl_estimator='exact' reads the weight of the LM head outside the model's forward, where FSDP and "
            "DeepSpeed ZeRO-3 keep only a part of it on each process. Use 'k2' or 'k3', or DDP or ZeRO-2."
        )
    if name == "k1":
        _warn(
            "kl_estimator='k1' in the loss is unbiased but has several times the gradient variance of 'k2' and 'k3', "
            "whose gradient is the same in expectation."
        )
    if name == "k3" and not corrected:
        _warn(
            "kl_estimator='k3' with use_bias_correction_kl=False minimises the forward KL(ref‖policy), not "
            "KL(policy‖ref)."
        )
    if name == "k2" and not corrected and config._rollouts_reused:
        _warn(
            "kl_estimator='k2' without use_bias_correction_kl is biased when rollouts are reused (num_iterations or "
            "steps_per_generation)."
        )
    if config.importance_sampling_level == "sequence":
        _warn(
            "The KL keeps the token-level ratio; TRL's own path would use the sequence ratio, whose KL gradient is "
            "not that of KL(policy‖ref)."
        )


def _check_kl_in_reward(config: Any, name: str) -> None:
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
    if config.advantage_estimator is None:
        raise ValueError(
            "kl_placement='reward' changes the advantages, so advantage_estimator must be set; 'group_relative' is "
            "TRL's own normalisation."
        )
    if name != "k1":
        _warn(
            f"{name!r} is used as a reward penalty. Its gradient is that of the KL only if its value is "
            "log(policy/ref) per token."
        )


def _check_controller(config: Any) -> None:
    if config.kl_target is None:
        for option in ("kl_horizon", "kl_target_unit"):
            if getattr(config, option) is not None:
                raise ValueError(f"{option} is read only with kl_target; set that too, or remove it.")
        return
    for option in ("kl_target", "kl_horizon"):
        value = getattr(config, option)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{option} must be a positive number, got {value!r}.")
    if config.kl_target_unit not in (None, "token", "sequence"):
        raise ValueError(f"kl_target_unit must be 'token' or 'sequence', got {config.kl_target_unit!r}.")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)


class BetaTimes(float):
    """
    `beta` for the time of one loss. TRL's loss multiplies it by its own KL per token in exactly one place; that
    product is answered with `beta` times another KL, so that TRL's masks, aggregation and metrics stay in force for
    every `loss_type` and nothing of them is copied. `penalties` keeps what was answered: anything but one entry means
    that TRL has changed.

    Args:
        beta (`float`):
            Coefficient of the KL.
        per_token_kl (`Callable`):
            Gives the KL per token, `(B, T)`, in nats, when the product is asked for.
    """

    _per_token_kl: Callable[[], torch.Tensor]
    penalties: list[torch.Tensor]

    def __new__(cls, beta: float, per_token_kl: Callable[[], torch.Tensor]) -> "BetaTimes":
        self = super().__new__(cls, beta)
        self._per_token_kl, self.penalties = per_token_kl, []
        return self

    def _times(self, theirs: torch.Tensor) -> torch.Tensor:
        ours = self._per_token_kl()
        if theirs.shape != ours.shape:
            raise UpstreamChanged(f"beta is multiplied by a tensor of shape {tuple(theirs.shape)} in the loss")
        self.penalties.append(ours)
        return float(self) * ours

    def __mul__(self, other):
        return self._times(other) if isinstance(other, torch.Tensor) else float(self) * other

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__):
            beta, tensor = sorted(args, key=lambda arg: isinstance(arg, torch.Tensor))
            return beta._times(tensor)
        return func(*(float(arg) if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


class Head(NamedTuple):
    """What turns the last hidden states of a causal language model into logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    in_float32: bool


def _base_model(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def lm_head(model: torch.nn.Module) -> Head:
    """The LM head of an unwrapped model, with the scale and softcap that TRL's fused head has read from its config."""
    base: Any = _base_model(model)
    values = inspect.getclosurevars(base.forward).nonlocals
    try:
        scale, softcap = values["logit_scale"], values["final_logit_softcapping"]
        in_float32 = values["cast_lm_head_to_fp32"]
    except KeyError as error:
        raise UpstreamChanged(f"add_fused_lm_head has no {error}") from error
    head = base.get_output_embeddings()
    return Head(head.weight, head.bias, scale, softcap, in_float32)


@contextmanager
def last_hidden_states(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states `(B, positions, H)` of every forward of an unwrapped model inside the block."""
    collected: list[torch.Tensor] = []
    handle = _base_model(model).base_model.register_forward_hook(
        lambda module, inputs, output: collected.append(output.last_hidden_state)
    )
    try:
        yield collected
    finally:
        handle.remove()


def exact_kl(
    hidden: torch.Tensor, head: Head, ref_hidden: torch.Tensor, ref_head: Head, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    r"""
    KL(policy‖reference) of the next-token distributions, summed over the whole vocabulary, without logits in memory:

    $$ \sum_v \pi(v\mid s_t)\,\log\frac{\pi(v\mid s_t)}{\pi_{\mathrm{ref}}(v\mid s_t)} $$

    Args:
        hidden, ref_hidden (`torch.Tensor` of shape `(B, T, H)`):
            Hidden states from which each completion token is predicted, of policy (with graph) and reference.
        head, ref_head ([`Head`]):
            Their LM heads.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero for trainable tokens; the others are not computed.
        temperature (`float`):
            Divides the logits of both.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32: nats, with the pathwise gradient; 0 where `mask` is 0.
    """
    trainable = mask.bool()
    hidden, ref_hidden = hidden[trainable], ref_hidden[trainable]
    if head.in_float32:
        hidden, ref_hidden = hidden.float(), ref_hidden.float()
    with torch.autocast(hidden.device.type, enabled=False) if head.in_float32 else nullcontext():
        divergence, _ = ChunkedDivergenceFunction.apply(
            hidden,
            head.weight,
            head.bias,
            ref_hidden,
            ref_head.weight,
            ref_head.bias,
            1.0,  # TRL's name for the reverse KL
            temperature,
            head.logit_scale,
            head.softcap,
            ref_head.logit_scale,
            ref_head.softcap,
        )
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(trainable, divergence)
