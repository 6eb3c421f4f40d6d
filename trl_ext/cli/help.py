"""`trl-ext <command> --help`: our options first, in a group of their own, and three examples at the end."""

import argparse
from typing import Any

from ..trainers.foreign import is_ours
from .commands import SAMPLING

_DRY_RUN = "Check everything, show the first prompt as the model sees it, sample a little, and train nothing."
_LAUNCH = "Options of `accelerate launch`, such as --num_processes 2, are taken too."
_MODEL = "--model_name_or_path Qwen/Qwen3-0.6B"
_FIRST = {  # of each command, one that needs no file
    "grpo": f"{_MODEL} --dataset_name prompts.jsonl --reward_funcs my_rewards.right "
    "--advantage_estimator reinforce_plus_plus",
    "ppo": f"{_MODEL} --dataset_name prompts.jsonl --reward_funcs my_rewards.right --use_peft",
    "dpo": f"{_MODEL} --dataset_name pairs.jsonl --loss_type psipo_identity",
    "kto": f"{_MODEL} --dataset_name answers.jsonl --loss_type bco",
    "prm": f"{_MODEL} --dataset_name steps.jsonl --kind token_classifier",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """An option under its first name alone, its default if it has one, and the examples line by line."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        names, action.option_strings = action.option_strings, action.option_strings[:1]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = names


def our_options(parser: Any) -> set[str]:
    """Options that TRL's command of that name does not have, or that a config of ours declares again."""
    ours: set[str] = set()
    for kind in parser.dataclass_types:
        theirs = {name for base in kind.__mro__ if not is_ours(base) for name in vars(base).get("__annotations__", ())}
        declared = [vars(base).get("__annotations__", {}) for base in kind.__mro__ if is_ours(base)]
        if theirs:
            ours |= {name for names in declared for name in names}
    return ours


def arrange(parser: Any, command: str) -> None:
    """Puts our options first, says how the command is used in one line, and adds the examples."""
    trains = command not in SAMPLING
    parser.usage = f"trl-ext {command} [--config FILE.yaml] {'[--dry_run] ' if trains else ''}[--OPTION VALUE …]"
    parser.formatter_class = HelpFormatter
    parser.epilog = f"{_LAUNCH}\n\n{_examples(command, trains)}"
    ours = our_options(parser)
    every = parser._optionals._group_actions
    moved = [action for action in every if action.dest in ours]
    if moved:
        group = parser.add_argument_group("options of trl_ext", "Each is off by default, and then training is TRL's.")
        group._group_actions.extend(moved)
        every[:] = [action for action in every if action not in moved]
        parser._optionals.title = "options of TRL and transformers"
        parser._action_groups.insert(0, parser._action_groups.pop())
    first = parser.add_argument_group("the command")
    first._group_actions.append(_shown("--config", "FILE.yaml", "YAML file with any of the options below."))
    if trains:
        first._group_actions.append(_shown("--dry_run", None, _DRY_RUN))
    parser._action_groups.insert(0, parser._action_groups.pop())


def _shown(option: str, value: str | None, text: str) -> argparse.Action:
    """An option for the help alone: it is read before the parser sees it."""
    return argparse.Action([option], argparse.SUPPRESS, nargs=None if value else 0, metavar=value, help=text)


def _examples(command: str, trains: bool) -> str:
    words = ["--config run.yaml", "--config run.yaml --limit 8"]
    if trains:
        words = ["--config run.yaml --dry_run", "--config run.yaml --resume_from_checkpoint last"]
        words = [_FIRST.get(command, f"{_MODEL} --dataset_name data.jsonl"), *words]
    else:
        words.append("--config run.yaml --backend vllm")
    return "\n".join(["examples:", *(f"  trl-ext {command} {line}" for line in words)])
