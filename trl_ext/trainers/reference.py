"""A reference that moves, in checkpoints. Of `sync_ref_model` TRL saves none and would resume from the first one."""

import os
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

FILE = "reference.safetensors"


def moving_reference(trainer: Any) -> Any:
    """The reference model if `sync_ref_model` moves it, unwrapped; else `None`."""
    reference = getattr(trainer, "ref_model", None)
    if not getattr(trainer.args, "sync_ref_model", False) or reference is None:
        return None
    return trainer.accelerator.unwrap_model(reference)


def _is_sharded(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def save_reference(trainer: Any, folder: Path) -> None:
    """Writes the reference into a checkpoint; nothing where each process holds only a part of it."""
    if (refreshed := getattr(trainer, "_moving", None)) is not None:
        return refreshed.save(folder)
    reference = moving_reference(trainer)
    if reference is not None and trainer.args.should_save and not _is_sharded(trainer):
        save_model(reference, str(folder / FILE), metadata={"format": "pt"})


def load_reference(trainer: Any, checkpoint: str | os.PathLike) -> None:
    """
    Goes on with the reference of a checkpoint.

    Raises:
        `ValueError`: If the reference is sharded and therefore in no checkpoint.
    """
    if (refreshed := getattr(trainer, "_moving", None)) is not None:
        return refreshed.load(checkpoint)
    reference, path = moving_reference(trainer), Path(checkpoint, FILE)
    if reference is None:
        return
    if _is_sharded(trainer):
        raise ValueError(
            "sync_ref_model has moved the reference, which is saved in no checkpoint with FSDP or DeepSpeed ZeRO-3: "
            "a resumed run would go on with the first one. Use DDP or ZeRO-2, or start anew."
        )
    if path.exists():
        load_model(reference, str(path))
    else:
        warnings.warn(
            f"{checkpoint} has no {FILE}, as TRL alone writes none: sync_ref_model starts again from the first "
            "reference.",
            stacklevel=2,
        )
