"""β-DPO: a β of the batch of all processes, its moving margins and its filter."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.functional.preference import (
    GlobalMargins,
    MovingMargins,
    PairBatch,
    batch_beta,
    beta_dpo,
    kept_pairs,
    logistic,
    moving_statistics,
)

F64 = torch.float64


def batch_of(margins, known=None, beta=0.5, dtype=F64):
    """Pairs with the given margins, which lie in the chosen completions."""
    chosen = torch.tensor(margins, dtype=dtype).requires_grad_()
    zeros, ones = torch.zeros_like(chosen).detach(), torch.ones_like(chosen).detach()
    return PairBatch(chosen, zeros, zeros, zeros, ones, ones, preference_prob=ones, beta=beta, global_margins=known)


def known_of(margins, mean=0.0, std=1.0, offset=0, noise=None):
    noise = None if noise is None else torch.tensor(noise, dtype=F64)
    return GlobalMargins(torch.tensor(margins, dtype=F64), offset, mean, std, noise)


# Numbers worked by hand


def test_the_beta_and_the_loss_worked_by_hand():
    # Process 1 of 2 holds 3 and 5 of the margins 0, 2, 3, 5; M₀ = 1.5, so β = .5 (1 + .4 (2.5 − 1.5)) = .7.
    batch = batch_of([3.0, 5.0], known_of([0.0, 2.0, 3.0, 5.0], mean=1.5, offset=2))
    assert batch_beta(batch, alpha=0.4) == pytest.approx(0.7, abs=1e-12)
    losses = beta_dpo(batch, alpha=0.4)
    expected = torch.tensor([math.log1p(math.exp(-2.1)), math.log1p(math.exp(-3.5))], dtype=F64)
    torch.testing.assert_close(losses.detach(), expected)
    (slopes,) = torch.autograd.grad(losses.sum(), batch.chosen_logps)  # −β σ(−βu): none through β
    torch.testing.assert_close(slopes, -0.7 * torch.tensor([-2.1, -3.5], dtype=F64).sigmoid())


def test_the_filter_worked_by_hand():
    # With M₀ = 0 and s = 1 the log-weights are 0, −2, −8, −.5; Gumbel noise of ½ is .3665 for each, of 1e-9 −3.0313.
    margins = [0.0, 2.0, 4.0, -1.0]
    equal = known_of(margins, noise=[0.5] * 4)
    assert kept_pairs(equal, 0.5).tolist() == [True, False, False, True]
    assert kept_pairs(known_of(margins, noise=[1e-9, 0.5, 0.5, 0.5]), 0.5).tolist() == [False, True, False, True]
    batch = batch_of(margins[2:], dataclasses.replace(equal, offset=2))
    assert batch_beta(batch, alpha=0.4, keep=0.5) == pytest.approx(0.5 * (1 + 0.4 * -0.5))
    losses = beta_dpo(batch, alpha=0.4, keep=0.5)
    expected = torch.tensor([0.0, 2 * math.log1p(math.exp(0.4))], dtype=F64)
    torch.testing.assert_close(losses.detach(), expected)
    (slopes,) = torch.autograd.grad(losses.sum(), batch.chosen_logps)
    assert slopes[0] == 0.0 and slopes[1] < 0.0


def test_the_moving_statistics_worked_by_hand():
    first = moving_statistics(torch.tensor([1.0, 3.0, 5.0], dtype=F64))
    assert first == (3.0, 2.0)
    second = moving_statistics(torch.tensor([0.0, 2.0], dtype=F64), first)
    assert second == pytest.approx((2.8, 0.9 * 2.0 + 0.1 * math.sqrt(2)))
    assert moving_statistics(torch.tensor([7.0], dtype=F64)) == (7.0, 0.0)
    # Policy and reference the same: a deviation of 0 is replaced by the first that is none.
    assert moving_statistics(torch.tensor([1.0, 3.0, 5.0], dtype=F64), (0.0, 0.0)) == pytest.approx((0.3, 2.0))


# Loops and laws

margin_lists = st.lists(st.floats(-20, 20), min_size=2, max_size=6)


@settings(max_examples=30, deadline=None)
@given(st.lists(margin_lists, min_size=1, max_size=6), st.floats(0.01, 2.0), st.floats(0, 2.0))
def test_a_loop_over_batches_written_from_the_paper(batches, beta, alpha):
    state, moving = MovingMargins(seed=0), None
    for margins in batches:
        mean = sum(margins) / len(margins)
        moving = mean if moving is None else moving
        expected_beta = max(beta * (1 + alpha * (mean - moving)), 1e-3)
        batch = batch_of(margins, state.observe(torch.tensor(margins, dtype=F64), offset=0, training=True), beta)
        assert batch_beta(batch, alpha=alpha) == pytest.approx(expected_beta, rel=1e-9, abs=1e-12)
        for loss, u in zip(beta_dpo(batch, alpha=alpha).tolist(), margins, strict=True):
            t = expected_beta * u
            assert loss == pytest.approx(max(-t, 0) + math.log1p(math.exp(-abs(t))), rel=1e-7, abs=1e-12)
        state.step()
        moving = 0.9 * moving + 0.1 * mean


@settings(max_examples=30, deadline=None)
@given(margin_lists, st.floats(-5, 5), st.floats(-20, 20), st.floats(0, 2))
def test_a_constant_on_every_margin_and_on_their_moving_mean_leaves_beta_alone(margins, moving, shift, alpha):
    here = batch_beta(batch_of(margins, known_of(margins, moving)), alpha=alpha)
    shifted = [u + shift for u in margins]
    there = batch_beta(batch_of(shifted, known_of(shifted, moving + shift)), alpha=alpha)
    assert there == pytest.approx(here, abs=1e-9)


def test_swapping_the_completions_mirrors_beta_about_its_start():
    margins = [1.0, -2.0, 4.0]
    here = batch_beta(batch_of(margins, known_of(margins, 0.5)), alpha=0.3)
    swapped = [-u for u in margins]
    there = batch_beta(batch_of(swapped, known_of(swapped, -0.5)), alpha=0.3)
    assert here - 0.5 == pytest.approx(0.5 - there) and here != there


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_without_slope_or_without_a_deviation_it_is_dpo_to_the_bit(alpha):
    margins = [0.3, -1.7, 2.9] if alpha == 0.0 else [1.25, 1.25, 1.25]
    moving = 7.0 if alpha == 0.0 else 1.25
    batch = batch_of(margins, known_of(margins, moving), dtype=torch.float32)
    dpo = logistic(batch.beta * batch.margin)
    for keep in (None, 1.0):
        ours = beta_dpo(batch, alpha=alpha, keep=keep)
        assert torch.equal(ours, dpo)
        a, b = (torch.autograd.grad(loss.sum(), batch.chosen_logps, retain_graph=True)[0] for loss in (ours, dpo))
        assert torch.equal(a, b)


def test_the_clamp_is_at_a_thousandth():
    batch = batch_of([-10.0, -30.0], known_of([-10.0, -30.0], mean=0.0))
    assert batch_beta(batch, alpha=0.6) == 1e-3  # unclamped: −5.5
    torch.testing.assert_close(beta_dpo(batch), logistic(1e-3 * batch.margin))


@pytest.mark.parametrize("margin", [-1e4, 1e4])
@pytest.mark.parametrize("moving", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_extreme_margins_stay_finite_in_float32(margin, moving, keep):
    margins = [margin, 0.0, 1.0, -1e4]
    batch = batch_of(margins, known_of(margins, moving, 1e-3, noise=[0.0, 0.5, 0.9, 0.1]), dtype=torch.float32)
    losses = beta_dpo(batch, keep=keep)
    (slopes,) = torch.autograd.grad(losses.sum(), batch.chosen_logps)
    assert losses.isfinite().all() and slopes.isfinite().all()
    if keep:
        assert kept_pairs(batch.global_margins, keep).sum() == 2


# The filter


def inclusion_probabilities(margins, mean, std, count):
    """Of each pair, by summing over every order in which `count` pairs can be drawn."""
    weight = [math.exp(-((u - mean) ** 2) / (2 * std**2)) for u in margins]
    total = [0.0] * len(margins)
    for order in itertools.permutations(range(len(margins)), count):
        probability, left = 1.0, sum(weight)
        for i in order:
            probability *= weight[i] / left
            left -= weight[i]
        for i in order:
            total[i] += probability
    return total


def test_pairs_are_kept_with_the_probability_of_the_paper():
    margins, mean, std, draws = [0.0, 0.8, -1.5, 2.0, 1.0], 0.3, 1.2, 20_000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5, dtype=F64)
    for _ in range(draws):
        noise = torch.rand(5, generator=generator, dtype=F64)
        counts += kept_pairs(GlobalMargins(torch.tensor(margins, dtype=F64), 0, mean, std, noise), 0.4)
    for kept, exact in zip((counts / draws).tolist(), inclusion_probabilities(margins, mean, std, 2), strict=True):
        assert abs(kept - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)


@pytest.mark.parametrize(("pairs_in_all", "keep", "count"), [(10, 0.7, 7), (100, 0.29, 29), (4, 0.2, 1), (7, 0.5, 3)])
def test_the_number_kept_is_the_integer_part_and_at_least_one(pairs_in_all, keep, count):
    noise = torch.rand(pairs_in_all, dtype=F64, generator=torch.Generator().manual_seed(1)).tolist()
    for std in (0.0, 1.0):
        known = known_of(list(range(pairs_in_all)), std=std, noise=noise)
        assert kept_pairs(known, keep).sum() == count
        batch = batch_of(list(map(float, range(pairs_in_all))), known)
        kept = kept_pairs(known, keep)
        expected = logistic(batch_beta(batch, keep=keep) * batch.margin)[kept].mean()
        torch.testing.assert_close(beta_dpo(batch, keep=keep).mean(), expected)


def test_the_noise_depends_on_seed_and_batch_and_leaves_torchs_generator_alone():
    margins = torch.zeros(8)
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def noises(seed, count=3):
        state = MovingMargins(seed)
        return [tuple(state.observe(margins, 0, training=True).noise.tolist()) for _ in range(count)]

    assert noises(0) == noises(0)
    assert len({*noises(0), *noises(1), *noises(2**32)}) == 9
    assert torch.equal(torch.get_rng_state(), before)


# The state


def test_it_moves_once_per_step_over_all_that_it_has_seen_and_evaluation_changes_nothing():
    state, (one, two) = MovingMargins(seed=0), torch.tensor([[1.0, 3.0], [5.0, 9.0]], dtype=F64)
    assert state.observe(one, 0, training=False).moving_mean == 2.0 and state.state() == {"moving": None, "draws": 0}
    assert [state.observe(margins, 0, training=True).moving_mean for margins in (one, two)] == [2.0, 2.0]
    known = state.observe(two, 0, training=False)
    assert (known.moving_mean, known.moving_std) == moving_statistics(one) and known.noise is None
    state.step()
    after = moving_statistics(torch.cat([one, two]), moving_statistics(one))
    assert state.state() == {"moving": after, "draws": 2}


def test_a_margin_that_is_not_finite_never_reaches_the_moving_state():
    good, bad = torch.tensor([1.0, 3.0], dtype=F64), torch.tensor([math.nan, 1.0, math.inf, 3.0], dtype=F64)
    assert moving_statistics(bad, (0.5, 2.0)) == moving_statistics(good, (0.5, 2.0))
    assert moving_statistics(bad[:1], (0.5, 2.0)) == (0.5, 2.0) and moving_statistics(bad[:1]) == (0.0, 0.0)
    state, clean = MovingMargins(seed=0), MovingMargins(seed=0)
    for first in (bad, good):
        state.observe(first, 0, training=True), clean.observe(good, 0, training=True)
        state.step(), clean.step()
    assert state.state() == clean.state()
    assert state.observe(good, 0, training=True).moving_mean == 2.0


def test_a_state_that_went_through_a_checkpoint_goes_on_as_it_would_have():
    margins = torch.tensor([1.0, 3.0, -2.0], dtype=F64)

    def seen(state):
        known = state.observe(margins, 0, training=True)
        state.step()
        return known.moving_mean, known.moving_std, known.noise.tolist()

    straight = MovingMargins(seed=3)
    seen(straight)
    saved = json.loads(json.dumps(straight.state()))
    resumed = MovingMargins(seed=3)
    resumed.restore(saved)
    assert seen(resumed) == seen(straight)
    fresh = MovingMargins(seed=3)
    fresh.restore(json.loads(json.dumps(MovingMargins(seed=3).state())))
    assert seen(fresh) == seen(MovingMargins(seed=3))


def test_the_metrics_are_of_the_loss_with_its_options():
    margins = [0.0, 2.0, 3.0, 5.0]
    batch = batch_of(margins, known_of(margins, mean=1.5, std=2.0))
    assert MovingMargins(seed=0, alpha=0.4).metrics(batch) == {
        "beta_dpo/beta": pytest.approx(0.7),
        "beta_dpo/clamped": 0.0,
        "beta_dpo/moving_mean": 1.5,
        "beta_dpo/moving_std": 2.0,
    }
    clamped = MovingMargins(seed=0, alpha=0.6).metrics(batch_of([-10.0, -30.0], known_of([-10.0, -30.0])))
    assert (clamped["beta_dpo/beta"], clamped["beta_dpo/clamped"]) == (1e-3, 1.0)
