import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ext.functional.reductions import (
    is_constant,
    reward_to_go,
    weighted_mean,
    weighted_std,
    whiten,
)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **tolerance)


MASK = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
LAST = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 0, 0, 1, 1, 1]),
        ({"gamma": 0.9}, [0.59049, 0.6561, 0.729, 0, 0, 0.81, 0.9, 1]),
        ({"gamma": 0.9, "discount": "all"}, [0.478297, 0.531441, 0.59049, 0, 0, 0.81, 0.9, 1]),
    ],
)
def test_reward_to_go_skips_untrainable_tokens(options, expected):
    close(reward_to_go(LAST, MASK, **options)[0], expected, atol=1e-6, rtol=0)


@given(st.data())
def test_reward_to_go_equals_the_backward_loop(data):
    length = data.draw(st.integers(1, 40))
    mask = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    rewards = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=length, max_size=length))
    gamma = data.draw(st.floats(0.01, 1.0))
    discount = data.draw(st.sampled_from(["trainable", "all"]))
    actual = reward_to_go(torch.tensor([rewards], dtype=torch.float64), torch.tensor([mask]), gamma, discount)
    close(actual[0], reference.reward_to_go(rewards, mask, gamma, discount), atol=1e-9, rtol=1e-9)


class CountingOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_without_a_discount_reward_to_go_is_one_sum_and_equal_to_1e_12():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, 4096, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 4096, generator=generator) < 0.8
    with CountingOperations() as mode:
        total = reward_to_go(rewards, mask)
    assert mode.count < 10, "no pass per doubling"
    loop = torch.zeros(4, 4096, dtype=torch.float64)
    following = torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(4096)):
        following = following + rewards[:, t] * mask[:, t]
        loop[:, t] = following * mask[:, t]
    close(total, loop, atol=1e-12, rtol=1e-12)
    close(total, reward_to_go(rewards, mask, gamma=1 - 1e-15), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("gamma", [0, -0.5, 1.5, float("nan"), "0.9", None])
def test_reward_to_go_refuses_a_discount_outside_its_range(gamma):
    with pytest.raises(ValueError, match=r"gamma must be a number in \(0, 1\], got"):
        reward_to_go(LAST, MASK, gamma=gamma)


def test_reward_to_go_refuses_an_unknown_discount():
    with pytest.raises(ValueError, match="discount must be 'trainable' or 'all', got 'some'"):
        reward_to_go(LAST, MASK, discount="some")


def test_whiten_keeps_a_small_variance_beside_a_large_mean():
    values = 1000 + torch.tensor([0.005, -0.005] * 50, dtype=torch.float64)
    whitened = whiten(values, torch.ones(100))
    close(whitened.square().mean(), 2.5e-5 / (2.5e-5 + 1e-8), atol=1e-7, rtol=0)


def test_whiten_of_one_value_is_zero_with_either_correction():
    for correction in (0, 1):
        close(whiten(torch.tensor([3.0]), torch.ones(1), correction), [0.0])


@pytest.mark.parametrize("correction", [0, 1])
def test_weighted_std_is_what_whiten_divides_by(correction):
    values, weights = [3.0, 5.0, -2.0, 0.5], [1.0, 0.25, 0.0, 2.0]
    mean = sum(w * x for w, x in zip(weights, values, strict=True)) / 3.25
    square = sum(w * (x - mean) ** 2 for w, x in zip(weights, values, strict=True)) / (3.25 - correction)
    values, weights = torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    std = weighted_std(values, weights, correction)
    close(std, (square + 1e-8) ** 0.5, atol=1e-12, rtol=0)
    close(whiten(values, weights, correction) * std, values - mean, atol=1e-12, rtol=0)
    assert weighted_std(values.half(), weights, correction).dtype == torch.float64


def test_weighted_mean_without_weight_is_zero():
    close(weighted_mean(torch.tensor([3.0, 4.0]), torch.zeros(2)), 0.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 1.0], True), ([1.0, 1.0 + 1e-5], False), ([1e4, 1e4 + 1e-3], True), ([5.0, 7.0], False)],
)
def test_is_constant_is_relative_to_the_size(values, expected):
    values = torch.tensor(values, dtype=torch.float64)
    assert is_constant(values, torch.ones(2, dtype=torch.bool), dim=0).item() is expected


def test_is_constant_looks_at_the_selected_entries_only():
    where = torch.tensor([True, False, True])
    assert is_constant(torch.tensor([1.0, float("nan"), 1.0]), where, dim=0)
    assert is_constant(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.bool), dim=0)
