"""`trl-ext <command> …`: TRL's command line with our options, in every worker process."""

import difflib
import importlib
import importlib.resources
import sys
import warnings

from .registration import register


def main(argv: list[str] | None = None) -> int:
    """Runs one of TRL's commands with our classes in place of TRL's. Returns the exit code."""
    register()
    from trl.cli import accelerate_launcher
    from trl.cli.main import main as trl_main

    accelerate_launcher.launch_training_script = _launch_training_script
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process only parses; the workers parse again and warn
        try:
            return trl_main(list(sys.argv[1:] if argv is None else argv))
        except ValueError as error:
            print(f"trl-ext: error: {error}", file=sys.stderr)
            return 2


def _launch_training_script(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
    """TRL's own, but for `-m trl_ext` before the script: a patch of this process would not reach the workers."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    _refuse_unknown(script_name.removesuffix(".py"), launch_args)
    script = importlib.resources.files("trl.scripts").joinpath(script_name)
    launch_command(
        launch_command_parser().parse_args([*launch_args, "-m", "trl_ext", str(script), *training_script_args])
    )


def _refuse_unknown(command: str, launch_args: list[str]) -> None:
    """What TRL's parser did not take must be an option of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    ours = importlib.import_module(f"trl.scripts.{command}").make_parser()
    theirs = launch_command_parser()._option_string_actions
    for argument in launch_args:
        option = argument.partition("=")[0]
        if option.startswith("--") and not any(known.startswith(option) for known in theirs):
            name = option[2:]
            known = [known[2:] for known in [*ours._option_string_actions, *theirs] if known.startswith("--")]
            closest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {closest[0]!r}?" if closest else f"see `trl-ext {command} --help`."
            raise ValueError(f"there is no option {name!r} for `trl-ext {command}` or `accelerate launch`; {hint}")


if __name__ == "__main__":
    raise SystemExit(main())
