"""
What the package proves: tests marked `theorem` say a statement and its paper, and show how near they came.

`pytest -m theorem --write-theorems` writes `docs/theorems.md`; every other run compares what it has found with that
page, and `tests/project/test_theorems.py` compares the statements.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from trl_ext.papers import PAPERS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/theorems.md"
HEAD = """# Theorems

Every statement that the package proves by a computation in its tests: what is claimed, where it comes from, the test,
the largest deviation that it found and the largest that it accepts. A zero is equality to the bit. *Enumeration* means
that every outcome was summed with its probability, in float64; nothing is sampled.

`pytest -m theorem --write-theorems` writes this page, and every run of the tests compares it with what it finds: a
deviation a thousand times larger than the one that is printed is an error. Formulas that are often printed wrongly are
in [errata](errata.md).
"""
AGAIN = "write it again: pytest -m theorem --write-theorems"
_deviations: list[float] = []  # of the test that is running


def proves(found: Any, expected: Any = 0.0) -> None:
    """
    The largest difference between two tensors or numbers, or two mappings to them, is what the test has found.

    A test marked `theorem` calls it at least once. It fails beyond `at_most`, and so does NaN.
    """
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for name in found:
            proves(found[name], expected[name])
        return
    found, expected = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (found, expected))
    found, expected = torch.broadcast_tensors(found, expected)
    _deviations.append((found - expected).abs().max().item())


class Theorem(NamedTuple):
    """One statement: the arguments of its marker, and its test."""

    part: str
    statement: str
    paper: str | None
    at_most: float
    test: str  # file::function

    def row(self, found: float) -> str:
        paper = PAPERS[self.paper] if self.paper else None
        source = f"[{paper.arxiv or paper.year}]({paper.url})" if paper else ""
        file, _, function = self.test.partition("::")
        test = f"[`{function}`](../{file})"
        return f"| {self.statement} | {source} | {test} | {found:.1e} | {self.at_most:g} |"


def written() -> Iterator[Theorem]:
    """Every statement in the files of the tests, in their order."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.theorem":
                    arguments = [ast.literal_eval(value) for value in mark.args]
                    options = {word.arg: ast.literal_eval(word.value) for word in mark.keywords}
                    yield _theorem(arguments, options, f"{path.relative_to(ROOT).as_posix()}::{node.name}")


def _theorem(arguments: Any, options: dict[str, Any], test: str) -> Theorem:
    part, statement = arguments
    paper = options.get("paper")
    assert paper is None or paper in PAPERS, f"{test}: no paper {paper!r} in trl_ext.papers"
    return Theorem(part, statement, paper, options["at_most"], test)


def page(found: dict[str, float]) -> str:
    """The page; `found`: test → deviation."""
    lines, part = [HEAD], None
    for theorem in sorted(written(), key=lambda theorem: theorem.part):
        if theorem.part != part:
            part = theorem.part
            lines.append(f"\n## {part}\n\n| statement | source | test | found | accepted |\n|---|---|---|---|---|")
        lines.append(theorem.row(found[theorem.test]))
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def printed() -> dict[str, float]:
    """Test → deviation, as the page has it."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ") and "](../" in line]
    return {_test_of(row[2]): float(row[3]) for row in rows}


def _test_of(cell: str) -> str:
    function, _, file = cell.strip("[)").partition("`](../")
    return f"{file}::{function.strip('`')}"


class Recorder:
    """Collects what the tests find, also from the processes of xdist; a plugin of pytest."""

    def __init__(self, config: pytest.Config):
        self.found: dict[str, float] = {}
        self.write = config.getoption("--write-theorems")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "theorem":
                    test = report.nodeid.partition("[")[0]
                    self.found[test] = max(value, self.found.get(test, 0.0))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.write:
            PAGE.write_text(page(self.found))
            return
        on_page = printed()
        self.differing = [
            f"{test}: found {number:.1e}, printed {on_page.get(test)}"
            for test, number in self.found.items()
            if number > 1000 * max(on_page.get(test, 0.0), 1e-16)
        ]
        if self.differing and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.write and self.differing:
            terminalreporter.section("docs/theorems.md does not say what the tests found")
            terminalreporter.write_line("\n".join(self.differing))
            terminalreporter.write_line(AGAIN)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-theorems", action="store_true", help="write docs/theorems.md from what the tests find")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config), "theorems-recorder")


def largest(deviations: list[float], at_most: float) -> float:
    """What a test has found; an error beyond `at_most`, for NaN, and if it has found nothing."""
    assert deviations, "a test marked theorem calls proves()"
    assert all(number <= at_most for number in deviations), f"found {deviations}, accepted {at_most}"
    return max(deviations)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    _deviations.clear()
    yield
    if (mark := item.get_closest_marker("theorem")) is not None:
        item.user_properties.append(("theorem", largest(_deviations, mark.kwargs["at_most"])))
