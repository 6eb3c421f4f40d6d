"""One line for each log entry, and all metrics in a file."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import build
from tiny.dpo import build as build_dpo
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from trl_ext.callbacks import LogLines, MetricsFile
from trl_ext.callbacks.log_lines import log_line
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS = GRPOTrainer, GRPOConfig


def words(line):
    return re.split(r"\s+", line.strip())


# The line


def test_of_grpo_and_ppo_without_the_loss():
    logs = {"loss": 0.0, "reward": 0.3125, "kl": 0.00213, "completions/mean_length": 45.2, "entropy": 0.06697}
    logs |= {"value/explained_variance": 0.5, "completions/clipped_ratio": 0.0, "epoch": 0.1}
    assert words(log_line(logs)) == [
        "reward", "0.312", "kl", "0.00213", "length", "45.2", "explained", "0.5", "entropy", "0.067",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 0.69, "rewards/accuracies": 0.75, "rewards/margins": 0.1, "entropy": 2.0},
         "loss 0.69 accuracy 0.75 margin 0.1 entropy 2"),  # DPO
        ({"loss": 0.5, "kl": 0.01, "rewards/margins": -0.2}, "loss 0.5 margin -0.2 kl 0.01"),  # KTO
        ({"loss": 0.5, "accuracy": 0.9, "brier": 0.1}, "loss 0.5 accuracy 0.9"),  # process-reward models
        ({"reward": 1.0, "kl": 0.7, "kl/reference": 0.01}, "reward 1 kl 0.01"),  # asynchronous: `kl` is of the sampler
        ({"eval_loss": 0.5, "eval_accuracy": 0.9, "epoch": 1.0}, "evaluation loss 0.5 accuracy 0.9"),
        ({"loss": math.nan, "rewards/accuracies": None, "kl": math.inf}, "loss nan kl inf"),
        ({"epoch": 1.0, "policy_samples/reward": 0.3}, ""),
    ],
)  # fmt: skip
def test_of_the_others(logs, line):
    assert " ".join(words(log_line(logs))) == line


def printed_by(capsys):
    out, err = capsys.readouterr()
    assert err == "", "no progress bar where there is no terminal"
    return out.splitlines()


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_run_of_three_steps_prints_four_lines(tiny_model, tmp_path, capsys, disable_tqdm):
    trainer = build(*OURS, tiny_model, tmp_path / "out", log_style="line", beta=0.1, disable_tqdm=disable_tqdm)
    capsys.readouterr()
    trainer.train()
    *steps, last = printed_by(capsys)
    assert [words(line)[:2] for line in steps] == [["step", f"{step}/3"] for step in (1, 2, 3)]
    assert all(words(line)[2::2][:4] == ["reward", "kl", "length", "entropy"] for line in steps)
    assert all(line.endswith("s/step") for line in steps)
    assert re.fullmatch(rf"3 steps in \d+ s; all metrics: {re.escape(str(tmp_path))}/out/metrics\.jsonl", last)


def test_evaluations_have_a_line(tiny_model, tmp_path, capsys):
    from tiny.dpo import pairs

    options = {"log_style": "line", "max_steps": 1, "eval_dataset": pairs(4), "disable_tqdm": False}
    trainer = build_dpo(DPOTrainer, DPOConfig, tiny_model, tmp_path / "out", **options)
    capsys.readouterr()
    trainer.train()
    trainer.evaluate()
    lines = printed_by(capsys)
    assert words(lines[0])[:5] == ["step", "1/1", "loss", words(lines[0])[3], "accuracy"]
    assert words(lines[-1])[:4] == ["step", "1/1", "evaluation", "loss"]


def test_other_processes_print_and_write_nothing(tmp_path, capsys):
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), disable_tqdm=False)
    state = TrainerState(is_world_process_zero=False, max_steps=3)
    for callback in (LogLines(), MetricsFile()):
        callback.on_train_begin(args, state, TrainerControl())
        callback.on_log(args, state, TrainerControl(), logs={"loss": 1.0})
        callback.on_train_end(args, state, TrainerControl())
    assert printed_by(capsys) == [] and not (tmp_path / "out").exists()


# The option


class Mine(ProgressCallback):
    """A user's."""


class LogsAtOnce(TrainerCallback):
    """A user's that logs as training begins, before those that the option adds have begun."""

    trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        Trainer.log(self.trainer, {"reward": 0.125, "at": "once"})


def test_it_takes_the_place_of_transformers_printing_alone(tiny_model, tmp_path):
    def kinds(**options):
        trainer = build(*OURS, tiny_model, tmp_path, **options)
        return [type(callback) for callback in trainer.callback_handler.callbacks]

    for disable_tqdm, theirs in ((False, ProgressCallback), (True, PrinterCallback)):
        assert theirs in kinds(disable_tqdm=disable_tqdm)
        assert theirs in kinds(disable_tqdm=disable_tqdm, log_style="full", advantage_estimator="group_mean")
        found = kinds(disable_tqdm=disable_tqdm, log_style="line", callback_paths=["test_log.Mine"])
        assert theirs not in found and {LogLines, MetricsFile} < {*found}
        assert "Mine" in [kind.__name__ for kind in found]


@pytest.mark.parametrize(
    ("value", "says"), [("short", "must be one of 'line', 'full', got 'short'"), (True, "is no switch")]
)
def test_another_style_is_refused(tmp_path, value, says):
    for config in (GRPOConfig, DPOConfig):
        with pytest.raises(ValueError, match=f"log_style .*{says}"):
            config(str(tmp_path), bf16=False, use_cpu=True, log_style=value)


def test_what_is_printed_does_not_change_training_and_is_not_in_the_card(tiny_model, tmp_path):
    trained = []
    for style in ("line", None):
        trainer = build(*OURS, tiny_model, tmp_path / "out", log_style=style)
        trainer.train()
        trained.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        trainer.create_model_card()
        assert "log_style" not in (tmp_path / "out" / "README.md").read_text()
    assert all(map(torch.equal, *trained))


def test_a_callback_may_log_as_training_begins(tiny_model, tmp_path, capsys):
    trainer = build(*OURS, tiny_model, tmp_path, log_style="line", callback_paths=["test_log.LogsAtOnce"], max_steps=1)
    trainer.train()
    lines = [words(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["step", "0/1", "reward", "0.125"] and lines[1][:2] == ["step", "1/1"]
    assert [entry["step"] for entry in read(tmp_path / "metrics.jsonl")] == [0, 1, 1]


# The file


def read(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def without_clock(entries):
    timed = ("time", "per_second", "flos")
    return [{name: x for name, x in entry.items() if not any(word in name for word in timed)} for entry in entries]


def plain(entries):
    return [
        {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in entry.items()}
        for entry in entries
    ]


def test_the_file_is_the_log_and_goes_on_with_a_resumed_run(tiny_model, tmp_path):
    options = {"log_style": "line", "advantage_estimator": "group_mean", "save_strategy": "steps", "save_steps": 2}
    path = tmp_path / "out" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("of another run\n")
    whole = build(*OURS, tiny_model, tmp_path / "out", max_steps=3, **options)
    whole.train()
    assert read(path) == plain(whole.state.log_history)
    assert [entry["step"] for entry in read(path)] == [1, 2, 3, 3] and next(iter(read(path)[0])) == "step"
    for lost in (False, True):  # stopped at step 3, after the checkpoint of step 2; or on another machine
        if lost:
            path.unlink()
        resumed = build(*OURS, tiny_model, tmp_path / "out", max_steps=3, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert read(path) == plain(resumed.state.log_history)
        assert without_clock(read(path))[:3] == without_clock(plain(whole.state.log_history))[:3]


def test_what_json_does_not_have_is_null(tmp_path):
    callback, args = MetricsFile(), SimpleNamespace(output_dir=str(tmp_path))
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    logs = {"a": math.nan, "b": -math.inf, "c": torch.tensor(0.5), "d": None, "e": "text", "f": 3, "g": [1]}
    callback.on_log(args, state, control, logs=logs)
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 0, "a": None, "b": None, "c": 0.5, "d": None, "e": "text", "f": 3, "g": [1]}
    ]


def test_what_a_callback_logs_as_training_begins_is_kept(tmp_path):
    callback, args = MetricsFile(), SimpleNamespace(output_dir=str(tmp_path))
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_log(args, state, control, logs={"held_out/greedy": 0.1})  # by a callback that comes before
    state.log_history.append({"held_out/greedy": 0.1, "step": 0})
    callback.on_train_begin(args, state, control)
    callback.on_log(args, state, control, logs={"reward": 0.2})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "held_out/greedy": 0.1}, {"step": 0, "reward": 0.2}]
