"""`trl_ext.functional` and its tests run where TRL is not installed."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import trl_ext.functional

FORBIDDEN = {"trl", "transformers", "accelerate", "datasets", "peft", "tiny"}  # `tiny` builds trainers
FILES = sorted([*Path(__file__).parent.glob("*.py"), *Path(trl_ext.functional.__file__).parent.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_imports_nothing_of_trl(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            assert name.partition(".")[0] not in FORBIDDEN, name
            if name.startswith("trl_ext."):
                assert name.startswith("trl_ext.functional"), name


def test_here_trl_cannot_be_imported():
    with pytest.raises(ImportError):
        importlib.import_module("trl")


def test_every_module_can():
    for module in pkgutil.walk_packages(trl_ext.functional.__path__, "trl_ext.functional."):
        importlib.import_module(module.name)


def test_every_public_function_and_class_can_be_imported_from_the_package():
    inner = {"Spread", "rewards_to_go", "above_the_group", "required_reward_margin"} | {
        "advantage_std",
        "baseline_metrics",
        "left_out_to_go",
        "value_metrics",
    }  # between the modules
    for module in pkgutil.walk_packages(trl_ext.functional.__path__, "trl_ext.functional."):
        for name, thing in vars(importlib.import_module(module.name)).items():
            is_here = getattr(thing, "__module__", None) == module.name
            if is_here and callable(thing) and not name.startswith("_") and name not in inner:
                assert name in trl_ext.functional.__all__, f"{module.name}.{name}"
    assert all(hasattr(trl_ext.functional, name) for name in trl_ext.functional.__all__)
