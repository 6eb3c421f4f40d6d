"""TRL's parser, made strict: what it would ignore, or find out when a model has loaded, is refused in a sentence."""

import argparse
import difflib
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any
from unittest import mock

import trl.rewards
from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments
from trl.scripts.utils import TrlParser

from ..functional.preference import PREFERENCE_LOSSES, UNPAIRED_LOSSES
from ..lookup import did_you_mean, import_path
from ..scripts.as_meant import as_meant
from ..trainers.dpo.losses import TRL_LOSSES
from .help import arrange
from .launch import number_of_processes, refuse_stray_words
from .values import GRPO_LOSSES

_REWARDS = sorted(name for name in trl.rewards.__all__ if name.endswith(("_reward", "_punishment")))
_WITH_OUR_OPTIONS = ("grpo", "dpo", "kto")


def parser_class(seen: dict[str, Any] | None = None) -> type:
    """
    The parser. An option that TRL's would ignore is an error, which names the closest one there is.

    Args:
        seen (`dict[str, Any]`, *optional*):
            Gets the `output_dir` of the run once it is known, what was parsed, and the number of processes.
    """

    class Parser(TrlParser):
        def __init__(self, *args, prog: str, **kwargs):
            super().__init__(*args, prog=prog.replace("trl", "trl-ext", 1), **kwargs)
            # vLLM has options that neither TRL nor we know; TRL passes them on.
            self.strict = "vllm-serve" not in prog
            if self.strict:
                arrange(self, self.prog.partition(" ")[2])

        for_launcher: Sequence[str] = ()  # words for `accelerate launch` from the YAML file

        def set_defaults_with_config(self, **config):
            if self.strict:
                _refuse_unknown(self, [name for name in config if name not in {a.dest for a in self._actions}])
            for action in self._actions:
                value = config.get(action.dest)
                for item in value if isinstance(value, list) else [value]:
                    if action.choices and item is not None and str(item) not in map(str, action.choices):
                        raise ValueError(f"{action.dest} must be one of {list(action.choices)}, got {item!r}.")
            self.for_launcher = super().set_defaults_with_config(**config)
            return self.for_launcher

        def parse_args_into_dataclasses(self, args=None, **kwargs):
            processes = self.checked(args) if self.strict else 1
            with _with_the_option(self, args), one_of(processes):
                parsed = super().parse_args_into_dataclasses(args=args, **kwargs)
            parts = tuple(part for part in parsed if is_dataclass(part))
            for part in parts:
                _check_values(self.prog, part)
            as_meant(parts)
            if seen is not None:
                seen.update(parts=parts, processes=processes)
                seen["output_dir"] = next((part.output_dir for part in parts if hasattr(part, "output_dir")), None)
            return parsed

        def checked(self, args) -> int:
            """Refuses words that nobody reads. Returns the number of processes that the launcher's ask for."""
            _, unknown = self.parse_known_args(args)
            _refuse_unknown(self, [word.partition("=")[0][2:] for word in unknown if word.startswith("--")])
            refuse_stray_words(_without_accelerate_config(unknown))
            return number_of_processes([*self.for_launcher, *unknown])

    return Parser


@contextmanager
def one_of(processes: int) -> Iterator[None]:
    """Around the construction of configs: batches are counted as the workers count them, not as this process would."""
    with mock.patch.object(TrainingArguments, "world_size", processes):
        yield


def _refuse_unknown(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Refuses names that are options neither of the command nor of `accelerate launch`."""
    theirs = [*long_options(launch_command_parser()), "accelerate_config"]
    for name in names:
        plain = name.replace("-", "_")
        if plain == "dry_run":
            raise ValueError("dry_run is a word of the command line, --dry_run, and no key of a YAML file.")
        if plain in theirs:
            continue
        others = [command for command in _WITH_OUR_OPTIONS if not parser.prog.endswith(f" {command}")]
        other = next((command for command in others if name in _options_of_command(command)), None)
        if other is not None:
            raise ValueError(f"{name!r} is an option of `trl-ext {other}`, not of `{parser.prog}`.")
        closest = difflib.get_close_matches(plain, [*long_options(parser), *theirs, "config"], n=1)
        hint = f"did you mean {closest[0]!r}?" if closest else f"see `{parser.prog} --help`."
        raise ValueError(f"there is no option {name!r} for `{parser.prog}` or `accelerate launch`; {hint}")


def long_options(parser: argparse.ArgumentParser) -> list[str]:
    """Names of the options that are written with two hyphens, as they stand in YAML."""
    return [option[2:].replace("-", "_") for option in parser._option_string_actions if option.startswith("--")]


def _options_of_command(command: str) -> list[str]:
    return long_options(importlib.import_module(f"trl.scripts.{command}").make_parser(prog=f"trl {command}"))


def _without_accelerate_config(words: list[str]) -> list[str]:
    """Words for `accelerate launch`, without the one option that TRL reads itself."""
    if "--accelerate_config" not in words:
        return words
    place = words.index("--accelerate_config")
    return words[:place] + words[place + 2 :]


# Values


@contextmanager
def _with_the_option(parser: argparse.ArgumentParser, args: Any) -> Iterator[None]:
    """Around the construction of configs: an error of others that does not name the option gets its name."""
    try:
        yield
    except json.JSONDecodeError as error:
        values, _ = parser.parse_known_args(args)
        option = next((name for name, value in vars(values).items() if value == error.doc), "An option")
        raise ValueError(
            f"{option} must be a mapping in JSON, such as '{{\"option\": 1}}', got {error.doc!r}: {error.msg} at "
            f"character {error.pos + 1}."
        ) from error
    except ValueError as error:
        if str(error).startswith("Your setup doesn't support bf16"):
            raise ValueError(
                "bf16, which is on by default, needs a GPU that has it, and there is none. Add --bf16 false, or "
                "--use_cpu to train on the CPU in spite of it."
            ) from error
        raise


def _check_values(prog: str, part: Any) -> None:
    """Refuses in a part of the parsed arguments what TRL finds out after a model has loaded, or with a traceback."""
    rewards = getattr(part, "reward_funcs", None) or []
    if isinstance(rewards, str):
        raise ValueError(f"reward_funcs must be a list, got {rewards!r}; write reward_funcs: [{rewards}].")
    for name in rewards:
        if "." in name:
            import_path(name, "reward_funcs")
        elif name not in _REWARDS:
            raise ValueError(
                f"reward_funcs {name!r} is neither one of TRL's {_REWARDS} nor a dotted path such as "
                f"'my_rewards.my_function'{did_you_mean(name, _REWARDS)}"
            )
    if prog.endswith((" grpo", " ppo")) and hasattr(part, "loss_type") and part.loss_type not in GRPO_LOSSES:
        _refuse_loss(part.loss_type)


def _refuse_loss(name: Any) -> None:
    names = name if isinstance(name, list) else [name]
    others = {"dpo": {*TRL_LOSSES, *PREFERENCE_LOSSES}, "kto": {*UNPAIRED_LOSSES}}
    command = next((command for command, losses in others.items() if losses & {*map(str, names)}), None)
    hint = f"; that is a loss of `trl-ext {command}`." if command else did_you_mean(name, GRPO_LOSSES)
    raise ValueError(f"loss_type must be one of {GRPO_LOSSES}, got {name!r}{hint}")
