"""Small instruments around a call of TRL's: another value for its time, and what the model returned in it."""

import contextlib
from typing import Any


class FirstOutput:
    """Stands for `model` and keeps what its first call returned, with graph."""

    def __init__(self, model):
        self.model = model
        self.output: Any = None

    def __call__(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        self.output = output if self.output is None else self.output
        return output


@contextlib.contextmanager
def overridden(thing, **values):
    """`thing` with these attributes; afterwards with its own again."""
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)
