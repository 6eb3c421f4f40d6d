"""Interrupted runs: which checkpoint is whole, and where the data of a later epoch continues."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .model_card import replace_card_of_adapter
from .reference import load_reference, save_reference
from .run_folder import announced, save_batch, warn_of_another_batch
from .trained_head import trained_head, warn_of_trained_head

_STATE_FILE = "trl_ext_state.json"


def begin_checkpoint(trainer: Any, trial: Any) -> Path:
    """
    The folder of the checkpoint that `trainer` is about to write. The `Trainer` writes its state last, so from here on
    until then a folder without it is not whole; one left there by an earlier run would say otherwise.
    """
    folder = Path(trainer._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
    if trainer.args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    return folder


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """Around the writing of a checkpoint: the writer's error, of a full disk for instance, says what is left."""
    try:
        yield
    except Exception as error:
        if not _is_whole(folder):
            error.add_note(f"{folder} is not whole; resume_from_checkpoint=True passes it over.")
        raise


def whole_checkpoint(wanted: Any, output_dir: str) -> Any:
    """
    What to hand to [`~transformers.Trainer.train`] as `resume_from_checkpoint`.

    Args:
        wanted (`str`, `bool` or `None`):
            What the user gave. `True`: the last checkpoint of `output_dir` that is whole.
        output_dir (`str`):
            Folder of the run.

    Raises:
        `ValueError`: If the checkpoint named, or every checkpoint there is, was cut off while it was written.
    """
    if wanted is None or wanted is False:
        return wanted
    cut_off = "the run was stopped while saving it"
    if wanted is not True:
        if os.path.isdir(wanted) and not _is_whole(Path(wanted)):
            whole = _newest_first(Path(wanted).parent)
            other = next((f"; {folder} is whole" for folder in whole if _is_whole(folder)), "")
            raise ValueError(f"{wanted} has no readable {TRAINER_STATE_NAME}: {cut_off}{other}.")
        return wanted
    folders = _newest_first(Path(output_dir))
    for folder in folders:
        if _is_whole(folder):
            return str(folder)
        warnings.warn(f"{folder} is passed over: it has no readable {TRAINER_STATE_NAME}, {cut_off}.", stacklevel=3)
    if folders:
        raise ValueError(
            f"No checkpoint in {output_dir} has a readable {TRAINER_STATE_NAME}: the run was stopped while saving its "
            "first. Start anew, without resume_from_checkpoint."
        )
    return wanted  # upstream says that there is none


def _newest_first(output_dir: Path) -> list[Path]:
    folders = [folder for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()]
    steps = {folder: folder.name.rpartition("-")[2] for folder in folders}
    return sorted((folder for folder in folders if steps[folder].isdigit()), key=lambda f: int(steps[f]), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def resumable(sampler: Any) -> Any:
    """
    TRL's sampler, which draws one permutation per epoch from a generator that no checkpoint keeps: a run that goes on
    in a later epoch would see the order of the first again. The sampler is told when an epoch starts, and then puts
    the generator where an uninterrupted run has it.
    """
    generator = getattr(sampler, "generator", None)
    if generator is not None:

        def set_epoch(epoch: int) -> None:
            generator.manual_seed(sampler.seed)
            for _ in range(epoch):
                torch.randperm(sampler.num_samples, generator=generator)

        sampler.set_epoch = set_epoch
    return sampler


def _warn_of_replayed_rows(checkpoint: Any) -> None:
    """A stream has no length, so that the `Trainer` skips what was seen in all epochs within the first one."""
    if isinstance(checkpoint, str) and os.path.isdir(checkpoint):
        epoch = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text()).get("epoch") or 0
        if epoch >= 1:
            warnings.warn(
                f"{checkpoint} was written in epoch {int(epoch) + 1} of a stream, where its rows continue in another "
                "order than in an uninterrupted run: the epoch begins again. Only data sets with an index continue "
                "where they stopped.",
                stacklevel=3,
            )


@contextmanager
def keeping_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """
    Around the reading of a checkpoint: TRL trains the adapter of a quantised model in bfloat16, PEFT would go on with
    it, and with a second one that is frozen, in float32.
    """
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])


class Interruptible:
    """
    The methods of `Trainer` around a checkpoint, so that a run that was stopped goes on as if it had not been. Stands
    before TRL's trainer among the bases, and knows no algorithm. Where `_is_ours` is `False`, each method is TRL's.
    """

    args: Any
    model: Any
    train_dataset: Any
    _is_ours: bool

    def get_extra_state(self) -> dict[str, Any]:
        """What goes on in this run besides weights, optimizer and data: numbers and lists, for JSON."""
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The counterpart, when a checkpoint is read."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        divided = getattr(self, "is_fsdp_enabled", False)
        if not self._is_ours:
            if divided:
                warn_of_trained_head(self)
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
        warn_of_another_batch(self.args, resume_from_checkpoint)
        if isinstance(self.train_dataset, datasets.IterableDataset | IterableDataset):
            _warn_of_replayed_rows(resume_from_checkpoint)
        with announced(self.args.output_dir, self.args.should_save), trained_head(self) if divided else nullcontext():
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with keeping_dtypes(model or self.model) if self._is_ours else nullcontext():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _save_checkpoint(self, model, trial):
        if not self._is_ours:
            return super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder, state = begin_checkpoint(self, trial), self.get_extra_state()
        with _told_of(folder):
            if state and self.args.should_save:  # before the trainer's own state makes the folder whole
                (folder / _STATE_FILE).write_text(json.dumps(state))
            save_batch(self.args, folder)
            save_reference(self, folder)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        replace_card_of_adapter(self, folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self._is_ours:
            load_reference(self, checkpoint)
        if checkpoint is None or not (state := self.get_extra_state()):
            return
        path = Path(checkpoint, _STATE_FILE)
        if path.exists():
            self.set_extra_state(json.loads(path.read_text()))
        else:
            warnings.warn(f"{checkpoint} has no {_STATE_FILE}; these start anew: {sorted(state)}.", stacklevel=2)
