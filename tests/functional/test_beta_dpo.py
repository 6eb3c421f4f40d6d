"""β-DPO: a β of the batch of all processes, its moving margin, its filter, and both in interrupted runs."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import logged, weights
from tiny.dpo import build, pairs

from trl_ext.functional.preference_losses import (
    GlobalMargins,
    PairBatch,
    batch_beta,
    beta_dpo,
    kept_pairs,
    logistic,
    moving_statistics,
)
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.dpo.beta_dpo import MovingMargin

F64 = torch.float64
OURS = (DPOTrainer, DPOConfig)
TRLS = (trl.DPOTrainer, trl.DPOConfig)


def batch_of(margins, everyone=None, beta=0.5, dtype=F64):
    """Pairs with the given margins, which lie in the chosen completions."""
    chosen = torch.tensor(margins, dtype=dtype).requires_grad_()
    zeros, ones = torch.zeros_like(chosen).detach(), torch.ones_like(chosen).detach()
    return PairBatch(chosen, zeros, zeros, zeros, ones, ones, prob=ones, beta=beta, everyone=everyone)


def everyone_of(margins, mean=0.0, std=1.0, first=0, noise=None):
    noise = None if noise is None else torch.tensor(noise, dtype=F64)
    return GlobalMargins(torch.tensor(margins, dtype=F64), first, mean, std, noise)


# Numbers worked by hand


def test_the_beta_and_the_loss_worked_by_hand():
    # Process 1 of 2 holds 3 and 5 of the margins 0, 2, 3, 5; M₀ = 1.5, so β = .5 (1 + .4 (2.5 − 1.5)) = .7.
    batch = batch_of([3.0, 5.0], everyone_of([0.0, 2.0, 3.0, 5.0], mean=1.5, first=2))
    assert batch_beta(batch, alpha=0.4) == pytest.approx(0.7, abs=1e-12)
    losses = beta_dpo(batch, alpha=0.4)
    expected = torch.tensor([math.log1p(math.exp(-2.1)), math.log1p(math.exp(-3.5))], dtype=F64)
    torch.testing.assert_close(losses.detach(), expected)
    (slopes,) = torch.autograd.grad(losses.sum(), batch.chosen_logps)  # −β σ(−βu): none through β
    torch.testing.assert_close(slopes, -0.7 * torch.tensor([-2.1, -3.5], dtype=F64).sigmoid())


def test_the_filter_worked_by_hand():
    # With M₀ = 0 and s = 1 the log-weights are 0, −2, −8, −.5; Gumbel noise of ½ is .3665 for each, of 1e-9 −3.0313.
    margins = [0.0, 2.0, 4.0, -1.0]
    equal = everyone_of(margins, noise=[0.5] * 4)
    assert kept_pairs(equal, 0.5).tolist() == [True, False, False, True]
    assert kept_pairs(everyone_of(margins, noise=[1e-9, 0.5, 0.5, 0.5]), 0.5).tolist() == [False, True, False, True]
    batch = batch_of(margins[2:], dataclasses.replace(equal, first=2))
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
    state, moving = MovingMargin(seed=0), None
    for margins in batches:
        mean = sum(margins) / len(margins)
        moving = mean if moving is None else moving
        expected_beta = max(beta * (1 + alpha * (mean - moving)), 1e-3)
        batch = batch_of(margins, state(torch.tensor(margins, dtype=F64), first=0, training=True), beta)
        assert batch_beta(batch, alpha=alpha) == pytest.approx(expected_beta, rel=1e-9, abs=1e-12)
        for loss, u in zip(beta_dpo(batch, alpha=alpha).tolist(), margins, strict=True):
            t = expected_beta * u
            assert loss == pytest.approx(max(-t, 0) + math.log1p(math.exp(-abs(t))), rel=1e-7, abs=1e-12)
        state.step()
        moving = 0.9 * moving + 0.1 * mean


@settings(max_examples=30, deadline=None)
@given(margin_lists, st.floats(-5, 5), st.floats(-20, 20), st.floats(0, 2))
def test_a_constant_on_every_margin_and_on_their_moving_mean_leaves_beta_alone(margins, moving, shift, alpha):
    here = batch_beta(batch_of(margins, everyone_of(margins, moving)), alpha=alpha)
    shifted = [u + shift for u in margins]
    there = batch_beta(batch_of(shifted, everyone_of(shifted, moving + shift)), alpha=alpha)
    assert there == pytest.approx(here, abs=1e-9)


def test_swapping_the_completions_mirrors_beta_about_its_start():
    margins = [1.0, -2.0, 4.0]
    here = batch_beta(batch_of(margins, everyone_of(margins, 0.5)), alpha=0.3)
    swapped = [-u for u in margins]
    there = batch_beta(batch_of(swapped, everyone_of(swapped, -0.5)), alpha=0.3)
    assert here - 0.5 == pytest.approx(0.5 - there) and here != there


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_without_slope_or_without_a_deviation_it_is_dpo_to_the_bit(alpha):
    margins = [0.3, -1.7, 2.9] if alpha == 0.0 else [1.25, 1.25, 1.25]
    moving = 7.0 if alpha == 0.0 else 1.25
    batch = batch_of(margins, everyone_of(margins, moving), dtype=torch.float32)
    dpo = logistic(batch.beta * batch.margin)
    for keep in (None, 1.0):
        ours = beta_dpo(batch, alpha=alpha, keep=keep)
        assert torch.equal(ours, dpo)
        a, b = (torch.autograd.grad(loss.sum(), batch.chosen_logps, retain_graph=True)[0] for loss in (ours, dpo))
        assert torch.equal(a, b)


def test_the_clamp_is_at_a_thousandth():
    batch = batch_of([-10.0, -30.0], everyone_of([-10.0, -30.0], mean=0.0))
    assert batch_beta(batch, alpha=0.6) == 1e-3  # unclamped: −5.5
    torch.testing.assert_close(beta_dpo(batch), logistic(1e-3 * batch.margin))


@pytest.mark.parametrize("margin", [-1e4, 1e4])
@pytest.mark.parametrize("moving", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_extreme_margins_stay_finite_in_float32(margin, moving, keep):
    margins = [margin, 0.0, 1.0, -1e4]
    batch = batch_of(margins, everyone_of(margins, moving, 1e-3, noise=[0.0, 0.5, 0.9, 0.1]), dtype=torch.float32)
    losses = beta_dpo(batch, keep=keep)
    (slopes,) = torch.autograd.grad(losses.sum(), batch.chosen_logps)
    assert losses.isfinite().all() and slopes.isfinite().all()
    if keep:
        assert kept_pairs(batch.everyone, keep).sum() == 2


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
        everyone = everyone_of(list(range(pairs_in_all)), std=std, noise=noise)
        assert kept_pairs(everyone, keep).sum() == count
        batch = batch_of(list(map(float, range(pairs_in_all))), everyone)
        kept = kept_pairs(everyone, keep)
        expected = logistic(batch_beta(batch, keep=keep) * batch.margin)[kept].mean()
        torch.testing.assert_close(beta_dpo(batch, keep=keep).mean(), expected)


def test_the_noise_depends_on_seed_and_batch_and_leaves_torchs_generator_alone():
    margins = torch.zeros(8)
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def noises(seed, count=3):
        state = MovingMargin(seed)
        return [tuple(state(margins, 0, training=True).noise.tolist()) for _ in range(count)]

    assert noises(0) == noises(0)
    assert len({*noises(0), *noises(1), *noises(2**32)}) == 9
    assert torch.equal(torch.get_rng_state(), before)


# The trainer


def trained(classes, model, folder, **options):
    trainer = build(*classes, model, folder, **{"loss_type": ["beta_dpo"], "kind": "reference", **options})
    trainer.train()
    return trainer


def assert_equal_weights(ours, theirs):
    for name, weight in weights(theirs).items():
        assert torch.equal(weights(ours)[name], weight), name


FILTER = {"loss_kwargs": {"beta_dpo": {"alpha": 0.1, "keep": 0.5}}}


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [("sigmoid", {}), ("sigmoid", {"kind": "lora"}), ("sigmoid_norm", {"logp_reduction": "mean"})],
    ids=["sum", "LoRA", "mean"],
)
def test_without_slope_it_trains_as_sigmoid_does_bit_for_bit(tiny_model, tmp_path, loss_type, options):
    shared = {"kind": options.get("kind", "reference"), "gradient_accumulation_steps": 2}
    theirs = trained(TRLS, tiny_model, tmp_path, loss_type=[loss_type], **shared)
    ours = trained(OURS, tiny_model, tmp_path, **{**shared, "loss_kwargs": {"beta_dpo": {"alpha": 0.0}}, **options})
    assert_equal_weights(ours, theirs)
    for our_entry, their_entry in zip(logged(ours), logged(theirs), strict=True):
        assert {name: our_entry[name] for name in ("loss", "grad_norm", "rewards/margins")} == {
            name: their_entry[name] for name in ("loss", "grad_norm", "rewards/margins")
        }
        assert our_entry["beta_dpo/beta"] == 0.1


def test_a_slope_changes_the_run(tiny_model, tmp_path):
    flat = trained(OURS, tiny_model, tmp_path, loss_kwargs={"beta_dpo": {"alpha": 0.0}})
    steep = trained(OURS, tiny_model, tmp_path, loss_kwargs={"beta_dpo": {"alpha": 0.1}})
    assert any(not torch.equal(weight, weights(flat)[name]) for name, weight in weights(steep).items())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_beta_follows_the_logged_margins(tiny_model, tmp_path, reduction):
    options = {"loss_kwargs": {"beta_dpo": {"alpha": 0.2}}, "max_steps": 6, "logp_reduction": reduction}
    trainer = trained(OURS, tiny_model, tmp_path, **options)
    moving, betas = None, []
    unit = "_per_token" if reduction == "mean" else ""
    names = ("beta_dpo/beta", "beta_dpo/moving_mean", "beta_dpo/clamped")
    for chosen, rejected, beta, moving_mean, clamped in logged(
        trainer, f"logratios/chosen{unit}", f"logratios/rejected{unit}", *names
    ):
        margin = chosen - rejected
        moving = margin if moving is None else moving
        assert moving_mean == pytest.approx(moving, rel=1e-4, abs=1e-5)
        assert beta == pytest.approx(max(0.1 * (1 + 0.2 * (margin - moving)), 1e-3), rel=1e-4)
        assert clamped == float(beta == 1e-3)
        moving = 0.9 * moving + 0.1 * margin
        betas.append(beta)
    assert trainer._moving_margin.moving[0] == pytest.approx(moving, rel=1e-4)
    assert betas[0] == 0.1 and len({*betas}) == 6


def test_the_clamp_is_logged(tiny_model, tmp_path):
    trainer = trained(OURS, tiny_model, tmp_path, loss_kwargs={"beta_dpo": {"alpha": 1e3}}, max_steps=6)
    betas = [beta for (beta,) in logged(trainer, "beta_dpo/beta")]
    assert [clamped for (clamped,) in logged(trainer, "beta_dpo/clamped")] == [float(beta == 1e-3) for beta in betas]
    assert 1e-3 in betas and max(betas) > 0.1


def test_it_moves_once_per_optimizer_step_over_all_its_micro_batches(tiny_model, tmp_path, monkeypatch):
    windows, step = [], MovingMargin.step

    def recorded(state):
        windows.append((state.moving, state._window))
        step(state)

    monkeypatch.setattr(MovingMargin, "step", recorded)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer = trained(OURS, tiny_model, tmp_path, **options)
    (first, one), (second, two) = windows
    assert [len(margins) for margins in (*one, *two)] == [2] * 8
    assert first == moving_statistics(one[0])
    assert second == moving_statistics(torch.cat(one), first)
    assert trainer._moving_margin.moving == moving_statistics(torch.cat(two), second)
    assert trainer._moving_margin.draws == 8
    means = [entry["beta_dpo/moving_mean"] for entry in logged(trainer)]
    assert means == pytest.approx([first[0], second[0]])  # constant inside a step


def test_evaluation_changes_nothing_and_keeps_every_pair(tiny_model, tmp_path):
    trainer = trained(OURS, tiny_model, tmp_path, **FILTER)
    state = trainer._moving_margin
    before = (state.moving, state.draws, len(state._window))
    rows = pairs(4)
    metrics = trainer.evaluate(rows)
    assert (state.moving, state.draws, len(state._window)) == before
    assert metrics["eval_beta_dpo/moving_mean"] == before[0][0]
    margin = metrics["eval_rewards/margins"] / 0.1
    assert metrics["eval_beta_dpo/beta"] == pytest.approx(
        max(0.1 * (1 + 0.1 * (margin - before[0][0])), 1e-3), rel=1e-4
    )
    fresh = build(*OURS, tiny_model, tmp_path, loss_type=["beta_dpo"], kind="reference", **FILTER)
    theirs = build(*TRLS, tiny_model, tmp_path, loss_type=["sigmoid"], kind="reference")
    assert fresh.evaluate(rows)["eval_loss"] == theirs.evaluate(rows)["eval_loss"]  # before training: β
    assert fresh._moving_margin.moving is None


@pytest.mark.parametrize("options", [{}, FILTER], ids=["", "a filter"])
def test_an_interrupted_run_continues_bit_for_bit(tiny_model, tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **options}
    options = {"per_device_train_batch_size": 2, **options}
    whole = trained(OURS, tiny_model, tmp_path / "out", **options)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = json.loads((checkpoint / "beta_dpo.json").read_text())
    assert saved["draws"] == 4 and len(saved["moving"]) == 2
    resumed = build(*OURS, tiny_model, tmp_path / "out", loss_type=["beta_dpo"], kind="reference", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert resumed._moving_margin.moving == whole._moving_margin.moving
    assert_equal_weights(resumed, whole)
    # And the state matters: without it the run is another.
    (checkpoint / "beta_dpo.json").unlink()
    forgetful = build(*OURS, tiny_model, tmp_path / "out", loss_type=["beta_dpo"], kind="reference", **options)
    with pytest.warns(UserWarning, match=r"checkpoint-2 holds no moving margin of beta_dpo; it starts at the next"):
        forgetful.train(resume_from_checkpoint=str(checkpoint))
    assert any(not torch.equal(weight, weights(whole)[name]) for name, weight in weights(forgetful).items())


def test_the_seed_decides_what_the_filter_keeps(tiny_model, tmp_path):
    shared = {**FILTER, "data_seed": 7, "max_steps": 3}
    one, same, other = (trained(OURS, tiny_model, tmp_path, seed=seed, **shared) for seed in (1, 1, 2))
    assert_equal_weights(one, same)
    assert any(not torch.equal(weight, weights(one)[name]) for name, weight in weights(other).items())


def test_other_losses_write_no_state(tiny_model, tmp_path):
    trained(OURS, tiny_model, tmp_path, loss_type=["gpo_logistic"], max_steps=1, save_strategy="steps", save_steps=1)
    assert not (tmp_path / "checkpoint-1" / "beta_dpo.json").exists()
