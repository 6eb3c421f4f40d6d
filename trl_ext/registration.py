"""TRL's public names become ours: scripts that import `trl.GRPOTrainer` get the subclass with our options."""

import importlib
from typing import Any

_NAMES = {
    "DPOConfig": "trl_ext.trainers.dpo",
    "DPOTrainer": "trl_ext.trainers.dpo",
    "GRPOConfig": "trl_ext.trainers.grpo",
    "GRPOTrainer": "trl_ext.trainers.grpo",
}
_PLACES = ("trl", "trl.trainer")  # two lazy modules, each with its own copy of a name
_originals: dict[tuple[str, str], Any] = {}


def register() -> None:
    """
    Replaces TRL's public config and trainer names by ours, in `trl` and `trl.trainer`. Doing so again changes nothing.

    Names that a module imported from TRL earlier stay TRL's, so call it first.

    Raises:
        `RuntimeError`: If another package has replaced one of the names already.
    """
    if _originals:
        return
    originals = {(place, name): getattr(importlib.import_module(place), name) for place in _PLACES for name in _NAMES}
    for (place, name), original in originals.items():
        if not original.__module__.startswith("trl."):
            raise RuntimeError(
                f"{place}.{name} was replaced by {original.__module__} already; trl_ext cannot build on that. "
                "Import and use only one of the two packages."
            )
    _originals.update(originals)
    for place, name in originals:
        setattr(importlib.import_module(place), name, getattr(importlib.import_module(_NAMES[name]), name))


def unregister() -> None:
    """Gives TRL's public names back to TRL. Without [`register`] before, it changes nothing."""
    for (place, name), original in _originals.items():
        setattr(importlib.import_module(place), name, original)
    _originals.clear()
