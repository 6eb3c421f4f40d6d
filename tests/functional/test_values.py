"""Generalised advantages, the critic's loss and its metrics: numbers worked by hand, loops, laws, an enumeration."""

import itertools
import math
import random
import warnings

import pytest
import reference
import torch
from theorems import proves

from trl_ext.functional.reductions import aggregated, reward_to_go
from trl_ext.functional.rewards import RewardBatch, reward_at_end
from trl_ext.functional.token_advantages import reinforce_plus_plus
from trl_ext.functional.values import (
    advantage_std,
    clipped_value_loss,
    explained_variance,
    gae,
    lambda_advantages,
    lambda_returns,
    value_metrics,
)

F64 = torch.float64
MASK = torch.tensor([[1, 1, 0, 0, 1, 1]])
VALUES = torch.tensor([[0.5, 0.4, 9.0, 9.0, 0.6, 0.7, 0.0]], dtype=F64)
LAST = torch.tensor([[0, 0, 0, 0, 0, 1.0]], dtype=F64)
SOME = torch.tensor([[-0.01, 0.02, 0, 0, -0.03, 1]], dtype=F64)


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), atol=atol, rtol=0.0)


def ending_in(value, values=VALUES):
    return torch.cat([values[:, :-1], torch.tensor([[value]], dtype=F64)], dim=1)


def a_batch(rewards=LAST, mask=MASK, values=VALUES, **fields):
    return RewardBatch(rewards, torch.ones_like(mask).bool(), mask, 1, values=values, **fields)


# Numbers worked by hand


@pytest.mark.parametrize(
    ("rewards", "gamma", "lam", "expected"),
    [
        (LAST, 1.0, 0.0, [-0.1, 0.2, 0, 0, 0.1, 0.3]),
        (LAST, 1.0, 0.95, [0.437462, 0.565750, 0, 0, 0.385, 0.3]),
        (LAST, 1.0, 1.0, [0.5, 0.6, 0, 0, 0.4, 0.3]),
        (LAST, 0.9, 0.95, [0.189139, 0.384958, 0, 0, 0.2865, 0.3]),
        (SOME, 1.0, 0.95, [0.4193875, 0.557250, 0, 0, 0.355, 0.3]),
    ],
)
def test_advantages_of_a_row_with_a_tool_result(rewards, gamma, lam, expected):
    close(lambda_advantages(rewards, VALUES, MASK, gamma, lam), [expected])


def test_targets_of_a_row_with_a_tool_result():
    close(lambda_returns(a_batch()), [[0.937462, 0.965750, 0, 0, 0.985, 1.0]])
    close(lambda_returns(a_batch(), lam=1.0), [[1.0, 1.0, 0, 0, 1.0, 1.0]])


def test_a_mask_that_is_ignored_gives_other_targets():
    all_trainable = lambda_returns(a_batch(mask=torch.ones(1, 6)))
    close(all_trainable[:, :2], [[1.681635, 1.749089]])
    assert not torch.allclose(all_trainable[:, :2], lambda_returns(a_batch())[:, :2], atol=0.1)


def test_whitened_advantages():
    penalty = torch.tensor([[0.3, 0, 0, 0, 0, 0]], dtype=F64)  # so that not all rewards are equal without it
    batch = a_batch(LAST + penalty, kl_penalty=penalty)
    close(gae(batch), [[0.159882, 1.490946, 0, 0, -0.384450, -1.266378]])


@pytest.mark.parametrize(
    ("end", "gamma", "lam", "expected"),
    [
        (0.8, 1.0, 0.95, [0.265988, 0.385250, 0, 0, 0.195, 0.1]),
        (0.8, 0.9, 0.5, [-0.069102, 0.157550, 0, 0, 0.039, 0.02]),
        (0.0, 1.0, 0.95, [-0.419913, -0.336750, 0, 0, -0.565, -0.7]),
    ],
)
def test_a_row_that_was_cut_off_is_worth_what_comes_after_it(end, gamma, lam, expected):
    close(lambda_advantages(0 * LAST, ending_in(end), MASK, gamma, lam), [expected])


@pytest.mark.parametrize(
    ("reward", "end", "expected"),
    [(1.0, 0.0, [0.451, 0.58, 0.4, 0, 0]), (0.0, 0.8, [0.2705, 0.39, 0.2, 0, 0])],
)
def test_a_row_that_ends_in_a_tool_result(reward, end, expected):
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    values = torch.tensor([[0.5, 0.4, 0.6, 9.0, 9.0, end]], dtype=F64)
    rewards = torch.tensor([[0, 0, reward, 0, 0]], dtype=F64)
    close(lambda_advantages(rewards, values, mask), [expected])


@pytest.mark.parametrize(
    ("lam", "expected"), [(0.95, [1.838713, 2.040750, 0, 0, 0.885, 0.3]), (1.0, [2, 2.1, 0, 0, 0.9, 0.3])]
)
def test_step_rewards_are_added(lam, expected):
    steps = torch.tensor([[0, 1, 0, 0, 0.5, 0]], dtype=F64)
    batch = a_batch(steps=steps, steps_scored=steps > 0)
    close(gae(batch, lam=lam, whiten_advantages=False), [expected])


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [(0.5, 0.18, 0.0), (0.3, 0.245, -0.7), (0.05, 0.45125, -0.95), (-0.1, 0.605, -1.1)],
)
def test_the_value_loss_lets_a_value_come_back_freely_and_go_on_by_the_clip_only(value, loss, slope):
    value = torch.tensor(value, dtype=F64, requires_grad=True)
    found = clipped_value_loss(value, torch.tensor(0.2, dtype=F64), torch.tensor(1.0, dtype=F64), 0.2)
    close(found.detach(), loss)
    close(torch.autograd.grad(found, value)[0], slope)


def test_without_a_clip_the_value_loss_is_half_the_squared_error():
    close(clipped_value_loss(torch.tensor([0.5]), torch.tensor([9.0]), torch.tensor([1.0]), None), [0.125])


def test_explained_variance():
    targets = torch.tensor([[1.0, 1, 1, 0, 0, 0]])
    ones = torch.ones(1, 6)
    close(explained_variance(targets, torch.tensor([[0.9, 0.8, 0.7, 0.3, 0.2, 0.1]]), ones), 0.813333)
    close(explained_variance(targets, torch.full((1, 6), 3.0), ones), 0.0)
    assert explained_variance(ones, targets, ones).isnan()
    assert explained_variance(torch.rand(1, 6), targets, 0 * ones).isnan()


def test_whitened_rewards():
    rewards, mask = torch.tensor([[0.0, 0, 0, 1]], dtype=F64), torch.ones(1, 4)
    batch = a_batch(rewards, mask, torch.zeros(1, 5, dtype=F64))
    deltas = gae(batch, lam=0.0, whiten_rewards=True, whiten_advantages=False)  # with V = 0 the rewards themselves
    close(deltas, [[-0.327350, -0.327350, -0.327350, 1.982051]])


# Laws


def random_batches(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        rows, width = rng.randint(1, 5), rng.randint(1, 8)
        rewards, values = ([[rng.uniform(-2, 2) for _ in range(width + more)] for _ in range(rows)] for more in (0, 1))
        if rng.random() < 0.5:
            values = [[*row[:-1], 0.0] for row in values]
        mask = [[int(rng.random() < rng.choice((0.3, 0.8, 1.0))) for _ in range(width)] for _ in range(rows)]
        mask[0] = [0] * width if rng.random() < 0.2 else mask[0]
        yield rewards, values, mask, rng.choice((1.0, 0.9, 0.5)), rng.choice((0.0, 0.3, 0.95, 1.0))


def tensors(rewards, values, mask):
    return torch.tensor(rewards, dtype=F64), torch.tensor(values, dtype=F64), torch.tensor(mask)


@pytest.mark.theorem(
    "Rewards-to-go and critics",
    "λ-advantages equal the loop written from the formula, with holes in the mask",
    paper="gae",
    at_most=1e-12,
)
def test_advantages_equal_the_loop_written_from_the_formula():
    for rewards, values, mask, gamma, lam in random_batches(200):
        found = lambda_advantages(*tensors(rewards, values, mask), gamma, lam)
        expected = [reference.lambda_advantages(*row, gamma, lam) for row in zip(rewards, mask, values, strict=True)]
        proves(found, expected)


@pytest.mark.theorem(
    "Rewards-to-go and critics",
    "λ = 1 is the reward-to-go minus the value",
    paper="gae",
    at_most=1e-12,
)
def test_lambda_one_is_the_reward_to_go_minus_the_value_and_lambda_zero_one_step():
    for rewards, values, mask, gamma, _ in random_batches(50, seed=1):
        r, v, m = tensors(rewards, values, mask)
        terminal = torch.cat([v[:, :-1], 0 * v[:, -1:]], dim=1)
        expected = (reward_to_go(r, m, gamma) - v[:, :-1]).where(m.bool(), 0.0)
        proves(lambda_advantages(r, terminal, m, gamma, 1.0), expected)
        nearly = lambda_advantages(r, v, m, gamma, 1e-9)
        close(lambda_advantages(r, v, m, gamma, 0.0), nearly, atol=1e-7)


def lambda_return(rewards, values, mask, start, gamma, lam):
    """The weighted mean of all n-step returns from `start` on."""
    places = [t for t in range(start, len(rewards)) if mask[t]]
    after = [*(values[t] for t in places[1:]), values[-1]]
    returns, total = [], 0.0
    for n, t in enumerate(places):
        total += gamma**n * rewards[t]
        returns.append(total + gamma ** (n + 1) * after[n])
    weights = [(1 - lam) * lam**n for n in range(len(places) - 1)] + [lam ** (len(places) - 1)]
    return sum(w * x for w, x in zip(weights, returns, strict=True))


@pytest.mark.theorem(
    "Rewards-to-go and critics",
    "The critic's targets are the weighted mean of all n-step returns",
    paper="gae",
    at_most=1e-12,
)
def test_targets_are_the_weighted_mean_of_the_n_step_returns():
    for rewards, values, mask, gamma, lam in random_batches(100, seed=2):
        r, v, m = tensors(rewards, values, mask)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = lambda_returns(a_batch(r, m, v), gamma=gamma, lam=lam)
        for i, row in enumerate(mask):
            for t, trainable in enumerate(row):
                expected = lambda_return(rewards[i], values[i], row, t, gamma, lam) if trainable else 0.0
                proves(found[i, t], expected)


def outcome_batch(returns, mask, values, **fields):
    outcome, scored = reward_at_end(torch.tensor(returns, dtype=F64), mask)
    return RewardBatch(outcome, scored, mask, 1, values=values, **fields)


MASKS = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
RETURNS = [1.0, 0.0, 0.5, math.nan]


@pytest.mark.theorem(
    "Rewards-to-go and critics",
    "Without values and discounts `gae` is `reinforce_plus_plus`",
    paper="ppo",
    at_most=1e-12,
)
def test_without_values_and_discounts_it_is_reinforce_plus_plus():
    batch = outcome_batch(RETURNS, MASKS, torch.zeros(4, 5))
    proves(gae(batch, lam=1.0), reinforce_plus_plus(batch))
    penalised = outcome_batch(RETURNS, MASKS, torch.zeros(4, 5), kl_penalty=0.1 * torch.rand(4, 4) * MASKS)
    proves(gae(penalised, lam=1.0), reinforce_plus_plus(penalised))


def test_what_stands_at_untrainable_tokens_changes_nothing():
    torch.manual_seed(0)
    values = torch.rand(4, 5, dtype=F64)
    clean = outcome_batch(RETURNS, MASKS, values)
    for poison in (math.nan, math.inf):
        dirty = values.clone()
        dirty[:, :-1][MASKS == 0] = poison
        poisoned = outcome_batch(RETURNS, MASKS, dirty)
        for function in (gae, lambda_returns):
            assert torch.equal(function(poisoned), function(clean))
        assert value_metrics(poisoned, None) == value_metrics(clean, None)


def test_a_constant_more_in_every_value_leaves_the_whitened_advantages():
    torch.manual_seed(0)
    values = torch.cat([torch.rand(4, 4, dtype=F64), torch.zeros(4, 1, dtype=F64)], dim=1)
    shifted = torch.cat([values[:, :-1] + 7.0, values[:, -1:]], dim=1)
    one, other = (gae(outcome_batch(RETURNS, MASKS, v), lam=1.0) for v in (values, shifted))
    close(one, other, atol=1e-9)


def test_rows_without_a_reward_teach_nothing_and_count_nowhere():
    torch.manual_seed(0)
    values = torch.rand(4, 5, dtype=F64)
    batch, others = outcome_batch(RETURNS, MASKS, values), outcome_batch(RETURNS[:3], MASKS[:3], values[:3])
    assert not gae(batch)[3].any() and not lambda_returns(batch)[3].any()
    close(gae(batch)[:3], gae(others), atol=1e-12)
    assert value_metrics(batch, None) == pytest.approx(value_metrics(others, None))


def test_equal_rewards_leave_noise_that_is_not_scaled():
    torch.manual_seed(0)
    values = torch.cat([1e-3 * torch.rand(3, 4, dtype=F64), torch.zeros(3, 1, dtype=F64)], dim=1)
    batch = outcome_batch([1.0] * 3, MASKS[:3], values)
    with pytest.warns(UserWarning, match="All rewards of the batch are equal"):
        advantages = gae(batch, lam=1.0)
    assert 0 < advantages.abs().max() < 2e-3
    close(advantages[MASKS[:3] == 1].mean(), 0.0, atol=1e-12)


def test_what_it_divides_by_times_the_result_is_the_centred_one():
    torch.manual_seed(0)
    batch = outcome_batch(RETURNS, MASKS, torch.rand(4, 5, dtype=F64))
    plain = gae(batch, whiten_advantages=False)
    centred = (plain - plain[batch.trainable].mean()).where(batch.trainable, 0.0)
    close(gae(batch) * advantage_std(batch), centred, atol=1e-9)
    assert advantage_std(batch, whiten_advantages=False) == 1.0


def test_metrics_are_means_over_the_trainable_tokens():
    torch.manual_seed(0)
    values = torch.rand(4, 5, dtype=F64)
    batch = outcome_batch(RETURNS, MASKS, values)
    trainable = batch.trainable
    to_go = reward_to_go(batch.rewards, trainable)[trainable] + values[:, -1:].expand(4, 4)[trainable]
    own = values[:, :-1][trainable]
    found = value_metrics(batch, None, gamma=1.0, lam=0.95, whiten_advantages=True, whiten_rewards=False)
    assert found == pytest.approx(
        {
            "value/mean": own.mean().item(),
            "value/return_mean": to_go.mean().item(),
            "value/explained_variance": (1 - (to_go - own).var() / to_go.var()).item(),
        }
    )


@pytest.mark.theorem(
    "Rewards-to-go and critics",
    "With λ = 1 the expected policy gradient of `gae` is the true one, whatever the critic says "
    "(enumeration of two tokens)",
    paper="gae",
    at_most=1e-12,
)
@pytest.mark.parametrize("values", [[0.0, 0.0], [0.7, -2.0]])
def test_the_expected_gradient_is_the_true_one_for_any_values(values):
    """All completions of two tokens of a policy of three tokens, the second of which knows the first."""
    torch.manual_seed(0)
    reward = torch.randn(3, 3, dtype=F64)
    first = torch.randn(3, dtype=F64, requires_grad=True)
    second = torch.randn(3, 3, dtype=F64, requires_grad=True)

    def logps(i, j):
        return torch.stack([first.log_softmax(0)[i], second[i].log_softmax(0)[j]])

    objective = sum(logps(i, j).sum().exp() * reward[i, j] for i, j in itertools.product(range(3), range(3)))
    exact = torch.autograd.grad(objective, (first, second))
    surrogate = 0.0
    for i, j in itertools.product(range(3), range(3)):
        # The value of the second state may depend on the first token, not on the second.
        v = torch.tensor([[values[0], values[1] * (i + 1), 0.0]], dtype=F64)
        batch = outcome_batch([reward[i, j].item()], torch.ones(1, 2), v)
        advantages = gae(batch, lam=1.0, whiten_advantages=False)[0]
        surrogate = surrogate + logps(i, j).sum().exp().detach() * (advantages * logps(i, j)).sum()
    for found, expected in zip(torch.autograd.grad(surrogate, (first, second)), exact, strict=True):
        proves(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 1.1}, r"lam must be a number in \[0, 1\], got 1.1"),
        ({"lam": -0.1}, r"lam must be a number in \[0, 1\], got -0.1"),
        ({"gamma": 0.0}, r"gamma must be a number in \(0, 1\], got 0.0"),
        ({"gamma": 0.0, "lam": 0.0}, r"gamma must be a number in \(0, 1\], got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gae(a_batch(), **options)


def test_a_batch_without_values_is_refused():
    for function in (gae, lambda_returns):
        with pytest.raises(ValueError, match=r"needs a critic\. Use trl_ext\.PPOConfig and PPOTrainer"):
            function(a_batch(values=None))


# Aggregation, without TRL; with TRL in tests/trainers/ppo

PER_TOKEN = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])
HOLES = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", (1.5 + 3) / 2 / 2), ("sapo", (1.5 + 3) / 2 / 2), ("bnpo", 6 / 3 / 2), ("dr_grpo", 6 / (2 * 10) / 2),
        ("luspo", 6 / 2 / 2), ("dapo", 6 / (12 / 3 * 2 / 4)), ("cispo", 6 / (12 / 3 * 2 / 4)),
        ("vespo", 6 / (12 / 3 * 2 / 4)),
    ],
)  # fmt: skip
def test_aggregation(loss_type, expected):
    sizes = {"num_items": torch.tensor(12), "max_completion_length": 10, "num_processes": 3}
    found = aggregated(PER_TOKEN, HOLES, loss_type, **sizes, accumulation=2, steps_per_generation=4)
    close(found, expected)
    assert aggregated(PER_TOKEN, 0 * HOLES, loss_type, **{**sizes, "num_items": 0}) == 0.0


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="loss_type must be one of TRL's, got 'ppo'"):
        aggregated(PER_TOKEN, HOLES, "ppo", num_items=1, max_completion_length=1)
