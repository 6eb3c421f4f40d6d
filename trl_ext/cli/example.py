"""`trl-ext example`: the recipes, with model, data and reward of the quickstart, as files of the user's own."""

import argparse
import os
import shutil
from pathlib import Path

QUICKSTART = ["grpo", "--config", "recipes/quickstart.yaml"]


def source() -> Path:
    """The recipes: inside an installed wheel, beside the package in a checkout. There is one copy of them."""
    package = Path(__file__).parents[1]
    beside = package.parent / "recipes"
    return beside if (beside / "quickstart.yaml").exists() else package / "recipes"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trl-ext example",
        description="Copy the recipes to FOLDER/recipes, with the model, the data and the reward of the quickstart.",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="FOLDER", help="default: here")
    parser.add_argument("--run", action="store_true", help="run the quickstart: a minute on a CPU")
    args = parser.parse_args(argv)
    target = args.folder / "recipes"
    if not (target.exists() and target.samefile(source())):
        if target.exists():
            raise ValueError(f"{target} exists already, and nothing was copied. Remove it, or name another FOLDER.")
        shutil.copytree(source(), target, ignore=shutil.ignore_patterns("__pycache__"))
    there = "" if args.folder == Path() else f"cd {args.folder} && "
    command = " ".join(["trl-ext", *QUICKSTART])
    print(
        f"The recipes are in {target}. A minute on a CPU, then how much it has learnt:\n  {there}{command}", flush=True
    )
    if not args.run:
        return 0
    from . import main as run

    os.chdir(args.folder)
    return run(QUICKSTART)
