"""Several attempts at a prompt: the published formulas, the numbers of verl, and exact expectations."""

import itertools
import math

import pytest
import torch
from theorems import proves

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.attempts import best_of_group, gpg, pass_at_k
from trl_ext.functional.rewards import RewardBatch, reward_at_end

F64 = torch.float64


def batch_of(returns, size, **fields):
    mask = torch.ones(len(returns), 2)
    return RewardBatch(*reward_at_end(torch.tensor(returns, dtype=F64), mask), mask, size, **fields)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64), atol=atol, rtol=0)


# Pass@k training: rewards of 0 and 1, the formula of the paper


@pytest.mark.theorem(
    "Advantages",
    "With rewards of 0 and 1 `pass_at_k` is the published closed form, for any number of successes, G up to 16",
    paper="pass_at_k",
    at_most=1e-12,
)
@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_rewards_of_0_and_1_give_the_formula_of_the_paper(size, k):
    for ones in range(size + 1):
        found = pass_at_k(batch_of([1.0] * ones + [0.0] * (size - ones), size), k=k)
        if size <= k:
            proves(found)
            continue
        zeros = size - ones
        mean = 1 - math.comb(zeros, k) / math.comb(size, k)
        std = math.sqrt(mean * (1 - mean))
        if std == 0:
            assert not found.any(), "no set succeeds, or all do"
            continue
        of_a_one = (1 - mean) / std
        of_a_zero = (1 - mean - math.comb(zeros - 1, k - 1) / math.comb(size - 1, k - 1)) / std
        proves(found, torch.tensor([of_a_one] * ones + [of_a_zero] * zeros, dtype=F64))


def test_a_group_with_a_success_in_every_set_teaches_nothing_although_its_rewards_differ():
    assert not pass_at_k(batch_of([1.0, 1.0, 1.0, 0.0], 4), k=2).any()
    assert pass_at_k(batch_of([1.0, 1.0, 0.0, 0.0], 4), k=2).any()


def test_one_attempt_is_the_group_relative_advantage_with_the_biased_standard_deviation():
    rewards = torch.tensor([0.9, 0.1, 0.4, 0.7], dtype=F64)
    close(pass_at_k(batch_of(rewards.tolist(), 4), k=1), (rewards - rewards.mean()) / rewards.std(correction=0))


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_k_is_a_whole_number(k):
    with pytest.raises(ValueError, match=f"k must be a whole number >= 1, got {k!r}"):
        pass_at_k(batch_of([1.0, 0.0], 2), k=k)


@pytest.mark.parametrize(("function", "option"), [(pass_at_k, "scale"), (best_of_group, "scale")])
def test_a_switch_is_true_or_false(function, option):
    with pytest.raises(ValueError, match="scale must be true or false, got 'no'"):
        function(batch_of([1.0, 0.0], 2), **{option: "no"})


def test_an_unknown_correction_is_refused():
    with pytest.raises(ValueError, match="correction must be 'groups' or 'nonzero', got 'verl'"):
        gpg(batch_of([1.0, 0.0], 2), correction="verl")


# Exact expectations: every group of draws from a bandit of three arms


def expected_gradient(function, size):
    """Of the mean over the group, and the rewards, the log-probs and the logits of the arms."""
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=F64, requires_grad=True)
    reward, logps = torch.tensor([1.0, 0.2, -0.5], dtype=F64), logits.log_softmax(0)
    total = torch.zeros((), dtype=F64)
    for arms in itertools.product(range(3), repeat=size):
        arms = torch.tensor(arms)
        advantages = function(batch_of(reward[arms].tolist(), size))
        total = total + logps[arms].sum().exp().detach() * (advantages * logps[arms]).mean()
    return torch.autograd.grad(total, logits, retain_graph=True)[0], reward, logps, logits


def gradient_of_the_best(k, reward, logps, logits):
    goal = torch.zeros((), dtype=F64)
    for arms in itertools.product(range(3), repeat=k):
        arms = torch.tensor(arms)
        goal = goal + logps[arms].sum().exp() * reward[arms].max()
    return torch.autograd.grad(goal, logits)[0]


@pytest.mark.theorem(
    "Advantages",
    "Without scaling, the expected policy gradient of `pass_at_k` is (G − k)/(G k) times that of the expected best of "
    "k (enumeration, G = 2 to 5)",
    paper="pkpo",
    at_most=1e-12,
)
@pytest.mark.parametrize(("size", "k"), [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3), (5, 3)])
def test_without_scaling_the_best_of_k_attempts_is_what_is_improved(size, k):
    gradient, *rest = expected_gradient(lambda batch: pass_at_k(batch, k=k, scale=False), size)
    proves(gradient, (size - k) / (size * k) * gradient_of_the_best(k, *rest))
    assert gradient.abs().max() > 1e-3


@pytest.mark.theorem(
    "Advantages",
    "The expected policy gradient of `best_of_group` is 1/G times that of the expected best of G (enumeration, "
    "G = 2 to 5)",
    paper="best_of_group",
    at_most=1e-12,
)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_the_best_only_improves_the_best_of_the_group(size):
    gradient, *rest = expected_gradient(best_of_group, size)
    proves(gradient, gradient_of_the_best(size, *rest) / size)
    assert gradient.abs().max() > 1e-3


# The numbers of verl, by loops over lists


def passk_of_verl(returns, size, norm):
    """`compute_grpo_passk_outcome_advantage`: the first of the two largest gets their difference."""
    out = [0.0] * len(returns)
    for start in range(0, len(returns), size):
        group = returns[start : start + size]
        first, second = sorted(range(size), key=lambda i: -group[i])[:2]
        mean = sum(group) / size
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / (size - 1))
        out[start + first] = (group[first] - group[second]) / (std + 1e-6 if norm else 1.0)
    return out


def gpg_of_verl(returns, size):
    """`compute_gpg_outcome_advantage` with `f_norm` 1: the batch over its nonzero scores."""
    alpha = len(returns) / max(sum(x != 0 for x in returns), 1)
    means = [sum(returns[i - i % size : i - i % size + size]) / size for i in range(len(returns))]
    return [alpha * (x - mean) for x, mean in zip(returns, means, strict=True)]


RETURNS = [[1, 0, 0, 0, 0.9, 1, 1, 0.8], [0.0] * 8, [1.0] * 8, [0.3, -2.0, 7.5, 0.0, 0.0, 0.1, 0.2, 0.0]]


@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_numbers_are_those_of_verl(returns, size):
    batch = batch_of(returns, size)
    close(best_of_group(batch, scale=False), passk_of_verl(returns, size, norm=False))
    close(best_of_group(batch, scale=True), passk_of_verl(returns, size, norm=True), atol=2e-5)  # their eps
    close(gpg(batch, correction="nonzero"), gpg_of_verl(returns, size))


def test_gpg_makes_up_for_groups_without_a_signal():
    close(gpg(batch_of([1, 0, 1, 1, 0, 0, 0, 0], 2)), [2.0, -2.0, 0, 0, 0, 0, 0, 0])  # one pair of four
    close(gpg(batch_of([1, 0, 1, 0], 2)), [0.5, -0.5, 0.5, -0.5])
    assert not gpg(batch_of([1, 1, 0, 0], 2)).any()
    close(gpg(batch_of([1, 0, math.nan, math.nan], 2)), [0.5, -0.5, 0, 0])  # what was not scored is not counted


def test_what_is_needed_is_a_fact_of_the_row():
    needed = ADVANTAGE_ESTIMATORS["pass_at_k"].completions
    assert needed() == 3 and needed(k=4) == 5 and needed(k=1, scale=False) == 2
