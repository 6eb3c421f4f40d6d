"""TRL's public names become ours: scripts that import `trl.GRPOTrainer` get the subclass with our options."""

import importlib
import importlib.abc
import os
import re
import sys
import warnings
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from .upstream import check_parameters

# TRL's public name → our module that defines a subclass of that name. Nothing else has to know about a new entry.
_NAMES = {
    "DPOConfig": "trl_ext.trainers.dpo",
    "DPOTrainer": "trl_ext.trainers.dpo",
    "GRPOConfig": "trl_ext.trainers.grpo",
    "GRPOTrainer": "trl_ext.trainers.grpo",
}
_TESTED = (1, 16)  # the minor version of TRL that the tests run with, as in constraints.txt
_PLACES = ("trl", "trl.trainer")  # two lazy modules, each with its own copy of a name
_originals: dict[tuple[str, str], Any] = {}  # (module, name) → what it held before


def register() -> AbstractContextManager:
    """
    Replaces TRL's public config and trainer names by ours. Doing so again changes nothing.

    It loads nothing heavy: `trl` and `trl.trainer` find our class when a name is first asked for, and a trainer is
    replaced in the module that defines it when that module is imported. A config stays TRL's there, because pickled
    arguments refer to it by that path.

    Names that were imported from TRL earlier stay TRL's; a warning lists them.

    Returns:
        `AbstractContextManager`: In a `with` statement, [`unregister`] runs at the end, unless the names were ours
        before.

    Raises:
        `RuntimeError`: If another package has replaced one of the names, or if TRL is not laid out as expected.

    Example:

    ```python
    with trl_ext.register():
        from trl import GRPOConfig, GRPOTrainer
    ```
    """
    undo = ExitStack()
    if _finder in sys.meta_path:
        return undo
    for place in _PLACES:
        importlib.import_module(place)
    _refuse_foreign_patches()
    _warn_of_newer_version()
    _warn_of_earlier_names()
    sys.meta_path.insert(0, _finder)
    undo.callback(unregister)
    try:
        for place in _PLACES:
            held = vars(sys.modules[place])
            _originals.update({(place, name): held.pop(name) for name in _NAMES if name in held})
            held["__getattr__"] = _our  # PEP 562: asked before TRL's own lazy lookup
        for name in filter(_is_trainer, _NAMES):
            if _home(name) in sys.modules:
                _bind(name)
    except BaseException:
        undo.close()
        raise
    return undo


def unregister() -> None:
    """Gives TRL's public names back to TRL. Without [`register`] before, it changes nothing."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for place in _PLACES:
        vars(sys.modules[place]).pop("__getattr__", None)
    for (place, name), original in _originals.items():
        held = vars(sys.modules[place])
        if place not in _PLACES or name not in held:  # otherwise another package has set it since
            held[name] = original
    _originals.clear()


def _is_trainer(name: str) -> bool:
    return name.endswith("Trainer")


def _home(name: str) -> str:
    """TRL's module that defines a name: `GRPOTrainer` lives in `trl.trainer.grpo_trainer`."""
    return "trl.trainer." + re.sub("(Config|Trainer)$", r"_\1", name).lower()


def _our(name: str) -> Any:
    """What `trl` and `trl.trainer` answer first when they hold no such name."""
    if name not in _NAMES:
        raise AttributeError(name)
    return getattr(importlib.import_module(_NAMES[name]), name)


def _bind(name: str) -> None:
    """Puts our trainer in TRL's defining module, once both are loaded, for those who import it from there."""
    theirs, ours = importlib.import_module(_home(name)), importlib.import_module(_NAMES[name])
    if not hasattr(ours, name):
        return  # our module is importing TRL's at this moment, and needs the original; its own end comes here again
    held = getattr(theirs, name)
    if held is not getattr(ours, name):
        check_parameters(held)
        _originals[_home(name), name] = held
        setattr(theirs, name, getattr(ours, name))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find TRL's defining modules and ours, and binds our trainer after either was executed."""

    def find_spec(self, fullname, path=None, target=None):
        names = [name for name in filter(_is_trainer, _NAMES) if fullname in (_home(name), _NAMES[name])]
        if not names:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_bind(module):
                execute(module)
                for name in names:
                    _bind(name)

            spec.loader.exec_module = execute_and_bind  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def _refuse_foreign_patches() -> None:
    for name in _NAMES:
        for place in (*_PLACES, _home(name)):
            held = getattr(sys.modules.get(place), "__dict__", {}).get(name)
            source = getattr(held, "__module__", None) or type(held).__module__
            if held is not None and source != _home(name):
                raise RuntimeError(
                    f"{place}.{name} was replaced by {source} already; trl_ext cannot build on that. "
                    "Import and use only one of the two packages."
                )


def _warn_of_newer_version() -> None:
    import trl

    found = re.match(r"(\d+)\.(\d+)", trl.__version__)
    # One process of a run speaks for all.
    if found and tuple(map(int, found.groups())) > _TESTED and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"trl_ext was tested with TRL {'.'.join(map(str, _TESTED))}; this is TRL {trl.__version__}. Where TRL has "
            "moved, training stops with an error that names the place; `trl-ext env --check` looks for it now.",
            stacklevel=3,
        )


def _warn_of_earlier_names() -> None:
    originals = {id(getattr(sys.modules[_home(name)], name)) for name in _NAMES if _home(name) in sys.modules}
    if not originals:
        return
    earlier = sorted(
        f"{place}.{name}"
        for place, module in list(sys.modules.items())
        if place.partition(".")[0] not in ("trl", "trl_ext")
        for name, value in list(getattr(module, "__dict__", {}).items())
        if id(value) in originals
    )
    if earlier:
        warnings.warn(
            f"These names were imported from TRL before trl_ext.register() and stay TRL's: {', '.join(earlier)}. "
            "Register first, then import them.",
            stacklevel=3,
        )
