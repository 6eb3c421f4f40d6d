"""Two processes that the modules of this folder share."""

import pytest
from launch import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two gloo processes that run one worker module after the other."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.end()
