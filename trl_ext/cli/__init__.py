"""`trl-ext <command> …`: TRL's command line with our options, in every worker process."""

import argparse
import importlib
import io
import subprocess
import sys
import warnings
from contextlib import ExitStack, redirect_stdout
from functools import partial
from typing import Any

from .. import __version__
from ..registration import register

DESCRIPTION = (
    "TRL's command line with the options of trl_ext: advantage estimators, KL penalties and process rewards for "
    "`trl-ext grpo`, preference losses for `trl-ext dpo` and `trl-ext kto`, and the commands `trl-ext ppo`, "
    "`trl-ext prm`, `trl-ext label-steps` and `trl-ext rejection-sampling`. `trl-ext grpo --help` explains them."
)
# Commands that TRL does not have; their scripts are in `trl_ext.scripts`.
COMMANDS = ("ppo", "prm", "label-steps", "rejection-sampling")


def main(argv: list[str] | None = None) -> int:
    """Runs one of TRL's commands with our classes in place of TRL's. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["env"]:
        return _env(argv[1:])
    from trl.cli.commands import get_commands
    from trl.cli.commands.training import TrainingCommand
    from trl.cli.main import main as trl_main

    commands = [*get_commands(), *map(TrainingCommand, COMMANDS)]
    with ExitStack() as undo, warnings.catch_warnings():
        _set(undo, sys.modules["trl.cli.main"], "ArgumentParser", _overview)
        _set(undo, sys.modules["trl.cli.main"], "get_commands", lambda: commands)
        command = next((word for word in argv if not word.startswith("-")), None)
        if command not in {command.name for command in commands}:
            return trl_main(argv)  # help, or a command that does not exist: no need to load torch
        return _run(argv, undo)


def _run(argv: list[str], undo: ExitStack) -> int:
    """Runs a command that exists."""
    from .words import checked_words

    seen: dict[str, Any] = {}
    try:
        argv = checked_words(argv)
        warnings.simplefilter("ignore")  # this process only parses; the workers parse again and warn
        undo.enter_context(register())
        import trl
        from trl.cli import accelerate_launcher

        from .launch import launch_training_script
        from .parser import parser_class

        _set(undo, accelerate_launcher, "launch_training_script", partial(launch_training_script, seen))
        _set(undo, trl, "TrlParser", parser_class(seen))
        for name in COMMANDS:  # TRL looks for the script of a command in `trl.scripts`
            if name in argv:
                script = importlib.import_module(f"trl_ext.scripts.{name.replace('-', '_')}")
                sys.modules[f"trl.scripts.{name}"] = script
                undo.callback(sys.modules.pop, f"trl.scripts.{name}")
        return sys.modules["trl.cli.main"].main(argv)
    except subprocess.CalledProcessError as error:  # the worker has said why
        return error.returncode if error.returncode > 0 else 1
    except KeyboardInterrupt:
        from .interrupted import how_to_go_on

        print(how_to_go_on(argv, seen.get("output_dir")), file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"trl-ext: error: {error}", file=sys.stderr)
        return 2


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _overview(**kwargs) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(**{**kwargs, "prog": "trl-ext", "description": DESCRIPTION})
    parser.add_argument("--version", action="version", version=f"trl-ext {__version__}")
    return parser


def _env(argv: list[str]) -> int:
    """Prints what `trl env` prints, and our version; with `--check`, also whether TRL is as trl_ext expects it."""
    parser = argparse.ArgumentParser(prog="trl-ext env", description="Print the environment information.")
    parser.add_argument("--check", action="store_true", help="also check the parts of TRL that trl_ext depends on")
    args = parser.parse_args(argv)

    from trl.scripts.env import print_env

    with redirect_stdout(io.StringIO()) as printed:
        print_env()
    print(f"{printed.getvalue().rstrip()}\n- trl_ext version: {__version__}\n")
    if not args.check:
        return 0

    from .. import upstream, upstream_async

    print("Parts of TRL that trl_ext depends on:\n")
    failed = 0
    warnings.simplefilter("ignore")  # TRL's remarks on the tiny run of the check
    for name, check in {**upstream.CHECKS, **upstream_async.CHECKS}.items():
        try:
            check()
            print(f"- {name}: ok")
        except Exception as error:  # what has changed may fail in any way; the list goes on
            failed += 1
            print(f"- {name}: FAILED: {error or type(error).__name__}")
    return int(failed > 0)
