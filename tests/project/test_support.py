"""Versions are said in several files, once each, and agree; what a repository has to have is there and is read."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from trl_ext import registration

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
ROW = re.search(r"^\| 0\.1.*$", (ROOT / "docs/support.md").read_text(), re.MULTILINE)[0].strip("| ").split(" | ")


def test_the_python_versions_agree():
    found = [re.search(r":: (3\.\d+)$", line) for line in PROJECT["project"]["classifiers"]]
    classified = [match[1] for match in found if match]
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert classified == workflow["jobs"]["functional"]["strategy"]["matrix"]["python-version"] == ROW[2].split(", ")
    assert PROJECT["project"]["requires-python"] == f">={classified[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == classified[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{classified[0].replace('.', '')}"
    alone = {step.get("with", {}).get("python-version") for job in workflow["jobs"].values() for step in job["steps"]}
    assert alone <= {None, classified[0], "${{ matrix.python-version }}"}


def test_the_versions_of_trl_agree():
    low, high = re.search(r"trl>=([\d.]+),<([\d.]+)", str(PROJECT["project"]["dependencies"])).groups()
    assert ROW[1] == low == ".".join(map(str, registration._TESTED))
    assert high == f"{registration._TESTED[0]}.{registration._TESTED[1] + 1}"
    assert version("trl").startswith(f"{low}.") and CONSTRAINTS["trl"].startswith(f"{low}.")
    assert f"TRL {low} " in (ROOT / "README.md").read_text()


def test_the_table_has_the_versions_of_the_constraints():
    tested = dict(part.split(" ") for part in ROW[3].split(", "))
    assert tested == {name: CONSTRAINTS[name] for name in tested} and "torch" in tested


def test_everything_of_the_test_extra_has_a_tested_version():
    extras = PROJECT["project"]["optional-dependencies"]
    names = [re.split(r"[<>=\[]", line)[0] for name in extras if name != "dev" for line in extras[name]]
    known = {name.lower().replace("_", "-") for name in CONSTRAINTS}
    assert {name for name in names if name != "trl-ext"} <= known


def test_the_citation_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type"} <= {*citation}
    assert citation["license"] == PROJECT["project"]["license"] and citation["title"].startswith("trl_ext")
    assert "version" not in citation, "that stands in one place"


@pytest.mark.parametrize("words", ["Report a vulnerability", "trust_remote_code", "weights_only=True", "safe_load"])
def test_the_page_on_security_says_what_runs_code(words):
    assert words in (ROOT / "SECURITY.md").read_text()


def test_what_the_page_on_security_says_of_the_code_is_true():
    source = "".join(path.read_text() for path in (ROOT / "trl_ext").rglob("*.py"))
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", source))
    assert not re.search(r"\bpickle\.|yaml\.(?!safe_|YAMLError)\w+\(", source)
