"""Finds the function that a name in a config stands for: an entry of a table, or a dotted path."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lookup(name: str, table: Mapping[str, Any], also: Collection[str] = (), option: str = "") -> Any:
    """
    The entry of `table` called `name`, or what the dotted path `name` leads to.

    Args:
        name (`str`):
            Name in the table, or a path such as `"my_package.my_function"`.
        table (`Mapping[str, Any]`):
            Names that need no path.
        also (`Collection[str]`, *optional*):
            Further names to mention in the error, which the caller resolves itself.
        option (`str`, *optional*):
            Option that the name is the value of, for the error.

    Raises:
        `ValueError`: If `name` is neither, or if the path cannot be imported or leads to nothing callable.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    if not _is_dotted_path(name):
        names = sorted([*table, *also])
        raise ValueError(
            f"{_of(option)}{name!r} is neither one of {names} nor a dotted path such as 'my_package.my_function'"
            f"{did_you_mean(name, names)}"
        )
    return import_path(name, option)


def did_you_mean(name: Any, names: Collection[str]) -> str:
    """The end of a sentence: which of `names` is the closest; a full stop if none is close."""
    plain = str(name).lower().replace("-", "_").replace("+", "_plus")
    closest = difflib.get_close_matches(plain, names, n=1)
    return f"; did you mean {closest[0]!r}?" if closest else "."


def import_path(path: str, option: str = "") -> Callable[..., Any]:
    """
    The callable at a dotted path, whose last part is an attribute of the module before it.

    The working directory is searched last, so that a path means the same in a script, on the command line and in every
    worker process. TRL does the same for reward functions. `option` is the option that the path is the value of, for
    the error.

    Raises:
        `ValueError`: If it is no dotted path, the module or the attribute does not exist, or is not callable.
    """
    if not _is_dotted_path(path):
        raise ValueError(f"{_of(option)}{path!r} is not a dotted path such as 'my_package.my_function'.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module was found; what it imports itself is missing
        raise ValueError(
            f"{_of(option)}{path!r} cannot be imported: there is no module {error.name!r}. Install it, or start the "
            "run from the folder that contains it."
        ) from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(
            f"{_of(option)}{path!r} cannot be imported: module {module_name!r} has no {attribute!r}"
            f"{did_you_mean(attribute, dir(module))}"
        ) from error
    if not callable(found):
        raise ValueError(f"{_of(option)}{path!r} is of type {type(found).__name__}, which cannot be called.")
    return found


def _of(option: str) -> str:
    return f"{option} " if option else ""


def _is_dotted_path(name: Any) -> bool:
    return isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))
