"""`trl-ext <command> …`: TRL's command line with our options, in every worker process."""

import argparse
import difflib
import importlib
import importlib.resources
import io
import subprocess
import sys
import warnings
from contextlib import ExitStack, redirect_stdout
from functools import partial
from typing import Any

from . import __version__
from .registration import register

_COMMANDS = ("ppo",)  # that TRL does not have


def main(argv: list[str] | None = None) -> int:
    """Runs one of TRL's commands with our classes in place of TRL's. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["env"]:
        return _env(argv[1:])
    with ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process only parses; the workers parse again and warn
        undo.enter_context(register())
        import trl
        from trl.cli import accelerate_launcher
        from trl.cli.main import main as trl_main

        _set(undo, accelerate_launcher, "launch_training_script", _launch_training_script)
        _set(undo, sys.modules["trl.cli.main"], "ArgumentParser", _prog_is_trl_ext)
        _set(undo, trl, "TrlParser", _parser_class())
        _add_commands(undo)
        try:
            return trl_main(argv)
        except subprocess.CalledProcessError as error:  # the worker has said why
            return error.returncode if error.returncode > 0 else 1
        except (ValueError, OSError) as error:
            print(f"trl-ext: error: {error}", file=sys.stderr)
            return 2


def _add_commands(undo: ExitStack) -> None:
    """Commands of ours beside TRL's, which look for their scripts in `trl.scripts` and find those of ours there."""
    from trl.cli.commands.training import TrainingCommand

    main_module, found = sys.modules["trl.cli.main"], sys.modules["trl.cli.main"].get_commands
    _set(undo, main_module, "get_commands", lambda: [*found(), *map(TrainingCommand, _COMMANDS)])
    for name in _COMMANDS:
        sys.modules[f"trl.scripts.{name}"] = importlib.import_module(f"trl_ext.scripts.{name}")
        undo.callback(sys.modules.pop, f"trl.scripts.{name}")


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _prog_is_trl_ext(**kwargs) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(**{**kwargs, "prog": "trl-ext"})


def _parser_class() -> type:
    """TRL's parser, made strict: an option that it would ignore is an error, which names the closest one there is."""
    from trl.scripts.utils import TrlParser

    class Parser(TrlParser):
        def __init__(self, *args, prog: str, **kwargs):
            super().__init__(*args, prog=prog.replace("trl", "trl-ext", 1), **kwargs)
            # vLLM has options that neither TRL nor we know; TRL passes them on.
            self.refuse = partial(_refuse_unknown, self) if "vllm-serve" not in prog else lambda names: None

        def set_defaults_with_config(self, **config):
            self.refuse([name for name in config if name not in {action.dest for action in self._actions}])
            for action in self._actions:
                value = config.get(action.dest)
                for item in value if isinstance(value, list) else [value]:
                    if action.choices and item is not None and str(item) not in map(str, action.choices):
                        raise ValueError(f"{action.dest} must be one of {list(action.choices)}, got {item!r}.")
            return super().set_defaults_with_config(**config)

        def parse_args_into_dataclasses(self, args=None, **kwargs):
            _, unknown = self.parse_known_args(args)
            self.refuse([word.partition("=")[0][2:] for word in unknown if word.startswith("--")])
            return super().parse_args_into_dataclasses(args=args, **kwargs)

    return Parser


def _refuse_unknown(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Refuses names that are options neither of the command nor of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    theirs = [*_options(launch_command_parser()), "accelerate_config"]
    for name in names:
        plain = name.replace("-", "_")
        if plain not in theirs:
            closest = difflib.get_close_matches(plain, [*_options(parser), *theirs], n=1)
            hint = f"did you mean {closest[0]!r}?" if closest else f"see `{parser.prog} --help`."
            raise ValueError(f"there is no option {name!r} for `{parser.prog}` or `accelerate launch`; {hint}")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Long options, as they are written in YAML."""
    return [option[2:].replace("-", "_") for option in parser._option_string_actions if option.startswith("--")]


def _launch_training_script(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
    """As TRL's, with `-m trl_ext` put before the script: a patch of this process would not reach the workers."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser = launch_command_parser()
    package = "trl_ext.scripts" if script_name.removesuffix(".py") in _COMMANDS else "trl.scripts"
    script = str(importlib.resources.files(package).joinpath(script_name))
    ours = ["-m", "trl_ext", script, *training_script_args]
    args = parser.parse_args([*_flags_without_values(parser, launch_args), *ours])
    if args.training_script != "trl_ext":
        raise ValueError(
            f"{args.training_script!r} is neither an option nor the value of one. A YAML file is given with --config."
        )
    launch_command(args)


def _flags_without_values(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """`multi_gpu: true` in YAML arrives as `--multi_gpu True`, but the flags of `accelerate launch` take no value."""
    flags = {option for option, action in parser._option_string_actions.items() if action.nargs == 0}
    result: list[str] = []
    for word in words:
        if result and result[-1] in flags and word in ("True", "False"):
            if word == "False":
                result.pop()
        else:
            result.append(word)
    return result


def _env(argv: list[str]) -> int:
    """Prints what `trl env` prints, and our version; with `--check`, also whether TRL is as trl_ext expects it."""
    from trl.scripts.env import print_env

    parser = argparse.ArgumentParser(prog="trl-ext env", description="Print the environment information.")
    parser.add_argument("--check", action="store_true", help="also check the parts of TRL that trl_ext depends on")
    args = parser.parse_args(argv)
    with redirect_stdout(io.StringIO()) as printed:
        print_env()
    print(f"{printed.getvalue().rstrip()}\n- trl_ext version: {__version__}\n")
    if not args.check:
        return 0

    from .upstream import CHECKS

    print("Parts of TRL that trl_ext depends on:\n")
    failed = 0
    warnings.simplefilter("ignore")  # TRL's remarks on the tiny run of the check
    for name, check in CHECKS.items():
        try:
            check()
            print(f"- {name}: ok")
        except Exception as error:  # what has changed may fail in any way; the list goes on
            failed += 1
            print(f"- {name}: FAILED: {error or type(error).__name__}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
