"""Parameters of which each process holds a part, as FSDP2 divides them: whole for a moment, and in parts again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers.integrations import deepspeed


def whole(tensor: Any) -> Any:
    """
    A tensor of which each process may hold a part; anything else as it is. Entered by all processes alike.

    Its gradient is the mean of those of all processes, as the engine's own is; by itself `full_tensor` would take of
    the gradient of this process the slice that this process holds, and lose the others'.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    full = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def parted(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The counterpart: `tensor` on the device of `like`, and divided among the processes as `like` is."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def in_parts(model: torch.nn.Module) -> None:
    """Takes away what a forward pass without a backward has left whole, so that parameters are what they are in."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def not_divided() -> Iterator[None]:
    """Models that are loaded inside are whole on each process, which may call them as often as it likes."""
    reference = deepspeed._hf_deepspeed_config_weak_ref  # by which transformers knows of ZeRO-3
    config = None if reference is None else reference()
    if config is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
