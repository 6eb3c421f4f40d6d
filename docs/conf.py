"""
The site: `docs/katex.sh && sphinx-build -W --keep-going -n -q -E -c docs . site`, from the root of the repository.

Its pages are the Markdown files as they are. The contents are those of docs/index.md: a page that no section there
links to is a warning. Formulas are drawn while building, so that a reader needs neither JavaScript nor a network for
them; `-t tex` leaves them as TeX where there is no KaTeX.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.errors import ConfigError
from sphinx.util import logging

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import reference  # noqa: E402

project, author, copyright = "trl_ext", "", "the trl_ext developers"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "README"
include_patterns = ["*.md", "docs/**", "recipes/README.md", "api/**"]
exclude_patterns = ["docs/_static/**"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "trl_ext"
html_math_renderer = "katex"
html_static_path = ["_static"]
html_css_files = ["katex/katex.min.css", "site.css"]
html_copy_source = False
html_show_sphinx = False
html_use_index = False

LOG = logging.getLogger(__name__)
KATEX = HERE / "_static/katex/katex.min.js"
PROGRAM = """
const katex = require(process.argv[1])
require('readline').createInterface({input: process.stdin}).on('line', line => {
  const [formula, displayMode] = JSON.parse(line)
  let answer
  try { answer = {html: katex.renderToString(formula, {displayMode})} }
  catch (error) { answer = {error: error.message} }
  console.log(JSON.stringify(answer))
})"""


@cache
def katex():
    """The process that draws."""
    return subprocess.Popen(
        ["node", "-e", PROGRAM, str(KATEX)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def formula(display):
    def write(translator, node):
        if translator.builder.tags.has("tex"):
            translator.body.append(f"<code>{translator.encode(node.astext())}</code>")
            raise nodes.SkipNode
        print(json.dumps([node.astext(), display]), file=katex().stdin, flush=True)
        answer = json.loads(katex().stdout.readline())
        if "error" in answer:
            LOG.warning("formula: %s", answer["error"], location=node)
        translator.body.append(answer.get("html", ""))
        raise nodes.SkipNode

    return write


def contents():
    """The sections of docs/index.md and the pages that each links to, in order."""
    _, *sections = re.split(r"^## (.+)$", (HERE / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        targets = re.findall(r"\]\(([^)#:]+)\.md\)", text)
        yield title, [os.path.normpath(f"docs/{target}") for target in targets]


def with_contents(app, docname, source):
    """The Markdown files stay readable on their own: what only Sphinx understands is added here."""
    if docname == root_doc:
        for title, pages in [("", ["docs/index"]), *contents(), ("Reference", ["api/index"])]:
            entries = "\n".join(f"/{page}" for page in pages)
            caption = f":caption: {title}\n" if title else ""
            source[0] += f"\n```{{toctree}}\n:hidden:\n{caption}\n{entries}\n```\n"


def prepare(app, config):
    if not app.tags.has("tex") and not (KATEX.exists() and shutil.which("node")):
        raise ConfigError("Formulas need node and KaTeX: run docs/katex.sh, or leave them as TeX with -t tex.")
    for sentence in reference.write(HERE.parent / "trl_ext", HERE.parent / "api"):
        LOG.warning(sentence)


def to_the_front_page(app, exception):
    if exception is None and app.builder.name == "html":
        Path(app.outdir, "index.html").write_text('<meta http-equiv="refresh" content="0; url=README.html">\n')


def setup(app):
    app.connect("config-inited", prepare)
    app.add_html_math_renderer("katex", (formula(False), None), (formula(True), None))
    app.connect("source-read", with_contents)
    app.connect("build-finished", to_the_front_page)
