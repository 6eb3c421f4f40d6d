"""The page docs/notebook.md as a notebook, run in a kernel; tests/project/test_blocks.py runs it as a page."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_that_the_model_learns(tmp_path, monkeypatch):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    for path in ROOT.iterdir():
        if path.name in ("recipes", "trl_ext", "docs"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    notebook = jupytext.read(ROOT / "docs/notebook.md")
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    setup, training, picture = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [
        "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout")
        for cell in (setup, training)
    ]
    before, after = (float(text.split()[-1]) for text in texts)
    assert before < 0.2 and after > before + 0.2
    assert any("image/png" in out.get("data", {}) for out in picture.outputs)
