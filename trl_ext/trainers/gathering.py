"""Parameters of which each process may hold a part: copied whole, written, saved, loaded. Of FSDP2 and of ZeRO-3."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..sharded import in_parts, parted, whole


def is_sharded(trainer: Any) -> bool:
    """Whether each process of a trainer holds a part of each weight only."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def is_flat(trainer: Any) -> bool:
    """Whether that is a part of one flat row of numbers, in which no weight can be found: FSDP1."""
    return trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1


def settle(trainer: Any) -> None:
    """
    Takes away what forward and backward passes outside a step of the engine have left whole. Not between a forward
    pass and its backward pass.
    """
    in_parts(trainer.model)
    if trainer.is_deepspeed_enabled and is_sharded(trainer):
        trainer.model_wrapped.empty_partition_cache()


def mix(policy: Sequence[torch.Tensor], into: Sequence[torch.Tensor], alpha: float) -> None:
    """Each of `into` ← (1 − alpha) · itself + alpha · that of `policy`. Entered by all processes, as what follows."""
    # With ZeRO-3, TRL gathers those that are in parts, writes on one process, and hands on what it has gathered.
    SyncRefModelCallback.sync_target_model(torch.nn.ParameterList(policy), torch.nn.ParameterList(into), alpha)


def copies(parameters: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Each whole, in main memory, one after the other."""
    for parameter in parameters:
        with maybe_gather_lm_head_ctx(parameter) if hasattr(parameter, "ds_status") else nullcontext():
            copy = whole(parameter.detach()).to("cpu", copy=True).contiguous()
        yield copy


@torch.no_grad()
def overwrite(parameters: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """The counterpart: puts whole tensors where each process may hold a part."""
    partitioned: list[tuple[torch.Tensor, torch.Tensor]] = []
    for parameter, tensor in zip(parameters, tensors, strict=True):
        if hasattr(parameter, "ds_id"):  # by ZeRO-3
            partitioned.append((tensor.to(parameter.device), parameter))
        else:
            parameter.copy_(parted(tensor, parameter))
    if partitioned:
        mix([ours for ours, _ in partitioned], [theirs for _, theirs in partitioned], 1.0)


def save_whole(trainer: Any, model: torch.nn.Module, path: Path) -> None:
    """Writes a model that is not the trainer's. Where processes share its weights: its parameters."""
    writes = trainer.args.should_save
    if is_sharded(trainer):
        named = dict(model.named_parameters())
        weights = {name: copy for name, copy in zip(named, copies(named.values()), strict=True) if writes}
        if writes:
            save_file(weights, path, metadata={"format": "pt"})
    elif writes:
        save_model(model, str(path), metadata={"format": "pt"})


def load_whole(trainer: Any, model: torch.nn.Module, path: Path) -> None:
    """The counterpart."""
    if not is_sharded(trainer):
        load_model(model, str(path))
        return
    weights = load_file(path)
    for name, parameter in model.named_parameters():
        overwrite([parameter], [weights[name].to(parameter.dtype)])
