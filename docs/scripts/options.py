"""
Write docs/options.md: every option of ours, from the dataclasses, and every row of the tables of methods.

    python docs/scripts/options.py
"""

import argparse
import dataclasses
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.cli.methods import first_line
from trl_ext.cli.values import CHOICES, NAMES
from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.preference import PREFERENCE_LOSSES
from trl_ext.labels import LabelStepsConfig
from trl_ext.labels.config import SamplingConfig
from trl_ext.papers import PAPERS
from trl_ext.rejection_sampling import RejectionSamplingConfig
from trl_ext.trainers.async_grpo import AsyncGRPOConfig
from trl_ext.trainers.dpo import DPOConfig
from trl_ext.trainers.foreign import is_ours
from trl_ext.trainers.grpo import GRPOConfig
from trl_ext.trainers.kto import KTOConfig
from trl_ext.trainers.ppo import PPOConfig
from trl_ext.trainers.prm import PRMConfig

PAGE = Path(__file__).parents[1] / "options.md"
CONFIGS: dict[str, type] = {
    "grpo": GRPOConfig, "ppo": PPOConfig, "async": AsyncGRPOConfig, "dpo": DPOConfig, "kto": KTOConfig,
    "prm": PRMConfig, "sampling": SamplingConfig, "label-steps": LabelStepsConfig,
    "rejection-sampling": RejectionSamplingConfig,
}  # fmt: skip
WITHOUT_COMMAND = ("async", "sampling")
# Commands that also take the options of another section.
EXTENDS = {"ppo": "grpo", "async": "grpo", "label-steps": "sampling", "rejection-sampling": "sampling"}
# A value of each option that says something only beside another one; set alone, the config says which.
SET_ALONE: dict[str, dict[str, Any]] = {
    "grpo": {
        "advantage_kwargs": {}, "reward_clip_range": [-1.0, 1.0], "kl_estimator": "k2", "kl_placement": "loss",
        "kl_target": 0.1, "kl_horizon": 100.0, "kl_target_unit": "token", "step_separator": ";", "process_weight": 0.5,
        "step_ends_function": "builtins.len", "outcome_weight": 0.5, "process_reward_model": {"model": "m"},
        "implicit_prm": {}, "skip_zero_advantages": True, "ref_refresh_steps": 10, "ref_refresh_kl": 0.1,
        "ref_refresh_alpha": 0.5, "ref_refresh_optimizer": True, "ref_total_kl": True, "policy_kl_stop": 0.1,
    },
    "dpo": {
        "psi": "identity", "chosen_reward_column": "c", "rejected_reward_column": "r",
        "reward_margin_scale": 2.0, "loss_kwargs": {"psipo_logit": {"eps": 0.1}}, "ref_refresh_kl": 0.1,
        "ref_refresh_alpha": 0.5, "ref_refresh_optimizer": True,
    },
    "kto": {"bco_momentum": 0.5},
}  # fmt: skip
HEAD = """\
# Options

Every option of trl_ext, with its type, its default and what it may be. Written by `python docs/scripts/options.py`
from the classes that read them; the same facts are in `trl-ext grpo --help` and, for an editor, in `trl-ext schema
grpo`. The options of TRL and transformers are in [TRL's documentation](https://huggingface.co/docs/trl). "Set alone"
is what is said where an option is set without the one that it needs.
"""
ESTIMATORS = """
## Advantage estimators

What `advantage_kwargs` takes with its default, what comes out, how many completions of a prompt are compared at least,
what becomes of rewards of steps, what else is needed, where the paper has the KL, and whether the asynchronous trainer
has it; from the rows of `ADVANTAGE_ESTIMATORS`. Formulas and traps are in [advantages](methods/advantages.md).

| name | what | `advantage_kwargs` | advantage per | completions | step rewards | needs | KL in the | async | paper |
|---|---|---|---|---|---|---|---|---|---|
"""
LOSSES = """
## Preference losses

What `loss_kwargs` takes with its default, and which columns and models a loss reads; from the rows of
`PREFERENCE_LOSSES`. Which one when is in [preference](methods/preference.md).

| `loss_type` | what | `loss_kwargs` | reads a probability | needs scores | reference | log-probs | paper |
|---|---|---|---|---|---|---|---|
"""


def our_fields(config: type) -> Iterator[dataclasses.Field]:
    """Those of a config that TRL's does not have, or that ours declares again."""
    declared = {name for base in config.__mro__ if is_ours(base) for name in inspect.get_annotations(base)}
    fields: list[dataclasses.Field] = list(getattr(config, "__dataclass_fields__", {}).values())
    yield from (field for field in fields if field.name in declared)


def type_of(hint: Any) -> str:
    """A type as a user thinks of it, without `None` and the text that stands for a mapping on a command line."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    mapping = next((kind for kind in kinds if (typing.get_origin(kind) or kind) is dict), None)
    if mapping is not None:
        return "mapping"
    return " or ".join(str(kind) if typing.get_args(kind) else kind.__name__ for kind in kinds)


def may_be(command: str, option: str) -> str:
    """The names that an option takes, where there is a list of them."""
    key = ("grpo" if command == "async" and option != "kl_placement" else command, option)
    names = ", ".join(f"`{name}`" for name in NAMES.get(key) or CHOICES.get(key, []))
    return f"{names}, a dotted path" if key in NAMES else names


def said_alone(command: str, option: str) -> str:
    """What the config says of an option that is set without any other; empty if it is content."""
    if option not in SET_ALONE.get(command, {}):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            CONFIGS[command]("outputs/none", bf16=False, report_to="none", **{option: SET_ALONE[command][option]})
        except ValueError as error:
            return str(error)
    return ""


def row_of(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n") for cell in cells) + " |\n"


def options_of(command: str) -> Iterator[str]:
    """The section of a command."""
    config = CONFIGS[command]
    yield f"\n## `{config.__name__}`" + ("\n" if command in WITHOUT_COMMAND else f", `trl-ext {command}`\n")
    seen = set()
    if extended := EXTENDS.get(command):
        seen = {field.name for field in our_fields(CONFIGS[extended])}
        yield f"\nThose of `{CONFIGS[extended].__name__}`, and:\n"
    yield "\n| option | what | type | default | may be | set alone |\n|---|---|---|---|---|---|\n"
    hints = typing.get_type_hints(config)
    for field in our_fields(config):
        if field.name not in seen or field.name in inspect.get_annotations(config):
            text = str(field.metadata.get("help", "")).replace("%(default)r", repr(field.default)).replace("%%", "%")
            default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            allowed = ", ".join(f"`{name}`" for name in field.metadata.get("choices", ())) or may_be(
                command, field.name
            )
            yield row_of(
                f"`{field.name}`",
                text,
                type_of(hints[field.name]),
                default,
                allowed,
                said_alone(command, field.name),
            )


def keywords(function: Callable, also: tuple[str, ...] = ()) -> str:
    """Keyword-only arguments that a user may set, with their defaults."""
    filled: set[str] = set()
    while isinstance(function, partial):
        filled, function = filled | {*function.keywords}, function.func
    parameters = inspect.signature(function).parameters.values()
    free = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in filled and p.name not in also]
    return ", ".join(f"`{p.name}: {p.default!r}`" for p in free)


def paper_of(row: Any) -> str:
    return f"[{PAPERS[row.paper].arxiv or PAPERS[row.paper].year}]({PAPERS[row.paper].url})" if row.paper else ""


def estimators() -> Iterator[str]:
    yield ESTIMATORS
    for name, row in ADVANTAGE_ESTIMATORS.items():
        least = str(row.completions()) if row.completions is not None else "2" if row.siblings else "1"
        needs = "a critic: `trl-ext ppo`" if row.values else "a greedy answer per prompt" if row.baseline else ""
        yield row_of(
            f"`{name}`",
            first_line(row.function),
            keywords(row.function, also=("process_weight", "outcome_weight")),
            "token" if row.per_token else "completion",
            least,
            row.steps,
            needs or ("fresh rollouts" if row.on_policy else ""),
            row.kl_placement or "",
            "yes" if row.within is not None else "no",
            paper_of(row),
        )


def losses() -> Iterator[str]:
    yield LOSSES
    for name, row in PREFERENCE_LOSSES.items():
        yield row_of(
            f"`{name}`",
            first_line(row.function),
            keywords(row.function, also=("psi",)),
            "yes" if row.prob else "no",
            "yes" if row.scores else "no",
            "yes" if row.reference else "none is loaded",
            "means" if row.per_token else "sums",
            paper_of(row),
        )


def page() -> str:
    """The whole page."""
    sections = [row for command in CONFIGS for row in options_of(command)]
    return "".join([HEAD, *sections, *estimators(), *losses()])


if __name__ == "__main__":
    argparse.ArgumentParser(description="Write docs/options.md.").parse_args()
    PAGE.write_text(page(), encoding="utf-8")
