"""
The learned reward and the program's, which only looks on: GRPO on the hard clock task with a process-reward model,
with outcomes beside it and without.

    python docs/scripts/reward_hacking.py outputs/circle_prm --output docs/methods/reward_models.png

Where the learned reward rises and the program's falls, the policy has found what the model does not see. The options
are those of `recipes/process_grpo_prm_quickstart.yaml`.
"""

import argparse
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes.clock.task import outcome_reward, process_reward
from trl_ext import GRPOConfig, GRPOTrainer

RECIPE = Path("recipes/process_grpo_prm_quickstart.yaml")
RUNS = {"learned reward alone": [0.0, 0.0, 1.0], "learned reward and outcomes": [0.0, 1.0, 1.0]}


def logged(prm: str, weights: list[float], seed: int) -> dict[str, list[float]]:
    """Mean rewards against optimiser steps: of the steps, by the model and the program, and of the outcomes."""
    options = yaml.safe_load(RECIPE.read_text())
    model, data = options.pop("model_name_or_path"), options.pop("dataset_name")
    changes = {"callback_paths": None, "reward_weights": weights, "process_reward_model": {"model": prm}, "seed": seed}
    changes |= {"use_cpu": True, "disable_tqdm": True, "output_dir": "outputs/reward_hacking"}
    del options["reward_funcs"]
    trainer = GRPOTrainer(
        model,
        [process_reward, outcome_reward],
        GRPOConfig(**options | changes),
        train_dataset=load_dataset(data, split="train"),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    names = {"the model": Path(prm).name, "the program": "process_reward", "outcomes": "outcome_reward"}
    found = {key: [entry[f"rewards/{name}/mean"] for entry in log] for key, name in names.items()}
    return {"step": [entry["step"] for entry in log], **found}


def draw(runs: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    lines = {"the model": ("C1", "-"), "the program": ("C0", "-"), "outcomes": ("0.4", ":")}
    for axes, (title, found) in zip(figure.subplots(1, 2, sharey=True), runs.items(), strict=True):
        for key, (color, style) in lines.items():
            label = "right results" if key == "outcomes" else f"right lines, by {key}"
            axes.plot(found["step"], found[key], color=color, linestyle=style, label=label)
        axes.set(title=title, xlabel="Optimiser step", ylim=(0, 1.02))
    figure.axes[0].set_ylabel("Mean of the samples")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the learned reward beside the program's.")
    parser.add_argument("prm", help="folder of a process-reward model")
    parser.add_argument("--seed", type=int, default=1, help="seed of both runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/reward_hacking.png"), help="picture to write")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small to gain by more
    runs = {title: logged(args.prm, weights, args.seed) for title, weights in RUNS.items()}
    for title, found in runs.items():
        print(title, *(f"{key} {found[key][-1]:.2f}" for key in found), sep=", ")
    draw(runs, args.output)


if __name__ == "__main__":
    main()
