"""
What a critic is for: rewards of steps, which a prefix tells much about. The clock task's base model writes answers, a
reward for every right line; the policy stays as it is while the critic learns (`critic_warmup_steps`), so that every
generation batch is a test of what was learnt on those before.

    python docs/scripts/critic.py --output docs/methods/ppo.png

Prints, for each seed, the explained variance on the last batches and the variance of the policy gradient of a fresh
batch with the critic, with one number as baseline, and with V = 0: the trace of the covariance of the gradients of
single completions, on the same completions. λ = 1, nothing whitened, so that all three have the same expectation.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset

from recipes.clock.task import process_reward
from trl_ext import PPOConfig, PPOTrainer

ROWS = 64


def trained(seed: int, batches: int, folder: Path) -> PPOTrainer:
    args = PPOConfig(
        str(folder), seed=seed, beta=0.0, critic_lam=1.0, lam=1.0, whiten_advantages=False, cliprange_value=None,
        num_iterations=4, per_device_train_batch_size=ROWS, max_completion_length=64, max_steps=4 * batches,
        critic_warmup_steps=4 * batches, critic_learning_rate=3e-3, lr_scheduler_type="constant_with_warmup",
        warmup_steps=5, logging_steps=1, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = load_dataset("recipes/clock/data", split="train")
    trainer = PPOTrainer("recipes/clock/model", process_reward, args, train_dataset=data)
    trainer.train()
    return trainer


def gradient_variance(trainer: PPOTrainer, batch: dict, advantages: torch.Tensor) -> float:
    """Trace of the covariance of the completions' policy gradients."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].size(1)
    parameters = list(trainer.model.parameters())
    gradients = []
    for row, weight in enumerate(advantages * batch["completion_mask"]):
        logits = trainer.model(input_ids=ids[row, None], attention_mask=mask[row, None]).logits[0, -width - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, ids[row, -width:, None])[:, 0]
        found = torch.autograd.grad((weight * logps).sum(), parameters)
        gradients.append(torch.cat([g.flatten() for g in found]))
    stacked = torch.stack(gradients)
    return (stacked - stacked.mean(0)).square().sum(1).mean().item()


def measured(seed: int, batches: int, folder: Path) -> dict:
    trainer = trained(seed, batches, folder)
    curve = [h["value/explained_variance"] for h in trainer.state.log_history if "value/explained_variance" in h]
    rows = load_dataset("recipes/clock/data", split="test").select(range(ROWS))
    trainer.model.train()
    batch = trainer._generate_and_score_completions(list(rows))
    to_go, values, mask = batch["returns"], batch["old_values"], batch["value_mask"]
    kinds = {"V = 0": to_go, "one number": to_go - to_go[mask].mean(), "critic": to_go - values}
    variances = {name: gradient_variance(trainer, batch, a.where(mask, 0.0)) for name, a in kinds.items()}
    return {"explained_variance": curve, "gradient_variance": variances}


def draw(results: dict[int, dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for seed, result in results.items():
        curve = result["explained_variance"]
        left.plot(range(1, len(curve) + 1), curve, label=f"seed {seed}")
        bars = result["gradient_variance"]
        right.plot(list(bars), [x / bars["V = 0"] for x in bars.values()], "o", label=f"seed {seed}")
    left.set(xlabel="Generation batch of 64 completions", ylabel="Explained variance", ylim=(-0.5, 1))
    left.axhline(0, color="0.7", linewidth=0.8)
    right.set(ylabel="Gradient variance, relative", ylim=(0, 1.1), xlabel="Baseline")
    right.margins(x=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Explained variance of a critic, and the gradient's variance.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("outputs/critic/ppo.png"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = {seed: measured(seed, args.batches, Path("outputs/critic")) for seed in args.seeds}
    for seed, result in results.items():
        last, bars = result["explained_variance"][-5:], result["gradient_variance"]
        shares = ", ".join(f"{name} {x / bars['V = 0']:.3f}" for name, x in bars.items())
        print(f"seed {seed}: explained variance {sum(last) / len(last):.3f}; gradient variance {shares}", flush=True)
    Path("outputs/critic/critic.json").write_text(json.dumps(results), encoding="utf-8")
    draw(results, args.output)


if __name__ == "__main__":
    main()
