"""An LM head that is trained and that FSDP2 has not made whole where TRL's fused forward reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor

from ..sharded import whole
from .input_checks import warn_user
from .shared_prefix import base_model

WRONG = (
    "FSDP2 divides the LM head that this adapter trains (modules_to_save), and TRL loses of its gradient what other "
    "processes have found: it is wrong. With any option of trl_ext it is right; else leave the head out of the "
    "adapter, or use DDP."
)


@contextmanager
def trained_head(trainer: Any) -> Iterator[None]:
    """
    Around training: TRL's fused forward never calls the head, so that FSDP2 makes it whole only if it stands in one
    unit with a module that is called, which it does not below PEFT. TRL then takes `full_tensor()`, whose gradient is
    not the mean of those of all processes ([`whole`]). For the duration of such a forward, `get_output_embeddings`
    gives a head whose gradient is.
    """
    base = base_model(trainer, trainer.model)

    def head_of(module: Any) -> Any:
        head = type(module).get_output_embeddings(module)
        if not isinstance(head.weight, DTensor) or not head.weight.requires_grad:
            return head
        return SimpleNamespace(weight=whole(head.weight), bias=whole(head.bias))

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("fused_lm_head"):
            module.get_output_embeddings = lambda: head_of(module)

    def end(module: Any, *_: Any) -> None:
        vars(module).pop("get_output_embeddings", None)

    handles = [
        base.register_forward_pre_hook(begin, with_kwargs=True),
        base.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def warn_of_trained_head(trainer: Any) -> None:
    """Where nothing of ours is on, so that the gradient is TRL's."""
    head = base_model(trainer, trainer.model).get_output_embeddings()
    if is_peft_model(trainer.model) and head is not None and head.weight.requires_grad:
        warn_user(WRONG)
