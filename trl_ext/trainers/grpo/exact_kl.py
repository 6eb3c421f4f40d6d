"""The KL over the whole vocabulary, from the last hidden states of policy and reference."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from ...packed.forward import shared_prefix_of
from ...sharded import whole
from ...upstream import fused_head


class Head(NamedTuple):
    """What turns the last hidden states of a causal language model into logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    in_float32: bool

    def whole(self) -> "Head":
        """With all of the weight where each process holds a part. Entered by all processes alike."""
        return self._replace(weight=whole(self.weight), bias=whole(self.bias))


def _base_model(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def lm_head(model: torch.nn.Module) -> Head:
    """The LM head of an unwrapped model, with the scale and softcap that TRL's fused head has read from its config."""
    base: Any = _base_model(model)
    values = fused_head(base.forward)
    head = base.get_output_embeddings()
    names = ("logit_scale", "final_logit_softcapping", "cast_lm_head_to_fp32")
    return Head(head.weight, head.bias, *(values[name] for name in names))


@contextmanager
def last_hidden_states(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states `(B, positions, H)` of every forward of an unwrapped model inside the block."""
    base = _base_model(model)
    if (shared := shared_prefix_of(base)) is not None:  # its backbone sees packed rows
        with shared.collecting() as collected:
            yield collected
        return
    collected = []
    handle = base.base_model.register_forward_hook(
        lambda module, inputs, output: collected.append(output.last_hidden_state)
    )
    try:
        yield collected
    finally:
        handle.remove()


@contextmanager
def exact_kl_inside(
    trainer: Any, model: torch.nn.Module, ref_hidden: Any, mask: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """
    Collects [`exact_kl`] `(B, T)` of the forwards of the policy inside the block, for consecutive rows of the batch.
    It is computed where a forward ends, before an engine takes the whole weights away, and becomes a part of the
    output: engines watch what is there, to have the weights back for its backward pass.

    Args:
        trainer ([`GRPOTrainer`]):
            Knows the reference, the temperature, and mixed precision.
        model (`torch.nn.Module`):
            Policy, unwrapped.
        ref_hidden (`torch.Tensor` of shape `(B, T, H)`), mask (`torch.Tensor` of shape `(B, T)`):
            As in [`exact_kl`].
    """
    base, width = _base_model(model), mask.size(1)
    found: list[torch.Tensor] = []
    reference = base if trainer.ref_model is None else trainer.accelerator.unwrap_model(trainer.ref_model)

    def at_the_end(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not hidden:  # the KL came with the log-probs
            return
        states, done = hidden.pop(), sum(len(kl) for kl in found)
        rows = slice(done, done + len(states))
        with torch.no_grad():
            ref_head = lm_head(reference).whole()
        with trainer.accelerator.autocast():
            kl = exact_kl(
                states[:, -width - 1 : -1], lm_head(base).whole(), ref_hidden[rows], ref_head, mask[rows],
                trainer.temperature,
            )  # fmt: skip
        output["loss"] = kl  # which the loss of GRPO does not read
        found.append(kl)

    with last_hidden_states(model) as hidden:
        handle = base.register_forward_hook(at_the_end, prepend=True)  # before those of an engine
        try:
            yield found
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
