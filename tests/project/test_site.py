"""The site is built without a warning, and what is dead in a page, a docstring or a formula is a warning."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAWN = shutil.which("node") is not None and (ROOT / "docs/_static/katex/katex.min.js").exists()
BUILD = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E", "-c", "docs", ".", "site"]
NOT_COPIED = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "outputs", "api", "site", "*.safetensors")
without_sphinx = any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo"))
pytestmark = pytest.mark.skipif(without_sphinx, reason="needs pip install -c constraints.txt -e '.[docs]'")
GENERATOR = (ROOT / "docs/reference.py").read_text()
needs_katex = pytest.mark.skipif(not DRAWN, reason="needs node, and KaTeX from docs/katex.sh")


def build(folder):
    tex = [] if DRAWN else ["-t", "tex"]
    done = subprocess.run([*BUILD, *tex], cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "copy"  # what is written stays here; links would be followed
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    assert build(folder) == (0, "")
    return folder / "site"


def test_the_site_has_every_page_and_shows_it_without_a_network(site):
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "recipes/README.md"]
    for page in pages:
        html = (site / page.relative_to(ROOT).with_suffix(".html")).read_text()
        assert not re.findall(r"<(?:script|img)[^>]+src=\"(?:https?:)?//|<link[^>]+stylesheet[^>]+//", html), page
    assert "url=README.html" in (site / "index.html").read_text()
    assert "leave_one_out" in (site / "searchindex.js").read_text()


def test_the_reference_has_every_public_function(site):
    import trl_ext.functional

    html = "".join(page.read_text() for page in (site / "api").glob("functional.*.html"))
    for name in trl_ext.functional.__all__:
        thing = getattr(trl_ext.functional, name)
        if callable(thing) and thing.__doc__ and getattr(thing, "__module__", "").startswith("trl_ext"):
            assert f'id="{name.lower()}"' in html, name
    options = (site / "api/trainers.grpo.config.html").read_text()
    assert "advantage_estimator" in options and "Parameters" in options


@needs_katex
def test_formulas_are_drawn(site):
    html = (site / "docs/methods/reinforce_plus_plus.html").read_text()
    assert html.count('class="katex-display"') >= 1 and "$$" not in html
    assert (site / "_static/katex/katex.min.css").exists()


FAULTS = {
    "[page](nosuch.md)": r"docs/page\.md:3.*nosuch\.md",
    "[anchor](index.md#nosuch)": r"docs/page\.md:5.*nosuch",
    "[anchor](#nosuch)": r"docs/page\.md:7.*nosuch",
    "![picture](nosuch.png)": r"docs/page\.md:9.*nosuch\.png",
    r"$\nosuch{x}$": r"docs/page\.md:11: WARNING: formula",
}


@needs_katex
def test_what_leads_nowhere_is_a_warning(tmp_path):
    """A site of two pages and one package, with one fault of each kind."""
    (tmp_path / "docs").mkdir()
    for name in ("conf.py", "_static"):
        (tmp_path / "docs" / name).symlink_to(ROOT / "docs" / name)
    only_rewards = re.subn(r"^GROUPS = \{.*?^\}", 'GROUPS = {"Rewards": ["rewards"]}', GENERATOR, flags=re.M | re.S)
    assert only_rewards[1] == 1
    (tmp_path / "docs/reference.py").write_text(only_rewards[0])
    shutil.copytree(ROOT / "trl_ext/rewards", tmp_path / "trl_ext/rewards")
    with (tmp_path / "trl_ext/rewards/step_format.py").open("a") as file:
        file.write('\n\ndef added():\n    """As [`nosuch_name`]."""\n')
    (tmp_path / "README.md").write_text("# Front\n\nText.\n")
    (tmp_path / "docs/index.md").write_text("# Overview\n\n## Start\n\n[page](page.md)\n")
    (tmp_path / "docs/page.md").write_text("# Page\n\n" + "\n\n".join(FAULTS) + "\n")
    (tmp_path / "docs/forgotten.md").write_text("# In no contents\n")
    status, printed = build(tmp_path)
    assert status == 1
    for pattern in [*FAULTS.values(), r"forgotten\.md: WARNING: document isn't included", r"\[`nosuch_name`\]"]:
        assert re.search(pattern, printed), f"{pattern}\n{printed}"
