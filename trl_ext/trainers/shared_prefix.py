"""The option `shared_prefix` in a trainer: what it is refused with, and its installation in policy and reference."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import is_peft_model

from ..packed.forward import SharedPrefix, install, use_attention
from ..upstream import UpstreamChanged
from .foreign import Options, is_ours, overriding_class, without_super
from .gathering import is_sharded


def flat_sharding(options: Any) -> bool:
    """Whether each process keeps a part of one row of numbers, in which no weight can be found: FSDP1."""
    given = options.fsdp_plugin_args
    if given is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    return int((given or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) == 1


INSTEAD_OF_FSDP1 = "Use FSDP2 (fsdp_version: 2), DDP or DeepSpeed"


def is_compiled(options: Any) -> bool:
    """Whether the model is compiled, by an option or by accelerate's launcher."""
    return bool(options.torch_compile) or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"


def _parallelism(config: Any) -> str | None:
    """What cuts a sequence or a layer between processes, of an accelerate `ParallelismConfig`."""
    kinds = {"cp_enabled": "context", "sp_enabled": "sequence", "tp_enabled": "tensor"}
    return next((f"{kind} parallelism" for name, kind in kinds.items() if getattr(config, name, False)), None)


def check_shared_prefix(options: Any) -> None:
    """Refuses `shared_prefix` with what nobody has run it with. `options`: a config seen through `Options`."""
    value = options.shared_prefix
    if value not in (None, False, True):
        raise ValueError(f"shared_prefix must be true or false, got {value!r}.")
    if not value:
        return
    compiled = "torch_compile" if is_compiled(options) else None
    flat = "FSDP1" if flat_sharding(options) else None
    if other := compiled or flat or _parallelism(options.parallelism_config):
        raise ValueError(f"shared_prefix is not available with {other}: nobody has run the two together. Remove one.")
    implementation = (options.model_init_kwargs or {}).get("attn_implementation", "sdpa")
    if implementation != "sdpa":
        raise ValueError(
            "shared_prefix computes attention itself, in place of attn_implementation='sdpa', but model_init_kwargs "
            f"asks for {implementation!r}. Remove one."
        )


def base_model(trainer: Any, model: Any) -> Any:
    """A model of a trainer, unwrapped and below PEFT."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if is_peft_model(model) else model


class SharesPrefixes:
    """
    Installs [`~trl_ext.packed.forward.SharedPrefix`] where the option asks for it. Stands before TRL's trainer among
    the bases. Nothing else of TRL changes: its losses get the same log-probs at the same places.
    """

    _shared: Mapping[str, SharedPrefix] = MappingProxyType({})  # empty: every forward is TRL's
    _forward_seen = False  # whether a training step has called one of them

    args: Any
    model: Any
    ref_model: Any
    accelerator: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if Options(self.args).shared_prefix:
            if other := _parallelism(getattr(self.accelerator, "parallelism_config", None)):
                raise ValueError(f"shared_prefix is not available with {other}. Remove one.")
            models = {"policy": self.model, "reference": self.ref_model}
            self._shared = {name: self._installed(model) for name, model in models.items() if model is not None}

    def _installed(self, model: Any) -> SharedPrefix:
        base = base_model(self, model)
        # accelerate has put mixed precision around the forward of a reference that it has prepared
        autocast = self.accelerator.autocast if hasattr(base, "_original_forward") else nullcontext
        of_all = self._on_all if is_sharded(self) else bool
        return install(base, getattr(self, "_entropy_bonus_enabled", False), autocast, of_all)

    def _on_all(self, holds: bool) -> bool:
        fails = torch.tensor(float(not holds), device=self.accelerator.device)
        return not self.accelerator.reduce(fails, reduction="sum").item()

    @property
    def shared_prefix_counts(self) -> dict[str, dict[str, int]]:
        """
        Of policy and reference: forward passes on packed rows and on padded ones; tokens of the packed rows, and of
        the padded ones in their place. Empty without the option.
        """
        return {name: dict(shared.counts) for name, shared in self._shared.items()}

    def training_step(self, *args, **kwargs):
        try:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._shared:  # after the backward pass
                use_attention(base_model(self, self.model), "sdpa")
        if self._shared and not self._forward_seen:
            self._forward_seen = True
            if not any(self._shared["policy"].counts.values()):
                raise self._without_forward()
        return loss

    def _without_forward(self) -> Exception:
        """The error where no forward pass of a training step was ours to replace."""
        base = next(cls for cls in type(self).__mro__ if is_ours(cls))
        for method in ("_get_per_token_logps_and_entropies", "_compute_loss", "compute_loss"):
            if overriding_class(self, base, method) is not None:
                return without_super(self, base, method, "shared_prefix")
        return UpstreamChanged("a training step does not call the fused LM head")
