import gc
import os
import signal
import sys
import tempfile
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network, no telemetry
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores
if not any("tests/gpu" in argument for argument in sys.argv):
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from theorems import pytest_addoption, pytest_configure, pytest_runtest_call  # noqa: F401  hooks

_TESTS = Path(__file__).parent
# For the processes that tests start: the package under test, the recipes and the helpers.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_TESTS.parent), str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a tiny saved model with its tokenizer."""
    from tiny import save_model

    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def train(tiny_model, tmp_path):
    """`train(trainer_class, config_class, **options)`: a trainer that has trained the tiny model."""
    from functools import partial

    from tiny import train

    return partial(train, model=tiny_model, output_dir=tmp_path / "out")


@pytest.fixture(autouse=True)
def the_users_modules_go():
    """Another test's user has other functions in a file of the same name."""
    loaded = len(sys.modules)
    yield
    for name, module in list(islice(sys.modules.items(), loaded, None)):
        if str(getattr(module, "__file__", None)).startswith(tempfile.gettempdir()):
            del sys.modules[name]


def pytest_collection_finish():
    """Each run of a trainer ends with `gc.collect()`, most of whose time would go to the modules imported by now."""
    gc.freeze()
