"""`trl-ext ppo …`: TRL's `grpo` script, which finds our PPO classes where it asks TRL for those of GRPO."""

from contextlib import AbstractContextManager
from typing import Any

from trl.scripts import grpo

from trl_ext.scripts.in_place import in_place
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer


def _ppo_for_grpo() -> AbstractContextManager:
    return in_place(GRPOConfig=PPOConfig, GRPOTrainer=PPOTrainer)


def make_parser(subparsers: Any = None, prog: str | None = None) -> Any:
    with _ppo_for_grpo():
        return grpo.make_parser(subparsers, prog=prog)


def main(*args: Any) -> None:
    with _ppo_for_grpo():
        grpo.main(*args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
