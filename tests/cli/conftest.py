"""A user's working directory with a TRL run in it, and Python as a user starts it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import PROMPTS
from tiny.command import SMALL

import trl_ext

OURS = {
    "advantage_estimator": "reinforce_plus_plus",
    "advantage_kwargs": {"weighting": "sequence"},
    "kl_placement": "reward",
    "beta": 0.01,
    "num_generations": 1,
}


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch):
    """A user's working directory: YAML files, a dataset, a script, and functions of their own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    (tmp_path / "mine.py").write_text(
        "import os\n\n\n"
        "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n\n\n"
        "def broken(completions, **kwargs):\n    raise KeyError('answer')\n\n\n"
        "def half(batch):\n"
        "    open(f\"rank{os.environ['RANK']}of{os.environ['WORLD_SIZE']}\", 'w').close()\n"
        "    return batch.rewards.sum(1) / 2\n"
    )
    options = {"model_name_or_path": tiny_model, "dataset_name": "data", "reward_funcs": ["mine.length"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**options, **SMALL, **OURS, "use_cpu": True}))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump({"model": tiny_model, **SMALL, **OURS}))
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"model": tiny_model, **SMALL, "num_generations": 4}))
    shutil.copy(Path(__file__).parent / "user_script.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    trl_ext.unregister()


@pytest.fixture
def python():
    """`python(*words)`: runs them with this Python, and the package under test."""
    return run_python


def run_python(*command):
    package = str(Path(trl_ext.__file__).parent.parent)  # the one under test
    environment = {**os.environ, "PYTHONPATH": package, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
