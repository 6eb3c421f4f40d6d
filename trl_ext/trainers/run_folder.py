"""Who trains into a folder, so that a second run is warned; and with which batch a checkpoint was written."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from .input_checks import warn_user

_RUN = "_trl_ext_run-{}.json"  # what begins with `_` is not uploaded to the hub
_BATCH_FILE = "trl_ext_batch.json"


@contextmanager
def announced(folder: str | Path, is_writer: bool) -> Iterator[None]:
    """
    Around a run that trains into `folder`: a file there names its host, its process and when it began. Of two runs at
    the same time the second is warned, and not refused: launchers begin anew. What a run left that was killed is
    removed by the next one on that host.

    Args:
        folder (`str` or `pathlib.Path`):
            The run's `output_dir`.
        is_writer (`bool`):
            Whether this process writes checkpoints; the others of a run say nothing.
    """
    if not is_writer:
        yield
        return
    host, pid = socket.gethostname(), os.getpid()
    own = Path(folder, _RUN.format(f"{host}-{pid}"))
    with suppress(OSError):  # a run that cannot write there says so where it must write
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps({"host": host, "pid": pid, "started": time.time()}))
    try:
        # Each writes before it looks, so that of two that begin together at least one sees the other.
        for path in sorted(own.parent.glob(_RUN.format("*"))):
            if path != own:
                _look_at(path, host)
        yield
    finally:
        with suppress(OSError):
            own.unlink()


def _look_at(path: Path, host: str) -> None:
    """Warns of another run, or removes what is left of it."""
    try:
        other = json.loads(path.read_text())
        pid, started = other["pid"], other["started"]
    except (OSError, ValueError, KeyError):  # it ends now, or begins, and then sees us
        return
    here = other["host"] == host
    if here and not _is_running(pid, started):
        path.unlink(missing_ok=True)
        return
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    unsure = "" if here else f" Whether it still runs cannot be seen from here; if it does not, delete {path}."
    warn_user(
        f"Another run trains into {path.parent}: process {pid} on {other['host']}, since {since}. Checkpoints of the "
        f"two overwrite each other. Give each run an output_dir of its own.{unsure}"
    )


def _is_running(pid: int, started: float) -> bool:
    """Whether the process that wrote a file still runs; one of the same number that began later is another."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < started + 60.0  # clocks are set
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # somebody else's
        return True


def _batch(args: Any) -> dict[str, int]:
    rows = args.train_batch_size * args.world_size
    batch = {"processes": args.world_size, "optimizer step": rows * args.gradient_accumulation_steps}
    if getattr(args, "steps_per_generation", None):
        batch["generation batch"] = rows * args.steps_per_generation
    return batch


def save_batch(args: Any, folder: Path) -> None:
    """Writes how many rows a step of all processes has."""
    if args.should_save:
        (folder / _BATCH_FILE).write_text(json.dumps(_batch(args)))


def warn_of_another_batch(args: Any, checkpoint: Any) -> None:
    """The `Trainer` counts steps: with another batch it continues at another row of the data, and does not say so."""
    path = Path(checkpoint, _BATCH_FILE) if isinstance(checkpoint, str | Path) else None
    if path is None or not path.exists() or args.process_index != 0:
        return
    before, now = json.loads(path.read_text()), _batch(args)
    for what in ("optimizer step", "generation batch"):
        if before.get(what) != now.get(what):
            warn_user(
                f"{checkpoint} was written with {before.get(what)} rows in each {what} (processes: "
                f"{before['processes']}), this run has {now.get(what)} (processes: {now['processes']}): the data "
                "continue where as many steps of this run would have ended, so that rows are seen twice or left out. "
                "Choose per_device_train_batch_size and gradient_accumulation_steps so that the numbers agree."
            )
            return
