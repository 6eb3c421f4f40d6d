"""Runs a worker module in two gloo processes, and in this one; how a worker ends."""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from itertools import count
from pathlib import Path

import torch

TORCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


class Pair:
    """
    Two gloo processes that stay, because a start of two costs more than most of what they are started for: they run
    one worker module after the other. One that changes its process for good, as FSDP2 does, is given to [`two`].

    Args:
        folder (`pathlib.Path`):
            Where what is asked of them is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked = count()
        self.processes = None

    def run(self, worker, model: str, folder: Path) -> list:
        """The results of `worker.run(model, folder, 2)` of each process; or `run_in_two`, where the module has it."""
        if self.processes is None:
            with open(self.folder / "printed", "w") as printed:
                self.processes = subprocess.Popen(
                    [*TORCH, __file__, str(self.folder), str(os.getpid())],
                    env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stdout=printed, stderr=printed,
                )  # fmt: skip
            self.asked = count()
        _write(self.folder / f"{next(self.asked)}.json", [worker.__name__, model, str(folder)])
        ends, files = time.monotonic() + 600, [folder / f"{rank}of2.pt" for rank in (0, 1)]
        while not all(file.exists() for file in files):
            if self.processes.poll() is not None or time.monotonic() > ends:
                self.end()
                raise AssertionError((self.folder / "printed").read_text()[-12000:])
            time.sleep(0.05)
        return [torch.load(file) for file in files]

    def end(self):
        """Ends both, if they run."""
        if self.processes is not None:
            if self.processes.poll() is None:
                _write(self.folder / f"{next(self.asked)}.json", None)
                try:
                    self.processes.wait(30)
                except subprocess.TimeoutExpired:
                    self.processes.kill()
            for file in self.folder.glob("*.json"):
                file.unlink()
            self.processes = None


def one_and_two(pair: Pair, worker, model: str, folder: Path) -> tuple:
    """The results of `worker.run`, a module of that name, in this process, and those of each of two."""
    results = pair.run(worker, model, folder)
    return worker.run(model, folder, 1), results


def two(worker, model: str, folder: Path, words: list[str]) -> list:
    """
    The results of each of two processes of their own, which run the module as a script.

    Args:
        worker (module):
            As a script, saves each process's result as `<rank>of2.pt`.
        model (`str`):
            Path of the tiny model.
        folder (`pathlib.Path`):
            Where the results go.
        words (`list[str]`):
            Further arguments of the script.
    """
    done = subprocess.run(
        [*TORCH, worker.__file__, model, str(folder), "2", *words],
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
    _end()


def _end():
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _write(file: Path, what):
    """Whole or not at all."""
    beginning = file.with_suffix(".part")
    beginning.write_text(json.dumps(what))
    beginning.rename(file)


def _serve(folder: Path, asker: int):
    """One process of a [`Pair`]: does what is asked until there is nothing more, or the one who asks is gone."""
    rank = os.environ["RANK"]
    for number in count():
        asked = folder / f"{number}.json"
        while not asked.exists():
            os.kill(asker, 0)  # raises if there is no such process
            time.sleep(0.02)
        what = json.loads(asked.read_text())
        if what is None:
            _end()
        name, model, results = what[0], what[1], Path(what[2])
        worker = importlib.import_module(name)
        run = getattr(worker, "run_in_two", worker.run)
        beginning = results / f"{rank}of2.part"
        torch.save(run(model, results, 2), beginning)
        beginning.rename(results / f"{rank}of2.pt")


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]), int(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the other may wait for this one for ever; the launcher ends it
