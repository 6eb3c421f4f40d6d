"""
What other people's subclasses of our configs and trainers may do, and what is said where an option of ours would have
no effect.

* A field of ours that somebody else's config declares again is theirs: [`foreign_fields`], [`option`].
* A method of TRL's that somebody else's trainer overrides without `super()` is named: [`overriding_class`],
  [`Needed`].
* A config of ours in a trainer that is not ours is refused: [`OnlyInOurTrainer`].
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from ..upstream import UpstreamChanged


def is_ours(cls: type) -> bool:
    """Whether a class was written in trl_ext."""
    return cls.__module__.partition(".")[0] == "trl_ext"


def foreign_fields(config: Any) -> dict[str, type]:
    """
    Fields of ours that somebody else's class declares again, each with that class. They are not options of trl_ext.

    Somebody else's class is one among the ancestors of `type(config)` that our own config does not have: a subclass,
    or a class mixed in. A class that was written for trl_ext and only wants another default or type says so with the
    names of the fields that it means:

    ```python
    @dataclass
    class MyConfig(trl_ext.GRPOConfig):
        trl_ext_fields = ("advantage_estimator",)
        advantage_estimator: str | None = "reinforce_plus_plus"
    ```

    Args:
        config:
            Any config. One of TRL's has no fields of ours.

    Raises:
        `ValueError`: If `trl_ext_fields` holds a name that is no option of trl_ext.
    """
    ours = _our_class(config)
    if ours is None:
        return {}
    options, found = our_fields(config), {}
    others = [cls for cls in type(config).__mro__ if cls not in ours.__mro__]
    for cls in reversed(others):
        found.update({name: cls for name in inspect.get_annotations(cls) if name in options})
    for cls in others:
        meant = vars(cls).get("trl_ext_fields", ())
        for name in [meant] if isinstance(meant, str) else meant:
            if name not in options:
                raise ValueError(
                    f"{cls.__name__}.trl_ext_fields names {name!r}, which is no option of trl_ext; these are: "
                    f"{sorted(options)}."
                )
            found.pop(name, None)
    return found


def our_fields(config: Any) -> dict[str, Any]:
    """The fields that trl_ext adds to TRL's config, each with its default; none for a config that is not ours."""
    ours = _our_class(config)
    if ours is None:
        return {}
    theirs = next(cls for cls in ours.__mro__ if not is_ours(cls) and hasattr(cls, "__dataclass_fields__"))
    fields = ours.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: fields[name].default for name in fields if name not in theirs.__dataclass_fields__}


def option(config: Any, name: str) -> Any:
    """
    The value of our option `name`: its default where the field is somebody else's, `None` in a config that is not
    ours.
    """
    defaults = our_fields(config)
    if name not in defaults:
        return None
    return defaults[name] if name in foreign_fields(config) else getattr(config, name)


class Options:
    """
    A config as we read it: our options as [`option`] gives them, everything else as it is.

    Args:
        config:
            Any config, or none at all.
    """

    def __init__(self, config: Any):
        self._config, defaults = config, our_fields(config)
        self._theirs = {name: defaults[name] for name in foreign_fields(config)}

    def __getattr__(self, name: str) -> Any:
        return self._theirs[name] if name in self._theirs else getattr(self._config, name, None)


def options_set(config: Any) -> dict[str, Any]:
    """Our options that differ from their defaults, by name."""
    values = {name: option(config, name) for name in our_fields(config)}
    return {name: value for name, value in values.items() if value != our_fields(config)[name]}


def warn_of_foreign_fields(config: Any, stacklevel: int = 4) -> None:
    """One warning about all fields of ours that are somebody else's. For the `__post_init__` of our configs."""
    foreign = foreign_fields(config)
    if foreign:
        places = ", ".join(f"{cls.__name__}.{name}" for name, cls in foreign.items())
        warnings.warn(
            f"{places}: declared by that class, so it is read as that class's own field and the option of trl_ext of "
            "the same name is off. A class that means trl_ext's option lists it: "
            f"trl_ext_fields = {tuple(foreign)}.",
            stacklevel=stacklevel,
        )


def overriding_class(trainer: Any, base: type, method: str) -> type | None:
    """
    Somebody else's class that stands before the class that `base`, our trainer, extends, in the order of ancestors of
    `trainer`, and defines `method`; the first such. `None`: nobody overrides it.
    """
    mro, theirs = type(trainer).__mro__, next(cls for cls in base.__mro__ if not is_ours(cls))
    before = mro[: mro.index(theirs)] if theirs in mro else ()
    return next((cls for cls in before if method in vars(cls) and not is_ours(cls)), None)


def without_super(trainer: Any, base: type, method: str, option: str) -> ValueError:
    """The error to raise once it is seen that `base.method` did not run although `option` needs it."""
    cls = overriding_class(trainer, base, method) or type(trainer)
    return ValueError(
        f"{cls.__module__}.{cls.__qualname__} overrides {method} without calling that of {base.__name__}, so that "
        f"{option} has no effect with it. Call super().{method}(...) there and change its result, or remove the "
        "option."
    )


class Needed:
    """
    The methods of ours without which an option has no effect, until each has run once.

    Args:
        base (`type`):
            Our trainer class.
        ways (`dict[str, Sequence[str]]`):
            For each method the names on the way to it, itself first: a subclass may cut it off at any of them.
    """

    def __init__(self, base: type, ways: Mapping[str, Sequence[str]]):
        self._base, self._ways = base, ways
        self._options: dict[str, str] = {}

    def add(self, method: str, option: str) -> None:
        """`option`, in the words of a sentence, needs `method`."""
        self._options.setdefault(method, option)

    def has_run(self, method: str) -> None:
        """Called by the method itself."""
        self._options.pop(method, None)

    def check(self, trainer: Any, method: str, error: Exception | None = None) -> None:
        """
        Raises `ValueError` if `method` should have run by now and a subclass has kept it from running. After an
        `error` only for a whole override, which is what to tell the user first: a loss that takes one advantage per
        completion may have been given several. Otherwise it is somebody's bug before a call of `super()`.
        """
        if method not in self._options:
            return
        replaced = [n for n in self._ways[method] if n in vars(trainer) or overriding_class(trainer, self._base, n)]
        whole = [name for name in replaced if self._is_whole(trainer, method, name)]
        if found := whole if error else whole or replaced:
            raise without_super(trainer, self._base, found[0], self._options[method]) from error

    @contextmanager
    def after(self, trainer: Any) -> Iterator[None]:
        """Around a training step, in which all of them should run."""
        try:
            yield
        except Exception as error:
            for method in self._options:
                self.check(trainer, method, error)
            raise
        for method in self._options:
            self.check(trainer, method)
            raise UpstreamChanged(f"a training step does not call {method}")

    def _is_whole(self, trainer: Any, method: str, name: str) -> bool:
        """Whether an override mentions none of the names on the way, as `super().name(...)` or `self.method(...)`."""
        override = vars(overriding_class(trainer, self._base, name) or object).get(name)
        code = getattr(inspect.unwrap(override) if callable(override) else None, "__code__", None)
        return code is not None and not {*self._ways[method]} & {*code.co_names}


@contextmanager
def watching(trainer: Any, method: str, around: Callable) -> Iterator[None]:
    """
    Wherever `trainer.method(...)` is called inside the block, `around(method, ...)` is called in its place. The method
    is the outermost one, so that what a subclass does to a result is seen.
    """
    theirs, before = getattr(trainer, method), vars(trainer).get(method)
    setattr(trainer, method, functools.partial(around, theirs))
    try:
        yield
    finally:
        if before is None:
            delattr(trainer, method)
        else:
            setattr(trainer, method, before)


@dataclass(repr=False, eq=False)
class OnlyInOurTrainer:
    """
    Stands before TRL's config among the bases of ours: a trainer that is not ours would ignore our options, so it is
    refused if one is set.

    `Trainer.__init__` asks its arguments for `get_process_log_level()`; there we see which trainer is being made.
    Nothing is stored, so copies, pickles and dictionaries of the config are as before.
    """

    def options_for_our_trainer(self) -> dict[str, Any]:
        """Options that are set and no other trainer knows. A config with names of ours in TRL's fields adds them."""
        return options_set(self)

    def get_process_log_level(self):
        trainer = _trainer_being_made()
        if trainer is not None and not any(map(is_ours, type(trainer).__mro__)):
            options = self.options_for_our_trainer()
            if options:
                ours = _our_class(self)
                values = ", ".join(f"{name}={value!r}" for name, value in options.items())
                raise ValueError(
                    f"{type(trainer).__module__}.{type(trainer).__name__} does not know the options of trl_ext that "
                    f"are set ({values}) and would ignore them. Use the {ours and ours.__name__.replace('Config', '')}"
                    "Trainer of trl_ext or a subclass of it, or call trl_ext.register() before TRL's trainer is "
                    "imported, or remove the options."
                )
        return super().get_process_log_level()  # type: ignore[misc]


def _trainer_being_made() -> Trainer | None:
    """The trainer in whose `__init__` `get_process_log_level` was called; others may ask for the level too."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "get_process_log_level":  # of a subclass
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_name != "__init__":
        return None
    trainer = frame.f_locals.get("self")
    return trainer if isinstance(trainer, Trainer) else None


def _our_class(config: Any) -> type | None:
    """Our own config class among the ancestors: the first that has fields."""
    ours = (cls for cls in type(config).__mro__ if is_ours(cls) and "__dataclass_fields__" in vars(cls))
    return next(ours, None)
