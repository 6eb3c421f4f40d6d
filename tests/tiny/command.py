"""The command line with its worker in this process, which has imported what a process of its own would import anew."""

import subprocess
import sys

import trl_ext
from trl_ext import __main__, cli

SMALL = {
    "output_dir": "out",
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
}


def trl_ext_here(monkeypatch, capfd, *words: str) -> subprocess.CompletedProcess:
    """
    What `trl-ext WORDS` does with one worker: the launching half, and then the worker's, without a process of its own.

    Args:
        monkeypatch, capfd:
            pytest's fixtures.
        words (`str`):
            As typed behind `trl-ext`.

    Returns:
        `subprocess.CompletedProcess`: Exit code of the launching half, or else of the worker, and what was printed.
    """
    launched = []
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.commands.launch.launch_command", launched.append)
        code = _code_of(cli.main, [*words])
        for args in launched:
            assert args.module and args.training_script == "trl_ext" and code == 0
            patch.setattr(sys, "argv", ["trl_ext", *args.training_script_args])
            patch.setattr(sys, "excepthook", sys.excepthook)
            patch.setattr(sys, "path", [*sys.path])
            patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
            code = _code_of(__main__.main)
            trl_ext.unregister()
    printed = capfd.readouterr()
    return subprocess.CompletedProcess(["trl-ext", *words], code, printed.out, printed.err)


def _code_of(main, *args) -> int:
    try:
        return main(*args) or 0
    except SystemExit as end:
        return end.code or 0
