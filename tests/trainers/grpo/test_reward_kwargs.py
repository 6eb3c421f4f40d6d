"""Reward functions that pass their arguments on, answers that no separator cuts, and a beta that ends at 0."""

import json
import pickle
import warnings

import pytest
from tiny import CHARACTERS, build, digits, logged
from transformers import TrainerCallback

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS = (GRPOTrainer, GRPOConfig)
NOT_DATA = ("trainer_state", "log_extra", "log_metric", "environments")  # TRL's own, which no format takes


def by_length(completions, completion_steps, **kwargs):
    return [[float(len(step)) for step in steps] for steps in completion_steps]


def scripted(prompts, trainer):
    """Each completion is `a b`: two steps if a blank separates them."""
    ids = [2 + CHARACTERS.index(c) for c in "a b"]
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [list(ids) for _ in prompts],
        "logprobs": [[0.0] * 3 for _ in prompts],
    }


@pytest.mark.parametrize("estimator", ["group_relative", "reinforce_plus_plus", "process_group_relative"])
def test_what_a_function_passes_on_can_be_written_and_sent(train, estimator):
    seen = []

    def passes_on(completions, **kwargs):
        data = {name: value for name, value in kwargs.items() if name not in NOT_DATA}
        assert pickle.loads(pickle.dumps(data)) == data
        seen.append(json.loads(json.dumps(data)))
        return digits(completions)

    functions = [passes_on, by_length] if estimator == "process_group_relative" else [passes_on]
    train(*OURS, reward_funcs=functions, advantage_estimator=estimator, rollout_func=scripted, max_steps=1)
    steps = "completion_steps" in seen[0]
    assert steps == (estimator == "process_group_relative"), "only where the estimator needs them"
    assert {"prompts", "completion_ids"} <= seen[0].keys()
    if steps:
        assert len(seen[0]["completion_steps"]) == len(seen[0]["completion_step_ends"]) == 4


@pytest.mark.parametrize(("separator", "cut"), [("#", False), (" ", True)])
def test_a_batch_without_any_separator_is_warned_of_once(train, separator, cut):
    options = {"advantage_estimator": "process_group_relative", "rollout_func": scripted, "max_steps": 2}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = train(*OURS, reward_funcs=by_length, step_separator=separator, **options)
    said = [str(w.message) for w in said if "is one step" in str(w.message)]
    assert len(said) == (not cut)
    assert logged(trainer, "process/steps_mean")[0] == [2.0 if cut else 1.0]
    if said:
        assert said[0].startswith(
            "Each of the 4 completions of a generation batch is one step: none has step_separator='#' between two "
            "pieces of text."
        )


def whole(token_ids, tokenizer):
    return []


def test_steps_that_a_function_ends_are_its_own_affair(train):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Each of the")
        train(
            *OURS,
            reward_funcs=by_length,
            advantage_estimator="process_group_relative",
            step_ends_function="test_reward_kwargs.whole",
            rollout_func=scripted,
            max_steps=1,
        )


@pytest.mark.parametrize("options", [{"kl_estimator": "exact"}, {"kl_placement": "reward"}], ids=str)
def test_a_callback_may_end_the_penalty(tiny_model, tmp_path, options):
    """TRL runs no reference while `beta` is 0, which a schedule of the user's may reach."""

    class Off(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.beta = 0.0

    options = {"advantage_estimator": "reinforce_plus_plus", "beta": 0.1, **options}
    trainer, off = build(*OURS, tiny_model, tmp_path, rollout_func=scripted, **options), Off()
    off.trainer = trainer
    trainer.add_callback(off)
    trainer.train()
    assert [("kl/k1" in entry) for entry in logged(trainer)] == [True, False, False]
