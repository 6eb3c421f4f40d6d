"""`trl-ext rejection-sampling`, and `trl-ext sft` on what it writes, as a user types them."""

import json
from pathlib import Path

import pytest
import yaml
from tiny.command import trl_ext_here

from trl_ext import cli

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the recipes, made short."""
    (tmp_path / "recipes").symlink_to(RECIPES)
    options = yaml.safe_load((RECIPES / "rejection_sampling_quickstart.yaml").read_text())
    (tmp_path / "keep.yaml").write_text(yaml.safe_dump({**options, "limit": 4, "chunk_size": 2, "output_dir": "kept"}))
    options = yaml.safe_load((RECIPES / "rft_quickstart.yaml").read_text())
    short = {"dataset_name": "kept", "output_dir": "out", "max_steps": 1, "use_cpu": True}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**options, **short}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_writes_what_sft_trains_on(folder, monkeypatch, capfd):
    done = trl_ext_here(monkeypatch, capfd, "rejection-sampling", "--config", "keep.yaml", "--answers_per_prompt", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in Path("kept/train.jsonl").read_text().splitlines()]
    assert f"Kept {len(rows)} of 32 answers to 4 prompts" in done.stderr and rows
    assert {path.name for path in Path("kept/chunks").iterdir()} == {"000000.jsonl", "000001.jsonl"}
    done = trl_ext_here(monkeypatch, capfd, "sft", "--config", "train.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path("out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollouts", "2"], "there is no option 'rollouts' for `trl-ext rejection-sampling`"),
        (["--answers_per_prompt", "0"], "answers_per_prompt must be a whole number of at least 1, got 0."),
        (["--verifier", "recipes.clock.task.reward"], "module 'recipes.clock.task' has no 'reward'"),
    ],
)
def test_what_is_wrong_is_said_before_a_worker_starts(folder, capsys, words, message):
    assert cli.main(["rejection-sampling", "--config", "keep.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_model_options_of_sampling_are_refused(folder, capsys):
    assert cli.main(["rejection-sampling", "--dataset_name", "kept", "--output_dir", "o", "--seed", "3"]) == 2
    assert "seed is read only with model_name_or_path; without it, dataset_name holds" in capsys.readouterr().err
