"""
Time of an optimizer step, TRL's trainer and ours in turns on the same work: the quickstart's model, data and batch.

    python docs/scripts/step_time.py [--rounds 5] [--steps 20]
"""

import argparse
import statistics
import tempfile

import torch
import trl
from datasets import load_dataset

import trl_ext
from recipes.clock.task import outcome_reward

CASES = {  # what is compared: (options of TRL's trainer, options of ours)
    "nothing switched on": ({}, {}),
    "group_relative": ({}, {"advantage_estimator": "group_relative"}),
    "reinforce_plus_plus": ({}, {"advantage_estimator": "reinforce_plus_plus"}),
    "k3 in the loss": ({"beta": 0.01}, {"beta": 0.01, "kl_estimator": "k3"}),
    "exact in the loss": ({"beta": 0.01}, {"beta": 0.01, "kl_estimator": "exact"}),
    "reinforce_plus_plus, k1 in the reward": (
        {"beta": 0.01},
        {"beta": 0.01, "advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward"},
    ),
}


def step_times(trainer_class, config_class, data, steps: int, **options) -> list[float]:
    """Seconds of each step but the first, generation included."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            folder,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=64,
            learning_rate=1e-6,
            max_steps=steps,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        trainer = trainer_class("recipes/clock/model", outcome_reward, args=config, train_dataset=data)
        trainer.log = lambda logs, start_time=None: None
        trainer.train()
        return trainer._metrics["train"]["step_time"][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Step times of TRL's GRPO trainer and ours.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("recipes/clock/data", split="train")
    print("| case | TRL, ms | trl_ext, ms | ratio |\n|---|---|---|---|")
    for case, (theirs, ours) in CASES.items():
        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(arguments.rounds):
            times["theirs"] += step_times(trl.GRPOTrainer, trl.GRPOConfig, data, arguments.steps, **theirs)
            times["ours"] += step_times(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, data, arguments.steps, **ours)
        a, b = (1000 * statistics.median(times[name]) for name in ("theirs", "ours"))
        print(f"| {case} | {a:.1f} | {b:.1f} | {b / a:.3f} |", flush=True)


if __name__ == "__main__":
    main()
