"""Training in rounds: what the two iterative recipes share."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch


def parser_of(description: str, steps: int, output: str) -> argparse.ArgumentParser:
    """The options of a run in rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of training")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps of each")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder to write")
    return parser


def play_rounds(play_round: Callable[[int, Path, argparse.Namespace], dict], args: argparse.Namespace) -> None:
    """
    Plays rounds 0 to `args.rounds`, prints what each measured, and writes the table to `OUTPUT/rounds.json`.

    A round ends by writing `OUTPUT/round_N/found.json`; one that has it is skipped.
    """
    torch.set_num_threads(1)  # sums depend on the number of threads
    rounds = []
    for number in range(args.rounds + 1):
        done = args.output / f"round_{number}/found.json"
        rounds.append(json.loads(done.read_text()) if done.exists() else play_round(number, args.output, args))
        print(f"round {number}: " + ", ".join(f"{name} {value:.3f}" for name, value in rounds[-1].items()), flush=True)
    (args.output / "rounds.json").write_text(json.dumps(rounds, indent=1))
