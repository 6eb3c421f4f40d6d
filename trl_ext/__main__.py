"""`python -m trl_ext script.py …` or `python -m trl_ext -m module …`: runs it after `trl_ext.register()`."""

import atexit
import importlib.machinery
import os
import runpy
import sys
import threading
import traceback
import types
import warnings
from contextlib import AbstractContextManager, nullcontext

from .registration import register

USAGE = "usage: python -m trl_ext script.py [arguments …]  or  python -m trl_ext -m module [arguments …]"


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    as_module = arguments[:1] == ["-m"]
    if len(arguments) <= as_module or (arguments[0].startswith("-") and not as_module):
        raise SystemExit(USAGE)
    register()
    sys.excepthook = _print_from_the_script_on
    sys.argv = arguments[as_module:]
    if not as_module and _is_a_command():
        # TRL uses names that transformers has renamed; whoever runs a command can do nothing about that.
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning, append=True)
    try:
        if as_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            with _options_as_meant() if _is_a_command() else nullcontext():
                _run_script(sys.argv[0])
    except KeyboardInterrupt:
        if as_module or not _is_a_command():
            raise
        raise SystemExit(130) from None  # `trl-ext` says how to go on
    except Exception as error:
        said = None if as_module or not _is_a_command() else _sentence(error)
        if said is None:
            raise
        print(f"trl-ext: error: {said}", file=sys.stderr)
        raise SystemExit(2) from None
    state = sys.modules.get("accelerate.state")
    if state is not None and "gloo" in str(state.PartialState._shared_state.get("backend")):
        _leave_gloo()


def _leave_gloo() -> None:
    """
    Ends a finished worker of a gloo group without taking the interpreter down; exit handlers run.

    A thread of gloo drops the tensors of a collective some time after the collective has ended, and needs the
    interpreter for it. If that is being taken down by then, the process aborts, or never ends (torch 2.13).
    `destroy_process_group`, which TRL's scripts call, waits for these threads only if nobody else holds the group, but
    DDP does.
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _options_as_meant() -> AbstractContextManager:
    """Around a script of a command, which asks TRL for its parser."""
    from .scripts.as_meant import ParserAsMeant
    from .scripts.in_place import in_place

    return in_place(TrlParser=ParserAsMeant)


def _is_a_command() -> bool:
    """Whether `trl-ext` runs here: a script of TRL's, or of ours. Any other is the user's own."""
    folders = tuple(os.path.join(os.sep, name, "scripts") for name in ("trl", "trl_ext"))
    return os.path.dirname(os.path.realpath(sys.argv[0])).endswith(folders)


def _sentence(error: Exception) -> str | None:
    """
    What we refuse, before the first step, of what `trl-ext` was given, and what could not be opened; nothing of the
    user's is in such a traceback. `None`: anything else, whose traceback is of use.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "_inner_training_loop" for frame in frames):
        return None
    last, package = frames[-1], os.path.join(os.path.dirname(__file__), "")
    if isinstance(error, ValueError) and last.filename.startswith(package) and (last.line or "").startswith("raise "):
        return str(error)  # and no bug of ours
    from .trainers.places import unopened

    return unopened(error)


def _run_script(name: str) -> None:
    """As `python name` does: `sys.argv` as typed, `__file__` absolute, the script's folder first on the path."""
    path = os.path.abspath(name)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    try:
        source = loader.get_data(path)
    except OSError as error:
        print(f"python -m trl_ext: can't open file {path!r}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = types.ModuleType("__main__")
    module.__file__, module.__loader__, module.__builtins__ = path, loader, __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = module  # this one, so that pickles and spawned processes find the script
    exec(loader.source_to_code(source, path), vars(module))


def _print_from_the_script_on(kind, error, trace) -> None:
    """Prints a traceback without the frames that only start the script."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename in ours:
        start = start.tb_next
    sys.__excepthook__(kind, error.with_traceback(start or trace), start or trace)


if __name__ == "__main__":
    main()
