"""`trl-ext prm`, as a user types it."""

import json
from pathlib import Path

import pytest
import trl
import yaml
from tiny.command import trl_ext_here
from tiny.prm import PROMPTS, STEPS, base, rows

import trl_ext
from trl_ext import cli
from trl_ext.rewards import ProcessRewardModel
from trl_ext.scripts import prm


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        rows(8).to_json(tmp_path / "data" / f"{name}.jsonl")
    options = {
        "model_name_or_path": base(tmp_path / "model", "token_classifier"), "dataset_name": "data",
        "output_dir": "out", "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": False,
        "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    trl_ext.unregister()


def test_it_trains_a_model_that_its_folder_loads(folder, monkeypatch, capfd):
    """With an adapter, whose task type the command chooses so that the new head is trained and saved."""
    words = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--label_threshold", "0.7"]
    done = trl_ext_here(monkeypatch, capfd, "prm", "--config", "run.yaml", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = Path("out/metrics.jsonl").read_text()
    assert metrics.count("eval_first_error_accuracy") == 2 and metrics.count('"brier"') == 2
    assert done.stdout.count("  accuracy ") == 4, "a line for each step and each evaluation"
    assert json.loads(Path("out/adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    scores = ProcessRewardModel("out")(prompts=PROMPTS, completion_steps=STEPS)
    assert [len(row) for row in scores] == [3, 1, 2, 3] and 0.0 < scores[0][0] < 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "typo"], "kind must be one of ['chat', 'good_bad', 'marker', 'token_classifier'], got 'typo'."),
        (["--step_seperator", "x"], "there is no option 'step_seperator' for `trl-ext prm`"),
        (
            ["--advantage_estimator", "gae"],
            "'advantage_estimator' is an option of `trl-ext grpo`, not of `trl-ext prm`",
        ),
        (["--center_rewards_coefficient", "0.1"], "center_rewards_coefficient belongs to pairs of answers"),
        (["--step_separator", "\\n"], "separator holds a backslash and a letter where a control character is meant"),
    ],
)
def test_what_is_wrong_is_said_before_a_worker_starts(folder, capsys, words, message):
    assert cli.main(["prm", "--config", "run.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_kind_that_does_not_exist_is_refused_in_yaml(folder, capsys):
    options = yaml.safe_load(Path("run.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump({**options, "kind": "typo"}))
    assert cli.main(["prm", "--config", "run.yaml"]) == 2
    assert "kind must be one of" in capsys.readouterr().err


def test_the_names_of_trl_are_ours_for_the_script_alone():
    before = trl.RewardTrainer, trl.RewardConfig
    parser = prm.make_parser(prog="trl prm")
    assert (trl.RewardTrainer, trl.RewardConfig) == before
    assert {"kind", "objective", "dataset_name", "use_peft"} <= {action.dest for action in parser._actions}


def test_the_command_is_listed_beside_trls(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "Run the prm training script" in capsys.readouterr().out
