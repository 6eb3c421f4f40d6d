"""
A worker killed with SIGKILL in the middle of a step: the launcher ends, and the last whole checkpoint goes on with as
many processes, bit for bit, and with another number, to rounding: sums of gradients are then taken in another order.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import killed_worker
import psutil
import pytest
import torch
from killed_worker import GRPOTrainer, trained
from transformers import AutoModelForCausalLM


def launched(model, folder, processes, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, killed_worker.__file__, model, str(folder), str(processes), *words],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp2")])
def killed(request, tiny_model, tmp_path_factory):
    """The folder of a killed run, the words that choose its engine, and how the launcher ended."""
    folder, words = tmp_path_factory.mktemp(request.param), [request.param] * (request.param != "ddp")
    done = launched(tiny_model, folder, 2, "death", *words)
    return folder, words, done, time.time()


def resumed(killed, model, tmp_path, processes):
    folder, words, _, _ = killed
    shutil.copytree(folder / "run", tmp_path / "run")
    done = launched(model, tmp_path, processes, "end", *words)
    assert done.returncode == 0, done.stderr[-8000:]
    results = [torch.load(tmp_path / f"{rank}of{processes}.pt") for rank in range(processes)]
    assert results[0]["wrapped"].startswith("FSDP" if words else "DistributedDataParallel")
    return results, [torch.load(folder / f"whole-{rank}.pt") for rank in (0, 1)]


def test_the_launcher_ends_within_a_minute_and_says_why(killed):
    folder, _, done, ended = killed
    death = json.loads((folder / "run" / "died.json").read_text())
    assert ended - death["time"] < 60 and done.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {death['pid']}" in done.stderr
    assert not psutil.pid_exists(death["pid"])
    left = {path.name for path in (folder / "run").iterdir()}
    assert {"checkpoint-2", "checkpoint-4"} <= left and "checkpoint-6" not in left


def test_as_many_processes_go_on_bit_for_bit(killed, tiny_model, tmp_path):
    results, wholes = resumed(killed, tiny_model, tmp_path, 2)
    for result, whole in zip(results, wholes, strict=True):
        assert result["beta"] == whole["beta"] != 0.1
        for name, weight in whole["weights"].items():
            assert torch.equal(result["weights"][name], weight), name
    assert [entry["step"] for entry in results[0]["log"]] == [1, 2, 3, 4, 5, 6, 7]


def check(result, whole, model):
    assert result["beta"] == pytest.approx(whole["beta"], rel=1e-6)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, atol=1e-6, rtol=0, msg=name)
    start = AutoModelForCausalLM.from_pretrained(model).named_parameters()
    assert max((whole["weights"][name] - weight).abs().max() for name, weight in start) > 1e-2
    for ours, theirs in zip(result["log"], whole["log"], strict=True):
        for name in ("reward", "kl", "kl/beta", "loss", "advantages/std"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_four_processes_go_on_from_two_with_the_same_rows(killed, tiny_model, tmp_path):
    results, wholes = resumed(killed, tiny_model, tmp_path, 4)
    check(results[0], wholes[0], tiny_model)


@pytest.mark.slow  # `.ci/run` runs it after the others
def test_one_process_goes_on_from_two_with_the_same_rows(pair, tiny_model, tmp_path, recwarn):
    whole = pair.run(killed_worker, tiny_model, tmp_path)[0]
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    check(trained(GRPOTrainer, tiny_model, tmp_path / "run", 1, resume=checkpoint), whole, tiny_model)
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert not [w for w in recwarn if "rows in each" in str(w.message)]
    with pytest.warns(UserWarning, match=r"8 rows in each optimizer step \(processes: 2\), this run has 4 \("):
        trained(GRPOTrainer, tiny_model, tmp_path / "run", 1, resume=checkpoint, **rows)
