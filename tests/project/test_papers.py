"""Every paper that a docstring or a page links is in `trl_ext.papers`, and the other way round."""

import ast
import re
from pathlib import Path

import pytest

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.preference import PREFERENCE_LOSSES, UNPAIRED_LOSSES
from trl_ext.papers import PAPERS

ROOT = Path(__file__).parents[2]
URLS = {paper.url for paper in PAPERS.values()}
LINK = r"https?://(?:huggingface\.co/papers/|doi\.org/|arxiv\.org/|joschu\.net/)[^\s)\]]*[\w]"


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", sorted((ROOT / "trl_ext").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_papers_of_the_docstrings_are_known(path):
    for text in docstrings(path):
        assert {*re.findall(LINK, text)} <= URLS


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_papers_of_the_docs_are_known(page):
    assert {*re.findall(LINK, page.read_text())} <= URLS


def test_the_page_lists_every_paper():
    assert {*re.findall(LINK, (ROOT / "docs/papers.md").read_text())} == URLS


@pytest.mark.parametrize("name", PAPERS)
def test_a_citation_is_complete(name):
    paper = PAPERS[name]
    card = paper.for_card()
    assert card["title"] == paper.title and card["id"] == paper.arxiv
    assert card["citation"].startswith(f"@article{{{paper.cite},\n    title   = {{{{{paper.title}}}}},\n")
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv or "0000.00000") and 1990 < paper.year < 2030
    assert str(paper.year) in paper.cite


def test_no_two_papers_share_a_key_or_a_link():
    assert len({paper.cite for paper in PAPERS.values()}) == len(URLS) == len(PAPERS)


@pytest.mark.parametrize("table", [ADVANTAGE_ESTIMATORS, PREFERENCE_LOSSES, UNPAIRED_LOSSES])
def test_the_paper_of_every_row_is_known(table):
    for name, row in table.items():
        assert (row.paper in PAPERS) == bool(row.method), name
