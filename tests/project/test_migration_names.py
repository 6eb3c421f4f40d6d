"""Options that docs/migration.md names exist, and take the values that it gives them."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from trl_ext.trainers.grpo import GRPOConfig
from trl_ext.trainers.ppo import PPOConfig

PAGE = (Path(__file__).parents[2] / "docs/migration.md").read_text()
NAMES = {field.name for config in (GRPOConfig, PPOConfig) for field in fields(config)}
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| [^-]", line)]
HERE = [cells[-1] if len(cells) == 4 else cells[1] for cells in ROWS if cells[-1] not in ("numbers", "here")]


@pytest.mark.parametrize("cell", sorted({*HERE}))
def test_the_options_exist_and_take_these_values(cell):
    words = [word for word in re.findall(r"`([^`]+)`", cell) if not word.startswith("trl-ext ")]
    assert words or "`trl-ext ppo`" in cell or cell == "not available"
    options = {}
    for word in words:
        name, _, value = word.partition(": ")
        assert name in NAMES, word
        if value and "low" not in value:
            options[name] = yaml.safe_load(value)
    if options and {*options} <= {field.name for field in fields(GRPOConfig)}:
        placed = {"advantage_estimator": "group_mean", "beta": 0.1} | options
        GRPOConfig("unused", use_cpu=True, bf16=False, **placed)


def test_the_defaults_that_the_page_gives():
    from trl import RLOOConfig

    defaults = [
        [config.__dataclass_fields__[name].default for name in ("num_generations", "beta")]
        for config in (RLOOConfig, GRPOConfig)
    ]
    assert defaults == [[2, 0.05], [8, 0.0]]
