"""
GRPO in rounds, as DeepSeekMath's algorithm 1 has it, on the hard clock task with a learned process-reward model.

    python -m recipes.clock.iterate [--rounds 3] [--steps 40] [--seed 1] [--output outputs/iterate]

Each round: the reference becomes the policy; GRPO goes on for some steps with the reward model of the round before;
the new policy's answers are sampled and their lines verified; the reward model learns from them, with a tenth of
replayed rows. Everything of a round is in `OUTPUT/round_N`, and a round that is there is skipped, so that a run that
was stopped goes on with the same command. The table goes to `OUTPUT/rounds.json`.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.clock.accuracy import accuracy, read_rows, write_completions
from recipes.clock.rounds import parser_of, play_rounds
from recipes.clock.step_data import HARD, labelled_steps
from recipes.clock.task import outcome_reward, process_reward
from trl_ext import GRPOConfig, GRPOTrainer, PRMConfig, PRMTrainer
from trl_ext.rewards.implicit_reward import ImplicitReward

PROMPTS, SAMPLES, REPLAYED = 250, 8, 0.1
QUIET = {
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def load(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def train_policy(policy: Path, prm: Path, output: Path, steps: int, seed: int) -> dict:
    """
    GRPO from `policy`, which is the reference too. The learned reward and the outcome are trained on; the program's
    reward is logged beside them.
    """
    args = GRPOConfig(
        str(output),
        advantage_estimator="process_group_relative",
        process_reward_model={"model": str(prm)},
        reward_weights=[0.0, 1.0, 1.0],
        kl_estimator="k3",
        beta=0.01,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=64,
        max_steps=steps,
        learning_rate=3e-4,
        warmup_steps=5,
        lr_scheduler_type="constant_with_warmup",
        logging_steps=5,
        seed=seed,
        **QUIET,
    )
    data = Dataset.from_list(read_rows(HARD / "data/train.jsonl")).shuffle(seed)
    trainer = GRPOTrainer(str(policy), [process_reward, outcome_reward], args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    last = [entry for entry in trainer.state.log_history if "kl" in entry][-1]
    return {
        "kl": last["kl"],
        "program": last["rewards/process_reward/mean"],
        "learned": last[f"rewards/{prm.name}/mean"],
    }


def train_prm(prm: Path, rows: list[dict], output: Path, steps: int, rate: float, seed: int) -> None:
    args = PRMConfig(
        str(output),
        per_device_train_batch_size=64,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_length=128,
        seed=seed,
        **QUIET,
    )
    trainer = PRMTrainer(str(prm), args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()


def total_kl(policy: Path, rows: list[dict], answers: list[str]) -> float:
    """KL to the *first* policy in nats per token, over samples of the policy: mean log-ratio of what it wrote."""
    (model, tokenizer), (first, _) = load(policy), load(HARD / "model")
    conversations = [[{"role": "assistant", "content": answer}] for answer in answers]
    per_token = ImplicitReward(model, tokenizer, beta=1.0, ref_model=first).per_token(
        [row["prompt"] for row in rows], conversations
    )
    return torch.cat(per_token).mean().item()


def play_round(number: int, output: Path, args: argparse.Namespace) -> dict:
    """One round; what it measured. In round 0 the base answers, and the reward model is new."""
    folder, seed = output / f"round_{number}", args.seed + number
    policies = [HARD / "model", *(output / f"round_{n}/policy" for n in range(1, number + 1))]
    prms = [HARD / "model", *(output / f"round_{n}/prm" for n in range(number))]
    found = train_policy(policies[-2], prms[-1], policies[-1], args.steps, seed) if number else {}
    model, tokenizer = load(policies[-1])
    prompts = random.Random(seed).sample(read_rows(HARD / "data/train.jsonl"), PROMPTS)
    rows = labelled_steps(model, tokenizer, prompts, SAMPLES, seed=1000 * seed)
    old = [row for n in range(number) for row in json.loads((output / f"round_{n}/rows.json").read_text())]
    replay = random.Random(seed).sample(old, min(len(old), int(REPLAYED / (1 - REPLAYED) * len(rows))))
    # A new head needs the large rate; a trained one must not forget.
    train_prm(prms[-1], rows + replay, folder / "prm", *((150, 1e-3) if number else (400, 5e-3)), seed)
    test = read_rows(HARD / "data/test.jsonl")
    answers = write_completions(model, tokenizer, test, do_sample=True)
    found |= {kind: accuracy(model, tokenizer, test, do_sample=kind == "sampled") for kind in ("greedy", "sampled")}
    found["total_kl"] = total_kl(policies[-1], test, answers)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "found.json").write_text(json.dumps(found))  # last: the round is whole
    return found


def main() -> None:
    description = "Iterative GRPO with a reward model that learns between the rounds."
    play_rounds(play_round, parser_of(description, steps=40, output="outputs/iterate").parse_args())


if __name__ == "__main__":
    main()
