"""Data in a file, places that do not exist, and the last checkpoint, in every command."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from tiny import PROMPTS
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, ScriptArguments

from trl_ext import cli
from trl_ext.labels.run import read_rows
from trl_ext.scripts.as_meant import as_meant
from trl_ext.trainers.places import builder_of, load_rows


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Rows in a file of each format, in the working directory."""
    data = Dataset.from_dict({"prompt": PROMPTS})
    data.to_json("rows.jsonl" if monkeypatch.chdir(tmp_path) else tmp_path / "rows.jsonl")
    data.to_csv(tmp_path / "rows.csv")
    data.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": p} for p in PROMPTS]))
    return data


def read(script, mixture):
    """The data as TRL's scripts open them."""
    from trl import get_dataset

    as_meant((script, mixture))
    assert script.dataset_name is None
    return get_dataset(mixture)["train"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "./rows.jsonl"])
def test_a_file_is_the_data_set(rows, name):
    expected = rows.to_list()
    assert read(ScriptArguments(dataset_name=name), DatasetMixtureConfig()).to_list() == expected
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path=name), DatasetConfig(path=name)])
    assert read(ScriptArguments(), mixture).to_list() == expected * 2
    assert load_rows(name, None, "train").to_list() == expected
    streamed = read(ScriptArguments(dataset_name=name, dataset_streaming=True), DatasetMixtureConfig())
    assert not hasattr(streamed, "__len__") and [*streamed] == expected


def test_what_is_no_file_is_left_to_trl(rows, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("trl-lib/tldr", "folder", "gsm8k"):
        script, mixture = ScriptArguments(dataset_name=name), DatasetMixtureConfig()
        as_meant((script, mixture))
        assert script.dataset_name == name and mixture.datasets == []
    files = DatasetConfig(path="rows.jsonl", data_files="rows.jsonl")
    mixture = DatasetMixtureConfig(datasets=[files])
    as_meant((ScriptArguments(), mixture))
    assert mixture.datasets == [files] and builder_of(None) is None


@pytest.fixture
def no_network(monkeypatch):
    """Any look at the hub is a failure."""
    for name in ("huggingface_hub.hf_api.HfApi.dataset_info", "huggingface_hub.hf_api.HfApi.repo_info",
                 "socket.socket.connect"):  # fmt: skip
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("the network was touched"))


@pytest.fixture
def refused(folder, capsys, monkeypatch, no_network):
    """`refused(command, **options)`: the one sentence with which it ends before a worker starts."""
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))

    def sentence(command, **options):
        given = yaml.safe_load(Path("run.yaml").read_text()) if command == "grpo" else {"bf16": False}
        Path("now.yaml").write_text(yaml.safe_dump(given | options))
        assert cli.main([command, "--config", "now.yaml"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line.removeprefix("trl-ext: error: ")

    return sentence


@pytest.mark.parametrize("command", ["grpo", "ppo", "dpo", "kto", "prm", "sft", "reward"])
def test_a_file_that_does_not_exist_is_one_sentence_in_every_command(refused, command):
    said = refused(command, dataset_name="nosuch.jsonl", reward_funcs=None) if command in ("grpo",) else refused(
        command, dataset_name="nosuch.jsonl"
    )  # fmt: skip
    assert said == f"dataset_name: there is no file 'nosuch.jsonl'; a path starts at {Path.cwd()}."


def test_places_that_do_not_exist_are_said_with_the_closest(refused, folder):
    expected = "dataset_name: there is no file 'data/trian.jsonl'; did you mean 'data/train.jsonl'?"
    assert refused("grpo", dataset_name="data/trian.jsonl") == expected
    said = refused("grpo", datasets=[{"path": "data/trian.jsonl"}], dataset_name=None)
    assert said == expected.replace("dataset_name", "datasets")
    assert refused("grpo", dataset_name="./dat") == "dataset_name: there is no folder './dat'; did you mean 'data'?"
    said = refused("grpo", model_name_or_path="out/a/model")
    assert said == f"model_name_or_path: there is no folder 'out/a/model'; a path starts at {folder}."


def test_what_says_nothing_of_a_file_is_refused(refused):
    file = "data/train.jsonl"
    said = refused("grpo", dataset_name=file, dataset_train_split="test")
    assert said == (
        f"dataset_train_split='test' is not read with a file, {file!r}, whose rows are one split 'train'. Remove it."
    )
    assert refused("grpo", dataset_name=file, dataset_config="main").startswith("dataset_config='main' is not read")
    said = refused("grpo", dataset_name=file, eval_strategy="epoch", per_device_eval_batch_size=4)
    assert said.startswith(f"eval_strategy='epoch' needs rows of its own, which the file {file!r} does not have. Set ")


def test_commands_that_sample_read_files_too(rows, tmp_path):
    class Config:
        dataset_name, dataset_config, dataset_train_split, limit = "rows.jsonl", None, "train", 2

    assert [row["prompt"] for row in read_rows(Config)] == PROMPTS[:2]
    Config.dataset_name = "nosuch.jsonl"
    with pytest.raises(ValueError, match=r"there is no file 'nosuch.jsonl'; did you mean 'rows.jsonl'\?"):
        read_rows(Config)


# The last checkpoint


@pytest.mark.parametrize("command", ["grpo", "dpo", "sft"])
@pytest.mark.parametrize("written", [True, "true", "last"])
def test_without_a_checkpoint_there_is_nothing_to_go_on_from(refused, command, written):
    said = refused(command, resume_from_checkpoint=written, output_dir="out", dataset_name="data")
    assert said == (
        "There is no checkpoint in 'out' to go on from. Start without resume_from_checkpoint; a run saves one every "
        "save_steps steps."
    )


@pytest.mark.parametrize("written", ["true", "last", "True"])
def test_the_last_whole_checkpoint_is_meant(folder, monkeypatch, written):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    for step in (2, 10, 12):
        (folder / f"out/checkpoint-{step}").mkdir(parents=True)
    for step in (2, 10):
        (folder / f"out/checkpoint-{step}" / "trainer_state.json").write_text("{}")
    from trl_ext.trainers.grpo import GRPOConfig

    config = GRPOConfig("out", bf16=False, resume_from_checkpoint=written)
    assert config.resume_from_checkpoint is True
    as_meant((config,))
    assert config.resume_from_checkpoint == "out/checkpoint-10"
    assert cli.main(["grpo", "--config", "run.yaml", "--resume_from_checkpoint", written]) == 0 and launched


def test_a_folder_that_does_not_exist_is_no_checkpoint(refused):
    said = refused("grpo", resume_from_checkpoint="out/checkpoint-7")
    assert said == (
        "resume_from_checkpoint: there is no folder 'out/checkpoint-7'. Write 'last' for the last checkpoint of 'out'."
    )
