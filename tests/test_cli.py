"""The command line and `python -m trl_ext`, as a user types them."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from tiny import PROMPTS

import trl_ext
from trl_ext import cli


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch):
    """A user's working directory: a YAML file, a dataset and a reward function of their own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    (tmp_path / "mine.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n\n\n"
        "def half(rewards, scored, completion_mask, num_generations):\n    return rewards.sum(1) / 2\n"
    )
    options = {
        "model_name_or_path": tiny_model,
        "dataset_name": "data",
        "reward_funcs": ["mine.length"],
        "output_dir": "out",
        "advantage_estimator": "reinforce_plus_plus",
        "advantage_kwargs": {"weighting": "sequence"},
        "kl_placement": "reward",
        "beta": 0.01,
        "num_generations": 1,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    trl_ext.unregister()


def environment():
    return {**os.environ, "PYTHONPATH": "", "ACCELERATE_USE_CPU": "true"}


def test_trl_ext_grpo_trains_with_our_options_in_the_worker(folder):
    done = subprocess.run(
        [sys.executable, "-m", "trl_ext.cli", "grpo", "--config", "run.yaml", "--advantage_estimator", "mine.half",
         "--advantage_kwargs", "{}", "--num_processes", "1"],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "advantages/std" in done.stdout
    assert (folder / "out" / "model.safetensors").exists()


def test_a_failure_in_the_worker_is_an_exit_code(folder):
    done = subprocess.run(
        [sys.executable, "-m", "trl_ext.cli", "grpo", "--config", "run.yaml", "--reward_funcs", "mine.no_such"],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode != 0
    assert "no_such" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_placment": "reward"}, "there is no option 'kl_placment' for `trl-ext grpo` or `accelerate launch`; did "
                                    "you mean 'kl_placement'?"),
        ({"num_proceses": 2}, "there is no option 'num_proceses' for `trl-ext grpo` or `accelerate launch`; did you "
                              "mean 'num_processes'?"),
        ({"qqqqq": 2}, "there is no option 'qqqqq' for `trl-ext grpo` or `accelerate launch`; see `trl-ext grpo "
                       "--help`."),
        ({"advantage_kwargs": {"gamma": 7}}, "gamma must be a number in (0, 1], got 7."),
        ({"advantage_estimator": "reinforce"}, "advantage_kwargs has no 'weighting' for 'reinforce'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_yaml_is_one_sentence_before_a_worker_starts(folder, capsys, monkeypatch, change, message):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))
    options = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**options, **change}))
    assert cli.main(["grpo", "--config", "run.yaml"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-ext: error: ") and message in error


def test_python_m_trl_ext_runs_a_script_with_our_classes(folder):
    (folder / "script").mkdir()
    (folder / "script" / "beside.py").write_text("value = 7\n")
    (folder / "script" / "main.py").write_text(
        "import sys, beside\nfrom trl import GRPOTrainer\n"
        "print(__name__, GRPOTrainer.__module__, sys.argv, beside.value)\nsys.exit(3)\n"
    )
    for command in (["script/main.py", "a", "--b"], ["-m", "script.main", "a", "--b"]):
        env = environment() | ({"PYTHONPATH": "script"} if command[0] == "-m" else {})
        done = subprocess.run([sys.executable, "-m", "trl_ext", *command], capture_output=True, text=True, env=env)
        assert done.returncode == 3, done.stderr
        name, module, *arguments = done.stdout.strip().splitlines()[-1].split(" ", 2)
        assert (name, module) == ("__main__", "trl_ext.trainers.grpo")
        assert arguments[0].endswith("main.py', 'a', '--b'] 7")


@pytest.mark.parametrize("command", [[], ["-m"]])
def test_python_m_trl_ext_without_a_script_says_how_it_is_used(command):
    done = subprocess.run([sys.executable, "-m", "trl_ext", *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python -m trl_ext script.py")
