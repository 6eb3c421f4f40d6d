"""A reference that moves, in checkpoints. Of `sync_ref_model` TRL saves none and would resume from the first one."""

import os
import warnings
from pathlib import Path
from typing import Any

from .gathering import is_flat, load_whole, save_whole

FILE = "reference.safetensors"


def moving_reference(trainer: Any) -> Any:
    """The reference model if `sync_ref_model` moves it, unwrapped; else `None`."""
    reference = getattr(trainer, "ref_model", None)
    if not getattr(trainer.args, "sync_ref_model", False) or reference is None:
        return None
    return trainer.accelerator.unwrap_model(reference)


def save_reference(trainer: Any, folder: Path) -> None:
    """Writes the reference into a checkpoint; nothing with FSDP1. Entered by all processes alike."""
    if (refreshed := getattr(trainer, "_moving", None)) is not None:
        return refreshed.save(folder)
    reference = moving_reference(trainer)
    if reference is not None and not is_flat(trainer):
        save_whole(trainer, reference, folder / FILE)


def load_reference(trainer: Any, checkpoint: str | os.PathLike) -> None:
    """
    Goes on with the reference of a checkpoint.

    Raises:
        `ValueError`: If it is in none.
    """
    if (refreshed := getattr(trainer, "_moving", None)) is not None:
        return refreshed.load(checkpoint)
    reference, path = moving_reference(trainer), Path(checkpoint, FILE)
    if reference is None:
        return
    if is_flat(trainer):
        raise ValueError(
            "sync_ref_model has moved the reference, which is saved in no checkpoint with FSDP1: a resumed run would "
            "go on with the first one. Use FSDP2 (fsdp_version: 2), DDP or DeepSpeed, or start anew."
        )
    if path.exists():
        load_whole(trainer, reference, path)
    else:
        warnings.warn(
            f"{checkpoint} has no {FILE}, as TRL alone writes none: sync_ref_model starts again from the first "
            "reference.",
            stacklevel=2,
        )
