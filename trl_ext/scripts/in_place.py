"""Scripts of TRL that find a class of ours where they ask TRL for one of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import trl


@contextmanager
def in_place(**names: type) -> Iterator[None]:
    """TRL's public names as these classes; afterwards TRL's, or those that were registered, again."""
    held = vars(trl)
    before = {name: held[name] for name in names if name in held}
    held.update(names)
    try:
        yield
    finally:
        for name in names:
            del held[name]
        held.update(before)
