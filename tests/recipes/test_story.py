"""The quickstart as a newcomer sees it: few lines, no warning that could be avoided, and what to do next."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recipes.clock.accuracy as report

ROOT = Path(__file__).parents[2]


def quickstart(tmp_path, *words):
    """All that the command prints, on both streams."""
    for name in ("recipes", "trl_ext"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "trl_ext.cli", "grpo", "--config", "recipes/quickstart.yaml", *words]
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("TRL_", "PYTHONWARNINGS"))}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, timeout=600,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def check(printed, tmp_path, steps, width):
    lines = re.split(r"[\n\r]+", printed.strip())  # a progress bar writes one line over another
    assert len(lines) < 40, printed
    assert re.findall("(?m)^.*(?:Warning|were not passed to).*\n.*", printed) == []
    of_steps = [line.split() for line in lines if line.startswith("step ")]
    assert [words[1] for words in of_steps] == [f"{step}/{steps[-1]}" for step in steps]
    assert all(words[2::2][:4] == ["reward", "kl", "length", "entropy"] for words in of_steps)
    text = "\n".join(lines)
    accuracy = r"Held-out accuracy, 200 prompts: greedy 0\.\d\d -> [01]\.\d\d, sampled 0\.\d\d -> 0\.\d\d"
    assert re.search(rf"{accuracy} \(curves: outputs/quickstart/curves\.png\)", text)
    assert re.search(
        r"\nThe first prompt.*: \d( [a-f][+-]\d){6}:\n  before .*\((right|wrong)\)\n  after  .*\)\n", text
    )
    (command,) = re.findall(r"\nNext, for example: trl-ext \w+ --config (.*)\n", text)
    assert (ROOT / command).exists()
    entries = [json.loads(line) for line in (tmp_path / "outputs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "reward" in entry] == steps
    assert [entry["step"] for entry in entries if "held_out/greedy" in entry] == [0, steps[-1]]
    assert all("advantages/std" in entry for entry in entries if "reward" in entry)
    assert (tmp_path / "outputs/quickstart/curves.png").exists()


@pytest.mark.slow
def test_the_quickstart_is_told_in_less_than_40_lines(tmp_path):
    """With as many log entries as the whole of it."""
    pytest.importorskip("matplotlib")
    printed = quickstart(tmp_path, "--max_steps", "20", "--logging_steps", "1", "--per_device_train_batch_size", "32")
    check(printed, tmp_path, [*range(1, 21)], 2)


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path):
    pytest.importorskip("matplotlib")
    check(quickstart(tmp_path), tmp_path, [*range(5, 101, 5)], 3)


def test_the_next_command_of_each_report_is_there():
    for cls in (report.AccuracyReport, report.HardAccuracyReport):
        command, config = re.fullmatch(r"trl-ext (\w+) --config (.*)", cls.next_command).groups()
        assert f"trl-ext {command} --config {config}" in (ROOT / config).read_text()


def test_the_story_is_of_the_first_prompt_that_was_learned_or_else_of_the_first():
    said = report.AccuracyReport()
    said.rows = report.read_rows()[:3]
    wrong, right = ["", "", ""], ["", *(f"x\n#{row['answer']}" for row in said.rows[1:])]
    said.answers = wrong
    prompt = said.rows[1]["prompt"][-1]["content"]
    assert said._story(right).splitlines() == [
        f"The first prompt that it has learned to answer: {prompt}",
        "  before (nothing)  (wrong)",
        f"  after  x #{said.rows[1]['answer']}  (right)",
    ]
    assert said._story(wrong).startswith(f"The first prompt: {said.rows[0]['prompt'][-1]['content']}\n")
