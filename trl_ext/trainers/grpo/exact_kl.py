"""The KL over the whole vocabulary, from the last hidden states of policy and reference."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from ...upstream import UpstreamChanged


class Head(NamedTuple):
    """What turns the last hidden states of a causal language model into logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    in_float32: bool


def _base_model(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _captured(forward: Any) -> dict[str, Any]:
    """What TRL's fused head has captured of its arguments, below the wrappers that accelerate lays over a forward."""
    names = ("logit_scale", "final_logit_softcapping", "cast_lm_head_to_fp32")
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if inspect.isfunction(function):
            values = inspect.getclosurevars(function).nonlocals
            if all(name in values for name in names):
                return {name: values[name] for name in names}
        forward = getattr(forward, "__wrapped__", None)
    raise UpstreamChanged(f"no forward made by add_fused_lm_head has all of {', '.join(names)}")


def lm_head(model: torch.nn.Module) -> Head:
    """The LM head of an unwrapped model, with the scale and softcap that TRL's fused head has read from its config."""
    base: Any = _base_model(model)
    scale, softcap, in_float32 = _captured(base.forward).values()
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
