"""`trl-ext schema`: recipes are right by it, and mistakes are not."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from trl import TrlParser

from trl_ext import cli
from trl_ext.cli.commands import SAMPLING, TRAINING
from trl_ext.cli.schema import of_parser, schema

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
sys.path.append(str(ROOT / "tests" / "project"))
from test_docs import command_of  # noqa: E402


@pytest.fixture(scope="module")
def schemas():
    """Of each command; `async` of the script of that recipe."""
    from recipes.async_grpo import RunArguments
    from trl_ext.trainers.async_grpo import AsyncGRPOConfig

    found = {command: schema(command) for command in (*TRAINING, *SAMPLING)}
    found["async"] = of_parser(TrlParser((RunArguments, AsyncGRPOConfig)), "async")
    for one in found.values():
        jsonschema.Draft202012Validator.check_schema(one)
    return found


def mistakes(schema, options):
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(options)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_right(schemas, path):
    assert mistakes(schemas[command_of(path)], yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("grpo", {"advantage_estimatr": "reinforce"}),
        ("grpo", {"advantage_estimator": 3}),
        ("grpo", {"kl_placement": "rewards"}),
        ("grpo", {"loss_type": "dapoo"}),
        ("grpo", {"beta": "small"}),
        ("grpo", {"reward_funcs": "mine.f"}),
        ("grpo", {"datasets": [{"pathh": "x"}]}),
        ("grpo", {"psi": "identity"}),
        ("ppo", {"advantage_estimator": "group_mean"}),
        ("dpo", {"reward_funcs": ["mine.f"]}),
        ("kto", {"loss_type": "sigmoid"}),
        ("prm", {"kind": "typo"}),
        ("label-steps", {"search": "some"}),
        ("sft", {"training_script": "x"}),
    ],
)
def test_a_mistake_is_found(schemas, command, options):
    assert len(mistakes(schemas[command], options)) == 1


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("grpo", {"multi_gpu": True, "num_processes": 2, "accelerate_config": "fsdp2", "env": {"A": "1"}}),
        ("grpo", {"advantage_estimator": "mine.f", "advantage_kwargs": {"limit": 1.0}, "callback_paths": "mine.C"}),
        ("grpo", {"advantage_kwargs": '{"gamma": 0.9}', "lora_target_modules": "all-linear"}),
        ("dpo", {"loss_type": "psipo_identity"}),
        ("dpo", {"loss_type": ["mine.loss", "sigmoid"], "datasets": [{"path": "x", "data_files": ["a", "b"]}]}),
    ],
)  # fmt: skip
def test_what_the_command_takes_is_right(schemas, command, options):
    assert mistakes(schemas[command], options) == []


def test_names_of_tables_are_examples_and_help_texts_descriptions(schemas):
    found = schemas["grpo"]["properties"]["advantage_estimator"]
    assert "reinforce_plus_plus" in found["examples"] and "gae" not in found["examples"]
    assert found["description"].startswith("How rewards become advantages")
    assert schemas["grpo"]["properties"]["step_separator"]["default"] == "\n"
    assert "'\\n'" in schemas["grpo"]["properties"]["step_separator"]["description"]


def test_the_command_prints_it(capsys):
    assert cli.main(["schema", "kto"]) == 0
    assert "bco_momentum" in json.loads(capsys.readouterr().out)["properties"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["schema", "nosuch"])
    assert stop.value.code == 2 and "invalid choice: 'nosuch'" in capsys.readouterr().err
