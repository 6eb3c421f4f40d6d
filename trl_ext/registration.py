"""Replaces TRL's public names: scripts that import `trl.GRPOTrainer` get the subclass with our options."""

import importlib
import importlib.abc
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Any

from .upstream import UpstreamChanged, check_parameters

# TRL's public name → our module with the subclass of that name. A new name needs this entry only.
_NAMES = {
    "DPOConfig": "trl_ext.trainers.dpo",
    "DPOTrainer": "trl_ext.trainers.dpo",
    "GRPOConfig": "trl_ext.trainers.grpo",
    "GRPOTrainer": "trl_ext.trainers.grpo",
    "KTOConfig": "trl_ext.trainers.kto",
    "KTOTrainer": "trl_ext.trainers.kto",
}
_TESTED = (1, 16)  # the minor version of TRL that the tests run with, as in constraints.txt
_LAZY_MODULES = ("trl", "trl.trainer")  # both offer the public names, and each keeps those that were asked for


def register() -> AbstractContextManager:
    """
    Replaces TRL's public config and trainer names by ours. Doing so again changes nothing.

    It loads nothing heavy: `trl` and `trl.trainer` find our class when a name is first asked for, and a trainer is
    replaced in the module that defines it when that module is imported. A config stays TRL's there, because pickled
    arguments refer to it by that path.

    Names that were imported from TRL earlier, and classes that were derived from them, stay TRL's; a warning lists
    them.

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
    if _registered() is not None:
        return undo
    for module in _LAZY_MODULES:
        importlib.import_module(module)
    _refuse_foreign_patches()
    _warn_of_newer_version()
    _warn_of_earlier_names()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    undo.callback(unregister)
    try:
        for module in _LAZY_MODULES:
            held = vars(sys.modules[module])
            finder.originals.update({(module, name): held.pop(name) for name in _NAMES if name in held})
            held["__getattr__"] = _our_class  # PEP 562: asked before TRL's own lazy lookup
        for name in filter(_is_trainer, _NAMES):
            if _defining_module(name) in sys.modules:
                _bind_trainer(name, finder)
    except BaseException:
        undo.close()
        raise
    return undo


def unregister() -> None:
    """Undoes [`register`]. Without it before, nothing changes."""
    finder = _registered()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    for module in _LAZY_MODULES:
        vars(sys.modules[module]).pop("__getattr__", None)
    for (module, name), original in finder.originals.items():
        held = vars(sys.modules[module])
        if module not in _LAZY_MODULES or name not in held:  # otherwise another package has set it since
            held[name] = original


def _registered() -> Any:
    """Our finder, if it is installed. Found by name, because `importlib.reload` of this module makes a new class."""
    ours = (f for f in sys.meta_path if (type(f).__module__, type(f).__qualname__) == (__name__, "_Finder"))
    return next(ours, None)


def _is_trainer(name: str) -> bool:
    return name.endswith("Trainer")


def _defining_module(name: str) -> str:
    """TRL's module that defines a public name: `trl.trainer.grpo_trainer` for `GRPOTrainer`."""
    return "trl.trainer." + re.sub("(Config|Trainer)$", r"_\1", name).lower()


def _our_module(name: str) -> ModuleType:
    """
    Our module with the subclass of that name. An `AttributeError` while it is loaded must not leave as one: Python
    would take it for the answer that there is no such name, and TRL's lookup would give TRL's class without a word.
    """
    try:
        return importlib.import_module(_NAMES[name])
    except AttributeError as error:
        raise UpstreamChanged(f"{_NAMES[name]} cannot be loaded ({error})") from error


def _our_class(name: str) -> Any:
    """`__getattr__` of `trl` and `trl.trainer` while registered."""
    if name not in _NAMES:
        raise AttributeError(name)
    is_loading = _NAMES[name] in sys.modules
    module = _our_module(name)
    if not hasattr(module, name) and not is_loading:
        raise UpstreamChanged(f"{_NAMES[name]} was loaded without {name}")
    return getattr(module, name)  # while it is loaded, what it imports gets TRL's class: an AttributeError leads there


def _bind_trainer(name: str, finder: "_Finder") -> None:
    """Puts our trainer in TRL's defining module, once both are loaded, for those who import it from there."""
    theirs, ours = importlib.import_module(_defining_module(name)), _our_module(name)
    if not hasattr(ours, name):
        return  # our module is importing TRL's now and needs the original; this runs again when it is loaded
    held = getattr(theirs, name)
    if held is not getattr(ours, name):
        check_parameters(held)
        finder.originals[_defining_module(name), name] = held
        setattr(theirs, name, getattr(ours, name))


class _Finder(importlib.abc.MetaPathFinder):
    """
    Binds our trainer whenever TRL's defining module or ours has been loaded; to find them is left to the other
    finders. It also holds what was replaced, so that whoever finds it in `sys.meta_path` can undo that.
    """

    def __init__(self):
        self.originals: dict[tuple[str, str], Any] = {}  # (module, name) → what stood there before

    def find_spec(self, fullname, path=None, target=None):
        names = [name for name in filter(_is_trainer, _NAMES) if fullname in (_defining_module(name), _NAMES[name])]
        if not names:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_bind(module):
                execute(module)
                for name in names:
                    _bind_trainer(name, self)

            spec.loader.exec_module = execute_and_bind  # type: ignore[method-assign]
        return spec


def _refuse_foreign_patches() -> None:
    for name in _NAMES:
        for module in (*_LAZY_MODULES, _defining_module(name)):
            held = getattr(sys.modules.get(module), "__dict__", {}).get(name)
            source = getattr(held, "__module__", None) or type(held).__module__
            if held is not None and source != _defining_module(name):
                raise RuntimeError(
                    f"{module}.{name} was replaced by {source} already; trl_ext cannot build on that. "
                    "Import and use only one of the two packages."
                )


def _warn_of_newer_version() -> None:
    import trl

    found = re.match(r"(\d+)\.(\d+)", trl.__version__)
    # One process of a run speaks for all.
    if found and tuple(map(int, found.groups())) > _TESTED and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"trl_ext was tested with TRL {'.'.join(map(str, _TESTED))}; this is TRL {trl.__version__}. Where TRL has "
            "changed, training stops with an error that says where; `trl-ext env --check` looks for it now.",
            stacklevel=3,
        )


def _warn_of_earlier_names() -> None:
    homes = ((name, sys.modules.get(_defining_module(name))) for name in _NAMES)
    originals = [getattr(home, name) for name, home in homes if home is not None]
    earlier = sorted({*_names_of(originals), *(f"{c.__module__}.{c.__qualname__}" for c in _subclasses(originals))})
    if earlier:
        warnings.warn(
            f"These names were imported from TRL before trl_ext.register() and stay TRL's: {', '.join(earlier)}. "
            "Register first, then import them and define subclasses.",
            stacklevel=3,
        )


def _names_of(originals: list[type]) -> Iterator[str]:
    """Where other people's modules hold one of these classes."""
    wanted = {id(original) for original in originals}
    seen: set[int] = set()
    for path, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", {})
        if _is_foreign(path) and id(names) not in seen:  # `datasets` gives the main module a second name
            seen.add(id(names))
            yield from (f"{path}.{name}" for name, value in list(names.items()) if id(value) in wanted)


def _subclasses(classes: list[type]) -> Iterator[type]:
    """Other people's classes below these, but not those below ours."""
    child: type
    for parent in classes:
        for child in type.__subclasses__(parent):
            if child.__module__.partition(".")[0] != "trl_ext":
                yield from [child] if _is_foreign(child.__module__) else []
                yield from _subclasses([child])


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] not in ("trl", "trl_ext")
