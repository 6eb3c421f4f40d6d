"""Options of the asynchronous trainer: shared with GRPO's, off by default, refused where they cannot be honoured."""

import dataclasses
import functools
import subprocess
import sys
import warnings

import pytest
from tiny.engine import build

from trl_ext.trainers.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl_ext.trainers.grpo import GRPOConfig
from trl_ext.trainers.shared_options import SharedOptions
from trl_ext.upstream import trl_class

TRL = trl_class(AsyncGRPOTrainer)
HERE = r"These are: 'group_relative', 'group_mean', 'leave_one_out'"


def config(**options):
    return AsyncGRPOConfig("out", bf16=False, use_cpu=True, report_to="none", **options)


def test_shared_options_are_declared_once_and_follow_trls():
    shared = [field.name for field in dataclasses.fields(SharedOptions)]
    for cls in (GRPOConfig, AsyncGRPOConfig):
        names, theirs = [field.name for field in dataclasses.fields(cls)], trl_class(cls).__dataclass_fields__
        assert names[: len(theirs)] == [*theirs] and names[len(theirs) :][: len(shared)] == shared
        once = {*shared} - ({"kl_placement"} if cls is AsyncGRPOConfig else set())  # which has fewer values there
        assert not once & {*cls.__annotations__} and not {*shared} & {*theirs}


def test_every_option_is_off_by_default():
    details = {"step_separator": "\n", "process_weight": 1.0, "outcome_weight": 1.0, "beta": 0.0}
    for field in dataclasses.fields(AsyncGRPOConfig):
        if field.name not in trl_class(AsyncGRPOConfig).__dataclass_fields__:
            assert field.default == details.get(field.name), field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage_estimator": "gae"}, "needs a critic"),
        ({"advantage_estimator": "leave_one_out", "num_generations": 1}, "needs num_generations >= 2, got 1"),
        ({"advantage_estimator": "leave_one_out", "advantage_kwargs": {"gamma": 1.0}}, "has no 'gamma'"),
        ({"advantage_kwargs": {"gamma": 1.0}}, "advantage_kwargs is read only with advantage_estimator"),
        ({"advantage_estimator": "leave_one_out", "reward_clip_range": [1.0, 0.0]}, "the lower one first"),
        (
            {"advantage_estimator": "reinforce_plus_plus", "advantage_kwargs": {"discount": "all"}},
            "counts the tokens of tools too, of which AsyncGRPOTrainer keeps none",
        ),
        ({"reward_weights": [1.0]}, "reward_weights is read only with advantage_estimator"),
        ({"advantage_estimator": "leave_one_out", "reward_weights": ["a"]}, "must be a list of numbers"),
        ({"beta": -0.1}, r"beta must be a finite number >= 0, got -0\.1"),
        ({"beta": float("nan")}, "beta must be a finite number"),
        ({"kl_estimator": "k3"}, "kl_estimator is read only with beta"),
        ({"kl_placement": "loss"}, "kl_placement is read only with beta"),
        ({"kl_target": 0.1}, "kl_target is read only with beta"),
        ({"beta": 0.1, "kl_horizon": 5.0}, "kl_horizon is read only with kl_target"),
        ({"beta": 0.1, "kl_placement": "sequence"}, "kl_placement must be 'loss' or 'reward' with Async.* 'sequence'"),
        ({"beta": 0.1, "kl_estimator": "exact"}, "reads logits, which AsyncGRPOTrainer does not keep"),
        ({"beta": 0.1, "kl_estimator": "k4"}, "kl_estimator 'k4' is neither one of"),
        ({"beta": 0.1, "kl_placement": "reward"}, "so advantage_estimator must be set"),
        (
            {"beta": 0.1, "kl_placement": "reward", "advantage_estimator": "leave_one_out"},
            "needs the KL of all completions of a prompt .* 'reinforce', 'reinforce_plus_plus'",
        ),
        (
            {"beta": 0.1, "kl_placement": "reward", "advantage_estimator": "process_group_relative"},
            "a KL penalty belongs to no step",
        ),
        (
            {"beta": 0.1, "kl_placement": "reward", "kl_estimator": "k3", "advantage_estimator": "reinforce"},
            "Only 'k1' is right in the reward",
        ),
        ({"beta": 0.1, "kl_target": -1.0}, "kl_target must be a positive number"),
        ({"step_separator": "a"}, "step_separator is read only with advantage_estimator"),
        ({"advantage_estimator": "leave_one_out", "process_weight": 2.0}, "process_weight is read only with"),
        (
            {
                "advantage_estimator": "process_group_relative",
                "process_reward_model": {"model": "none", "kind": "marker"},
            },
            "in a process without accelerator, where the model runs on the CPU. Say so with device: cpu",
        ),
        ({"callback_paths": ["nowhere.Callback"]}, "callback_paths 'nowhere.Callback' cannot be imported"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config(**options)


def test_a_row_that_says_nothing_is_refused_and_the_others_are_named(monkeypatch):
    from trl_ext.functional import advantages

    row = advantages.ADVANTAGE_ESTIMATORS["group_mean"]._replace(within=None)
    monkeypatch.setitem(advantages.ADVANTAGE_ESTIMATORS, "silent", row)
    with pytest.raises(ValueError, match=f"'silent' is not available with AsyncGRPOTrainer.*{HERE}"):
        config(advantage_estimator="silent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage_estimator": "length_weighted"}, "derived for exactly on-policy updates"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "several times the gradient variance"),
        ({"beta": 0.1, "advantage_estimator": "reinforce_plus_plus"}, "with kl_placement unset the KL is in the loss"),
    ],
)
def test_what_is_questionable_is_said(options, message):
    with pytest.warns(UserWarning, match=message):
        config(**options)


def test_a_process_reward_model_on_the_cpu_is_accepted():
    model = {"model": "none", "kind": "marker", "device": "cpu"}
    assert config(advantage_estimator="process_group_relative", process_reward_model=model).process_reward_model


class OtherWorker:
    rollout_buffer = metrics_queue = None


def first(a: str) -> str:
    """
    Gives it back.

    Args:
        a: Anything.
    """
    return a


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, "beta > 0 needs a peft_config: the reference is the policy without its adapter"),
        (
            {"advantage_estimator": "leave_one_out", "rollout_worker": OtherWorker()},
            "no effect with a rollout_worker of type OtherWorker, which computes advantages itself",
        ),
        (
            {"advantage_estimator": "leave_one_out", "rollout_worker": None, "reward_weights": [1.0]},
            "reward_weights has 1 entries for 0 reward functions",
        ),
        (
            {"advantage_estimator": "process_group_relative", "rollout_worker": None},
            "needs a reward function that returns one list per completion",
        ),
        (
            {"advantage_estimator": "reinforce", "advantage_kwargs": {"gamma": 0.9}, "tools": [first]},
            r"gamma=0.9 with tools or an environment: .* Use gamma=1.0, or max_tool_calling_iterations=0",
        ),
    ],
)
def test_what_the_trainers_arguments_do_not_allow_is_refused_before_a_model_loads(
    tmp_path, options, message, monkeypatch
):
    @functools.wraps(TRL.__init__)
    def made(*args, **kwargs):
        pytest.fail("TRL's trainer is made")

    monkeypatch.setattr(TRL, "__init__", made)
    monkeypatch.setattr("tiny.engine.tokenizer_of", lambda model: None)
    with pytest.raises(ValueError, match=message):
        build(AsyncGRPOTrainer, AsyncGRPOConfig, "no-model", tmp_path, **options)


def test_a_config_of_ours_in_trls_trainer_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"does not know the options of trl_ext.*Use the AsyncGRPOTrainer of trl_ext"):
        build(TRL, AsyncGRPOConfig, tiny_model, tmp_path, beta=0.1)


def test_nothing_of_it_is_imported_unless_asked_for():
    code = (
        "import sys, trl_ext; trl_ext.register(); from trl import GRPOConfig, GRPOTrainer; import trl_ext.upstream; "
        "found = [n for n in sys.modules if 'async' in n and n.startswith('trl')]; assert not found, found; "
        "assert 'AsyncGRPOTrainer' in dir(trl_ext)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
