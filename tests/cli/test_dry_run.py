"""`--dry_run`: what it shows, what it finds, and that it leaves nothing behind."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny import PROMPTS
from tiny.prm import base
from tiny.prm import rows as step_rows
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from trl_ext import cli
from trl_ext.cli.launch import _flags_without_values, number_of_processes
from trl_ext.cli.rehearsal import Rehearsal

MINE = """
import torch


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def of_answer(completions, answer, **kwargs):
    return [float(a == "1") for a in answer]


def one_number(completions, **kwargs):
    return 1.0


def steps(completions, completion_steps, **kwargs):
    return [[1.0] * len(steps) for steps in completion_steps]


def wrong_shape(batch):
    return torch.zeros(3, 3, 3)


class Talkative:
    def __init__(self):
        raise KeyError("no key")
"""


@pytest.fixture
def dry(folder, capsys, monkeypatch):
    """`dry(command, *words, **options)`: exit code, what is printed, the last line of the errors."""
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))
    (folder / "mine.py").write_text(MINE)

    def run(command, *words, **options):
        given = yaml.safe_load(Path("run.yaml").read_text()) | options
        Path("run.yaml").write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
        before = sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in str(path))
        code = cli.main([command, "--config", "run.yaml", "--dry_run", *words])
        after = sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in str(path))
        assert after == before, "it leaves nothing behind"
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]

    return run


def test_it_shows_the_run_and_trains_nothing(dry, tiny_model):
    code, shown, _ = dry("grpo", "--num_processes", "2", "--multi_gpu", num_generations=2,
                          gradient_accumulation_steps=2)  # fmt: skip
    assert code == 0
    lines = shown.splitlines()
    assert lines[0] == "Dry run of `trl-ext grpo`: nothing is trained, and nothing is saved."
    assert f"{len(PROMPTS)} rows; columns prompt" in shown and f"prompt: {PROMPTS[0]!r}" in shown
    assert "advantage_estimator='reinforce_plus_plus'" in shown and "kl_placement='reward'" in shown
    (prompt,) = re.findall(r"Prompt 1 .*\n +('.*')", shown)
    assert " ".join(PROMPTS[0]) in prompt, "as its tokenizer writes it"
    rewards = re.search(r"length: (.*)", shown)[1].split(", ")
    assert len(rewards) == 8 and all(float(reward) >= 0 for reward in rewards)
    assert len(re.search(r"Advantages +(.*)", shown)[1].split(", ")) == 8
    assert "16 completions per optimizer step = 4 per device × 2 processes × 2 accumulation steps" in shown
    assert "16 completions per generation batch = 8 prompts × 2 generations, used for 1 optimizer step" in shown
    assert lines[-1] == "Ready. Without --dry_run the same command trains, and writes to out."


def test_the_steps_are_cut_as_training_cuts_them(dry):
    code, shown, _ = dry("grpo", advantage_estimator="process_group_relative", reward_funcs=["mine.steps"],
                         advantage_kwargs=None, kl_placement=None, num_generations=4, step_separator="a")  # fmt: skip
    assert code == 0
    count, texts = re.search(r"Steps +(\d+), cut by step_separator 'a':\n +(.*)", shown).groups()
    answer = re.search(r"Answer 1 .*\n +('.*')", shown)[1]
    assert len(texts.split(" | ")) == int(count)
    assert all(text[1:-1] in answer for text in texts.split(" | "))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward_funcs": ["mine.nosuch"]}, "reward_funcs 'mine.nosuch' cannot be imported: module 'mine' has no"),
        (
            {"reward_funcs": ["mine.of_answer"]},
            "'of_answer' raised TypeError: of_answer() missing 1 required positional argument: 'answer'",
        ),
        ({"reward_funcs": ["mine.one_number"]}, "Reward function 'one_number' returned 1.0; it must return a list"),
        ({"advantage_estimator": "mine.wrong_shape", "advantage_kwargs": None}, "mine.wrong_shape"),
        (
            {"advantage_estimator": "process_group_relative", "advantage_kwargs": None, "kl_placement": None,
             "num_generations": 4},
            "process_group_relative",
        ),
        ({"callback_paths": ["mine.Talkative"]}, "KeyError: 'no key' ("),
        ({"dataset_train_split": "validation"}, "The data set has no split 'validation'; it has ['train']."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(dry, options, said):
    code, _, error = dry("grpo", **options)
    assert code == 2
    assert error.startswith("trl-ext: error: ") and said in error


def test_columns_are_looked_at(dry, folder):
    (folder / "data" / "train.jsonl").write_text(json.dumps({"question": "ab"}))
    assert dry("grpo")[::2] == (
        2,
        "trl-ext: error: train_dataset has no column 'prompt'; it has ['question']. Rename one: "
        "dataset.rename_column('question', 'prompt').",
    )
    (folder / "data" / "train.jsonl").write_text("")
    assert dry("grpo")[0] == 2


def test_pairs_are_shown_as_tokens_with_the_loss_before_training(dry, folder):
    rows = [{"prompt": p, "chosen": "ab", "rejected": "c"} for p in PROMPTS]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    none = dict.fromkeys(
        ["reward_funcs", "advantage_estimator", "advantage_kwargs", "kl_placement", "num_generations"]
    )
    code, shown, error = dry("dpo", max_completion_length=None, loss_type=["psipo_identity"], beta=0.1, **none)
    assert code == 0, error
    assert "loss_type=['psipo_identity']" in shown and "chosen_ids, " in shown
    assert "Loss        25, of the first micro-batch" in shown, "(0 - 1 / (2 * 0.1))²: policy and reference are one"
    code, shown, error = dry("dpo", pair_weight_column="weight")
    assert code == 2 and "'weight'" in error


def test_a_process_reward_model_too(dry, folder, tmp_path):
    step_rows(8).to_json(folder / "data" / "train.jsonl")
    none = dict.fromkeys(
        ["reward_funcs", "advantage_estimator", "advantage_kwargs", "kl_placement", "num_generations"]
    )
    model = base(tmp_path / "model", "token_classifier")
    code, shown, error = dry("prm", max_completion_length=None, beta=None, model_name_or_path=model, **none)
    assert code == 0, error
    assert "kind='token_classifier'" in shown and "Loss " in shown


def test_it_is_a_word_of_the_command_line_and_of_commands_that_train(folder, capsys):
    def refused(*words):
        assert cli.main([*words]) == 2
        return capsys.readouterr().err.strip().removeprefix("trl-ext: error: ")

    assert (
        refused("label-steps", "--dry_run") == "--dry_run is for commands that train, not for `trl-ext label-steps`."
    )
    assert refused("grpo", "--dry_run=true") == "--dry_run takes no value; write it, or leave it out."
    options = yaml.safe_load(Path("run.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump({**options, "dry_run": True}))
    expected = "dry_run is a word of the command line, --dry_run, and no key of a YAML file."
    assert refused("grpo", "--config", "run.yaml") == expected


class Trainer:
    """What the arithmetic reads."""

    class args:
        per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation = 4, 2, 4
        max_steps, num_train_epochs = -1, 3.0

    num_generations, num_iterations = 8, 2


@pytest.mark.parametrize(
    ("command", "rows", "max_steps", "last"),
    [
        # 4 * 3 * 4 = 48 completions, 6 prompts, 4 optimizer steps each: 100 rows are 16.67 batches
        ("grpo", 100, -1, "3 epochs of 100 prompts are about 200 optimizer steps"),
        ("grpo", 120, 40, "40 optimizer steps use 60 of 120 prompts: 0.5 epochs"),
        ("dpo", 240, 20, "20 optimizer steps use 480 of 240 rows: 2 epochs"),
    ],
)
def test_the_arithmetic_of_batches(monkeypatch, command, rows, max_steps, last):
    monkeypatch.setattr(Trainer.args, "max_steps", max_steps)
    rehearsal = Rehearsal(command, processes=3)
    rehearsal._rows = rows
    first, *_, course = rehearsal.batch(Trainer)
    noun = "completions" if command == "grpo" else "rows"
    assert first == f"24 {noun} per optimizer step = 4 per device × 3 processes × 2 accumulation steps"
    assert course == last


def test_a_batch_is_counted_over_the_processes_that_will_run(folder, capsys, monkeypatch):
    """Two processes of 4 hold a group of 8; one does not, and TRL's command line counts one."""
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    words = ["grpo", "--config", "run.yaml", "--num_generations", "8"]
    assert cli.main([*words, "--num_processes", "2", "--multi_gpu"]) == 0 and len(launched) == 1
    assert cli.main([*words, "--num_processes", "1"]) == 2
    assert "generation_batch_size (4) must be divisible by num_generations (8)" in capsys.readouterr().err
    Path("two.yaml").write_text(Path("run.yaml").read_text() + "num_processes: 2\nmulti_gpu: true\n")
    assert cli.main(["grpo", "--config", "two.yaml", "--num_generations", "8"]) == 0


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ([], 1),
        (["--num_processes", "3"], 1),  # so it is without a device and without `--multi_gpu`
        (["--cpu", "True", "--num_processes", "3"], 1),
        (["--multi_gpu", "True", "--num_processes", "2"], 2),
        (["--use_fsdp", "--num_processes", "2"], 2),
        (["--config_file", "five.yaml"], 5),
        (["--config_file", "five.yaml", "--num_processes", "4"], 4),
        (["--accelerate_config", "five.yaml"], 5),
        (["--accelerate_config", "single_gpu"], 1),
        (["--accelerate_config", "zero3"], 8),
        (["--accelerate_config", "fsdp2"], 8),
    ],
)
def test_the_processes_are_those_that_accelerate_starts(tmp_path, monkeypatch, words, number):
    from accelerate.commands import launch

    started = []
    for launcher in ("multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, launcher, lambda args: started.append(args.num_processes))
    monkeypatch.setattr(launch, "simple_launcher", lambda args: started.append(1))
    monkeypatch.chdir(tmp_path)
    Path("five.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 5\n")
    assert number_of_processes(words) == number
    words = [*_flags_without_values(resolve_accelerate_config_argument(words)), "script.py"]
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    assert started == [number]
