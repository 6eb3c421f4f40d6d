"""The JSON schema of a command's YAML file, from the parser and the dataclasses that read it."""

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from enum import Enum
from typing import Any

from accelerate.commands.launch import launch_command_parser
from trl import TrlParser

from ..registration import register
from .commands import SAMPLING, TRAINING, script_of
from .parser import long_options
from .values import CHOICES, NAMES

_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array",
    type(None): "null",
}  # fmt: skip
_MAY_BE_ONE = ("callback_paths", "lora_target_modules", "loss_type", "report_to")  # a list, or its one entry
_TEXT, _NULL = {"type": "string"}, {"type": "null"}


def schema(command: str) -> dict[str, Any]:
    """
    The schema of the YAML file of `trl-ext command`: its options, those of `accelerate launch`, and no other key.
    Values in tables, which may be dotted paths as well, are given as examples, which editors offer.
    """
    with register():
        parser = script_of(command).make_parser(prog=f"trl {command}")
    return of_parser(parser, command)


def of_parser(parser: TrlParser, command: str) -> dict[str, Any]:
    """The same for the options of a parser."""
    properties: dict[str, dict] = {name: {} for name in long_options(launch_command_parser()) if name != "help"}
    properties |= {"accelerate_config": _TEXT, "env": {"type": "object"}}
    actions = {action.dest: action for action in parser._actions}
    for kind in parser.dataclass_types:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in actions:
                entry = _described(field, _entry(command, field, hints[field.name], actions[field.name].choices))
                properties[field.name] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"trl-ext {command}",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _entry(command: str, field: dataclasses.Field, hint: Any, choices: Iterable | None) -> dict[str, Any]:
    """What may stand at the key of an option."""
    also = [_NULL] if field.default is None else []
    allowed = CHOICES.get((command, field.name)) or (
        [choice.value if isinstance(choice, Enum) else choice for choice in choices] if choices else None
    )
    entry: dict[str, Any] = {"enum": allowed} if allowed else of_type(hint)
    parts = entry.get("anyOf", [entry])
    if field.name in _MAY_BE_ONE and any(part.get("type") == "array" for part in parts):
        also.append(_TEXT)
    if further := [other for other in also if entry and other not in parts]:
        entry = {"anyOf": [*parts, *further]}
    if names := NAMES.get((command, field.name)):
        entry["examples"] = names
    return entry


def _described(field: dataclasses.Field, entry: dict[str, Any]) -> dict[str, Any]:
    text = str(field.metadata.get("help") or "").replace("%(default)r", repr(field.default)).replace("%%", "%")
    described = {**({"description": text} if text else {}), **entry}
    default = field.default.value if isinstance(field.default, Enum) else field.default
    if isinstance(default, str | int | float | bool):
        described["default"] = default
    return described


def of_type(hint: Any) -> dict[str, Any]:
    """The schema of a type hint; an empty one, which allows everything, where it cannot be said."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [of_type(part) for part in inner]
        return {} if {} in parts else {"anyOf": parts}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if isinstance(origin, type) and issubclass(origin, Enum):
        return {"enum": [member.value for member in origin]}
    if origin in (list, tuple) and inner:
        return {"type": "array", "items": of_type(inner[0])}
    if origin is dict and len(inner) == 2:
        return {"type": "object", "additionalProperties": of_type(inner[1])}
    if dataclasses.is_dataclass(origin):
        hints = typing.get_type_hints(origin)
        keys = {field.name: of_type(hints[field.name]) for field in dataclasses.fields(origin)}
        return {"type": "object", "properties": keys, "additionalProperties": False}
    return {"type": _TYPES[origin]} if origin in _TYPES else {}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trl-ext schema",
        description="Print the JSON schema of the YAML file of a command. An editor that has a YAML language server "
        "completes and checks a file whose first line is `# yaml-language-server: $schema=grpo.schema.json`.",
    )
    parser.add_argument("command", choices=[*TRAINING, *SAMPLING], help="such as grpo > grpo.schema.json")
    print(json.dumps(schema(parser.parse_args(argv).command), indent=2, ensure_ascii=False))
    return 0
