"""`trl-ext ppo …`: TRL's `grpo` script, which finds our PPO classes where it asks TRL for those of GRPO."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl
from trl.scripts import grpo

from trl_ext.trainers.ppo import PPOConfig, PPOTrainer


@contextmanager
def _ppo_for_grpo() -> Iterator[None]:
    """The script imports these names when it runs; they are TRL's, or those that were registered, again afterwards."""
    names, held = {"GRPOConfig": PPOConfig, "GRPOTrainer": PPOTrainer}, vars(trl)
    before = {name: held[name] for name in names if name in held}
    held.update(names)
    try:
        yield
    finally:
        for name in names:
            del held[name]
        held.update(before)


def make_parser(subparsers: Any = None, prog: str | None = None) -> Any:
    with _ppo_for_grpo():
        return grpo.make_parser(subparsers, prog=prog)


def main(*args: Any) -> None:
    with _ppo_for_grpo():
        grpo.main(*args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
