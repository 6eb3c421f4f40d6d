"""Whole runs: killed, in two processes, into a folder of another run; data and models that do not fit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import load_dataset
from tiny import PROMPTS, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from trl_ext import cli
from trl_ext.__main__ import main as worker
from trl_ext.cli.interrupted import how_to_go_on
from trl_ext.labels import LabelStepsConfig, label_steps
from trl_ext.labels import run as run_module

SCRIPT = str(Path(trl_ext.__file__).parent / "scripts" / "label_steps.py")


def write_data(rows):
    Path("data").mkdir(exist_ok=True)
    Path("data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def given(tiny_model, tmp_path, monkeypatch):
    """Options of a run in a user's working directory; its last chunk is a short one."""
    monkeypatch.chdir(tmp_path)
    write_data([{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS[:7])])
    yield {
        "model_name_or_path": tiny_model, "dataset_name": "data", "verifier": "tiny.verifiers.has_digit",
        "step_separator": "b", "num_generations": 3, "rollouts": 2, "max_completion_length": 10, "chunk_size": 2,
    }  # fmt: skip
    trl_ext.unregister()


def label(given, output_dir, **options):
    label_steps(LabelStepsConfig(**{**given, "output_dir": str(output_dir), **options}))
    return Path(output_dir, "train.jsonl").read_bytes()


def command(*words):
    return [sys.executable, "-m", *words]


def test_what_is_written_is_data_to_train_on(given):
    totals = label_steps(LabelStepsConfig(**given, output_dir="out"))
    rows = load_dataset("out", split="train")
    assert rows.column_names == ["prompt", "number", "completions", "labels", "outcome"] and len(rows) == 21
    assert rows["number"] == [i for i in range(7) for _ in range(3)]
    for row in rows:
        assert len(row["completions"]) == len(row["labels"]) >= 1 and row["labels"][-1] == row["outcome"]
        assert all(label in (0.0, 0.5, 1.0) or len(row["labels"]) > 1 for label in row["labels"])
    assert max(map(len, rows["labels"])) > 1
    assert (totals.answers, totals.right) == (21, sum(rows["outcome"])) and totals.prefixes > 0
    again = label_steps(LabelStepsConfig(**given, output_dir="out"))
    assert (again.answers, again.prefixes) == (0, 0), "nothing is done again"


@pytest.mark.parametrize("search", ["all", pytest.param("first_error", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_with_the_bytes_of_one_that_was_not(given, search):
    config = {**given, "search": search}
    whole = label(config, "whole")
    Path("run.yaml").write_text(yaml.safe_dump({**config, "output_dir": "killed"}))
    environment = {**os.environ, "PAUSE": "0.5", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command("trl_ext", SCRIPT, "--config", "run.yaml"), env=environment, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 240
    while not Path("killed/chunks/000001.jsonl").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()[-3000:]
    done = sorted(path.name for path in Path("killed/chunks").glob("*.jsonl"))
    assert 2 <= len(done) < 4 and not Path("killed/train.jsonl").exists()
    assert label(config, "killed") == whole


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(given):
    whole = label(given, "one")
    Path("run.yaml").write_text(yaml.safe_dump({**given, "output_dir": "two"}))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "trl_ext"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    words = command(*launcher, SCRIPT, "--config", "run.yaml")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    assert Path("two/train.jsonl").read_bytes() == whole
    assert "right" in done.stderr and "tokens/s" in done.stderr and "Labelled answers to 7 prompts" in done.stderr


def test_the_command_starts_its_script_in_the_workers(given, monkeypatch):
    started = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    Path("run.yaml").write_text(yaml.safe_dump({**given, "output_dir": "out"}))
    words = ["--multi_gpu", "--num_processes", "2"]
    assert cli.main(["label-steps", "--config", "run.yaml", "--limit", "1", *words]) == 0
    (args,) = started
    assert (args.multi_gpu, args.num_processes) == (True, 2)
    assert args.training_script == "trl_ext" and args.module
    assert args.training_script_args == [SCRIPT, "--config", "run.yaml", "--limit", "1"]
    assert "trl.scripts.label-steps" not in sys.modules


def test_a_worker_refuses_in_one_sentence_and_with_status_2(given, monkeypatch, capsys):
    label(given, "out", limit=1)
    Path("run.yaml").write_text(yaml.safe_dump({**given, "output_dir": "out", "limit": 1}))
    monkeypatch.setattr(sys, "argv", ["trl_ext", SCRIPT, "--config", "run.yaml", "--seed", "1"])
    for owner, name in ((sys, "excepthook"), (sys, "path")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    with pytest.raises(SystemExit) as ended:
        worker()
    sentence = "out was labelled with seed=0, got 1; choose another output_dir, or delete it."
    assert ended.value.code == 2 and f"trl-ext: error: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rolouts", "3"], "there is no option 'rolouts' for `trl-ext label-steps` or `accelerate launch`; did you"),
        (["--temperature", "0"], "temperature must be positive, got 0.0: greedy continuations"),
        (["--step_separator", r"\n"], "Write \"\\n\" with double quotes in YAML, $'\\n' in a shell."),
    ],
)
def test_mistakes_at_the_command_line_are_said_before_a_worker_starts(given, capsys, monkeypatch, words, sentence):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))
    Path("run.yaml").write_text(yaml.safe_dump({**given, "output_dir": "out"}))
    assert cli.main(["label-steps", "--config", "run.yaml", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_after_ctrl_c_the_same_words_go_on():
    words = ["label-steps", "--config", "my run.yaml"]
    assert how_to_go_on(words, "out", patience=0).splitlines() == [
        "trl-ext: stopped.",
        "The chunks that are finished are in out.",
        "To go on: trl-ext label-steps --config 'my run.yaml'",
    ]


# Folders


def test_a_folder_of_another_run_is_refused(given):
    label(given, "out", limit=1)
    for options, sentence in (
        ({"rollouts": 3}, "out was labelled with rollouts=2, got 3; choose another output_dir, or delete it."),
        ({"search": "first_error"}, "out was labelled with estimate='soft', got 'hard'; choose another output_dir"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            label(given, "out", limit=1, **options)
    write_data([{"prompt": "a", "number": 0}])
    with pytest.raises(ValueError, match="out was labelled with other data; choose another output_dir, or delete it"):
        label(given, "out", limit=1)


def test_a_finished_folder_needs_no_model(given, monkeypatch):
    whole = label(given, "out", limit=2)
    Path("out/train.jsonl").unlink()
    monkeypatch.setattr(run_module, "SAMPLERS", {})
    assert label(given, "out", limit=2) == whole


def test_the_limit_is_a_number_of_prompts_from_the_first(given):
    first = label(given, "three", limit=4)
    assert label(given, "all").startswith(first) and len(first.splitlines()) == 12
    assert label(given, "more", limit=100) == label(given, "all")


def test_another_seed_gives_other_answers(given):
    assert label(given, "a", limit=2) != label(given, "b", limit=2, seed=1)


# Data and models


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"question": "a"}], "has no column 'prompt'"),
        ([{"prompt": "a", "labels": [1]}], "The data set has a column 'labels', the name of a column that is written"),
        ([{"prompt": "a", "prompts": "a"}], "column 'prompts', the name under which the verifier is given more."),
        ([{"prompt": "a"}, {"prompt": None}], "Column 'prompt' must hold texts or conversations, got None in row 1"),
        ([{"prompt": "a"}, {"prompt": ""}], "The prompt of row 1 of the data set is no token. Remove the row."),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}],
            "The prompt of row 0 of the data set holds more than text. Remove the row.",
        ),
    ],
)
def test_data_that_cannot_be_labelled_are_refused(given, rows, sentence):
    write_data(rows)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        label(given, "out")
    assert not Path("out").exists()


def test_a_split_without_rows_is_refused(given, monkeypatch):
    whole = load_dataset("data", split="train")
    monkeypatch.setattr("trl_ext.trainers.places.load_dataset", lambda *args, **kwargs: whole.select([]))
    with pytest.raises(ValueError, match="data has no row in its split 'train'"):
        label(given, "out")


def test_a_prompt_that_leaves_no_room_is_refused(given, tmp_path):
    path = save_model(tmp_path / "short")
    config = json.loads(Path(path, "config.json").read_text())
    Path(path, "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    write_data([{"prompt": "ab"}, {"prompt": "abc"}])
    options = {**given, "model_name_or_path": path}
    with pytest.raises(
        ValueError, match=r"row 1 of the data set has 3 tokens, .*=10 is more than the 12 that the mod"
    ):
        label(options, "out")
    assert label(options, "out", limit=1)


def test_a_completer_with_another_vocabulary_is_refused(given, tmp_path):
    path = save_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"completer has another vocabulary than model; its rollouts would start fro"):
        label(given, "out", completer=path)


def test_an_adapter_is_read_with_its_base(given, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(given["model_name_or_path"])
    path = str(tmp_path / "adapter")
    lora = LoraConfig(r=4, lora_alpha=256, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(path)
    AutoTokenizer.from_pretrained(given["model_name_or_path"]).save_pretrained(path)
    ours = label({**given, "model_name_or_path": path}, "out", limit=2)
    assert len(ours.splitlines()) == 6 and ours != label(given, "base", limit=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", fake_vllm([]))
        with pytest.raises(ValueError, match="backend='vllm' reads no adapter folder"):
            label(given, "adapter_in_vllm", limit=2, completer=path, backend="vllm")  # no folder "vllm" to import


# vLLM, by a module that has the part of its interface that is used


def fake_vllm(calls):
    class SamplingParams(SimpleNamespace):
        pass

    class LLM:
        def __init__(self, **options):
            calls.append(options)

        def generate(self, prompts, sampling_params, use_tqdm):
            assert not use_tqdm
            calls.append([*zip(prompts, sampling_params, strict=True)])
            outputs = []
            for params in sampling_params:
                tokens = [3 if j % 3 else 4 + params.seed % 17 for j in range(params.max_tokens)]
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=(*tokens,))] * params.n))
            return outputs

    return SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams, __spec__=SimpleNamespace(name="vllm"))


def test_vllm_is_given_token_ids_budgets_and_seeds(given, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(calls))
    whole = label(given, "out", limit=2, backend="vllm", temperature=0.7, top_p=0.9, chunk_size=1)
    made, first, rolled, second, *_ = calls
    assert made["model"] == given["model_name_or_path"] and made["generation_config"] == "vllm"
    assert made["gpu_memory_utilization"] == 0.9
    [(prompt, params)] = first
    tokenizer = AutoTokenizer.from_pretrained(given["model_name_or_path"])
    assert prompt == {"prompt_token_ids": tokenizer(PROMPTS[0])["input_ids"]}
    assert (params.n, params.max_tokens, params.temperature, params.top_p) == (3, 10, 0.7, 0.9)
    assert params.stop_token_ids == [1] and params.detokenize is False
    for prompt, params in rolled:
        assert params.n == 6 and len(prompt["prompt_token_ids"]) + params.max_tokens == 2 + 10
    seeds = [params.seed for call in calls[1:] for _, params in call]
    assert len({*seeds}) == len(seeds) and second is not rolled
    assert label(given, "again", limit=2, backend="vllm", temperature=0.7, top_p=0.9, chunk_size=1) == whole
    with pytest.raises(ValueError, match="batch_size is read with backend='transformers' alone"):
        label(given, "batch", backend="vllm", batch_size=8)
