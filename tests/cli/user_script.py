"""
A training script as a user of TRL writes it; it knows nothing of trl_ext.

    python user_script.py --config run.yaml
"""

import json
import os
import sys
from dataclasses import dataclass

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, TrlParser
from trl.trainer.grpo_trainer import GRPOTrainer as GRPOTrainerOfItsModule


@dataclass
class ScriptArguments:
    model: str


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def main():
    script_args, training_args = TrlParser((ScriptArguments, GRPOConfig)).parse_args_and_config()
    grpo = GRPOTrainer(
        model=script_args.model,
        reward_funcs=length,
        args=training_args,
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cde", "ef", "g 1"] * 4}),
    )
    grpo.train()
    dpo = DPOTrainer(
        model=script_args.model,
        args=DPOConfig(training_args.output_dir, max_steps=1, bf16=False, report_to="none", save_strategy="no"),
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 16, "chosen": ["cd"] * 16, "rejected": ["ef"] * 16}),
    )
    dpo.train()
    weights = sum(
        parameter.double().sum().item() for parameter in grpo.accelerator.unwrap_model(grpo.model).parameters()
    )
    found = {
        "grpo": type(grpo).__module__,
        "dpo": type(dpo).__module__,
        "same": GRPOTrainer is GRPOTrainerOfItsModule,
        "processes": grpo.accelerator.num_processes,
        "estimator": getattr(training_args, "advantage_estimator", None),
        "logged": sorted(name for entry in grpo.state.log_history for name in entry),
        "weights": weights,
        "name, file, argv, path": [__name__, __file__, sys.argv, sys.path[0]],
    }
    with open(f"rank{os.environ.get('RANK', 0)}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
