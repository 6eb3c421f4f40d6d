"""
Preference training in rounds: online DPO, with any loss of trl_ext.

    python -m recipes.clock.iterate_pairs [--loss psipo_identity] [--rounds 3] [--steps 50] [--seed 1] [--output …]

Each round: the policy answers prompts eight times; a right and a wrong answer of its own make a pair; DPO goes on for
some steps with the policy as the new reference. Everything of a round is in `OUTPUT/round_N`, and a round that is
there is skipped, so that a run that was stopped goes on with the same command. The table goes to `OUTPUT/rounds.json`.
"""

import argparse
import json
import random
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.clock.accuracy import accuracy, read_rows
from recipes.clock.pairs import preference_pairs
from recipes.clock.rounds import parser_of, play_rounds
from trl_ext import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
PROMPTS = 256


def play_round(number: int, output: Path, args: argparse.Namespace) -> dict:
    """One round; what it measured. Round 0 measures the base."""
    source = HERE / "model" if number <= 1 else output / f"round_{number - 1}/policy"
    model, tokenizer = (cls.from_pretrained(source) for cls in (AutoModelForCausalLM, AutoTokenizer))
    model, found = model.float(), {}
    if number > 0:
        prompts = random.Random(args.seed + number).sample(read_rows(HERE / "data/train.jsonl"), PROMPTS)
        pairs = preference_pairs(model, tokenizer, prompts, seed=1000 * args.seed + number)
        config = DPOConfig(
            str(output / f"round_{number}/policy"),
            loss_type=[args.loss],
            beta=args.beta,
            per_device_train_batch_size=32,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            seed=args.seed + number,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        model, found = trainer.model, {"pairs": len(pairs)}
    test = read_rows(HERE / "data/test.jsonl")
    found |= {kind: accuracy(model, tokenizer, test, do_sample=kind == "sampled") for kind in ("greedy", "sampled")}
    done = output / f"round_{number}/found.json"
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(found))  # last: the round is whole
    return found


def main() -> None:
    description = "Iterative preference training on pairs of the policy's own answers."
    parser = parser_of(description, steps=50, output="outputs/iterate_pairs")
    parser.add_argument("--loss", default="psipo_identity", help="a loss of trl_ext or of TRL")
    parser.add_argument("--beta", type=float, default=0.1, help="beta of the loss; τ of IPO")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="constant learning rate")
    play_rounds(play_round, parser.parse_args())


if __name__ == "__main__":
    main()
