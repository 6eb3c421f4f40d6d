"""Values of options as YAML and the shell write them: numbers that arrive as texts, mappings, booleans."""

import json
import os
import re
from typing import Any, get_args

import yaml

from .foreign import foreign_fields, our_fields

# YAML 1.1 reads a number as text unless it has a point and a sign: `1e-3`, `1.5e3`.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_as_meant(config: Any) -> None:
    """
    Puts in place what our options mean that were written in YAML or in a shell, before TRL's config reads them.

    A mapping may be written in the flow style of YAML, as `{weighting: sequence}`, and numbers in mappings as `1e-3`.
    `resume_from_checkpoint` may be `true` or `last` from a shell, unless there is a folder of that name.

    Raises:
        `ValueError`: If a text that begins with a brace is no mapping, or an option that is no switch is a boolean.
    """
    foreign, fields = foreign_fields(config), type(config).__dataclass_fields__
    switches = [name for name, field in fields.items() if bool in get_args(field.type)]
    for name, default in our_fields(config).items():
        value = getattr(config, name)
        if name in foreign:
            continue
        if isinstance(value, bool) and not isinstance(default, bool) and name not in switches:
            raise ValueError(
                f"{name} is no switch, got {value}. For its default leave it out, or write null. (YAML reads yes, no, "
                "on and off as booleans; a text in quotes is a text.)"
            )
        if name in config._VALID_DICT_FIELDS:
            setattr(config, name, with_numbers(mapping(name, value)))
    resume = config.resume_from_checkpoint
    if wants_last(resume):
        config.resume_from_checkpoint = True
    elif isinstance(resume, str) and resume.lower() == "false" and not os.path.isdir(resume):
        config.resume_from_checkpoint = None


def wants_last(resume: Any) -> bool:
    """Whether a value of `resume_from_checkpoint` means the last checkpoint, as no folder is called so."""
    return resume is True or (
        isinstance(resume, str) and resume.lower() in ("true", "last") and not os.path.isdir(resume)
    )


def mapping(name: str, value: Any) -> Any:
    """`value`, or what a text that begins with a brace means in YAML. JSON is left to TRL's config, which reads it."""
    if not isinstance(value, str) or not value.strip().startswith("{"):
        return value
    try:
        json.loads(value)
        return value
    except ValueError:
        pass
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{name} cannot be read as a mapping, got {value!r}. Write '{{option: value}}' or "
            '\'{"option": "value"}\', in quotes on a command line.'
        ) from error


def with_numbers(value: Any) -> Any:
    """`value` with the numbers that YAML left as texts, such as `1e-3`, everywhere inside."""
    if isinstance(value, dict):
        return {key: with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
