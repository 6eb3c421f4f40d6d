"""The curves of a run as a picture, without a tracking server."""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

NAME = "curves.png"
INCHES = 3.0, 2.4  # of one panel


class Panel(NamedTuple):
    """One pair of axes: what is drawn, and from where to where at least."""

    title: str
    series: Mapping[str, tuple[str, ...]]  # label → metrics that may be meant; the first that was logged
    axis: tuple[float, float | None] = (0.0, None)  # `None`: as far as the values go
    instead_of: str | None = None  # a metric with which there is no such panel


def curves_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(log_history: list[dict[str, Any]], path: str | Path) -> bool:
    """
    Draws what tells whether a run learns, against the optimizer step; `False` if nothing of it was logged.

    Axes begin at 0, shares and rewards between 0 and 1 have the axis from 0 to 1: what looks like a change is one.
    Evaluations are drawn as dots.

    Args:
        log_history (`list[dict]`):
            `state.log_history` of a trainer, or the lines of `metrics.jsonl`.
        path (`str` or `Path`):
            File to write; the suffix gives the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = {name for entry in log_history for name in entry}
    panels = [(panel, _lines(panel, log_history)) for panel in PANELS if panel.instead_of not in logged]
    panels = [(panel, lines) for panel, lines in panels if lines]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(INCHES[0] * columns, INCHES[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (panel, lines) in zip(places, panels, strict=False):
        for style, label, points in lines:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(*_limits(panel, [value for _, _, points in lines for _, value in points]))
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    return True


def _lines(panel: Panel, log_history: list[dict[str, Any]]) -> list[tuple[str, str, list[tuple[int, float]]]]:
    """Style, label and points of each line of a panel that has any."""
    lines = []
    for number, (label, names) in enumerate(panel.series.items()):
        for prefix, style, kind in (("", "-", label), ("eval_", "o", f"{label}, evaluation")):
            found = (_points(log_history, prefix + name) for name in names)
            if points := next(filter(None, found), None):
                if len(points) < 3:  # measured before and after, and nothing is known of what is between
                    style = "o:" if prefix == "" else style
                lines.append((f"C{number}{style}", kind, points))
    return lines


def _points(log_history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    found = [(entry["step"], entry[name]) for entry in log_history if isinstance(entry.get(name), int | float)]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _limits(panel: Panel, values: list[float]) -> tuple[float, float]:
    low, high = panel.axis
    low, high = min([low, *values]), max([low if high is None else high, *values])
    room = 0.04 * (high - low or 1.0)
    return low - room, high + room


class Curves(TrainerCallback):
    """
    Draws `curves.png` into the output folder when training ends: reward, KL, length and entropy of GRPO and PPO, loss,
    accuracy and margin of DPO, KTO and process-reward models, of those that were logged. On the main process; needs
    matplotlib. By name: `callback_paths: [trl_ext.callbacks.Curves]`.
    """

    def __init__(self):
        self.require_installed()

    @staticmethod
    def require_installed() -> None:
        """Refuses where there is no matplotlib; asked when a config names this class."""
        if not curves_available():
            raise ValueError("trl_ext.callbacks.Curves draws with matplotlib: pip install matplotlib.")

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir, NAME)
            path.parent.mkdir(parents=True, exist_ok=True)
            if draw_curves(state.log_history, path):
                print(f"Curves: {path}", flush=True)


PANELS = (
    Panel("reward", {"reward": ("reward",)}, axis=(0.0, 1.0)),
    Panel("loss", {"loss": ("loss",)}, instead_of="reward"),
    Panel(
        "held-out accuracy",
        {"greedy": ("held_out/greedy",), "sampled": ("held_out/sampled",)},
        axis=(0.0, 1.0),
    ),
    Panel("accuracy", {"accuracy": ("rewards/accuracies", "accuracy")}, axis=(0.0, 1.0)),
    Panel("KL to the reference, nats", {"KL": ("kl/reference", "kl", "policy_samples/kl")}),
    Panel("completion length, tokens", {"length": ("completions/mean_length", "policy_samples/length")}),
    Panel("reward margin", {"margin": ("rewards/margins",)}),
    Panel("entropy, nats per token", {"entropy": ("entropy",)}),
    Panel("explained variance", {"critic": ("value/explained_variance",)}, axis=(0.0, 1.0)),
)
