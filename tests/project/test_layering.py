"""Mathematics below, TRL above: who may import whom, and what importing the package does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "trl_ext"
HEAVY = {"trl", "transformers", "accelerate", "peft", "datasets", "bitsandbytes"}
LAYERS = ["functional", "lookup", "upstream", "trainers", "registration", "cli"]  # each may import those before it
SEES_TRL = {"upstream", "trainers", "rewards", "registration", "cli", "__main__"}


def imports(path: Path):
    """Dotted absolute names of the modules that a file imports anywhere."""
    package = ["trl_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def layer(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        root = name.split(".")[0]
        if own == "functional":
            allowed = root in {"torch", *sys.stdlib_module_names} or name == "trl_ext.functional.reductions"
            assert allowed, f"{path.name} imports {name}"
        if root in HEAVY:
            assert own in SEES_TRL, f"{path.name} imports {name}"
        if root == "trl_ext" and own in LAYERS and layer(name) in LAYERS:
            assert LAYERS.index(layer(name)) <= LAYERS.index(own), f"{path.name} imports {name}"


def test_importing_the_package_loads_and_changes_nothing():
    code = (
        "import sys, trl_ext; heavy = {'torch', 'trl', 'transformers', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'GRPOTrainer' in dir(trl_ext)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_public_name_is_an_attribute_error():
    import trl_ext

    with pytest.raises(AttributeError, match="module 'trl_ext' has no attribute 'PPOTrainer'"):
        _ = trl_ext.PPOTrainer
    assert trl_ext.GRPOTrainer.__module__.startswith("trl_ext.trainers.grpo")
