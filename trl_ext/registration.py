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
from typing import Any, NamedTuple

from .upstream import UpstreamChanged, check_parameters, trl_class

_TESTED = (1, 16)  # the minor version of TRL that the tests run with, as in constraints.txt
_LAZY_MODULES = ("trl", "trl.trainer")  # both offer the public names, and each keeps those that were asked for


class _Place(NamedTuple):
    """Of one public name of TRL's: our module with the subclass, TRL's that defines it, and those that offer it."""

    ours: str
    home: str
    offered: tuple[str, ...]  # the lazy modules, or a package that imports the name when it is imported


def _core(method: str, ours: str) -> dict[str, _Place]:
    """Config and trainer of a method in `trl.trainer`."""
    home = f"trl.trainer.{method.lower()}"
    return {f"{method}{kind}": _Place(ours, f"{home}_{kind.lower()}", _LAZY_MODULES) for kind in ("Config", "Trainer")}


def _experimental(method: str, package: str, ours: str) -> dict[str, _Place]:
    """Config and trainer of a method in a package of `trl.experimental`, whose modules have the package's name."""
    package, home = f"trl.experimental.{package}", f"trl.experimental.{package}.{package}"
    return {f"{method}{kind}": _Place(ours, f"{home}_{kind.lower()}", (package,)) for kind in ("Config", "Trainer")}


# TRL's public name → where it is. A new method needs one line.
_NAMES: dict[str, _Place] = {
    **_core("DPO", "trl_ext.trainers.dpo"),
    **_core("GRPO", "trl_ext.trainers.grpo"),
    **_core("KTO", "trl_ext.trainers.kto"),
    **_experimental("AsyncGRPO", "async_grpo", "trl_ext.trainers.async_grpo"),
}


def register() -> AbstractContextManager:
    """
    Replaces TRL's public config and trainer names by ours. Doing so again changes nothing.

    It loads nothing heavy: `trl` and `trl.trainer` find our class when a name is first asked for; a trainer is
    replaced in the module that defines it when that module is imported, an experimental name when its package is. A
    config stays TRL's in the module that defines it, because pickled arguments refer to it by that path.

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
            finder.originals.update({(module, name): held.pop(name) for name in _lazy_names() if name in held})
            held["__getattr__"] = _our_class  # PEP 562: asked before TRL's own lazy lookup
        for name in _NAMES:
            for module in _bound_in(name):
                if module in sys.modules:
                    _bind(name, module, finder)
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


def _lazy_names() -> list[str]:
    return [name for name, place in _NAMES.items() if place.offered == _LAZY_MODULES]


def _bound_in(name: str) -> list[str]:
    """The modules of TRL in which our class replaces what they hold, once they are loaded."""
    place = _NAMES[name]
    packages = [module for module in place.offered if module not in _LAZY_MODULES]
    return [*([place.home] if name.endswith("Trainer") else []), *packages]


def _our_module(name: str) -> ModuleType:
    """
    Our module with the subclass of that name. An `AttributeError` while it is loaded must not leave as one: Python
    would take it for the answer that there is no such name, and TRL's lookup would give TRL's class without a word.
    """
    try:
        return importlib.import_module(_NAMES[name].ours)
    except AttributeError as error:
        raise UpstreamChanged(f"{_NAMES[name].ours} cannot be loaded ({error})") from error


def _our_class(name: str) -> Any:
    """`__getattr__` of `trl` and `trl.trainer` while registered."""
    if name not in _lazy_names():
        raise AttributeError(name)
    is_loading = _NAMES[name].ours in sys.modules
    module = _our_module(name)
    if not hasattr(module, name) and not is_loading:
        raise UpstreamChanged(f"{_NAMES[name].ours} was loaded without {name}")
    return getattr(module, name)  # while it is loaded, what it imports gets TRL's class: an AttributeError leads there


def _bind(name: str, module: str, finder: "_Finder") -> None:
    """Puts our class in a module of TRL's, once both are loaded, for those who import it from there."""
    theirs, ours = importlib.import_module(module), _our_module(name)
    if not hasattr(ours, name) or not hasattr(theirs, name):
        return  # one is importing the other now, ours needs the original; this runs again when it is loaded
    held, original = getattr(theirs, name), trl_class(getattr(ours, name))
    if held is not getattr(ours, name):
        check_parameters(held)
        setattr(theirs, name, getattr(ours, name))
    finder.originals[module, name] = original  # a package may have imported ours from the home


class _Finder(importlib.abc.MetaPathFinder):
    """
    Binds our classes whenever TRL's module or ours has been loaded; to find them is left to the other finders. It also
    holds what was replaced, so that whoever finds it in `sys.meta_path` can undo that.
    """

    def __init__(self):
        self.originals: dict[tuple[str, str], Any] = {}  # (module, name) → what stood there before

    def find_spec(self, fullname, path=None, target=None):
        bound = [(name, module) for name in _NAMES for module in _bound_in(name)]
        due = [(name, module) for name, module in bound if fullname in (module, _NAMES[name].ours)]
        if not due:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_bind(module):
                execute(module)
                for name, place in due:
                    _bind(name, place, self)

            spec.loader.exec_module = execute_and_bind  # type: ignore[method-assign]
        return spec


def _refuse_foreign_patches() -> None:
    for name, place in _NAMES.items():
        for module in (*place.offered, place.home):
            held = getattr(sys.modules.get(module), "__dict__", {}).get(name)
            source = getattr(held, "__module__", None) or type(held).__module__
            if held is not None and source != place.home:
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
    homes = ((name, sys.modules.get(place.home)) for name, place in _NAMES.items())
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
