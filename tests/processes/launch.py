"""Starts a worker script as two gloo processes, and runs it as one; how a worker ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def one_and_two(worker, model: str, folder: Path, launcher: list[str] | None = None) -> tuple:
    """
    The results of `worker.run`, a module with a script of that name, in this process, and those of each of two.

    Args:
        worker (module):
            Has `run(model, folder, world_size)`, and as a script saves each process's result as `<rank>of2.pt`.
        model (`str`):
            Path of the tiny model.
        folder (`pathlib.Path`):
            Where the results go.
        launcher (`list[str]`, *optional*):
            Arguments of `accelerate launch`. Default: torch's own launcher.
    """
    results = two(worker, model, folder, [], launcher)
    return worker.run(model, folder, 1), results


def two(worker, model: str, folder: Path, words: list[str], launcher: list[str] | None = None) -> list:
    """The results of each of two processes; `words` are further arguments of the script."""
    if launcher is None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", port]
    done = subprocess.run(
        [*command, worker.__file__, model, str(folder), "2", *words],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-12000:]  # the failure of one process stands above the other's
    return [torch.load(folder / f"{rank}of2.pt") for rank in (0, 1)]


def leave(results: dict, folder: Path, world_size: int):
    """
    In a worker: saves what this process saw, and ends it. Not by the interpreter's end, during which a thread of gloo
    may still drop the tensors of the last collective: the process would abort, or hang.
    """
    torch.save(results, folder / f"{torch.distributed.get_rank()}of{world_size}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
