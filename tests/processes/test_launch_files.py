"""The files of `recipes/accelerate`: accelerate reads each, and those of one and two processes train on CPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import launched_worker
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from transformers import AutoModelForCausalLM

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_lora": "FSDP"}
KINDS |= {"deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
# Those that are run below, and what their model is wrapped in.
WRAPPED = {"one_gpu": "Qwen3", "ddp": "DistributedDataParallel", "fsdp2": "FSDPQwen3", "fsdp2_lora": "FSDPPeft"}
WRAPPED |= {"deepspeed_zero2": "DeepSpeedEngine", "deepspeed_zero3": "DeepSpeedEngine"}
FILES = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def test_there_is_a_file_for_one_two_and_eight():
    eight = {"ddp_8", "fsdp2_8", "fsdp2_lora_8", "deepspeed_zero3_8"}
    assert FILES.keys() == KINDS.keys() | eight


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    config, text = load_config_from_file(str(FILES[name])), FILES[name].read_text()
    kind, processes = name.removesuffix("_8"), 8 if name.endswith("_8") else 1 if name == "one_gpu" else 2
    assert isinstance(config, ClusterConfig) and str(config.distributed_type.value) == KINDS[kind]
    assert config.num_processes == processes and config.mixed_precision == "bf16"
    if KINDS[kind] == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if KINDS[kind] == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(kind[-1])
    assert text.startswith("#") and len(text.splitlines()) <= 40
    assert f"--config_file recipes/accelerate/{name}.yaml" in text
    assert ("\n# Run to the end: " in text) == (name in WRAPPED), "the header says whether anyone has"


def settings(path):
    """What the launcher is told, without the comments and the number of processes."""
    return [line for line in path.read_text().splitlines() if not line.startswith(("#", "num_processes"))]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("_8")])
def test_eight_are_launched_as_two_are(name):
    assert settings(FILES[name]) == settings(FILES[name.removesuffix("_8")])


def launched(name, model, folder, processes):
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES[name]), "--mixed_precision",
            "no", "--main_process_port", port, launched_worker.__file__, model, str(folder), str(processes),
            *(["lora"] if "lora" in name else []),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    return torch.load(folder / f"0of{processes}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_it_trains_and_what_it_saves_is_read_again(name, tiny_model, tmp_path):
    if KINDS[name] == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="needs pip install -c constraints.txt -e '.[test-engines]'")
    result = launched(name, tiny_model, tmp_path, 1 if name == "one_gpu" else 2)
    assert result["wrapped"].startswith(WRAPPED[name]) and len(result["log"]) == 3
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()
    if "lora" in name:
        from peft import AutoPeftModelForCausalLM

        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    else:
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    saved = dict(found.named_parameters())
    assert saved.keys() == result["weights"].keys()
    for parameter, weight in result["weights"].items():
        assert torch.equal(saved[parameter], weight), parameter
