"""Other people's subclasses of our configs and trainers, and our configs in other people's trainers: the helpers."""

import copy
import pickle
import re
import sys
from dataclasses import dataclass, field

import pytest
import trl
from transformers import Trainer
from trl.trainer.dpo_config import DPOConfig as TRLConfig

from trl_ext.trainers.foreign import (
    OnlyInOurTrainer,
    foreign_fields,
    option,
    options_set,
    our_fields,
    overriding_class,
    warn_of_foreign_fields,
    without_super,
)

CPU = {"bf16": False, "use_cpu": True, "report_to": "none"}


@dataclass
class Ours(OnlyInOurTrainer, TRLConfig):
    """Stands for a config of trl_ext."""

    estimator: str | None = field(default=None, metadata={"help": "an option"})
    scale: float = field(default=1.0, metadata={"help": "another"})

    __module__ = "trl_ext.trainers.test"


@dataclass
class Theirs(Ours):
    estimator: str = "grpo"


@dataclass
class Mixin:
    scale: float = 3.0


@dataclass
class Mixed(Mixin, Ours):
    pass


@dataclass
class MixedLast(Ours, Mixin):
    pass


@dataclass
class Grandchild(Theirs):
    estimator: str = "other"


@dataclass
class Deliberate(Ours):
    trl_ext_fields = ("estimator",)
    estimator: str | None = "k2"
    scale: float = 2.0


@dataclass
class Silent(Ours):
    other: int = 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Ours, {}),
        (Silent, {}),
        (TRLConfig, {}),
        (Theirs, {"estimator": Theirs}),
        (Grandchild, {"estimator": Grandchild}),
        (Mixed, {"scale": Mixin}),
        (MixedLast, {"scale": Mixin}),
        (Deliberate, {"scale": Deliberate}),
    ],
)
def test_a_field_that_another_class_declares_again_is_that_class_s(config, expected):
    assert foreign_fields(config("out", **CPU)) == expected


def test_an_option_that_is_somebody_elses_is_off():
    theirs, meant = Theirs("out", **CPU), Deliberate("out", **CPU)
    assert theirs.estimator == "grpo" and option(theirs, "estimator") is None
    assert option(Theirs("out", scale=2.0, **CPU), "scale") == 2.0
    assert (option(meant, "estimator"), option(meant, "scale")) == ("k2", 1.0)
    assert option(Ours("out", estimator="x", **CPU), "estimator") == "x"
    assert option(TRLConfig("out", **CPU), "estimator") is None
    assert our_fields(theirs) == {"estimator": None, "scale": 1.0} and our_fields(TRLConfig("out", **CPU)) == {}
    assert options_set(theirs) == {} and options_set(meant) == {"estimator": "k2"}


def test_one_warning_names_every_class_and_field():
    @dataclass
    class Both(Ours):
        estimator: str = "grpo"
        scale: float = 2.0

    config = Both("out", **CPU)
    with pytest.warns(UserWarning) as caught:
        warn_of_foreign_fields(config)
    (warning,) = caught
    assert "Both.estimator, Both.scale: declared by that class" in str(warning.message)
    assert "trl_ext_fields = ('estimator', 'scale')" in str(warning.message)


def test_the_deliberate_switch_refuses_a_name_that_is_no_option():
    @dataclass
    class Misspelt(Ours):
        trl_ext_fields = "estimater"

    with pytest.raises(ValueError, match=r"Misspelt.trl_ext_fields names 'estimater', which is no option of trl_ext"):
        foreign_fields(Misspelt("out", **CPU))


class Base:
    def loss(self):
        pass

    def other(self):
        pass


class Subclass(Base):
    def loss(self):
        pass


class SubSubclass(Subclass):
    pass


def test_the_class_that_overrides_a_method_is_found():
    assert overriding_class(SubSubclass(), Base, "loss") is Subclass
    assert overriding_class(SubSubclass(), Base, "other") is None
    assert overriding_class(Base(), Base, "loss") is None
    assert str(without_super(SubSubclass(), Base, "loss", "kl_estimator='k2'")) == (
        "test_foreign.Subclass overrides loss without calling that of Base, so that kl_estimator='k2' has no effect "
        "with it. Call super().loss(...) there and change its result, or remove the option."
    )

    class Further(Base):
        __module__ = "trl_ext.trainers.test"

        def loss(self):
            pass

    assert overriding_class(Further(), Base, "loss") is None, "ours is no stranger"


# A config of ours in a trainer that is not


class OtherTrainer(Trainer):
    """As much of a trainer as reads the config."""

    def __init__(self, args):
        args.get_process_log_level()


class OurTrainer(OtherTrainer):
    __module__ = "trl_ext.trainers.test"


class TheirTrainer(OurTrainer):
    pass


def same(config):
    return config


def parsed(config):
    given = [f"--{name}={getattr(config, name)}" for name in options_set(config)]
    args = ["--output_dir=out", "--bf16=False", "--use_cpu=True", "--report_to=none", *given]
    return trl.TrlParser((type(config),)).parse_args_into_dataclasses(args=args)[0]


WAYS = {"itself": same, "copied": copy.copy, "deep copied": copy.deepcopy, "parsed": parsed}
WAYS["pickled"] = lambda config: pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("way", WAYS)
def test_another_trainer_refuses_our_options_and_takes_our_config_without(monkeypatch, way):
    monkeypatch.setitem(sys.modules, "trl_ext.trainers.test", sys.modules[__name__])
    config = WAYS[way](Ours("out", scale=2.0, **CPU))
    sentence = "OtherTrainer does not know the options of trl_ext that are set (scale=2.0) and would ignore them."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        OtherTrainer(config)
    OurTrainer(config)
    TheirTrainer(config)
    OtherTrainer(WAYS[way](Ours("out", **CPU)))
    OtherTrainer(Theirs("out", **CPU))
    assert "scale" in config.to_dict() and isinstance(config.get_process_log_level(), int), "anybody else may ask"


def test_a_subclass_that_asks_for_the_log_level_itself_changes_nothing():
    @dataclass
    class Louder(Ours):
        def get_process_log_level(self):
            return super().get_process_log_level() + 1

    with pytest.raises(ValueError, match="would ignore them"):
        OtherTrainer(Louder("out", estimator="x", **CPU))
