"""Losses of single completions: the classifier, its bound of DPO, and the shift that goes on from batch to batch."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional.preference import UNPAIRED_LOSSES, MovingRewards, UnpairedBatch, bco

F64 = torch.float64
rewards = st.floats(-30, 30, allow_nan=False)


def batch(values, labels, shift=0.0, dtype=F64):
    return UnpairedBatch(torch.tensor(values, dtype=dtype), torch.tensor(labels), shift)


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


@given(st.lists(st.tuples(rewards, st.booleans()), min_size=1, max_size=6), rewards)
def test_the_loss_is_the_classifiers_in_a_loop(completions, shift):
    values, labels = map(list, zip(*completions, strict=True))
    expected = [minus_log_sigmoid(r - shift if good else shift - r) for r, good in completions]
    assert bco(batch(values, labels, shift)).tolist() == pytest.approx(expected, rel=1e-12)


@given(rewards, rewards, rewards)
def test_a_good_and_a_bad_completion_are_an_upper_bound_of_dpo_for_every_shift(good, bad, shift):
    pair = bco(batch([good, bad], [True, False], shift)).sum().item()
    assert pair >= minus_log_sigmoid(good - bad) - 1e-12


@given(st.floats(0.5, 6), st.floats(-6, 6))
def test_the_shift_between_two_rewards_is_where_their_bound_is_least(apart, middle):
    def bound(shift):
        return bco(batch([middle + apart / 2, middle - apart / 2], [True, False], shift)).sum().item()

    assert bound(middle) <= min(bound(middle + x) for x in (-1.0, -0.1, 0.1, 1.0)) + 1e-12


def test_slopes_at_the_reference():
    values = torch.zeros(2, dtype=F64, requires_grad=True)
    loss = bco(UnpairedBatch(values, torch.tensor([True, False]))).sum()
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert torch.autograd.grad(loss, values)[0].tolist() == [-0.5, 0.5]


def test_extreme_rewards_are_finite_in_float32():
    values = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = bco(UnpairedBatch(values, torch.tensor([True, True, False, False])))
    assert loss.tolist() == [1e4, 0.0, 0.0, 1e4]
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == [-1.0, 0.0, 0.0, 1.0]
    assert bco(batch([1.0], [True], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 1), (2, 1)), ((), ())])
def test_a_batch_is_one_number_per_completion(shapes):
    with pytest.raises(ValueError, match="one reward and one label per completion"):
        UnpairedBatch(torch.zeros(shapes[0]), torch.zeros(shapes[1]).bool())


# The shift


def see(state, values, labels, training=True):
    return state.observe(torch.tensor(values), torch.tensor(labels), training)


def test_the_shift_follows_the_loop_over_batches():
    state, good, bad = MovingRewards(momentum=0.75), None, None
    for step in range(5):
        values, labels = [step + 1.0, -2.0 * step, 0.5 * step], [True, False, True]
        of_good, of_bad = (1.0 + 1.5 * step) / 2, -2.0 * step
        good, bad = (of_good, of_bad) if good is None else (good, bad)
        assert see(state, values, labels) == pytest.approx((good + bad) / 2)
        state.step()
        good, bad = 0.75 * good + 0.25 * of_good, 0.75 * bad + 0.25 * of_bad
    assert state.metrics() == pytest.approx({"bco/mean_chosen": good, "bco/mean_rejected": bad})


def test_it_moves_once_per_step_by_all_its_micro_batches():
    one, two = MovingRewards(), MovingRewards()
    for state in (one, two):
        see(state, [0.0, 0.0], [True, False])
        state.step()
    see(one, [1.0, 3.0, -1.0, -5.0], [True, True, False, False])
    assert see(two, [1.0, -1.0], [True, False]) == see(two, [3.0, -5.0], [True, False]) == 0.0
    one.step()
    two.step()
    assert one.means == two.means == pytest.approx([-0.3, 0.2])


def test_a_kind_that_is_not_there_keeps_its_average_and_is_zero_before_it_was_seen():
    state = MovingRewards(momentum=0.5)
    assert see(state, [2.0, 4.0], [True, True]) == 1.5 and state.metrics() == {"bco/mean_chosen": 3.0}
    state.step()
    assert see(state, [-4.0], [False]) == 1.5
    state.step()
    assert state.means == [-4.0, 3.0] and see(state, [8.0], [True]) == -0.5


def test_evaluation_reads_only():
    state = MovingRewards()
    assert see(state, [2.0, -1.0], [True, False], training=False) == 0.5 and state.means == [None, None]
    see(state, [4.0, 0.0], [True, False])
    state.step()
    assert see(state, [100.0, -1.0], [True, False], training=False) == 2.0
    assert state.means == [0.0, 4.0] and state.window == []


def test_a_reward_that_is_not_finite_is_left_out():
    state = MovingRewards()
    assert see(state, [math.inf, 2.0, math.nan], [True, True, False]) == 1.0
    state.step()
    assert state.means == [None, 2.0]


def test_a_restored_state_goes_on_bit_for_bit():
    whole, torn = MovingRewards(0.9), MovingRewards(0.9)
    for step in range(6):
        if step == 3:
            state, torn = json.loads(json.dumps(torn.state())), MovingRewards(0.9)
            torn.restore(state)
        found = [see(state, [0.1 * step, 1 / (step + 3)], [True, False]) for state in (whole, torn)]
        assert found[0] == found[1]
        whole.step()
        torn.step()


def test_every_row_has_a_paper():
    from trl_ext.papers import PAPERS

    for row in UNPAIRED_LOSSES.values():
        assert row.paper in PAPERS and row.method
