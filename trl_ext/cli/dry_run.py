"""`--dry_run`: the command's own script in this process, up to the first optimizer step, and nothing on disk."""

import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import transformers

from ..trainers.interruptions import whole_checkpoint
from ..trainers.places import unopened
from .commands import script_of
from .rehearsal import Rehearsal

_OWN = str(Path(__file__).parents[1])


class _TrainingWouldStart(BaseException):
    """Ends the script where it calls `train`; no `except Exception` on the way stops it."""


def launch_training_script(seen: dict[str, Any], script_name: str, **_: Any) -> None:
    """
    In place of the worker processes: the script with what the parser made of the words, and a report.

    Args:
        seen (`dict[str, Any]`):
            What the parser has left: `parts`, the parsed dataclasses, and `processes`.
        script_name (`str`):
            As TRL's launcher is given it, such as `"grpo.py"`.

    Raises:
        `ValueError`: With the one sentence, whatever goes wrong.
    """
    command = script_name.removesuffix(".py")
    rehearsal = Rehearsal(command, seen["processes"])
    try:
        with tempfile.TemporaryDirectory() as folder, _instead_of_training(rehearsal), _without_bars():
            _keep_off_the_disk(seen["parts"], rehearsal, folder)
            script_of(command).main(*seen["parts"])
    except _TrainingWouldStart:
        print("\n".join(rehearsal.lines), flush=True)
    except Exception as error:
        if rehearsal.lines:
            print("\n".join(rehearsal.lines), flush=True)
        raise ValueError(sentence(error)) from error


def _keep_off_the_disk(parts: tuple, rehearsal: Rehearsal, folder: str) -> None:
    """Switches off what writes, or runs before the first step for long; each with a line that says so."""
    script_args, config, *_ = parts
    rehearsal.begin(config, resume=whole_checkpoint(config.resume_from_checkpoint, config.output_dir))
    rehearsal.split = script_args.dataset_train_split
    config.resume_from_checkpoint, config.output_dir = None, folder
    for name, instead in (
        ("push_to_hub", "the hub is not asked"),
        ("use_vllm", "transformers samples here, not vLLM"),
        ("precompute_ref_log_probs", "the log-probs of the reference are not precomputed here"),
        ("use_liger_kernel", "without Liger's kernels here"),
    ):
        if getattr(config, name, False):
            setattr(config, name, False)
            rehearsal.say("Note", f"{name} is on: {instead}.")


@contextmanager
def _instead_of_training(rehearsal: Rehearsal) -> Iterator[None]:
    load = datasets.load_dataset

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        return rehearsal.opened(load(*args, **kwargs))

    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> None:
        rehearsal.rehearse(self)
        raise _TrainingWouldStart

    with (
        mock.patch.object(datasets, "load_dataset", load_dataset),
        mock.patch.object(transformers.Trainer, "train", train),
    ):
        yield


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without progress bars, and without warnings that others make of each other."""
    bars = datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|accelerate|datasets|peft)\.")
    try:
        yield
    finally:
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers.utils.logging.enable_progress_bar()


def sentence(error: BaseException) -> str:
    """What went wrong in one sentence; where, if it was in code of the user's."""
    if said := unopened(error):
        return said
    text, calls = " ".join(str(error).split()), [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not isinstance(error, ValueError) and not (calls and calls[-1].f_code.co_filename.startswith(_OWN)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    scoring = next((frame.f_locals for frame in calls if frame.f_code.co_name == "_calculate_rewards"), {})
    if function := scoring.get("reward_func_name"):
        text = f"reward function {function!r}: {text}"
    theirs = [*filter(_is_the_users, traceback.extract_tb((error.__cause__ or error).__traceback__))]
    if theirs:
        text = f"{text.rstrip('.')} ({theirs[-1].filename}, line {theirs[-1].lineno})."
    return text


def _is_the_users(frame: traceback.FrameSummary) -> bool:
    inside = (_OWN, sys.prefix, sys.base_prefix, "<")
    return not frame.filename.startswith(inside)
