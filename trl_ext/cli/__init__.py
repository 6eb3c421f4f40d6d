"""`trl-ext <command> …`: TRL's command line with our options, in every worker process."""

import argparse
import importlib
import io
import subprocess
import sys
import warnings
from contextlib import ExitStack, redirect_stdout
from functools import partial
from importlib.metadata import version
from typing import Any

from .. import __version__
from ..registration import register
from .commands import AT_ONCE, COMMANDS, script_of

DESCRIPTION = (
    "TRL's command line with what TRL lacks: more advantage estimators, KL penalties and rewards of steps for `grpo`, "
    "preference losses for `dpo` and `kto`, and the commands that are marked below; `trl-ext grpo --help` shows our "
    "options first, `trl-ext methods` lists what they may be."
)


def main(argv: list[str] | None = None) -> int:
    """Runs one of TRL's commands with our classes in place of TRL's. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["env"]:
        return _env(argv[1:])
    if argv and argv[0] in AT_ONCE:
        return _at_once(argv)
    from trl.cli.commands import get_commands
    from trl.cli.commands.training import TrainingCommand
    from trl.cli.main import main as trl_main

    commands = [*get_commands(), *map(TrainingCommand, COMMANDS), *map(_AtOnce, AT_ONCE)]
    for command in commands:
        command.help_text = f"{COMMANDS[command.name]} (of trl_ext)" if command.name in COMMANDS else command.help_text
    with ExitStack() as undo, warnings.catch_warnings():
        _set(undo, sys.modules["trl.cli.main"], "ArgumentParser", _overview)
        _set(undo, sys.modules["trl.cli.main"], "get_commands", lambda: commands)
        wanted = next((word for word in argv if not word.startswith("-")), None)
        if wanted not in {command.name for command in commands}:
            return trl_main(argv)  # help, or a command that does not exist: no need to load torch
        return _run(argv, undo)


def _run(argv: list[str], undo: ExitStack) -> int:
    """Runs a command that exists."""
    from .words import checked_words, without_dry_run

    seen: dict[str, Any] = {}
    try:
        argv, dry_run = without_dry_run(checked_words(argv))
        # This process only parses; the workers parse again and warn.
        warnings.simplefilter("ignore", FutureWarning if dry_run else Warning)
        undo.enter_context(register())
        import trl
        from trl.cli import accelerate_launcher

        from .launch import launch_training_script
        from .parser import parser_class

        launcher: Any = partial(launch_training_script, seen)
        if dry_run:
            from . import dry_run as rehearsed

            launcher = partial(rehearsed.launch_training_script, seen)
        _set(undo, accelerate_launcher, "launch_training_script", launcher)
        _set(undo, trl, "TrlParser", parser_class(seen))
        for name in COMMANDS:  # TRL looks for the script of a command in `trl.scripts`
            if name in argv:
                sys.modules[f"trl.scripts.{name}"] = script_of(name)
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


def _at_once(argv: list[str]) -> int:
    """Runs a command that starts no worker."""
    try:
        return importlib.import_module(f".{argv[0]}", __name__).main(argv[1:])
    except (ValueError, OSError) as error:
        print(f"trl-ext: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


class _AtOnce:
    """Such a command in the list of `trl-ext --help`, where TRL's parser asks for its name and its help."""

    def __init__(self, name: str):
        self.name, self.help_text = name, f"{AT_ONCE[name]} (of trl_ext)"

    def register(self, subparsers: Any) -> None:
        subparsers.add_parser(self.name, help=self.help_text, add_help=False)


def _versions() -> str:
    """Ours and those below, without loading them."""
    others = ("trl", "transformers", "torch")
    return f"trl-ext {__version__} ({', '.join(f'{name} {version(name)}' for name in others)})"


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _overview(**kwargs) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(**{**kwargs, "prog": "trl-ext", "description": DESCRIPTION})
    parser.add_argument("--version", action="version", version=_versions())
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
