"""`python -m trl_ext script.py …` or `python -m trl_ext -m module …`: runs it after `trl_ext.register()`."""

import importlib.machinery
import os
import runpy
import sys
import types

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
    if as_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        _run_script(sys.argv[0])


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


def _print_from_the_script_on(kind, error, traceback) -> None:
    """Prints a traceback without the frames that only start the script."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    start = traceback
    while start is not None and start.tb_frame.f_code.co_filename in ours:
        start = start.tb_next
    sys.__excepthook__(kind, error.with_traceback(start or traceback), start or traceback)


if __name__ == "__main__":
    main()
