"""
Preference pairs from the base model: a right and a wrong worked answer of its own to each prompt.

    python -m recipes.clock.pairs [--output FILE] [--seed 0]

Both answers are samples of the same model at temperature 1, the first right and the first wrong one of `SAMPLES`, so
that they come from one distribution, as IPO assumes. Prompts whose samples are all right or all wrong are left out.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.clock.accuracy import read_rows, write_completions
from recipes.clock.task import outcome_reward

HERE = Path(__file__).parent
PROMPTS, SAMPLES = 768, 8


def preference_pairs(model, tokenizer, rows: list[dict], seed: int = 0) -> list[dict]:
    """Conversational preference pairs for those of `rows` to which the model writes both kinds of answer."""
    repeated = [row for row in rows for _ in range(SAMPLES)]
    completions = []
    for start in range(0, len(repeated), 512):
        completions += write_completions(
            model, tokenizer, repeated[start : start + 512], do_sample=True, seed=seed + start
        )
    rewards = outcome_reward([row["prompt"] for row in repeated], completions)
    pairs = []
    for i, row in enumerate(rows):
        answers: dict[float, str] = {}
        for completion, reward in list(zip(completions, rewards, strict=True))[i * SAMPLES : (i + 1) * SAMPLES]:
            answers.setdefault(reward, completion)
        if len(answers) == 2:
            messages = {
                name: [{"role": "assistant", "content": answers[r]}]
                for name, r in (("chosen", 1.0), ("rejected", 0.0))
            }
            pairs.append({"prompt": row["prompt"], **messages})
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample preference pairs for the clock task from its base model.")
    parser.add_argument("--output", type=Path, default=HERE / "preferences" / "train.jsonl", help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums depend on the number of threads
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    pairs = preference_pairs(model, tokenizer, read_rows(HERE / "data" / "train.jsonl")[:PROMPTS], args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{len(pairs)} pairs of {PROMPTS} prompts in {args.output}")


if __name__ == "__main__":
    main()
