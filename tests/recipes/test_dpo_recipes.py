"""Preference recipes and the command line, as a user types it; the pairs that are shipped."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny.command import trl_ext_here
from tiny.dpo import pairs

import trl_ext
from recipes.clock.accuracy import read_rows
from recipes.clock.pairs import HERE, PROMPTS, preference_pairs
from recipes.clock.task import outcome_reward
from trl_ext.functional.preference import PREFERENCE_LOSSES
from trl_ext.trainers.dpo import DPOConfig
from trl_ext.trainers.dpo.losses import parse_losses

RECIPES = Path(__file__).parents[2] / "recipes"
DPO_RECIPES = ["ipo.yaml", "ipo_quickstart.yaml", "psipo_soft_labels.yaml", "rpo.yaml"]


@pytest.fixture
def registered():
    trl_ext.register()
    yield
    trl_ext.unregister()


@pytest.mark.parametrize("name", DPO_RECIPES)
def test_a_recipe_parses_and_its_header_says_who_ran_it(name, registered, monkeypatch, tmp_path):
    from trl.scripts.dpo import make_parser

    text = (RECIPES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f"trl-ext dpo --config recipes/{name}" in text
    header = text.split("\n\n")[0]
    assert ("Run to the end" in header) != ("Not run to the end" in header)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text.replace("bf16: false", "") + "\nbf16: false\n", encoding="utf-8")
    _, config, model, _ = make_parser().parse_args_and_config(["--config", name])  # refuses what it does not know
    assert isinstance(config, DPOConfig)
    assert parse_losses(config), "a loss of ours"
    assert model.model_name_or_path


def test_the_page_names_every_loss_and_every_option():
    page = (RECIPES.parent / "docs/methods/preference.md").read_text(encoding="utf-8")
    options = DPOConfig.__annotations__.keys()
    for name in [*PREFERENCE_LOSSES, *(name for name in options if not name.startswith("_"))]:
        assert re.search(rf"`{name}\b", page), name


def test_trl_ext_dpo_trains_with_our_losses_in_the_worker(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data").mkdir()
    pairs(8, p=lambda i: 0.3 + i / 20).to_json(tmp_path / "data" / "train.jsonl")
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef psi(prob):\n    return torch.sin(prob)\n\n\n"
        "def pair_loss(batch, *, power=1.0):\n    return batch.margin.abs() ** power\n"
    )
    options = {
        "model_name_or_path": tiny_model,
        "dataset_name": "data",
        "output_dir": "out",
        "loss_type": ["psipo_logit", "psipo", "mine.pair_loss"],
        "psi": "mine.psi",
        "preference_prob_column": "p",
        "loss_kwargs": {"psipo_logit": {"eps": 0.01}},
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    words = [
        "--num_processes",
        "1",
        "--loss_kwargs",
        '{"psipo_logit": {"eps": 0.1}, "mine.pair_loss": {"power": 2.0}}',
    ]
    done = trl_ext_here(monkeypatch, capfd, "dpo", "--config", "run.yaml", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("psipo_logit", "psipo", "mine.pair_loss"):
        assert (tmp_path / "out" / "metrics.jsonl").read_text().count(f'"loss/{name}"') == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


# The pairs


def test_the_shipped_pairs_are_a_right_and_a_wrong_answer_to_prompts_of_the_training_data():
    rows = [json.loads(line) for line in (HERE / "preferences" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 592
    known = {row["prompt"][0]["content"] for row in read_rows(HERE / "data" / "train.jsonl")[:PROMPTS]}
    prompts = [row["prompt"] for row in rows]
    assert {prompt[0]["content"] for prompt in prompts} <= known
    assert outcome_reward(prompts, [row["chosen"] for row in rows]) == [1.0] * len(rows)
    assert outcome_reward(prompts, [row["rejected"] for row in rows]) == [0.0] * len(rows)


def test_the_pairs_are_samples_of_the_base_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(HERE / "model")
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    rows = read_rows(HERE / "data" / "train.jsonl")[:12]
    found = preference_pairs(model, tokenizer, rows)
    assert 5 <= len(found) <= 12
    assert all(pair["chosen"] != pair["rejected"] for pair in found)
    assert outcome_reward([p["prompt"] for p in found], [p["chosen"] for p in found]) == [1.0] * len(found)
    assert found == preference_pairs(model, tokenizer, rows)
