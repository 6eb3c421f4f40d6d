"""Two runs in one folder, another batch than the checkpoint's, and a disk that is full while one is written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import psutil
import pytest
import tiny
import tiny.dpo as tiny_dpo
from transformers import TrainerCallback

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.run_folder import announced

OURS = (GRPOTrainer, GRPOConfig)
ON = {"advantage_estimator": "group_mean"}
HOST = socket.gethostname()


def left(folder, pid, host=HOST, started=None):
    """The file of another run."""
    path = folder / f"_trl_ext_run-{host}-{pid}.json"
    path.write_text(json.dumps({"host": host, "pid": pid, "started": started or time.time()}))
    return path


def said(folder, is_writer=True):
    with warnings.catch_warnings(record=True) as seen, announced(folder, is_writer):
        warnings.simplefilter("always")
        files = {path.name for path in folder.iterdir()}
    return [str(warning.message) for warning in seen], files


@pytest.fixture
def other():
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


# Two runs


def test_a_second_run_is_told_of_the_first(tmp_path, other):
    path = left(tmp_path, other.pid, started=time.time())
    (sentence,), files = said(tmp_path)
    assert files == {path.name, f"_trl_ext_run-{HOST}-{os.getpid()}.json"}
    since = time.strftime("%Y-%m-%d", time.localtime())
    assert sentence.startswith(f"Another run trains into {tmp_path}: process {other.pid} on {HOST}, since {since} ")
    assert sentence.endswith("Give each run an output_dir of its own.")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # ours is gone, the other's stays
    assert said(tmp_path, is_writer=False) == ([], {path.name})  # the other processes of a run


@pytest.mark.parametrize("reaped", [True, False])
def test_what_a_killed_run_left_is_removed_in_silence(tmp_path, other, reaped):
    other.kill()
    if reaped:
        other.wait()
    else:  # a container's first process may never ask for it
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    left(tmp_path, other.pid)
    left(tmp_path, os.getppid(), started=time.time() - 10**9)  # the number is another process's by now
    sentences, files = said(tmp_path)
    assert not sentences and files == {f"_trl_ext_run-{HOST}-{os.getpid()}.json"}


def test_of_a_run_on_another_host_it_is_said_what_cannot_be_seen(tmp_path):
    path = left(tmp_path, 1, host="elsewhere")
    (sentence,), _ = said(tmp_path)
    assert "process 1 on elsewhere" in sentence
    assert sentence.endswith(f"Whether it still runs cannot be seen from here; if it does not, delete {path}.")


def test_a_file_that_is_being_written_and_a_folder_that_cannot_be_are_no_faults(tmp_path):
    (tmp_path / f"_trl_ext_run-{HOST}-1.json").write_text("{")
    assert said(tmp_path)[0] == []
    (tmp_path / "file").write_text("")
    with announced(tmp_path / "file" / "folder", True):
        pass


@pytest.mark.parametrize("kind", ["GRPO", pytest.param("DPO", marks=pytest.mark.slow)])
def test_every_trainer_announces_its_run_and_takes_the_file_away(tiny_model, tmp_path, other, kind):
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(sorted(path.name for path in tmp_path.glob("_trl_ext_run-*")))

    def build(**options):
        if kind == "GRPO":
            return tiny.build(*OURS, tiny_model, tmp_path, max_steps=1, **options)
        return tiny_dpo.build(DPOTrainer, DPOConfig, tiny_model, tmp_path, max_steps=1, **options)

    on = ON if kind == "GRPO" else {"loss_type": ["psipo_identity"]}
    own = f"_trl_ext_run-{HOST}-{os.getpid()}.json"
    theirs = left(tmp_path, other.pid)
    for options, files in ((on, sorted([own, theirs.name])), ({}, [theirs.name])):  # off: nothing of ours is done
        trainer = build(**options)
        trainer.add_callback(Looks())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert seen.pop() == files
        assert any("Another run trains into" in str(warning.message) for warning in caught) == bool(options)
        assert [path.name for path in tmp_path.glob("_trl_ext_run-*")] == [theirs.name]


def test_ctrl_c_takes_the_file_away(tmp_path):
    with pytest.raises(KeyboardInterrupt), announced(tmp_path, True):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert not [*tmp_path.iterdir()]


# Another batch


def test_another_batch_than_the_checkpoints_is_told(tiny_model, tmp_path):
    options = {**ON, "rollout_func": tiny.scripted_rollout, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    tiny.train(*OURS, tiny_model, tmp_path, per_device_train_batch_size=8, **options)
    checkpoint = tmp_path / "checkpoint-1"
    assert json.loads((checkpoint / "trl_ext_batch.json").read_text()) == {
        "processes": 1, "optimizer step": 8, "generation batch": 8
    }  # fmt: skip

    def warned(checkpoint, **batch):
        trainer = tiny.build(*OURS, tiny_model, tmp_path, **{**options, "save_strategy": "no"}, **batch)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=str(checkpoint))
        return [str(w.message) for w in seen if "rows" in str(w.message)]

    assert warned(checkpoint, per_device_train_batch_size=4, gradient_accumulation_steps=2) == []
    (sentence,) = warned(checkpoint, per_device_train_batch_size=4)
    assert sentence.startswith(
        f"{checkpoint} was written with 8 rows in each optimizer step (processes: 1), this run has 4 (processes: 1): "
        "the data continue where as many steps of this run would have ended"
    )
    (sentence,) = warned(
        checkpoint, per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4
    )
    assert "with 8 rows in each generation batch (processes: 1), this run has 16" in sentence
    (checkpoint / "trl_ext_batch.json").unlink()  # of TRL's, or an earlier version
    assert warned(checkpoint, per_device_train_batch_size=4) == []


# A full disk


class FullDisk(TrainerCallback):
    """From the fourth step on there is no space for a file of the checkpoint."""

    def __init__(self, folder, file):
        self.path = folder / "checkpoint-4" / file

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.path.parent.mkdir()
            self.path.symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, of Linux")
@pytest.mark.parametrize("file", ["optimizer.pt", pytest.param("trl_ext_state.json", marks=pytest.mark.slow)])
def test_a_full_disk_is_an_error_and_the_checkpoint_before_goes_on(tiny_model, tmp_path, file):
    options = {
        "advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward", "beta": 0.1, "kl_target": 0.01,
        "max_steps": 5, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    trainer = tiny.build(*OURS, tiny_model, tmp_path / "run", **options)
    trainer.add_callback(FullDisk(tmp_path / "run", file))
    with pytest.raises(Exception) as error:
        trainer.train()
    said = [str(error.value), *error.value.__notes__]
    assert said[-1] == f"{tmp_path / 'run' / 'checkpoint-4'} is not whole; resume_from_checkpoint=True passes it over."
    (tmp_path / "run" / "checkpoint-4" / file).unlink(missing_ok=True)
    again = tiny.build(*OURS, tiny_model, tmp_path / "run", **options)
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over: it has no readable trainer_state"):
        again.train(resume_from_checkpoint=True)
    whole = tiny.train(*OURS, tiny_model, tmp_path / "whole", **options)
    tiny.assert_same_weights(again, whole)
    assert again.beta == whole.beta
