"""The callbacks that a config asks for, and those that an option of ours brings along."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback

from ..callbacks import LogLines, MetricsFile
from ..lookup import import_path
from .nothing_learned import NothingLearned

LOG_STYLES = ("line", "full")
LOG_STYLE_HELP = (
    "What is printed of each log entry: 'line', a few numbers, with all of them in metrics.jsonl, or 'full'. Default: "
    "'line' with trl-ext, 'full' in Python."
)


def check_log(options: Any) -> None:
    """Refuses callbacks that cannot be made, and a `log_style` that does not exist."""
    if options.log_style not in (None, *LOG_STYLES):
        raise ValueError(f"log_style must be one of {', '.join(map(repr, LOG_STYLES))}, got {options.log_style!r}.")
    for cls in _classes(options.callback_paths):
        if hasattr(cls, "require_installed"):
            cls.require_installed()


def _classes(paths: str | list[str] | None) -> list[Any]:
    """The classes at the dotted paths of the option `callback_paths`; a single string is a list of one."""
    return [import_path(path, "callback_paths") for path in ([paths] if isinstance(paths, str) else paths or [])]


def add_callbacks(trainer: Any, options: Any) -> None:
    """
    Adds the callbacks of the option `callback_paths`, made without arguments; one with an attribute `trainer` is given
    the trainer. With `log_style="line"`, its lines take the place of transformers' printing. Where completions are
    sampled and anything of ours is on, a run that learns nothing is told.

    Args:
        trainer ([`~transformers.Trainer`]):
            One of our trainers, once its options are in force.
        options ([`Options`]):
            Its config.
    """
    for cls in _classes(options.callback_paths):
        callback = cls()
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
        trainer.add_callback(callback)
    in_lines = options.log_style == "line"
    if in_lines:
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback) in (ProgressCallback, PrinterCallback):  # and no subclass that the user has added
                trainer.remove_callback(callback)
        trainer.add_callback(LogLines)
        trainer.add_callback(MetricsFile)
    if (in_lines or trainer._is_ours) and hasattr(trainer.args, "num_generations"):
        trainer.add_callback(NothingLearned)
