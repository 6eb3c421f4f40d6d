"""`register()`: which names become ours, when, and how they are given back."""

import importlib
import importlib.machinery
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
import trl
from datasets.fingerprint import Hasher
from tiny import build, scripted_rollout, train, weights
from trl.trainer import grpo_config, grpo_trainer, rloo_trainer

import trl_ext
from trl_ext import registration

ORIGINALS = grpo_trainer.GRPOTrainer, grpo_config.GRPOConfig


@pytest.fixture(autouse=True)
def quiet_and_undone():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="These names were imported from TRL before")  # this file's own
        yield
    trl_ext.unregister()
    for place in (trl, trl.trainer):
        assert (place.GRPOTrainer, place.GRPOConfig) == ORIGINALS
    assert (grpo_trainer.GRPOTrainer, grpo_config.GRPOConfig) == ORIGINALS


def test_registration_reaches_every_place_and_can_be_undone():
    assert trl.GRPOTrainer is ORIGINALS[0]  # resolved, so that TRL's lazy module holds it
    trl_ext.register()
    trl_ext.register()
    for place in (trl, trl.trainer):
        assert place.GRPOTrainer is trl_ext.GRPOTrainer
        assert place.GRPOConfig is trl_ext.GRPOConfig
        assert place.RLOOTrainer is rloo_trainer.RLOOTrainer
        with pytest.raises(AttributeError, match="has no attribute NoSuchTrainer"):
            _ = place.NoSuchTrainer
    assert grpo_trainer.GRPOTrainer is trl_ext.GRPOTrainer
    assert grpo_config.GRPOConfig is ORIGINALS[1], "a config stays TRL's where pickles look for it"
    trl_ext.unregister()
    trl_ext.unregister()


def test_as_a_context_manager_it_undoes_what_it_did_and_no_more():
    with trl_ext.register():
        assert trl.GRPOTrainer is trl_ext.GRPOTrainer
        with trl_ext.register():
            pass
        assert trl.GRPOTrainer is trl_ext.GRPOTrainer
    assert trl.GRPOTrainer is ORIGINALS[0]


def test_pickles_of_trl_do_not_change():
    def function(batch):
        return trl.GRPOConfig, grpo_trainer.GRPOTrainer.__name__

    args = trl.GRPOConfig("out", bf16=False, use_cpu=True)
    before = [pickle.dumps(trl), pickle.dumps(trl.trainer), Hasher.hash(function)]
    with trl_ext.register():
        assert [pickle.dumps(trl), pickle.dumps(trl.trainer), Hasher.hash(function)] == before
        assert type(pickle.loads(pickle.dumps(args))) is ORIGINALS[1]
        assert type(pickle.loads(pickle.dumps(trl.GRPOConfig("out", bf16=False)))) is trl_ext.GRPOConfig


def test_one_line_of_the_table_registers_a_name(monkeypatch):
    ours = types.ModuleType("ours_of_rloo")
    ours.RLOOTrainer = type("RLOOTrainer", (rloo_trainer.RLOOTrainer,), {})
    monkeypatch.setitem(sys.modules, "ours_of_rloo", ours)
    monkeypatch.setitem(registration._NAMES, "RLOOTrainer", registration._core("RLOO", "ours_of_rloo")["RLOOTrainer"])
    original = rloo_trainer.RLOOTrainer
    with trl_ext.register():
        assert trl.RLOOTrainer is trl.trainer.RLOOTrainer is rloo_trainer.RLOOTrainer is ours.RLOOTrainer
    assert trl.RLOOTrainer is trl.trainer.RLOOTrainer is rloo_trainer.RLOOTrainer is original


@pytest.mark.parametrize("name", registration._NAMES)
def test_each_name_of_the_table_is_a_subclass_of_trls(name):
    place = registration._NAMES[name]
    offered = [importlib.import_module(module) for module in place.offered]
    theirs = getattr(offered[0], name)
    assert theirs.__module__ == place.home
    with trl_ext.register():
        ours = getattr(offered[0], name)
        assert issubclass(ours, theirs) and ours is not theirs
        assert ours is getattr(importlib.import_module(place.ours), name) and ours.__name__ == name
        assert all(getattr(module, name) is ours for module in offered)
    assert all(getattr(module, name) is theirs for module in offered)


def test_names_imported_before_are_listed_in_a_warning(monkeypatch):
    early = types.ModuleType("user_module")
    early.Trainer, early.GRPOConfig = ORIGINALS
    monkeypatch.setitem(sys.modules, "user_module", early)
    with pytest.warns(UserWarning, match="before trl_ext.register") as caught:
        trl_ext.register()
    assert len(caught) == 1 and caught[0].filename == __file__
    text = str(caught[0].message)
    assert "user_module.GRPOConfig, user_module.Trainer" in text
    assert "trl.trainer" not in text and "trl_ext.trainers" not in text


def test_a_subclass_defined_before_is_listed_too(monkeypatch):
    class Early(ORIGINALS[0]):
        pass

    class Later(Early):
        pass

    class OfOurs(trl_ext.GRPOTrainer):
        pass

    with pytest.warns(UserWarning, match="before trl_ext.register") as caught:
        trl_ext.register()
    text = str(caught[0].message)
    assert "<locals>.Early" in text and "<locals>.Later" in text
    assert "OfOurs" not in text and "trl_ext.trainers" not in text


def test_a_module_with_two_names_is_listed_once(monkeypatch):
    early = types.ModuleType("user_module")
    early.GRPOConfig = ORIGINALS[1]
    monkeypatch.setitem(sys.modules, "user_module", early)
    monkeypatch.setitem(sys.modules, "the_same_module", early)
    with pytest.warns(UserWarning, match="before trl_ext.register") as caught:
        trl_ext.register()
    assert "user_module.GRPOConfig" in str(caught[0].message) and "the_same" not in str(caught[0].message)


@pytest.mark.parametrize("error", [AttributeError("type object '_DPOConfig' has no attribute '_VALID'"), None])
def test_our_module_that_cannot_be_loaded_is_an_error_and_not_trls_class(monkeypatch, error):
    class Finder:
        def find_spec(self, fullname, path=None, target=None):
            return importlib.machinery.ModuleSpec(fullname, self) if fullname == "broken_module_of_ours" else None

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            if error is not None:
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.setitem(
        registration._NAMES, "DPOConfig", registration._core("DPO", "broken_module_of_ours")["DPOConfig"]
    )
    with trl_ext.register(), pytest.raises(RuntimeError, match="broken_module_of_ours") as caught:
        _ = trl.DPOConfig
    assert caught.value.__cause__ is error and f"TRL {trl.__version__} is not laid out" in str(caught.value)
    sys.modules.pop("broken_module_of_ours", None)


def test_registration_can_be_reloaded_while_it_is_in_force():
    trl_ext.register()
    importlib.reload(registration)
    registration.register()
    assert trl.GRPOTrainer is trl_ext.GRPOTrainer and sum("_Finder" in repr(f) for f in sys.meta_path) == 1
    registration.unregister()
    assert trl.GRPOTrainer is ORIGINALS[0] and grpo_trainer.GRPOTrainer is ORIGINALS[0]


@pytest.mark.parametrize("place", [trl, trl.trainer, grpo_trainer])
def test_it_refuses_to_build_on_another_patch(monkeypatch, place):
    class Patched(ORIGINALS[0]):
        pass

    monkeypatch.setattr(place, "GRPOTrainer", Patched)
    with pytest.raises(
        RuntimeError, match=rf"{place.__name__}\.GRPOTrainer was replaced by test_registration already"
    ):
        trl_ext.register()
    monkeypatch.undo()
    trl_ext.register()  # nothing was left half done
    assert trl.GRPOTrainer is trl_ext.GRPOTrainer


@pytest.mark.parametrize(("version", "warned"), [("1.16.3", 0), ("1.17.0", 1), ("2.0.0.dev0", 1), ("unknown", 0)])
def test_a_newer_minor_version_of_trl_is_warned_about_once(monkeypatch, version, warned):
    monkeypatch.setattr(trl, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trl_ext.register()
        trl_ext.register()
    texts = [str(w.message) for w in caught if "was tested with" in str(w.message)]
    assert len(texts) == warned and all(f"tested with TRL 1.16; this is TRL {version}" in text for text in texts)


IN_A_NEW_PROCESS = """
import sys, time
start = time.monotonic()
import trl_ext
trl_ext.register()
assert "torch" not in sys.modules and "transformers" not in sys.modules, "register() is cheap"
assert time.monotonic() - start < 5

def forget():
    for name in [name for name in sys.modules if name.startswith("trl_ext.trainers.grpo")]:
        del sys.modules[name]
    sys.modules.pop("trl.trainer.grpo_trainer", None)

# An experimental trainer of TRL, then each way to the name, first of all imports.
from trl.experimental.gmpo import GMPOTrainer
from trl_ext.trainers import grpo as ours
import trl.trainer.grpo_trainer as home
assert home.GRPOTrainer is ours.GRPOTrainer and home.GRPOTrainer in GMPOTrainer.__mro__
originals = set()
for line in (
    "from trl.trainer.grpo_trainer import GRPOTrainer",
    "from trl_ext.trainers.grpo import GRPOTrainer",
    "from trl_ext import GRPOTrainer",
    "from trl import GRPOTrainer",
    "from trl.trainer import GRPOTrainer",
):
    forget()
    exec(line)
    home = sys.modules["trl.trainer.grpo_trainer"]
    assert home.GRPOTrainer is GRPOTrainer is sys.modules["trl_ext.trainers.grpo"].GRPOTrainer, line
    assert GRPOTrainer.__module__ == "trl_ext.trainers.grpo.trainer", line
    theirs = next(c for c in GRPOTrainer.__mro__ if not c.__module__.startswith("trl_ext."))
    assert theirs.__module__ == "trl.trainer.grpo_trainer", line
    assert theirs.__mro__[1].__module__ == "trl.trainer.base_trainer", line
    assert home.GRPOConfig.__module__ == "trl.trainer.grpo_config", line
trl_ext.unregister()
assert home.GRPOTrainer is theirs
forget()
import trl.trainer.grpo_trainer
assert trl.trainer.grpo_trainer.GRPOTrainer.__module__ == "trl.trainer.grpo_trainer"
"""


def test_registration_is_lazy_and_reaches_deep_imports_in_any_order():
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


EXPERIMENTAL = """
import sys
import trl_ext
trl_ext.register()
from trl import GRPOTrainer
assert not {"trl.experimental.async_grpo", "trl_ext.trainers.async_grpo"} & {*sys.modules}

def forget():
    for name in [name for name in sys.modules if name.startswith(("trl_ext.trainers.async_grpo", "trl.experimental"))]:
        del sys.modules[name]

originals = set()
for line in (
    "from trl.experimental.async_grpo import AsyncGRPOTrainer, AsyncGRPOConfig",
    "from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer",
    "from trl_ext import AsyncGRPOTrainer",
    "import trl.experimental.async_grpo.async_grpo_config; from trl_ext import AsyncGRPOTrainer",
):
    forget()
    exec(line)
    ours, package = sys.modules["trl_ext.trainers.async_grpo"], sys.modules["trl.experimental.async_grpo"]
    home, configs = package.async_grpo_trainer, package.async_grpo_config
    assert home.AsyncGRPOTrainer is package.AsyncGRPOTrainer is ours.AsyncGRPOTrainer is AsyncGRPOTrainer, line
    assert package.AsyncGRPOConfig is ours.AsyncGRPOConfig
    assert issubclass(ours.AsyncGRPOConfig, configs.AsyncGRPOConfig)
    assert configs.AsyncGRPOConfig.__module__ == "trl.experimental.async_grpo.async_grpo_config", line
    assert home.AsyncGRPOConfig is configs.AsyncGRPOConfig, line
theirs = next(c for c in AsyncGRPOTrainer.__mro__ if c.__module__.startswith("trl."))
trl_ext.unregister()
assert home.AsyncGRPOTrainer is package.AsyncGRPOTrainer is theirs
assert package.AsyncGRPOConfig is configs.AsyncGRPOConfig
trl_ext.register()  # the package has been imported
assert home.AsyncGRPOTrainer is package.AsyncGRPOTrainer is ours.AsyncGRPOTrainer
assert package.AsyncGRPOConfig is ours.AsyncGRPOConfig
"""


def test_an_experimental_name_is_bound_when_its_package_is_imported():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", EXPERIMENTAL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def gmpo():
    """TRL's experimental GMPO, imported anew: a subclass of the `GRPOTrainer` that it finds."""
    for name in [name for name in sys.modules if name.startswith("trl.experimental.gmpo")]:
        del sys.modules[name]
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    return GMPOTrainer, GMPOConfig


def test_an_experimental_subclass_trains_as_without_us(tiny_model, tmp_path):
    options = {"model": tiny_model, "output_dir": tmp_path, "rollout_func": scripted_rollout, "optim": "sgd"}
    expected = weights(train(*gmpo(), **options))
    with trl_ext.register():
        trainer_class, config_class = gmpo()
        assert issubclass(trainer_class, trl_ext.GRPOTrainer) and not issubclass(config_class, trl_ext.GRPOConfig)
        trainer = build(trainer_class, config_class, **options)
        trainer.train()
        with pytest.raises(TypeError, match="advantage_estimator"):
            config_class("out", advantage_estimator="reinforce")
    gmpo()
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, expected[name]), name
