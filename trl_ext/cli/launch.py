"""The worker processes: `accelerate launch … -m trl_ext <TRL's script> …`."""

import importlib.resources
import os
import subprocess

import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import DistributedType
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .commands import COMMANDS

_SEVERAL = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")  # without one it starts one process


def launch_training_script(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
    """As TRL's, with `-m trl_ext` put before the script: a patch of this process would not reach the workers."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    package = "trl_ext.scripts" if script_name.removesuffix(".py") in COMMANDS else "trl.scripts"
    script = str(importlib.resources.files(package).joinpath(script_name.replace("-", "_")))
    words = [*_flags_without_values(launch_args), "-m", "trl_ext", script, *training_script_args]
    refuse_stray_words(words)
    args = launch.launch_command_parser().parse_args(words)
    try:
        launch.launch_command(args)
    except ChildFailedError as error:  # with several processes; one raises `CalledProcessError`
        _, failure = error.get_first_failure()
        raise subprocess.CalledProcessError(failure.exitcode, args.training_script) from error
    except SignalException as error:
        raise KeyboardInterrupt from error


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
