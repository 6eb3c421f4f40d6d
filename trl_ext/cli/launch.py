"""The worker processes: `accelerate launch … -m trl_ext <TRL's script> …`."""

import argparse
import importlib.resources
import os
import subprocess
from typing import Any

import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import DistributedType
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .commands import COMMANDS

_SEVERAL = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")  # without one it starts one process

# What `accelerate launch` takes where nothing is said, with a warning of several lines.
_DEFAULTS = {"num_processes": 1, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}


def launch_training_script(
    seen: dict[str, Any], script_name: str, launch_args: list[str], training_script_args: list[str]
) -> None:
    """
    As TRL's, with `-m trl_ext` put before the script: a patch of this process would not reach the workers. `seen` is
    what the parser has seen of the run.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    package = "trl_ext.scripts" if script_name.removesuffix(".py") in COMMANDS else "trl.scripts"
    script = str(importlib.resources.files(package).joinpath(script_name.replace("-", "_")))
    words = [*_flags_without_values(launch_args), "-m", "trl_ext", script, *training_script_args]
    refuse_stray_words(words)
    if None in (getattr(part, "log_style", "no such option") for part in seen["parts"]):  # nobody has chosen
        words += ["--log_style", "line"]
    args = _with_defaults(launch.launch_command_parser().parse_args(words))
    try:
        launch.launch_command(args)
    except ChildFailedError as error:  # with several processes; one raises `CalledProcessError`
        _, failure = error.get_first_failure()
        raise subprocess.CalledProcessError(failure.exitcode, args.training_script) from error
    except SignalException as error:
        raise KeyboardInterrupt from error


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """
    The arguments with accelerate's defaults written out, where it would use them and has nothing else to say: without
    a file of its configuration, and with one device at most.
    """
    several = any(getattr(args, name) for name in _SEVERAL) or torch.accelerator.device_count() > 1
    if not several and args.config_file is None and not os.path.isfile(default_config_file):
        for name, value in _DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def refuse_stray_words(words: list[str]) -> None:
    """Refuses a word that `accelerate launch` would take for the script, because no option has it as its value."""
    args, _ = launch.launch_command_parser().parse_known_args([*words, "-m", "trl_ext", "script.py"])
    if args.training_script != "trl_ext":
        raise ValueError(
            f"{args.training_script!r} is neither an option nor the value of one. A YAML file is given with --config."
        )


def number_of_processes(words: list[str]) -> int:
    """How many workers `accelerate launch` starts with these words, on all machines."""
    words = _flags_without_values(resolve_accelerate_config_argument(words))
    args = launch.launch_command_parser().parse_args([*words, "-m", "trl_ext", "script.py"])
    if args.cpu:
        return 1
    devices, number = torch.accelerator.device_count(), args.num_processes
    several = devices > 1 or any(getattr(args, name) for name in _SEVERAL)
    if args.config_file is not None or os.path.isfile(default_config_file):
        defaults = load_config_from_file(args.config_file)
        several = several or defaults.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
        number = defaults.num_processes if number is None else number
    return max(1, devices if number is None else number) if several else 1


def _flags_without_values(words: list[str]) -> list[str]:
    """`multi_gpu: true` in YAML arrives as `--multi_gpu True`, but the flags of `accelerate launch` take no value."""
    actions = launch.launch_command_parser()._option_string_actions
    flags = {option for option, action in actions.items() if action.nargs == 0}
    result: list[str] = []
    for word in words:
        if result and result[-1] in flags and word in ("True", "False"):
            if word == "False":
                result.pop()
        else:
            result.append(word)
    return result
