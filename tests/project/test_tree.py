"""The package is as docs/design.md draws it, and small: files, function bodies, options with their help."""

import ast
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from trl_ext.trainers.async_grpo import AsyncGRPOConfig
from trl_ext.trainers.dpo import DPOConfig
from trl_ext.trainers.grpo import GRPOConfig
from trl_ext.trainers.kto import KTOConfig
from trl_ext.trainers.ppo import PPOConfig
from trl_ext.trainers.prm import PRMConfig
from trl_ext.trainers.shared_options import SharedOptions
from trl_ext.upstream import trl_class

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trl_ext"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(PACKAGE))


def drawn():
    """The files that the tree in docs/design.md shows below trl_ext/, without `__init__.py`."""
    tree = re.search(r"```\ntrl_ext/\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)[1]
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        names = re.match(r"(?:[\w]+(?:\.py|/)\s*)+", line.lstrip())
        if names is None or depth < 0:
            continue  # a comment goes on, or the line is not about the package
        del folders[depth:]
        for name in names[0].split():
            if name.endswith("/"):
                folders.append(name)
            else:
                yield "".join(folders) + name


def test_the_tree_of_the_design_page_is_the_tree_on_the_disk():
    page = {*drawn()}
    disk = {name_of(path) for path in FILES if path.name != "__init__.py"}
    assert page == disk


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_has_at_most_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_function_body_has_at_most_45_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 45, node.name


@pytest.mark.parametrize("config", [GRPOConfig, DPOConfig, KTOConfig, PPOConfig, PRMConfig, AsyncGRPOConfig])
def test_every_option_is_in_the_docstring_and_has_help(config):
    theirs = trl_class(config).__dataclass_fields__.keys()
    shared = SharedOptions.__annotations__ if SharedOptions in config.__bases__ else {}
    ours = {name for name in [*config.__annotations__, *shared] if not name.startswith("_")} - theirs
    lines = re.findall(r"^    ([a-z][a-z_, ]*) \(`", inspect.getdoc(config), re.MULTILINE)
    described = [name for line in lines for name in line.split(", ")]
    assert ours <= {*described} <= ours | theirs and len({*described}) == len(described)
    for name in ours:
        assert config.__dataclass_fields__[name].metadata["help"].endswith("."), name


def test_the_version_stands_in_one_place():
    import trl_ext

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "trl_ext/__init__.py"
    text = "".join(path.read_text() for path in FILES)
    assert text.count(f'"{trl_ext.__version__}"') == 1
