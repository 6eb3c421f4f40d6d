"""`trl-ext prm …`: TRL's `reward` script, which finds our PRM classes where it asks TRL for those of reward models."""

from contextlib import AbstractContextManager
from typing import Any

from trl.scripts import reward

from trl_ext.scripts.in_place import in_place
from trl_ext.trainers.prm import PRMConfig, PRMTrainer


def _prm_for_reward() -> AbstractContextManager:
    return in_place(RewardConfig=PRMConfig, RewardTrainer=PRMTrainer)


def make_parser(subparsers: Any = None, prog: str | None = None) -> Any:
    with _prm_for_reward():
        return reward.make_parser(subparsers, prog=prog)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    # The default is for language models; this one makes PEFT train and save the new head of a classifier, too.
    if training_args.kind in ("token_classifier", "marker") and model_args.lora_task_type == "CAUSAL_LM":
        model_args.lora_task_type = "TOKEN_CLS"
    with _prm_for_reward():
        reward.main(script_args, training_args, model_args, dataset_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
