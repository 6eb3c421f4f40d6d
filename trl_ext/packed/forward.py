"""The forward that TRL's trainers call for log-probs, on packed rows instead of padded ones."""

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from ..sharded import whole
from ..upstream import fused_head
from .attention import NAME, register_attention
from .head import scores
from .packing import Packed, pack
from .verdict import different, evaluating, rotary_limit, smallest_window, unfit

LEAST_SAVED = 0.05  # of the padded tokens; less is not worth other kernels
VOCABULARY_CHUNK = 32_768  # TRL's, for its head on our states
_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of TRL's head
_KNOWN = {"input_ids", "attention_mask", "labels", "fused_lm_head", "use_cache"}


class SharedPrefix:
    """
    What [`install`] puts before TRL's fused forward of one model, and what it has found out about the model.

    `counts`: forward passes of each kind; tokens of the packed ones, and those that TRL would have computed for them.
    `reason`: why the model takes TRL's forward for good; `None` while it does not.
    """

    def __init__(
        self,
        model: Any,
        entropy_gradient: bool,
        autocast: Callable[[], AbstractContextManager],
        of_all: Callable[[bool], bool],
    ):
        # Not bound to the model: a copy of the model brings itself.
        self.fused_forward: Any = getattr(model.forward, "__func__", model.forward)
        self._bound, self.autocast, self._of_all = self.fused_forward is not model.forward, autocast, of_all
        head = fused_head(model.forward)
        self.outputs, self.temperature = head["outputs"], head["temperature"]
        self.scale, self.softcap = head["logit_scale"], head["final_logit_softcapping"]
        self.in_float32, self.entropy_gradient = head["cast_lm_head_to_fp32"], entropy_gradient
        self.reason: str | None = None
        self.counts = {"packed": 0, "padded": 0, "packed_tokens": 0, "padded_tokens": 0}
        self._judged: set[bool] = set()  # in which modes of the model: dropout is seen in training only
        self._window: int | None = None
        self._rotary_limit = rotary_limit(model)
        self._said: set[str] = set()
        self._collected: list[torch.Tensor] | None = None
        self._ref_hidden: torch.Tensor | None = None
        self._kl: list[torch.Tensor] = []
        self._without: torch.Tensor | None = None
        if model.config.get_text_config() is not model.config:
            self.reason = "it is a model of more than text"

    # What a trainer asks for besides log-probs, each for the duration of a block

    @contextmanager
    def collecting(self) -> Iterator[list[torch.Tensor]]:
        """The last hidden states `(B, positions, H)` of every forward; a packed one gives those of scored tokens."""
        collected: list[torch.Tensor] = []
        self._collected = collected
        try:
            yield collected
        finally:
            self._collected = None

    @contextmanager
    def exact_kl(self, ref_hidden: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """
        KL(policy‖reference) `(B, C)` of every packed forward, in nats, from the logits of its log-probs. `ref_hidden`,
        `(B, C, H)`: what the reference predicts the C last tokens from, with the same LM head. Nothing is collected
        then. The list stays empty where the head is trained, or the forward is TRL's.
        """
        self._ref_hidden, self._kl = ref_hidden, []
        try:
            yield self._kl
        finally:
            self._ref_hidden = None

    @contextmanager
    def leaving_out(self, rows: torch.Tensor) -> Iterator[None]:
        """Rows, `(B,)` bool, that the loss does not depend on: their log-probs are 0, and cost nothing."""
        self._without = rows
        try:
            yield
        finally:
            self._without = None

    # The forward

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("fused_lm_head"):
            return self._theirs(model, args, kwargs)
        with self.autocast():
            packed = self._pack(model, args, kwargs)
            if self.reason is None and model.training not in self._judged:
                packed = self._agreed(packed if isinstance(packed, str) else None) or packed
            output = packed if isinstance(packed, str) else self._scored(model, packed, kwargs)
        if self.reason is not None:
            use_attention(model, "sdpa")  # for good: some models read the name, and would do something else
        if isinstance(packed, str) or isinstance(output, str):
            return self._padded(model, output, args, kwargs)
        self.counts["packed"] += 1
        self.counts["packed_tokens"] += packed.layout.total
        self.counts["padded_tokens"] += kwargs["input_ids"].numel()
        return output

    def _theirs(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with plain_attention(model):
            return self.fused_forward(*([model] if self._bound else []), *args, **kwargs)

    def _padded(self, model: Any, reason: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """TRL's forward; each reason is said once."""
        self.counts["padded"] += 1
        if reason not in self._said:
            self._said.add(reason)
            whose = "all its batches" if reason == self.reason else "some batches"
            warnings.warn(
                f"shared_prefix: {type(model).__name__} takes TRL's forward for {whose}: {reason}.", stacklevel=4
            )
        collected = self._collected
        handle = None
        if collected is not None:
            hook = lambda _, inputs, output: collected.append(output.last_hidden_state)  # noqa: E731
            handle = model.base_model.register_forward_hook(hook)
        try:
            return self._theirs(model, args, kwargs)
        finally:
            if handle is not None:
                handle.remove()

    def _pack(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Packed | str:
        """The batch as a packed row, or why it cannot be one."""
        if self.reason is not None:
            return self.reason
        given = sorted(name for name, value in kwargs.items() if value is not None and name not in _KNOWN)
        mask = kwargs.get("attention_mask")
        if kwargs.get("output_router_logits") or getattr(model.config, "output_router_logits", False):
            return "the loss of its routers reads every padded row"
        if args or given or mask is None or mask.dim() != 2 or kwargs.get("labels") is None:
            return f"it is called with {', '.join(given) or 'other arguments than ids, mask and labels'}"
        if self._rotary_limit is not None and kwargs["input_ids"].size(1) > self._rotary_limit:
            return f"beyond {self._rotary_limit} tokens its rotary embeddings depend on the length of the padded row"
        labels, size = kwargs["labels"], kwargs["input_ids"].numel()
        if self._without is not None and len(self._without) == len(labels):
            labels = labels.masked_fill(self._without[:, None].to(labels.device), -100)
        packed = pack(kwargs["input_ids"], mask, labels)
        if isinstance(packed, str):
            return f"a batch cannot be packed, because {packed}"
        if packed.layout.total > (1 - LEAST_SAVED) * size:
            return f"packing saves less than {LEAST_SAVED:.0%} of a batch's tokens"
        return self._beyond_window(packed) or packed

    def _beyond_window(self, packed: Packed) -> str | None:
        if self._window is None or packed.layout.longest <= self._window:
            return None
        return f"a row is longer than its sliding window of {self._window} tokens"

    def _scored(self, model: Any, packed: Packed, kwargs: dict[str, Any]) -> Any:
        """TRL's output for the batch, or why it cannot be given."""
        if model.training in self._judged:
            return self._output(model, packed, self._hidden(model, packed), kwargs["labels"])
        packed.layout.calls = []
        hidden = self._hidden(model, packed)
        self.reason = self._agreed(unfit(model, packed.layout))
        self._window = smallest_window(packed.layout)
        packed.layout.calls = None
        if (reason := self.reason or self._agreed(self._beyond_window(packed))) is not None:
            return reason
        if not self._judged:
            self.reason = self._agreed(self._compared(model, packed, kwargs))
        self._judged.add(model.training)
        return self.reason or self._output(model, packed, hidden, kwargs["labels"])

    def _agreed(self, reason: str | None) -> str | None:
        """Processes that share weights make the same passes: what keeps one from packing at first keeps all."""
        return None if self._of_all(reason is None) else reason or "another process could not"

    def _compared(self, model: Any, packed: Packed, kwargs: dict[str, Any]) -> str | None:
        """
        Compares two rows with TRL's forward: for architectures that the rules do not know. Behind one more column of
        padding, because TRL sends no positions, and in some models they then count the padding before a row.
        """
        rows = packed.rows.unique()[:2]
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        two = {name: torch.nn.functional.pad(kwargs[name][rows], (1, 0), value=x) for name, x in padding.items()}
        again = pack(**two)
        assert isinstance(again, Packed)
        with evaluating(model):
            states = self._hidden(model, again)
            head = model.get_output_embeddings()
            weight, states = whole(head.weight), states.to(head.weight.device)
            ours = self._of_trls_head(states, weight, whole(head.bias), again.targets)["log_probs"]
            theirs = self._theirs(model, (), {**two, "fused_lm_head": True}).log_probs
        return different(model, ours, theirs[again.rows, again.columns], len(ours))

    def _hidden(self, model: Any, packed: Packed) -> torch.Tensor:
        """The states that predict the scored tokens, `(scored, H)`."""
        name = model.config._attn_implementation
        use_attention(model, NAME)  # with gradients until somebody sets another: layers may be computed again
        output = model.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # transformers takes a mask of four dimensions as it is, and the attention function reads none
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.input_ids.device),
            shared_prefix=packed.layout,
            use_cache=False,
        )
        if not torch.is_grad_enabled():
            use_attention(model, name)
        return output.last_hidden_state[0].index_select(0, packed.source)

    def _output(self, model: Any, packed: Packed, states: torch.Tensor, labels: torch.Tensor) -> FusedCausalLMOutput:
        """Scores the states, and puts the results where TRL's loss expects them, `(B, T - 1)`."""
        head = model.get_output_embeddings()
        device, (rows, width) = head.weight.device, labels.shape
        states, where = states.to(device), (packed.rows.to(device), packed.columns.to(device))

        def spread(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.new_zeros(rows, width - 1).index_put(where, x)

        in_tile = self._ref_hidden is not None and self._frozen(head) and len(self._ref_hidden) == rows
        if self._collected is not None and not in_tile:
            self._collected.append(states.new_zeros(rows, width, states.size(1)).index_put(where, states))
        if self._frozen(head):
            ref = self._ref_at(where, width) if in_tile else None
            found = self._of_frozen_head(states, whole(head.weight), packed.targets, ref)
        else:
            found = self._of_trls_head(states, whole(head.weight), whole(head.bias), packed.targets)
        if in_tile:
            self._kl.append(spread(found["kl"])[:, -self._ref_hidden.size(1) :])  # type: ignore[index, union-attr]
        fields: dict[str, Any] = {name: spread(found.get(name)) for name in _FIELDS}
        if self._without is not None and fields["entropy"] is not None:  # a metric: the mean of the others
            mean = found["entropy"].detach().mean()
            fields["entropy"] = torch.where(self._without[:, None].to(device), mean, fields["entropy"])
        loss = -fields["log_probs"].sum() / len(packed.targets)
        return FusedCausalLMOutput(loss=loss, label_mask=labels[:, 1:].to(device) != -100, **fields)

    # The LM head

    def _frozen(self, head: Any) -> bool:
        """Whether the states' derivatives can be taken while the logits are there."""
        kind = type(head).__mro__[2] if isinstance(head, FSDPModule) else type(head)  # FSDP2 makes a class of its own
        plain = kind is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
        return plain and self.softcap is None and not self.entropy_gradient

    def _ref_at(self, where: tuple[torch.Tensor, torch.Tensor], width: int) -> torch.Tensor:
        """The reference's states of the scored tokens, `(scored, H)`; it has those of the last columns only."""
        assert self._ref_hidden is not None
        return self._ref_hidden[where[0], where[1] - (width - 1 - self._ref_hidden.size(1))]

    def _precision(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, enabled=False) if self.in_float32 else nullcontext()

    def _of_frozen_head(self, states: torch.Tensor, weight: Any, targets: torch.Tensor, ref: Any) -> dict[str, Any]:
        states = states.float() if self.in_float32 else states
        with self._precision(states.device), maybe_gather_lm_head_ctx(weight):
            scale = self.scale / self.temperature
            return scores(states, weight, targets.to(states.device), scale, self.outputs, ref)._asdict()

    def _of_trls_head(self, states: torch.Tensor, weight: Any, bias: Any, targets: torch.Tensor) -> dict[str, Any]:
        states, targets = states.float() if self.in_float32 else states, targets.to(states.device)
        with self._precision(states.device), maybe_gather_lm_head_ctx(weight, bias):
            found = ChunkedLogProbFunction.apply(
                states, weight, bias, targets, self.temperature, VOCABULARY_CHUNK, self.softcap, self.scale,
                self.outputs,
            )  # fmt: skip
        return dict(zip(_FIELDS, found, strict=True))


def install(
    model: Any,
    entropy_gradient: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    of_all: Callable[[bool], bool] = bool,
) -> SharedPrefix:
    """
    Replaces the fused forward of a model; its forward without `fused_lm_head` stays what it was.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model with TRL's fused LM head, unwrapped and below PEFT.
        entropy_gradient (`bool`, *optional*, defaults to `False`):
            Whether the loss differentiates the entropy.
        autocast (`Callable`, *optional*):
            Makes the context of mixed precision, where accelerate has put it around the forward that is replaced.
        of_all (`Callable`, *optional*):
            Whether something holds on all processes, where they share the weights.

    Raises:
        `ValueError`: If the model's attention is not `"sdpa"`, or it is installed already.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if shared_prefix_of(model) is not None:
        raise ValueError(f"shared_prefix is installed in this {type(model).__name__} already.")
    if implementation != "sdpa":
        raise ValueError(
            f"shared_prefix computes attention itself, in place of attn_implementation='sdpa', but this "
            f"{type(model).__name__} has {implementation!r}. Load it with 'sdpa', if it has that, or remove "
            "shared_prefix."
        )
    shared = SharedPrefix(model, entropy_gradient, autocast, of_all)
    register_attention()

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, **kwargs):
        return shared(self, args, kwargs)

    forward.shared_prefix, forward.fused_forward = shared, shared.fused_forward  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return shared


def shared_prefix_of(model: Any) -> SharedPrefix | None:
    """What is installed in an unwrapped model below PEFT, also inside what accelerate has put around it."""
    forward = model.forward
    while forward is not None:
        if (shared := getattr(forward, "shared_prefix", None)) is not None:
            return shared
        forward = getattr(forward, "__wrapped__", None)
    return None


def use_attention(model: Any, name: str) -> None:
    """Sets the name under which a model's layers look up their attention."""
    model.config._attn_implementation = name


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """
    The model's own attention for what is not a packed row. Our name would do the same in most models, but some read
    it. Where a layer is computed again in the backward pass, under our name, attention without a layout is sdpa.
    """
    ours = model.config._attn_implementation == NAME
    if ours:
        use_attention(model, "sdpa")
    try:
        yield
    finally:
        if ours:
            use_attention(model, NAME)
