"""`trl-ext ppo`, as a user types it."""

import json
import sys
from pathlib import Path

import pytest
import trl
import yaml
from tiny import PROMPTS
from tiny.command import trl_ext_here

import trl_ext
from trl_ext import cli
from trl_ext.scripts import ppo


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    (tmp_path / "mine.py").write_text(
        "def length(completions, **kwargs):\n    return [len(c) / 8 for c in completions]\n"
    )
    options = {
        "model_name_or_path": tiny_model, "dataset_name": "data", "reward_funcs": ["mine.length"], "output_dir": "out",
        "per_device_train_batch_size": 4, "max_completion_length": 8, "max_steps": 2, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True, "critic_lam": 1.0,
        "num_iterations": 1,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    trl_ext.unregister()


def test_it_trains_policy_and_critic_in_the_worker(folder, monkeypatch, capfd):
    done = trl_ext_here(monkeypatch, capfd, "ppo", "--config", "run.yaml", "--lam", "0.9")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("  explained ") == 2, "a line for each step"
    assert Path("out/metrics.jsonl").read_text().count("value/explained_variance") == 2
    assert {"config.json", "critic.safetensors", "model.safetensors"} <= {p.name for p in Path("out/critic").iterdir()}
    card = json.loads(Path("out/config.json").read_text())
    assert card["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--critic_lamda", "1"], "there is no option 'critic_lamda' for `trl-ext ppo`"),
        (["--lam", "2.0"], "lam must be a number in [0, 1], got 2.0."),
        (["--advantage_estimator", "group_mean"], "advantage_estimator must be 'gae', got 'group_mean'"),
    ],
)
def test_what_is_wrong_is_said_before_a_worker_starts(folder, capsys, words, message):
    assert cli.main(["ppo", "--config", "run.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_names_of_trl_are_ours_for_the_script_alone():
    before = trl.GRPOTrainer, trl.GRPOConfig
    parser = ppo.make_parser(prog="trl ppo")
    assert (trl.GRPOTrainer, trl.GRPOConfig) == before
    assert {"critic_lam", "reward_funcs"} <= {action.dest for action in parser._actions}
    with trl_ext.register():
        ours = trl.GRPOTrainer
        with ppo._ppo_for_grpo():
            assert trl.GRPOTrainer is trl_ext.PPOTrainer
        assert trl.GRPOTrainer is ours is trl_ext.GRPOTrainer
    assert trl.GRPOTrainer is before[0]


def test_the_command_is_listed_beside_trls(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert "Run the ppo training script" in printed and "Run the grpo training script" in printed
    assert "trl.scripts.ppo" not in sys.modules
