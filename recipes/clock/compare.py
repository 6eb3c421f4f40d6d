"""
Outcome against process rewards on the clock task: same model, data, batches and settings, several seeds.

    python -m recipes.clock.compare [--seeds 0 1 2] [--max_steps 150] [--learning_rate LR] [--output outputs/compare]

Trains `recipes/process_grpo_quickstart.yaml` once per seed with each kind of reward, measures held-out accuracy on the
way, prints a table and draws both curves to `OUTPUT/compare.png`. The numbers go to `OUTPUT/compare.json`.
"""

import argparse
import json
from pathlib import Path

import yaml
from datasets import load_dataset
from transformers import TrainerCallback

from recipes.clock.accuracy import HardAccuracyReport, accuracy, read_rows
from recipes.clock.task import outcome_reward, process_reward
from trl_ext import GRPOConfig, GRPOTrainer

RECIPE = Path(__file__).parent.parent / "process_grpo_quickstart.yaml"
EVERY = 10  # optimiser steps between two measurements
KINDS = {
    "outcome": ([outcome_reward], "group_relative"),
    "process": ([process_reward], "process_group_relative"),
    "both": ([process_reward, outcome_reward], "process_group_relative"),
}


class Curve(TrainerCallback):
    """Sampled accuracy on the held-out prompts, every few steps, as `[step, accuracy]`."""

    def __init__(self):
        self.points, self.rows = [], read_rows(HardAccuracyReport.test_file)

    def _measure(self, state, model, processing_class):
        self.points.append([state.global_step, accuracy(model, processing_class, self.rows, do_sample=True)])

    def on_train_begin(self, args, state, control, model, processing_class, **kwargs):
        self._measure(state, model, processing_class)

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        if state.global_step % EVERY == 0:
            self._measure(state, model, processing_class)


def train(kind: str, seed: int, output: Path, **overrides) -> dict:
    """One run of the recipe with this kind of reward: `{"curve": [[step, accuracy], …], "greedy": accuracy}`."""
    options = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    model, data = options.pop("model_name_or_path"), options.pop("dataset_name")
    functions, estimator = KINDS[kind]
    changes = {"advantage_estimator": estimator, "callback_paths": None, "seed": seed, **overrides}
    changes |= {"output_dir": str(output / "runs"), "disable_tqdm": True}
    del options["reward_funcs"]
    args = GRPOConfig(**{**options, **changes})
    curve = Curve()
    dataset = load_dataset(data, split="train")
    trainer = GRPOTrainer(model, functions, args, train_dataset=dataset, callbacks=[curve])
    trainer.train()
    greedy = accuracy(trainer.model, trainer.processing_class, curve.rows, do_sample=False)
    return {"curve": curve.points, "greedy": greedy}


def draw(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Mean over the seeds as a line, each seed as a thin one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (kind, runs) in zip(("C3", "C0", "C2"), results.items(), strict=False):
        curves = [run["curve"] for run in runs.values()]
        steps = [step for step, _ in curves[0]]
        for curve in curves:
            axes.plot(steps, [value for _, value in curve], color=color, alpha=0.25, linewidth=0.8)
        mean = [sum(values) / len(values) for values in zip(*[[v for _, v in c] for c in curves], strict=True)]
        axes.plot(steps, mean, color=color, label=f"{kind} rewards")
    axes.set(xlabel="Optimiser step", ylabel="Held-out accuracy, sampled", ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Outcome against process rewards on the clock task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["outcome", "process"])
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, help="default: the recipe's")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    overrides = {"max_steps": args.max_steps}
    if args.learning_rate is not None:
        overrides["learning_rate"] = args.learning_rate
    results: dict[str, dict[str, dict]] = {kind: {} for kind in args.kinds}
    for seed in args.seeds:
        for kind in args.kinds:
            run = results[kind][str(seed)] = train(kind, seed, args.output, **overrides)
            first, last = run["curve"][0][1], run["curve"][-1][1]
            print(f"seed {seed}, {kind}: sampled {first:.3f} -> {last:.3f}, greedy {run['greedy']:.3f}", flush=True)
    (args.output / "compare.json").write_text(json.dumps(results), encoding="utf-8")
    draw(results, args.output / "compare.png")


if __name__ == "__main__":
    main()
