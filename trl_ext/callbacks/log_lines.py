"""What is printed of a log entry: one line."""

import math
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from .metrics_file import NAME

# What is shown, in this order, and the metrics that may be meant; the first that is there.
SHOWN = {
    "reward": ("reward",),
    "loss": ("loss",),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "margin": ("rewards/margins", "margin"),
    "kl": ("kl/reference", "kl"),
    "length": ("completions/mean_length",),
    "explained": ("value/explained_variance",),
    "entropy": ("entropy",),
}


def log_line(logs: dict[str, Any]) -> str:
    """
    The numbers of a log entry that tell whether the run learns, as `reward 0.312   kl 0.0021`; empty if there is none.
    With rewards the loss is left out: it is no measure of progress there.
    """
    evaluated = any(name.startswith("eval_") for name in logs)
    if evaluated:
        logs = {name.removeprefix("eval_"): value for name, value in logs.items()}
    parts = []
    for label, names in SHOWN.items():
        value = next((logs[name] for name in names if logs.get(name) is not None), None)
        if isinstance(value, int | float) and not (label == "loss" and "reward" in logs):
            parts.append(f"{label} {_short(value)}")
    return ("evaluation   " if evaluated and parts else "") + "  ".join(parts).rstrip()


def _short(value: float) -> str:
    """Three digits, and a width at which the lines of a run stand in columns."""
    return f"{value:<9.3g}" if math.isfinite(value) else f"{value!s:<9}"


class LogLines(ProgressCallback):
    """
    In place of transformers' printing of a whole log entry: one line with step, reward, KL, length, accuracy and
    entropy, of those that there are. The progress bar is shown on a terminal only.
    """

    def __init__(self):
        super().__init__()
        self._at = 0, time.monotonic()  # step and time of the last line

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step, self._at = state.global_step, (state.global_step, time.monotonic())
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=not _bars(args)
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if _bars(args):
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:
            seconds = logs["train_runtime"]
            return self._print(f"{state.global_step} steps in {seconds:.0f} s; all metrics: {args.output_dir}/{NAME}")
        if line := log_line(logs):
            width = len(str(state.max_steps))
            pace = "" if line.startswith("evaluation") else f"  {self._pace(state.global_step)}"
            self._print(f"step {state.global_step:>{width}}/{state.max_steps}  {line}{pace}".rstrip())

    def _pace(self, step: int) -> str:
        """Seconds per step since it was last asked for."""
        before, then = self._at
        self._at = step, time.monotonic()
        return f"{(self._at[1] - then) / (step - before):.2g} s/step" if step > before else ""

    def _print(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()  # in a file, or a pipe, too


def _bars(args: Any) -> bool:
    return sys.stderr.isatty() and not args.disable_tqdm
