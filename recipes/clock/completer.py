"""
Train a completer for labels of steps, in half a minute on one CPU core: the easy base, on right answers.

    python -m recipes.clock.completer [--output DIR] [--seed 0]
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.clock.accuracy import accuracy, read_rows
from recipes.clock.build import Base, pretrain

HERE = Path(__file__).parent
RIGHT = Base(miscarry=0.0, slip=0.0, num_moves=8)
STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a completer for labels of steps on the clock task.")
    parser.add_argument("--output", type=Path, default=Path("outputs/clock_completer"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums depend on the number of threads
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    moves = RIGHT.num_moves
    pretrain(model, tokenizer, RIGHT, [(STEPS, moves)], random.Random(f"completer {args.seed}"), fewest=moves)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    rows = read_rows(HERE / "hard" / "data" / "test.jsonl")
    greedy, sampled = (accuracy(model, tokenizer, rows, do_sample) for do_sample in (False, True))
    print(f"{args.output}: {len(rows)} held-out prompts of {moves} moves, greedy {greedy:.3f}, sampled {sampled:.3f}")


if __name__ == "__main__":
    main()
