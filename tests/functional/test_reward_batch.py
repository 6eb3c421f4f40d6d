"""What every estimator is given: where rewards are put, which rows count, and what is refused."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.functional.rewards import RewardBatch, reward_at_end, reward_at_steps

F64 = torch.float64
NAN = float("nan")


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


# Where rewards are put


def test_reward_at_end_finds_the_last_trainable_token():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    rewards, scored = reward_at_end(torch.tensor([0.0, 2.0, 3.0, NAN]), mask)
    close(rewards, [[0, 0, 0, 0], [0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    assert scored.nonzero().tolist() == [[0, 1], [1, 2], [2, 0]]  # a reward of 0 is a reward, NaN is none


def test_step_rewards_are_put_on_the_step_ends():
    rewards, scored = reward_at_steps([[1.0, None, 0.0], [NAN]], [[0, 2, 3], [1]], 5)
    close(rewards, [[1.0, 0, 0, 0, 0], [0.0] * 5])
    assert rewards.dtype == torch.float32
    assert scored.nonzero().tolist() == [[0, 0], [0, 3]]  # a reward of 0 is a reward, None and NaN are none


@pytest.mark.parametrize(("values", "ends"), [([[1.0]], [[0, 1]]), ([[1.0, 2.0]], [[0]]), ([[1.0]], [[0], [1]])])
def test_step_rewards_that_do_not_match_the_steps_are_refused(values, ends):
    with pytest.raises(ValueError):
        reward_at_steps(values, ends, 2)


# Shapes


def fields(**changes):
    """Four completions of three tokens for two prompts."""
    return {
        "outcome": torch.zeros(4, 3),
        "outcome_scored": torch.ones(4, 3).bool(),
        "mask": torch.ones(4, 3),
        "num_generations": 2,
    } | changes


TABLE = ["outcome_scored", "mask", "steps", "steps_scored", "kl_penalty"]
WHOLE = "Give all completions of every prompt."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outcome": torch.zeros(4)}, "outcome must be of shape (N, T) with T >= 1, got (4,)."),
        ({"outcome": torch.zeros(4, 0)}, "outcome must be of shape (N, T) with T >= 1, got (4, 0)."),
        ({"outcome": torch.zeros(4, 3, 1)}, "outcome must be of shape (N, T) with T >= 1, got (4, 3, 1)."),
        *(
            ({name: torch.zeros(shape)}, f"{name} must be of shape (4, 3) with an outcome of (4, 3), got {shape}.")
            for name in TABLE
            for shape in ((4, 2), (3, 3), (4,))
        ),
        *(
            (
                {"baseline": torch.zeros(shape)},
                f"baseline must be of shape (4,) with an outcome of (4, 3), got {shape}.",
            )
            for shape in ((2,), (4, 1), (4, 3))
        ),
        *(
            ({"values": torch.zeros(shape)}, f"values must be of shape (4, 4) with an outcome of (4, 3), got {shape}.")
            for shape in ((4, 3), (4,))
        ),
        *(
            ({"num_generations": size}, f"4 rows are no whole number of groups of num_generations={size}. {WHOLE}")
            for size in (3, 8, 0, -2, 2.0, None)
        ),
        (
            {"steps": torch.zeros(4, 3)},
            "steps and steps_scored belong together; give both, or neither.",
        ),
        (
            {"steps_scored": torch.zeros(4, 3).bool()},
            "steps and steps_scored belong together; give both, or neither.",
        ),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError) as error:
        RewardBatch(**fields(**changes))
    assert str(error.value) == message


def test_shapes_that_fit_are_taken_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardBatch(**fields())
        RewardBatch(
            **fields(num_generations=4),
            steps=torch.zeros(4, 3),
            steps_scored=torch.zeros(4, 3).bool(),
            kl_penalty=torch.zeros(4, 3),
            baseline=torch.zeros(4),
            values=torch.zeros(4, 4),
        )


def test_a_batch_does_not_change():
    batch = RewardBatch(**fields())
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.outcome = torch.ones(4, 3)


# Who can learn

NOTHING = "No completion of the batch has both a reward and a trainable token; all advantages are 0."


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome_scored": torch.zeros(4, 3).bool()},
        {"mask": torch.zeros(4, 3)},
        # One half of the rows has rewards, the other tokens.
        {
            "outcome_scored": torch.tensor([[True] * 3] * 2 + [[False] * 3] * 2),
            "mask": torch.tensor([[0] * 3] * 2 + [[1] * 3] * 2),
        },
    ],
    ids=["no reward", "no token", "never both"],
)
def test_a_batch_from_which_nothing_can_be_learnt_is_said_once_where_it_is_made(changes):
    with pytest.warns(UserWarning) as caught:
        RewardBatch(**fields(**changes))
    assert [str(warning.message) for warning in caught] == [NOTHING]
    assert caught[0].filename == __file__


def test_rewards_of_steps_alone_are_something_to_learn_from():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored = torch.zeros(4, 3).bool()
        one_step = scored.clone()
        one_step[3, 1] = True
        batch = RewardBatch(**fields(outcome_scored=scored), steps=torch.zeros(4, 3), steps_scored=one_step)
    assert batch.scorable.tolist() == [False, False, False, True]


def small(**changes):
    """Row 0 has an outcome, row 1 a step, row 2 neither, row 3 an outcome and no token."""
    outcome, scored = reward_at_end(
        torch.tensor([2.0, NAN, NAN, 5.0], dtype=F64), torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]])
    )
    steps, steps_scored = reward_at_steps([[], [0.5], [], []], [[], [0], [], []], 3)
    return RewardBatch(
        **{
            "outcome": outcome,
            "outcome_scored": scored,
            "mask": torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]]),
            "num_generations": 4,
            "steps": steps,
            "steps_scored": steps_scored,
            **changes,
        }
    )


def test_rows_without_any_reward_are_unscorable():
    batch = small()
    assert batch.scorable.tolist() == [True, True, False, True]
    assert batch.trainable.tolist() == [[True, True, False], [True, False, True], [False] * 3, [False] * 3]


def test_token_rewards_are_outcomes_and_steps_less_the_kl():
    penalty = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.0, -0.1], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    batch = small(kl_penalty=penalty)
    close(batch.without_kl, [[0, 2, 0], [0.5, 0, 0], [0, 0, 0], [5, 0, 0]])
    close(batch.rewards, [[-0.1, 1.8, 0], [0.2, 0, 0.1], [-1, -1, -1], [5, 0, 0]], atol=1e-7)
    assert batch.rewards.dtype == F64
    assert torch.equal(small().rewards, small().without_kl)


def test_centred_returns_leave_unscorable_rows_out_and_count_rows_without_tokens():
    # Returns 2, 0.5 and 5: mean 2.5; the KL of the unscorable row is no reward either.
    batch = small(kl_penalty=torch.tensor([[0.0] * 3, [0.0] * 3, [7.0] * 3, [0.0] * 3]))
    close(batch.centred(batch.rewards), [[-0.5, -2.0, 0.0, 2.5]])
    assert batch.centred(batch.rewards.float()).dtype == F64


def test_centred_returns_are_those_of_each_prompt():
    outcome, scored = reward_at_end(torch.tensor([1.0, 0.0, NAN, 8.0, NAN, NAN]), torch.ones(6, 2))
    batch = RewardBatch(outcome, scored, torch.ones(6, 2), num_generations=2)
    close(batch.centred(batch.rewards), [[0.5, -0.5], [0.0, 0.0], [0.0, 0.0]])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    size=st.integers(1, 4),
    prompts=st.integers(1, 3),
)
def test_centred_returns_equal_the_loop(data, size, prompts):
    numbers = st.floats(-100, 100) | st.just(NAN)
    returns = data.draw(st.lists(numbers, min_size=size * prompts, max_size=size * prompts))
    mask = torch.ones(size * prompts, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome, scored = reward_at_end(torch.tensor(returns, dtype=F64), mask)
        batch = RewardBatch(outcome, scored, mask, size)
    expected = []
    for start in range(0, len(returns), size):
        group = returns[start : start + size]
        known = [x for x in group if not math.isnan(x)]
        expected.append([0.0 if math.isnan(x) else x - sum(known) / len(known) for x in group])
    close(batch.centred(batch.rewards), expected, atol=1e-9)


def test_per_completion_is_zero_where_a_row_cannot_learn_and_has_the_dtype_of_the_outcome():
    advantages = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=F64)
    close(small().per_completion(advantages), [1.0, 2.0, 0.0, 0.0])  # no reward; no token
    close(small().per_completion(advantages[0]), [1.0, 2.0, 0.0, 0.0])
    batch = RewardBatch(**fields(outcome=torch.zeros(4, 3, dtype=torch.bfloat16)))
    per_row = batch.per_completion(torch.tensor([[1.0, NAN], [3.0, 4.0]], dtype=F64))
    assert per_row.dtype == torch.bfloat16 and per_row.shape == (4,)


def test_outcomes_alone_is_the_same_batch_without_its_steps_in_float64():
    half = small(outcome=torch.ones(4, 3).half()).outcomes_alone()
    assert half.outcome.dtype == F64 and torch.equal(half.outcome, torch.ones(4, 3, dtype=F64))
    batch = small(kl_penalty=torch.ones(4, 3), baseline=torch.ones(4), values=torch.ones(4, 4))
    alone = batch.outcomes_alone()
    assert alone.steps is None and alone.steps_scored is None and batch.steps is not None
    for field in dataclasses.fields(batch):
        if not field.name.startswith("steps"):
            assert getattr(alone, field.name) is getattr(batch, field.name)
    assert alone.scorable.tolist() == [True, False, False, True]
    close(alone.without_kl, [[0, 2, 0], [0, 0, 0], [0, 0, 0], [5, 0, 0]])
