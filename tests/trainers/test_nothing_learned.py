"""Runs that learn nothing are told so once, with the name of the function or option; runs that learn are not."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import build, digits, weights
from transformers import TrainerControl, TrainerState

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.nothing_learned import NothingLearned

OURS = GRPOTrainer, GRPOConfig
CONFIG = {
    "generation_batch_size": 64,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "gradient_accumulation_steps": 1,
    "reward_weights": None,
    "advantage_estimator": None,
    "max_completion_length": 32,
    "mask_truncated_completions": False,
    "learning_rate": 1e-5,
    "beta": 0.04,
}


def healthy(step, **others):
    """An entry of a run that learns, as TRL logs it."""
    return {
        "step": step, "reward": 0.3 + step / 100, "rewards/f/mean": 0.3 + step / 100, "rewards/f/std": 0.4,
        "reward_std": 0.4, "frac_reward_zero_std": 0.25, "completions/clipped_ratio": 0.1, "kl": 1e-4 * step,
        "learning_rate": 1e-5, **others,
    }  # fmt: skip


def constant(step, value=1.0, **others):
    """An entry of a run whose function `f` returns one number."""
    rewards = {"reward": value, "rewards/f/mean": value, "rewards/f/std": 0.0, "frac_reward_zero_std": 1.0}
    return healthy(step, **rewards, reward_std=0.0, kl=None) | others


def told(entries, main=True, history=(), **config):
    """The warnings about a run that logs these entries, each with the step at which it comes."""
    callback, args = NothingLearned(), SimpleNamespace(**{**CONFIG, **config})
    state = TrainerState(is_world_process_zero=main, log_history=list(history))
    state.global_step = history[-1]["step"] if history else 0
    callback.on_train_begin(args, state, TrainerControl())
    found = []
    for entry in entries:
        state.global_step = entry["step"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback.on_log(args, state, TrainerControl(), logs=entry)
        found += [(entry["step"], str(warning.message)) for warning in caught]
    return found


def run(entry, steps=range(1, 200), **others):
    return [entry(step, **others) for step in steps]


def test_a_healthy_run_is_told_nothing():
    assert told(run(healthy)) == []


# Rewards


def test_a_constant_reward_is_told_once_with_the_name_of_the_function():
    ((step, sentence),) = told(run(constant))
    assert step == 10
    assert sentence.startswith(
        "Reward function 'f' returned 1.0 for all 640 completions of the first 10 steps: nothing to learn."
    )


def test_the_entries_of_ten_steps_each_are_evidence_as_those_of_one():
    assert [step for step, _ in told(run(constant, range(10, 100, 10)))] == [10]
    assert [step for step, _ in told(run(constant, range(4, 100, 4)))] == [12]


def test_few_completions_are_no_evidence():
    assert [step for step, _ in told(run(constant), generation_batch_size=8)] == [32]
    assert [step for step, _ in told(run(constant), generation_batch_size=8, num_iterations=2)] == [63]
    assert told(run(constant, range(1, 10))) == []


def test_a_solved_task_is_no_fault():
    assert told([healthy(1), *run(constant, range(2, 100))]) == []


def test_a_number_that_rounding_scatters_is_one_number():
    scattered = {"rewards/f/mean": 0.1, "rewards/f/std": 7e-9}
    assert "'f' returned 0.1 for" in told(run(constant, value=0.1, **scattered))[0][1]


def test_a_constant_function_among_others_is_no_fault_unless_the_others_weigh_nothing():
    others = {"rewards/g/mean": 0.4, "rewards/g/std": 0.3, "reward_std": 0.3, "frac_reward_zero_std": 0.1}
    assert told(run(constant, **others)) == []
    ((_, sentence),) = told(run(constant, **others), reward_weights=[1.0, 0.0])
    assert sentence.startswith("Reward function 'f' returned 1.0 for")
    both = {"rewards/g/mean": 0.0, "rewards/g/std": 0.0}
    ((_, sentence),) = told(run(constant, **both))
    assert sentence.startswith("Reward functions 'f', 'g' returned 1.0 and 0.0 for")


def test_a_number_that_moves_from_step_to_step_is_not_called_constant():
    found = told([constant(step, value=step / 200) for step in range(1, 100)])
    assert [sentence[:14] for _, sentence in found] == ["All advantages"], "within a step there is nothing to learn"


def test_functions_that_score_nothing_are_left_to_trl():
    nothing = {"reward": None, "rewards/f/mean": None, "rewards/f/std": None, "frac_reward_zero_std": None}
    assert told(run(constant, **nothing)) == told(run(constant, reward=math.nan, frac_reward_zero_std=None)) == []
    assert told([{"step": step, "reward": 1.0, "frac_reward_zero_std": 0.5} for step in range(1, 50)]) == []
    late = [*run(constant, range(1, 5), **nothing), *run(constant, range(5, 30))]
    assert [step for step, _ in told(late)] == [14], "counted from where something was scored"


def test_steps_may_differ_where_their_mean_does_not():
    assert told(run(constant, **{"process/frac_groups_zero_std": 0.5, "frac_reward_zero_std": 0.5})) == []
    assert len(told(run(constant, **{"process/frac_groups_zero_std": 1.0}))) == 1


def test_a_penalty_for_cut_off_completions_is_something_to_learn():
    varies = {"frac_reward_zero_std": 0.5}
    assert told(run(constant, **varies), missing_eos_penalty=1.0) == []
    assert len(told(run(constant, **varies, **{"completions/clipped_ratio": 0.0}), missing_eos_penalty=1.0)) == 1


def test_the_metrics_of_the_asynchronous_trainer():
    entry = {"reward": 0.0, "reward_std": 0.0, "rewards/f": 0.0, "completions/clipped_ratio": 0.0, "kl": 0.0}
    config = dict.fromkeys(CONFIG) | {"max_completion_length": 32, "beta": 0.0}
    ((step, sentence),) = told([{"step": step, **entry} for step in range(1, 200)], **config)
    assert step == 10 and sentence.startswith("Reward function 'f' returned 0.0 for all completions of the first 10")
    assert told([{"step": step, **entry, "reward_std": 0.1} for step in range(1, 200)], **config) == []


# Advantages


@pytest.mark.parametrize("ours", [False, True])
def test_advantages_of_zero_are_told_once(ours):
    options = {"frac_reward_zero_std": 1.0, "kl": None}
    if ours:
        options |= {"advantages/mean": 0.0, "advantages/std": 0.0}
    ((step, sentence),) = told(run(healthy, **options), advantage_estimator="leave_one_out" if ours else None)
    named = " of advantage_estimator='leave_one_out'" if ours else ""
    assert step == 10 and sentence.startswith(f"All advantages{named} were 0 in the first 10 steps")
    assert "earn one reward. Does a reward function read the prompt alone?" in sentence


def test_an_option_that_makes_them_zero_is_named_where_rewards_differ():
    options = {"advantages/mean": 0.0, "advantages/std": 0.0, "kl": None}
    ((_, sentence),) = told(run(healthy, **options), advantage_estimator="process_group_relative")
    assert "process_weight, outcome_weight" in sentence


def test_advantages_that_are_not_zero_once_are_enough():
    zero = {"advantages/mean": 0.0, "advantages/std": 0.0, "frac_reward_zero_std": 1.0}
    assert told([healthy(1, **zero | {"advantages/mean": 0.5}), *run(healthy, range(2, 100), **zero)]) == []


# Length


def test_completions_that_are_all_cut_off_are_told_once_also_late():
    cut_off = {"completions/clipped_ratio": 1.0}
    for start in (1, 50):
        entries = [*run(healthy, range(1, start)), *run(healthy, range(start, 150), **cut_off)]
        ((step, sentence),) = told(entries)
        assert step == start + 9
        assert sentence.startswith(
            "All 640 completions of the last 10 steps were cut off at max_completion_length=32. Raise it"
        )
    assert "mask_truncated_completions leaves them out" in told(entries, mask_truncated_completions=True)[0][1]


def test_one_completion_that_ends_is_enough():
    entries = [healthy(step, **{"completions/clipped_ratio": 1.0 if step % 9 else 0.98}) for step in range(1, 200)]
    assert told(entries) == []


# Reference


def test_a_reference_that_equals_the_policy_for_a_hundred_steps_is_told_once():
    ((step, sentence),) = told(run(healthy, kl=0.0), kl_estimator="k1", learning_rate=0.0)
    assert step == 100
    assert sentence.startswith("The KL to the reference was 0 in the last 100 steps (beta=0.04, kl_estimator='k1')")
    assert told(run(healthy, kl=0.0), beta=0.0) == [], "no KL option: nobody asked"
    assert told(run(healthy, kl=2e-9)) == [], "a policy that moves slowly"
    assert len(told(run(healthy, **{"kl/reference": 0.0}))) == 1, "of the asynchronous trainer"
    assert told(run(healthy, **{"kl": 0.0, "kl/reference": 1e-3})) == []
    assert [step for step, _ in told(run(healthy, kl=0.0), critic_warmup_steps=50)] == [150], "it was not to move"


def test_one_cause_is_told_once():
    assert [sentence[:15] for _, sentence in told(run(constant, kl=0.0))] == ["Reward function"]


# The run


def test_other_processes_say_nothing():
    assert told(run(constant), main=False) == []


def test_a_run_that_goes_on_does_not_say_it_again_and_keeps_the_evidence():
    assert told(run(constant, range(21, 60)), history=run(constant, range(1, 21))) == []
    assert [step for step, _ in told(run(constant, range(6, 60)), history=run(constant, range(1, 6)))] == [10]
    assert told(run(constant, range(6, 60)), history=run(healthy, range(1, 6))) == []


def ones(completions, **kwargs):
    return [1.0] * len(completions)


SIXTEEN = {"per_device_train_batch_size": 16, "max_steps": 17, "learning_rate": 1e-3}


def caught_in(trainer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [w for w in caught if "steps" in str(w.message) and "completions" in str(w.message)]


def test_a_constant_reward_in_training_changes_neither_weights_nor_random_state(tiny_model, tmp_path):
    results = []
    for watched in (True, False):
        trainer = build(*OURS, tiny_model, tmp_path, reward_funcs=ones, advantage_estimator="reinforce_plus_plus",
                        kl_placement="reward", beta=0.1, **SIXTEEN)  # fmt: skip
        if not watched:
            trainer.remove_callback(NothingLearned)
        found = caught_in(trainer)
        assert len(found) == watched
        results.append((weights(trainer), torch.get_rng_state()))
        if watched:
            assert str(found[0].message).startswith(
                "Reward function 'ones' returned 1.0 for all 256 completions of the first 16 steps: nothing to learn."
            )
            assert found[0].filename == __file__, "the user's line, not one of transformers"
    (ours, state), (plain, plain_state) = results
    assert torch.equal(state, plain_state) and all(torch.equal(value, plain[name]) for name, value in ours.items())


def test_a_run_that_learns_is_told_nothing_and_one_that_cannot_end_is(tiny_model, tmp_path):
    options = {"reward_funcs": digits, "advantage_estimator": "group_relative", **SIXTEEN}
    assert caught_in(build(*OURS, tiny_model, tmp_path, **options)) == []
    without_end = build(*OURS, tiny_model, tmp_path, generation_kwargs={"suppress_tokens": [0, 1]}, **options)
    (found,) = caught_in(without_end)
    assert "were cut off at max_completion_length=8" in str(found.message)


def test_with_nothing_of_ours_nobody_watches(tiny_model, tmp_path):
    def watches(**options):
        trainer = build(*OURS, tiny_model, tmp_path, **options)
        return [type(callback).__name__ for callback in trainer.callback_handler.callbacks].count("NothingLearned")

    assert watches() == 0 and watches(log_style="full") == 0
    assert watches(advantage_estimator="group_mean") == watches(log_style="line") == 1
