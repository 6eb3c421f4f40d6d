"""The commands: which there are, what they are for, and where their scripts are."""

import importlib
from types import ModuleType

# Commands that TRL does not have, with scripts in `trl_ext.scripts`, and what they do.
COMMANDS = {
    "ppo": "Run the ppo training script: PPO with a critic",
    "prm": "Run the prm training script: process-reward models",
    "label-steps": "Label the steps of sampled answers by rollouts",
    "rejection-sampling": "Keep the right ones of sampled answers, as data to train on",
}
# Commands that start no worker, each a module of this package with a `main`.
AT_ONCE = {
    "example": "Copy the recipes with model, data and reward, and run the quickstart with --run",
    "methods": "List the methods: option, value, one line, page, paper",
    "schema": "Print the JSON schema of a command's YAML file, for editors",
}
# TRL's commands that train, and ours.
TRAINING = ("grpo", "dpo", "kto", "ppo", "prm", "sft", "reward", "rloo", "distillation")
SAMPLING = ("label-steps", "rejection-sampling")


def script_of(command: str) -> ModuleType:
    """The script that the workers run, TRL's or ours; it has `make_parser` and `main`."""
    package = "trl_ext.scripts" if command in COMMANDS else "trl.scripts"
    return importlib.import_module(f"{package}.{command.replace('-', '_')}")
