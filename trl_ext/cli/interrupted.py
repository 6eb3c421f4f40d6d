"""What to say when a run was stopped with Ctrl-C."""

import os
import shlex
import time
from contextlib import suppress

from ..trainers.interruptions import whole_checkpoint


def how_to_go_on(argv: list[str], output_dir: str | None, patience: float = 60.0) -> str:
    """
    Three lines, once the workers, which get the signal too, have ended: what happened, what there is, and the command
    that goes on.

    Args:
        argv (`list[str]`):
            The words of the command.
        output_dir (`str`, *optional*):
            Folder of the run. `None`: it was not yet known.
        patience (`float`, *optional*, defaults to `60.0`):
            Seconds to wait for the workers.
    """
    _wait_for_children(patience)
    if {"label-steps", "rejection-sampling"}.intersection(argv):  # the same words go on
        again = shlex.join(["trl-ext", *argv])
        return f"trl-ext: stopped.\nThe chunks that are finished are in {output_dir}.\nTo go on: {again}"
    checkpoint = None
    if output_dir is not None:
        with suppress(ValueError):  # each was cut off while it was written
            checkpoint = whole_checkpoint(True, output_dir)
    if not isinstance(checkpoint, str):
        again = shlex.join(["trl-ext", *argv])
        return f"trl-ext: stopped.\nThere is no whole checkpoint in {output_dir or 'the output_dir'}.\nAnew: {again}"
    words = _without(argv, "--resume_from_checkpoint")
    again = shlex.join(["trl-ext", *words, "--resume_from_checkpoint", checkpoint])
    return f"trl-ext: stopped.\nThe last whole checkpoint is {checkpoint}.\nTo go on: {again}"


def _without(words: list[str], option: str) -> list[str]:
    kept: list[str] = []
    after = False  # whether the word before was the option
    for word in words:
        if not (word == option or word.startswith(f"{option}=") or (after and not word.startswith("--"))):
            kept.append(word)
        after = word == option
    return kept


def _wait_for_children(patience: float) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # none is left
            return
        if not ended:
            time.sleep(0.1)
