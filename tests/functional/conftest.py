"""The mathematics needs torch alone: here nothing may import TRL or what TRL is built on."""

import sys

import pytest

FORBIDDEN = ("trl", "transformers", "accelerate", "datasets", "peft")


@pytest.fixture(autouse=True, scope="module")
def without_trl():
    with pytest.MonkeyPatch.context() as patch:
        for name in FORBIDDEN:
            patch.setitem(sys.modules, name, None)  # `import trl` is an ImportError
        yield
