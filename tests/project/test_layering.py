"""Mathematics below, TRL above: who may import whom, and what importing the package does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "trl_ext"
HEAVY = {"trl", "transformers", "accelerate", "peft", "datasets", "bitsandbytes"}
# From the bottom up. A module imports those of its own line if it is the same package, and those of the lines before.
LAYERS = [
    {"functional"},
    {"citations", "lookup", "sharded", "upstream"},
    {"papers", "upstream_async"},
    {"callbacks", "rewards", "packed"},
    {"trainers"},
    {"labels"},
    {"rejection_sampling"},
    {"registration"},
    {"scripts"},
    {"cli", "__main__"},
    {"__init__"},
]
SEES_TRL = {"rewards", "packed", "trainers", "labels", "rejection_sampling", "registration", "scripts", "cli"}
SEES_TRL |= {"__main__", "callbacks", "sharded", "upstream", "upstream_async"}
FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    """The module or package directly below trl_ext that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, source: str):
    """Dotted absolute names of what a file imports anywhere: modules, and names of modules."""
    package = ["trl_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"trl_ext.{name} is in no layer"
    return found[0]


def wrong_imports(path: Path, source: str) -> list[str]:
    """What a file of the package imports although its layer may not."""
    own, wrong = owner(path), []
    for name in imports(path, source):
        root, _, below = name.partition(".")
        if own == "functional" and root not in {"torch", "trl_ext", *sys.stdlib_module_names}:
            wrong.append(name)
        if root in HEAVY and own not in SEES_TRL:
            wrong.append(name)
        theirs = below.partition(".")[0]
        if root == "trl_ext" and theirs not in ("__version__", own) and layer(theirs) >= layer(own):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    assert layer(owner(path)) >= 0
    assert wrong_imports(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("rewards/new.py", "from ..trainers import grpo"),
        ("rewards/new.py", "from trl_ext.trainers.grpo import GRPOTrainer"),
        ("rewards/new.py", "from .. import trainers"),
        ("functional/kl.py", "from ..lookup import lookup"),
        ("functional/kl.py", "from ..packed import head"),
        ("packed/new.py", "from ..trainers.grpo import GRPOTrainer"),
        ("packed/new.py", "from ..rewards import ProcessRewardModel"),
        ("functional/preference/psi.py", "from ...trainers import dpo"),
        ("functional/kl.py", "import numpy"),
        ("papers.py", "import trl"),
        ("lookup.py", "def f():\n    from .upstream import check_parameters"),
        ("trainers/grpo/new.py", "from ...registration import register"),
        ("trainers/grpo/new.py", "from ...labels import label_steps"),
        ("labels/new.py", "from ..scripts import label_steps"),
        ("labels/new.py", "from ..rejection_sampling import rejection_sampling"),
        ("trainers/ppo/new.py", "from ...scripts import ppo"),
        ("registration.py", "from . import cli"),
        ("__main__.py", "from .cli import main"),
    ],
)
def test_an_import_upwards_is_caught(file, line):
    assert len(wrong_imports(PACKAGE / file, line)) == 1


def test_a_module_without_a_layer_is_caught():
    with pytest.raises(AssertionError, match=r"trl_ext\.utils is in no layer"):
        wrong_imports(PACKAGE / "trainers/new.py", "from ..utils import anything")
    with pytest.raises(AssertionError, match=r"trl_ext\.utils is in no layer"):
        layer(owner(PACKAGE / "utils.py"))


def test_importing_the_package_loads_and_changes_nothing():
    code = (
        "import sys, trl_ext; heavy = {'torch', 'trl', 'transformers', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'GRPOTrainer' in dir(trl_ext)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_public_name_is_an_attribute_error():
    import trl_ext

    with pytest.raises(AttributeError, match="module 'trl_ext' has no attribute 'RLOOTrainer'"):
        _ = trl_ext.RLOOTrainer
    assert trl_ext.GRPOTrainer.__module__.startswith("trl_ext.trainers.grpo")
