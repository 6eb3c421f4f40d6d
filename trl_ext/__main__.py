"""`python -m trl_ext script.py …` or `python -m trl_ext -m module …`: run it with TRL's public names being ours."""

import os
import runpy
import sys

from .registration import register

USAGE = "usage: python -m trl_ext script.py [arguments …]  or  python -m trl_ext -m module [arguments …]"


def main() -> None:
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    if len(arguments) <= as_module:
        raise SystemExit(USAGE)
    register()
    sys.argv = arguments[as_module:]
    if as_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as `python script.py` has it
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
