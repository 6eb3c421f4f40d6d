"""
Interrupted runs continue as if nothing had happened.

What TRL 1.16 gives alone: bit for bit, where a checkpoint lies between two generation batches of the first epoch. The
buffer of completions is in no checkpoint, so that a run interrupted inside one (`num_iterations`,
`steps_per_generation`) samples anew.
"""

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import tiny
import tiny.dpo as tiny_dpo
import torch
import trl
from cells import FEATURES, GRPO, WEIGHTS, build, trainable
from killed import OPTIONS, PLACES

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS = (GRPOTrainer, GRPOConfig)
TRLS = (trl.GRPOTrainer, trl.GRPOConfig)
ON = {"GRPO": {"advantage_estimator": "group_relative"}, "DPO": {"loss_type": ["psipo_identity"]}}
STEPS = 10
QUICK = [("full", "adaptive beta"), ("full", "process rewards"), ("adapter", "k1 in the reward")]
QUICK += [("4-bit", "REINFORCE++"), ("full", "IPO, soft labels"), ("4-bit", "β-DPO")]
CELLS = [
    pytest.param(*cell, marks=[] if cell in QUICK else [pytest.mark.slow], id=", ".join(cell))
    for cell in product(WEIGHTS, FEATURES)
]
pytestmark = pytest.mark.filterwarnings("ignore:kl_estimator='k1' in the loss is unbiased")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def metrics(trainer, feature):
    """What was logged, less times; TRL's DPO counts its tokens from 0 again."""
    left_out = {"step_time"} if feature in GRPO else {"num_tokens"}
    return [
        {name: value for name, value in entry.items() if name not in left_out}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    tiny_dpo.adapter(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("weights", "feature"), CELLS)
def test_a_run_continues_bit_for_bit_from_any_step(tiny_model, adapter, tmp_path, monkeypatch, weights, feature):
    if weights.startswith("4-bit"):
        pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes (trl-ext[quantization])")
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # see test_matrix.py
    # 8 optimiser steps are an epoch of GRPO here, 4 one of DPO.
    options = {"max_steps": STEPS, "per_device_train_batch_size": 16 if feature in GRPO else 4}
    cell = (tiny_model, adapter, weights, feature, tmp_path)
    whole = build(*cell, save_strategy="steps", save_steps=1, **options)
    whole.train()
    steps = (1, 4, 7, 8, 9) if (weights, feature) in QUICK else (2, 9)
    for step in range(1, STEPS) if (weights, feature) == QUICK[0] else steps:
        resumed = build(*cell, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(trainable(resumed.model), trainable(whole.model))
        assert metrics(resumed, feature) == metrics(whole, feature), f"from step {step}"
        if feature == "adaptive beta":
            assert resumed.beta == whole.beta != 0.1


@pytest.mark.parametrize("reuse", [{"num_iterations": 2}, {"steps_per_generation": 2}], ids=str)
def test_reused_completions_continue_bit_for_bit_where_the_next_batch_is_generated(tiny_model, tmp_path, reuse):
    for classes, options in ((TRLS, {}), (OURS, {"advantage_estimator": "reinforce_plus_plus", "kl_estimator": "k2"})):
        options = {"beta": 0.1, "max_steps": 5, "save_strategy": "steps", "save_steps": 1, **reuse, **options}
        options["gradient_accumulation_steps"] = 1
        folder = tmp_path / classes[0].__module__
        whole = tiny.train(*classes, tiny_model, folder, **options)
        for step in range(1, 5):
            resumed = tiny.build(*classes, tiny_model, folder, **{**options, "save_strategy": "no"})
            resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
            same = all(
                torch.equal(a, b) for a, b in zip(*map(dict.values, map(tiny.weights, (resumed, whole))), strict=True)
            )
            assert same == (step % 2 == 0), f"{classes[0]}: inside a generation batch TRL samples anew"


def test_only_with_our_options_a_later_epoch_continues_in_its_own_order(tiny_model, tmp_path):
    options = {"per_device_train_batch_size": 16, "max_steps": 10, "save_strategy": "steps", "save_steps": 9}

    def resumed(classes, folder, **ours):
        whole = tiny.train(*classes, tiny_model, folder, **options, **ours)
        again = tiny.build(*classes, tiny_model, folder, **options, **ours)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
        return whole, again

    theirs, off = resumed(TRLS, tmp_path / "theirs"), resumed(OURS, tmp_path / "off")
    for a, b in zip(theirs, off, strict=True):
        assert_same(tiny.weights(a), tiny.weights(b))
    assert any(not torch.equal(a, b) for a, b in zip(*map(dict.values, map(tiny.weights, theirs)), strict=True)), (
        "TRL keeps the order of the data now: `resumable` can go"
    )
    on = resumed(OURS, tmp_path / "on", advantage_estimator="group_mean")
    assert_same(*map(tiny.weights, on))


# TRL's checkpoints and ours


@pytest.mark.parametrize("first", [OURS, TRLS], ids=["ours, then TRL's", "TRL's, then ours"])
def test_a_checkpoint_of_the_one_is_continued_by_the_other(tiny_model, tmp_path, first):
    second = TRLS if first is OURS else OURS
    options = {"beta": 0.1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = tiny.train(*first, tiny_model, tmp_path, **options)
    other = tiny.build(*second, tiny_model, tmp_path, **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(tiny.weights(other), tiny.weights(whole))  # no option of ours: the same training


@pytest.mark.parametrize("to_ours", [True, False], ids=["TRL's, then ours", "ours, then TRL's"])
def test_a_run_changes_its_method_at_a_checkpoint(tiny_model, tmp_path, to_ours):
    ours = {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward"}
    options = {"beta": 0.1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first, second = ((TRLS, {}), (OURS, ours)) if to_ours else ((OURS, ours), (TRLS, {}))
    tiny.train(*first[0], tiny_model, tmp_path, **options, **first[1])
    trainer = tiny.build(*second[0], tiny_model, tmp_path, **options, **second[1])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    entries = tiny.logged(trainer)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert [("kl/k1" in entry) for entry in entries] == [not to_ours] * 2 + [to_ours] * 2


def test_a_preference_checkpoint_of_the_one_is_continued_by_the_other(tiny_model, tmp_path):
    ours = (DPOTrainer, DPOConfig, tiny_model, tmp_path / "ours")
    theirs = (trl.DPOTrainer, trl.DPOConfig, tiny_model, tmp_path / "theirs")
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    names = {ours: ["gpo_logistic"], theirs: ["sigmoid"]}  # the same loss
    whole = [tiny_dpo.build(*run, loss_type=names[run], **options) for run in (ours, theirs)]
    for trainer in whole:
        trainer.train()
    for run, other in ((ours, theirs), (theirs, ours)):
        trainer = tiny_dpo.build(*run, loss_type=names[run], **options)
        trainer.train(resume_from_checkpoint=str(other[3] / "checkpoint-3"))
        assert_same(tiny.weights(trainer), tiny.weights(whole[0]))


# Killed while saving


@pytest.fixture(scope="module")
def killed(tiny_model, tmp_path_factory):
    """For every place, a folder of a run killed there while it saved checkpoint-4; its checkpoint-2 is whole."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).parent / "killed.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    command = [sys.executable, str(script), tiny_model, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    return tiny.train(*OURS, tiny_model, tmp_path_factory.mktemp("whole"), **OPTIONS)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_while_saving_continues_from_the_last_whole_checkpoint(
    killed, uninterrupted, tiny_model, tmp_path, recwarn, place
):
    folder = shutil.copytree(killed / place, tmp_path / "run")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-2", "checkpoint-4"}
    trainer = tiny.build(*OURS, tiny_model, folder, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    said = [str(warning.message) for warning in recwarn if "checkpoint-" in str(warning.message)]
    if place == "after_the_state":
        assert not said
    else:
        reason = "it has no readable trainer_state.json, the run was stopped while saving it."
        assert said == [f"{folder / 'checkpoint-4'} is passed over: {reason}"]
    assert_same(tiny.weights(trainer), tiny.weights(uninterrupted))
    assert trainer.beta == uninterrupted.beta


@pytest.mark.parametrize("place", PLACES)
def test_half_a_checkpoint_that_is_named_is_refused_in_a_sentence(killed, tiny_model, place):
    half = killed / place / "checkpoint-4"
    trainer = tiny.build(*OURS, tiny_model, killed / place, **{**OPTIONS, "save_strategy": "no"})
    if place == "after_the_state":
        trainer.train(resume_from_checkpoint=str(half))
        return
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(half))
    assert str(error.value) == (
        f"{half} has no readable trainer_state.json: the run was stopped while saving it; "
        f"{half.with_name('checkpoint-2')} is whole."
    )


def test_a_run_killed_in_its_first_checkpoint_is_told_to_start_anew(killed, tiny_model, tmp_path):
    shutil.copytree(killed / "after_the_weights" / "checkpoint-4", tmp_path / "checkpoint-4")
    for trainer in (
        tiny.build(*OURS, tiny_model, tmp_path, **ON["GRPO"]),
        tiny_dpo.build(DPOTrainer, DPOConfig, tiny_model, tmp_path, **ON["DPO"]),
    ):
        with pytest.warns(UserWarning, match="checkpoint-4 is passed over"), pytest.raises(ValueError) as error:
            trainer.train(resume_from_checkpoint=True)
        assert str(error.value) == (
            f"No checkpoint in {tmp_path} has a readable trainer_state.json: the run was stopped while saving its "
            "first. Start anew, without resume_from_checkpoint."
        )


@pytest.mark.parametrize("kind", ["GRPO", "DPO"])
def test_a_checkpoint_that_is_written_over_is_not_whole_before_its_end(tiny_model, tmp_path, monkeypatch, kind):
    builder, classes = (tiny.build, OURS) if kind == "GRPO" else (tiny_dpo.build, (DPOTrainer, DPOConfig))
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **ON[kind]}
    builder(*classes, tiny_model, tmp_path, **options).train()
    trainer = builder(*classes, tiny_model, tmp_path, **options)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / "checkpoint-1" / "trainer_state.json").exists()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_with_nothing_switched_on_checkpoints_are_upstreams(tiny_model, tmp_path, monkeypatch):
    refuse = lambda *args: pytest.fail("ours was asked")  # noqa: E731
    for name in ("begin_checkpoint", "whole_checkpoint", "keeping_dtypes"):
        monkeypatch.setattr(f"trl_ext.trainers.interruptions.{name}", refuse)
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    tiny.train(*OURS, tiny_model, tmp_path / "grpo", **options)
    tiny_dpo.build(DPOTrainer, DPOConfig, tiny_model, tmp_path / "dpo", **options).train()


def test_what_is_ours_is_written_before_what_makes_a_checkpoint_whole(tiny_model, tmp_path, monkeypatch):
    adaptive = {"kl_estimator": "k2", "beta": 0.1, "kl_target": 0.01}
    grpo = tiny.build(*OURS, tiny_model, tmp_path / "grpo", save_strategy="steps", save_steps=1, **adaptive)
    loss = {"loss_type": ["beta_dpo"]}
    dpo = tiny_dpo.build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path / "dpo", save_strategy="steps", save_steps=1, **loss
    )
    for trainer, file in (
        (grpo, "grpo/checkpoint-1/trl_ext_state.json"),
        (dpo, "dpo/checkpoint-1/trl_ext_state.json"),
    ):
        monkeypatch.setattr(trainer, "save_model", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert (tmp_path / file).exists() and not (tmp_path / file).with_name("trainer_state.json").exists()


def test_where_there_is_no_checkpoint_the_trainer_says_so_itself(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        tiny.build(*OURS, tiny_model, tmp_path, **ON["GRPO"]).train(resume_from_checkpoint=True)
