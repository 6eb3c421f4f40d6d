"""`trl-ext example`."""

import filecmp
from pathlib import Path

import pytest

from trl_ext import cli
from trl_ext.cli import example

RECIPES = Path(__file__).parents[2] / "recipes"


def test_it_copies_the_recipes_and_says_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["example"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        "The recipes are in recipes. A minute on a CPU, then how much it has learnt:",
        "  trl-ext grpo --config recipes/quickstart.yaml",
    ]
    different = filecmp.dircmp(RECIPES, tmp_path / "recipes", ignore=["__pycache__"])
    assert not (different.left_only or different.right_only or different.diff_files)
    assert (tmp_path / "recipes/clock/model/model.safetensors").exists()
    assert not [*tmp_path.rglob("__pycache__")]

    assert cli.main(["example"]) == 2, "what the user may have changed is left alone"
    assert capsys.readouterr().err == (
        "trl-ext: error: recipes exists already, and nothing was copied. Remove it, or name another FOLDER.\n"
    )
    assert cli.main(["example", "other"]) == 0
    assert "cd other && trl-ext grpo --config recipes/quickstart.yaml" in capsys.readouterr().out


def test_in_a_checkout_nothing_is_copied(monkeypatch, capsys):
    monkeypatch.chdir(RECIPES.parent)
    assert cli.main(["example"]) == 0
    assert "The recipes are in recipes." in capsys.readouterr().out


def test_it_runs_the_quickstart_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(cli, "main", lambda words: ran.append((words, Path.cwd())) or 3)
    assert example.main(["here", "--run"]) == 3
    assert ran == [(["grpo", "--config", "recipes/quickstart.yaml"], tmp_path / "here")]


@pytest.mark.parametrize(("inside", "beside"), [(True, False), (False, True), (True, True)])
def test_the_one_copy_is_inside_a_wheel_or_beside_a_checkout(tmp_path, monkeypatch, inside, beside):
    """An editable installation leaves a copy inside; the checkout's, beside, is the one that is kept."""
    for wanted, folder in ((inside, tmp_path / "trl_ext" / "recipes"), (beside, tmp_path / "recipes")):
        if wanted:
            folder.mkdir(parents=True)
            (folder / "quickstart.yaml").touch()
    monkeypatch.setattr(example, "__file__", str(tmp_path / "trl_ext" / "cli" / "example.py"))
    assert example.source() == (tmp_path / "recipes" if beside else tmp_path / "trl_ext" / "recipes")
