"""All metrics of a run in one file, a line for each log entry."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

NAME = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """
    Writes each log entry to `metrics.jsonl` in the output folder as one line of JSON, its `step` first; on the main
    process. What is NaN or infinite, which JSON does not have, is `null`.

    A run that starts anew replaces the file. One that goes on from a checkpoint begins with what was logged up to the
    checkpoint, which is kept in it, and appends: what the stopped run logged beyond it is logged again.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._write(args, "w", state.log_history)  # callbacks may have logged something already

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self._write(args, "a", [{**(logs or {}), "step": state.global_step}])

    def _write(self, args: Any, mode: str, entries: list[dict[str, Any]]) -> None:
        path = Path(args.output_dir, NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            for entry in entries:
                plain = {"step": entry["step"], **{name: _plain(value) for name, value in entry.items()}}
                file.write(json.dumps(plain, default=str) + "\n")


def _plain(value: Any) -> Any:
    """A number as JSON has it; numbers of NumPy and torch as Python's."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
