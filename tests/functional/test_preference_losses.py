"""Preference losses: numbers worked by hand, loops in float64, laws, slopes, and the policies they lead to."""

import dataclasses
import inspect
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theorems import proves

from trl_ext.functional.preference import (
    MARGIN_LOSSES,
    PREFERENCE_LOSSES,
    GlobalMargins,
    PairBatch,
    identity,
    psipo,
    psipo_target,
)

F64 = torch.float64
ALL = sorted(name for name, row in PREFERENCE_LOSSES.items() if not row.psi)  # `psipo` has tests of its own
SOFT = [name for name in ALL if PREFERENCE_LOSSES[name].prob]


def batch_of(chosen, rejected, *, prob=1.0, beta=0.5, delta=None, lengths=(4, 8), dtype=F64, requires_grad=False):
    """Pairs with the given log-ratios; the reference has nonzero log-probs, so that forgetting it shows."""
    chosen, rejected = torch.as_tensor(chosen, dtype=dtype), torch.as_tensor(rejected, dtype=dtype)
    chosen, rejected = torch.broadcast_tensors(torch.atleast_1d(chosen), torch.atleast_1d(rejected))
    references = torch.full_like(chosen, -6.75), torch.full_like(chosen, -11.5)
    logps = [
        (r + ref).detach().requires_grad_(requires_grad) for r, ref in zip((chosen, rejected), references, strict=True)
    ]
    full = torch.full_like
    return PairBatch(
        *logps,
        *references,
        chosen_lengths=full(chosen, lengths[0]),
        rejected_lengths=full(chosen, lengths[1]),
        preference_prob=torch.as_tensor(prob, dtype=dtype).expand_as(chosen),
        beta=beta,
        reward_margin=None if delta is None else torch.as_tensor(delta, dtype=dtype).expand_as(chosen),
    )


def value_and_gradients(loss, batch):
    value = loss(batch)
    assert value.shape == batch.chosen_logps.shape
    chosen, rejected = torch.autograd.grad(
        value.sum(), (batch.chosen_logps, batch.rejected_logps), materialize_grads=True
    )
    return value.detach(), chosen, rejected


# Numbers worked by hand: l_w = -6, l_w^ref = -6.8, l_l = -12, l_l^ref = -11.6, n = 4 and 8, p = .7, Δ = 1.5

NUMBERS = [
    # entry, keyword arguments, mean over tokens, p, value, slope in l_w, slope in l_l
    ("psipo_identity", {}, False, 1.0, 0.040000, 0.400000, -0.400000),
    ("psipo_identity", {}, True, 1.0, 0.562500, -0.375000, 0.187500),
    ("psipo_identity", {}, False, 0.7, 0.640000, 1.600000, -1.600000),
    ("psipo_logit", {}, False, 0.7, 0.244625, -0.989191, 0.989191),
    ("gpo_logistic", {}, False, 1.0, 0.437488, -0.177172, 0.177172),
    ("gpo_logistic", {}, False, 0.7, 0.617488, -0.027172, 0.027172),
    ("gpo_logistic", {}, True, 0.7, 0.670099, -0.021099, 0.010549),
    ("gpo_hinge", {}, False, 0.7, 0.760000, -0.200000, 0.200000),
    ("gpo_squared", {}, False, 0.7, 0.880000, 0.200000, -0.200000),
    ("gpo_truncated_quadratic", {}, False, 0.7, 0.880000, 0.200000, -0.200000),
    ("gpo_exponential", {}, False, 0.7, 0.930804, 0.081234, -0.081234),
    ("gpo_savage", {}, False, 0.7, 0.212953, -0.012433, 0.012433),
    ("rpo_sq", {}, False, 0.7, 0.810000, -0.900000, 0.900000),
    ("rpo_bwd_kl", {}, False, 0.7, 0.071892, -0.085959, 0.085959),
    ("rpo_fwd_kl", {}, False, 0.7, 0.082835, -0.102953, 0.102953),
    ("odpo", {"alpha": 1.0}, False, 0.7, 0.600603, -0.225760, 0.225760),
    ("margin_dpo", {}, False, 0.7, 1.241154, -0.355475, 0.355475),
    ("dpop", {"lam": 50.0}, False, 0.7, 0.437488, -0.177172, 0.177172),
    ("length_dpo", {"alpha": 0.01}, False, 0.7, 0.451845, -0.181774, 0.181774),
    ("simpo", {"gamma": 1.0}, True, 0.7, 1.313262, -0.091382, 0.045691),
    ("rrhf", {}, True, 0.7, 1.5, -0.25, 0.0),  # means of -1.5 both: the order is not wrong
    ("rrhf", {"sft_weight": 0.5}, False, 0.7, 3.0, -0.5, 0.0),
    ("sppo", {}, False, 0.7, 0.160000, 0.800000, 0.0),
    ("cal_dpo", {"coefficient": 0.5}, False, 0.7, 0.463282, -0.431475, 0.831475),
    ("cal_dpo", {"coefficient": 1.0}, False, 0.7, 0.663282, -0.631475, 1.431475),
    ("chipo", {"bound": 1.0}, False, 0.7, 0.224886, -0.324801, 0.168195),
    ("beta_dpo", {"alpha": 2.0}, False, 0.7, 0.437488, -0.177172, 0.177172),  # the first batch: DPO
]


def numbers_batch(chosen_logp=-6.0, rejected_logp=-12.0, prob=0.7):
    tensor = lambda x, **options: torch.tensor([x], dtype=F64, **options)  # noqa: E731
    return PairBatch(
        tensor(chosen_logp, requires_grad=True),
        tensor(rejected_logp, requires_grad=True),
        tensor(-6.8),
        tensor(-11.6),
        tensor(4.0),
        tensor(8.0),
        preference_prob=tensor(prob),
        beta=0.5,
        reward_margin=tensor(1.5),
    )


@pytest.mark.parametrize(("name", "options", "mean", "prob", "value", "chosen", "rejected"), NUMBERS)
def test_numbers_worked_by_hand(name, options, mean, prob, value, chosen, rejected):
    def loss(batch):
        return PREFERENCE_LOSSES[name].function(batch.per_token() if mean else batch, **options)

    actual = torch.cat(value_and_gradients(loss, numbers_batch(prob=prob)))
    torch.testing.assert_close(actual, torch.tensor([value, chosen, rejected], dtype=F64), atol=6e-7, rtol=0)


@pytest.mark.parametrize(("lam", "value"), [(50.0, 7.200746), (5.0, 0.943249)])
def test_dpop_penalises_a_chosen_completion_that_falls(lam, value):
    batch = numbers_batch(chosen_logp=-7.1, rejected_logp=-12.5)
    assert PREFERENCE_LOSSES["dpop"].function(batch, lam=lam).item() == pytest.approx(value, abs=6e-7)


def test_rrhf_is_the_papers_ranking_and_likelihood_of_two_completions():
    """The sums over the completions with a lower and a higher reward, and the likelihood of the best one."""
    tokens = {1.0: [-0.5, -1.5, -4.0], 0.0: [-1.0, -0.25]}  # by reward: the better one is the less likely one
    mean = {reward: sum(logps) / len(logps) for reward, logps in tokens.items()}
    ranking = sum(max(0.0, mean[i] - mean[j]) for i in tokens for j in tokens if i < j)
    likelihood = -sum(tokens[max(tokens)])  # a sum in the paper: the mean times the length
    sums = [torch.tensor([sum(tokens[reward])], dtype=F64, requires_grad=True) for reward in (1.0, 0.0)]
    lengths = [torch.tensor([float(len(tokens[reward]))]) for reward in (1.0, 0.0)]
    batch = PairBatch(*sums, *sums, *lengths, torch.ones(1), beta=0.1).per_token()
    loss = PREFERENCE_LOSSES["rrhf"].function(batch, sft_weight=3.0)
    assert loss.item() == pytest.approx(ranking + likelihood) and ranking == pytest.approx(2.0 - 0.625)
    slopes = torch.autograd.grad(loss.sum(), sums)
    assert [slope.item() for slope in slopes] == pytest.approx([-1 / 3 - 1, 1 / 2])


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(25.0, 24.0), (24.5, 26.0), (30.0, 21.0), (500.0, 499.0), (21.0, -3.0)]
)
def test_chipo_keeps_the_margin_in_float32_beyond_a_log_ratio_of_20(chosen, rejected):
    loss = partial(PREFERENCE_LOSSES["chipo"].function, bound=10.0)
    single, double = (
        value_and_gradients(loss, batch_of(chosen, rejected, beta=0.1, dtype=dtype, requires_grad=True))
        for dtype in (torch.float32, F64)
    )
    for ours, exact in zip(single, double, strict=True):
        torch.testing.assert_close(ours.to(F64), exact, rtol=1e-4, atol=1e-7)
    if min(chosen, rejected) > 20:  # both exponentials are at their clamp, and the margin alone is left
        assert single[0].item() == pytest.approx(math.log1p(math.exp(-0.1 * (chosen - rejected))), rel=1e-5)
        assert single[1].item() == pytest.approx(-0.1 / (1 + math.exp(0.1 * (chosen - rejected))), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chipo", {"bound": -1.0}, "bound must be positive, got -1.0."),
        ("chipo", {"bound": math.nan}, "bound must be positive, got nan."),
        ("dpop", {"lam": -5.0}, "lam must be at least 0, got -5.0."),
        ("cal_dpo", {"coefficient": -0.5}, "coefficient must be at least 0, got -0.5."),
        ("rrhf", {"sft_weight": math.nan}, "sft_weight must be at least 0, got nan."),
    ],
)
def test_an_option_that_turns_a_loss_around_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        PREFERENCE_LOSSES[name].function(batch_of(1.0, 0.0), **options)


def test_a_psi_that_returns_a_number_is_refused():
    with pytest.raises(ValueError, match=r"to a tensor of that shape, got a float\."):
        psipo(batch_of(1.0, 0.0, prob=0.5), psi=math.log)


def test_every_entry_has_a_number_a_slope_and_a_loop():
    assert {case[0] for case in NUMBERS} == set(ALL) == set(LOOPS) == set(SLOPES)


# Loops over plain numbers, written from the papers; w and l are log-ratios


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def mixture(f):
    return lambda w, r, p, b, **_: p * f(b * (w - r)) + (1 - p) * f(b * (r - w))


LOOPS = {
    "psipo_identity": lambda w, r, p, b, **_: (w - r - (2 * p - 1) / (2 * b)) ** 2,
    "psipo_logit": lambda w, r, p, b, **_: (w - r - math.log(p / (1 - p)) / b) ** 2,
    "gpo_logistic": mixture(minus_log_sigmoid),
    "gpo_hinge": mixture(lambda t: max(0.0, 1 - t)),
    "gpo_squared": mixture(lambda t: (1 - t) ** 2),
    "gpo_exponential": mixture(lambda t: math.exp(-t) if t >= -20 else math.exp(20) * (1 - t - 20)),  # its tangent
    "gpo_truncated_quadratic": mixture(lambda t: max(0.0, 1 - t) ** 2),
    "gpo_savage": mixture(lambda t: sigmoid(-t) ** 2),
    "rpo_sq": lambda w, r, p, b, delta, **_: (b * (w - r) - delta) ** 2,
    "rpo_bwd_kl": lambda w, r, p, b, delta, **_: bernoulli_kl(sigmoid(delta), sigmoid(b * (w - r))),
    "rpo_fwd_kl": lambda w, r, p, b, delta, **_: bernoulli_kl(sigmoid(b * (w - r)), sigmoid(delta)),
    "odpo": lambda w, r, p, b, delta, **_: minus_log_sigmoid(b * (w - r) - math.log(max(delta, 1e-6))),
    "margin_dpo": lambda w, r, p, b, delta, **_: minus_log_sigmoid(b * (w - r) - delta),
    "dpop": lambda w, r, p, b, **_: minus_log_sigmoid(b * (w - r - 50 * max(0.0, -w))),
    "length_dpo": lambda w, r, p, b, n_w, n_r, **_: minus_log_sigmoid(b * (w - r) + 0.01 * (n_w - n_r)),
    "simpo": lambda w, r, p, b, logp_w, logp_r, **_: minus_log_sigmoid(b * (logp_w - logp_r) - 0.5),
    "rrhf": lambda w, r, p, b, logp_w, logp_r, **_: max(0.0, logp_r - logp_w) - logp_w,
    "sppo": lambda w, r, p, b, **_: (w - (p - 0.5) / b) ** 2 + (r + (p - 0.5) / b) ** 2,
    "chipo": lambda w, r, p, b, **_: minus_log_sigmoid(min(2.0, max(-2.0, b * (math.exp(w) + w - math.exp(r) - r)))),
    "cal_dpo": lambda w, r, p, b, **_: (
        minus_log_sigmoid(w - r) + 0.5 * ((w - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2)
    ),
    "beta_dpo": lambda w, r, p, b, **_: minus_log_sigmoid(b * (w - r)),  # the first batch; more in test_beta_dpo.py
}


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


log_ratios = st.floats(-8, 8, allow_nan=False)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(log_ratios, log_ratios, st.floats(0.02, 0.98), st.floats(0.05, 2.0), st.floats(-3, 3))
def test_loops_from_the_papers(name, chosen, rejected, prob, beta, delta):
    batch = batch_of(chosen, rejected, prob=prob, beta=beta, delta=delta, lengths=(3, 7))
    expected = LOOPS[name](
        chosen, rejected, prob, beta, delta=delta, n_w=3, n_r=7, logp_w=chosen - 6.75, logp_r=rejected - 11.5
    )
    assert PREFERENCE_LOSSES[name].function(batch).item() == pytest.approx(expected, rel=1e-7, abs=1e-8)


# Laws


@pytest.mark.parametrize("name", SOFT)
@settings(max_examples=40, deadline=None)
@given(log_ratios, log_ratios, st.floats(0.02, 0.98))
def test_swapping_the_completions_and_the_probability_changes_nothing(name, chosen, rejected, prob):
    one = value_and_gradients(
        PREFERENCE_LOSSES[name].function, batch_of(chosen, rejected, prob=prob, requires_grad=True)
    )
    other = batch_of(rejected, chosen, prob=1 - prob, requires_grad=True)
    swapped = value_and_gradients(PREFERENCE_LOSSES[name].function, other)
    for a, b in zip(one, (swapped[0], swapped[2], swapped[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-9)


# ∂L/∂l_w at w = l = 0 for p, β, Δ, and the log-probs of the completions
SLOPES = {
    "psipo_identity": lambda p, b, **_: -(2 * p - 1) / b,
    "psipo_logit": lambda p, b, **_: -2 * math.log(p / (1 - p)) / b,
    "gpo_logistic": lambda p, b, **_: -b * (p - 0.5),
    "gpo_hinge": lambda p, b, **_: -b * (2 * p - 1),
    "gpo_squared": lambda p, b, **_: -2 * b * (2 * p - 1),
    "gpo_exponential": lambda p, b, **_: -b * (2 * p - 1),
    "gpo_truncated_quadratic": lambda p, b, **_: -2 * b * (2 * p - 1),
    "gpo_savage": lambda p, b, **_: -b / 4 * (2 * p - 1),
    "rpo_sq": lambda p, b, delta, **_: -2 * b * delta,
    "rpo_bwd_kl": lambda p, b, delta, **_: -b * (sigmoid(delta) - 0.5),
    "rpo_fwd_kl": lambda p, b, delta, **_: -b * delta / 4,
    "odpo": lambda p, b, delta, **_: -b * sigmoid(math.log(delta)),
    "margin_dpo": lambda p, b, delta, **_: -b * sigmoid(delta),
    "dpop": lambda p, b, **_: -b / 2,  # at r_w = 0; torch's relu has slope 0 there
    "length_dpo": lambda p, b, n_w, n_r, **_: -b * sigmoid(-0.01 * (n_w - n_r)),
    "simpo": lambda p, b, **_: -b * sigmoid(0.5 - b * (11.5 - 6.75)),  # the reference's log-probs are not equal
    "rrhf": lambda p, b, **_: -1.0,  # the reference's log-probs are in the right order
    "sppo": lambda p, b, **_: -2 * (p - 0.5) / b,
    "chipo": lambda p, b, **_: -b,
    "cal_dpo": lambda p, b, **_: -0.5 - 0.5 / b,
    "beta_dpo": lambda p, b, **_: -b / 2,
}


@pytest.mark.parametrize("prob", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_slope_at_the_reference(name, prob):
    if name == "psipo_logit" and prob == 1.0:
        pytest.skip("infinite")
    batch = batch_of(0.0, 0.0, prob=prob, beta=0.3, delta=1.2, requires_grad=True)
    _, chosen, _ = value_and_gradients(PREFERENCE_LOSSES[name].function, batch)
    assert chosen.item() == pytest.approx(SLOPES[name](prob, 0.3, delta=1.2, n_w=4, n_r=8), abs=1e-9)
    if prob == 0.5 and name in SOFT and name != "sppo":
        assert chosen.item() == 0.0


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_extreme_log_ratios_stay_finite_in_float32(name, beta, prob):
    prob = min(max(prob, 0.01), 0.99) if name == "psipo_logit" else prob
    for delta in (-1e4, 0.0, 3.0, 1e4):
        for chosen in (-1e4, 0.0, 1e4):
            for rejected in (-1e4, 0.0, 1e4):
                batch = batch_of(
                    chosen, rejected, prob=prob, beta=beta, delta=delta, dtype=torch.float32, requires_grad=True
                )
                for tensor in value_and_gradients(PREFERENCE_LOSSES[name].function, batch):
                    assert tensor.isfinite().all(), (chosen, rejected, delta)


MINIMISERS = {
    "logistic": lambda p: math.log(p / (1 - p)),
    "hinge": lambda p: math.copysign(1.0, 2 * p - 1),
    "squared": lambda p: 2 * p - 1,
    "exponential": lambda p: math.log(p / (1 - p)) / 2,
    "truncated_quadratic": lambda p: 2 * p - 1,
    "savage": lambda p: math.log(p / (1 - p)),
}


@pytest.mark.parametrize("prob", [0.1, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_the_minimiser_of_each_margin_loss(name, prob):
    t = torch.linspace(-4, 4, 80_001, dtype=F64)
    losses = prob * MARGIN_LOSSES[name](t) + (1 - prob) * MARGIN_LOSSES[name](-t)
    if name == "hinge" and prob == 0.5:  # flat between -1 and 1
        assert losses[(t.abs() <= 1)].std() < 1e-12 and losses.min() == pytest.approx(1.0)
        return
    assert t[losses.argmin()].item() == pytest.approx(MINIMISERS[name](prob), abs=2e-4)


@pytest.mark.parametrize("name", sorted({*MARGIN_LOSSES} - {"savage"}))
def test_margin_losses_are_convex_and_fall_at_zero(name):
    t = torch.linspace(-40, 40, 4001, dtype=F64)
    values = MARGIN_LOSSES[name](t)
    second_difference = values[2:] - 2 * values[1:-1] + values[:-2]
    assert (second_difference >= -1e-6 * values[1:-1].abs()).all()
    assert values[2001] < values[2000] < values[1999]


def test_savage_is_bounded_by_one():
    t = torch.linspace(-1e4, 1e4, 10_001)
    assert MARGIN_LOSSES["savage"](t).max() <= 1.0


def test_the_tangent_of_the_exponential_begins_at_twenty():
    t = torch.tensor([-19.9, -20.0, -21.0, -1e4], dtype=F64, requires_grad=True)
    value = MARGIN_LOSSES["exponential"](t)
    (slope,) = torch.autograd.grad(value.sum(), t)
    e20 = math.exp(20)
    expected = torch.tensor([math.exp(19.9), e20, 2 * e20, 9981 * e20], dtype=F64)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)
    expected = torch.tensor([-math.exp(19.9), -e20, -e20, -e20], dtype=F64)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@pytest.mark.theorem(
    "Preference losses",
    "IPO with a soft label is the mixture of its two hard labels, but for a constant",
    paper="psipo",
    at_most=1e-12,
)
def test_ipo_by_mixture_and_by_target_differ_by_a_constant():
    ipo, tau = PREFERENCE_LOSSES["psipo_identity"].function, 0.3
    for prob in (0.2, 0.5, 0.9):
        batch = batch_of([0.7, -3.0], [0.1, 2.0], prob=prob, beta=tau, requires_grad=True)
        hard = [batch_of([0.7, -3.0], [0.1, 2.0], beta=tau), batch_of([0.1, 2.0], [0.7, -3.0], beta=tau)]
        by_mixture = prob * ipo(hard[0]) + (1 - prob) * ipo(hard[1])
        expected = by_mixture - prob * (1 - prob) / tau**2
        proves(ipo(batch), expected)


@pytest.mark.theorem(
    "Preference losses",
    "`gpo_squared` with β is 4τ² times `psipo_identity` with τ = β/2",
    paper="gpo",
    at_most=1e-12,
)
def test_gpo_squared_is_ipo_at_half_the_beta():
    chosen, rejected = torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    ours = PREFERENCE_LOSSES["gpo_squared"].function(batch_of(chosen, rejected, beta=0.6))
    ipo = PREFERENCE_LOSSES["psipo_identity"].function(batch_of(chosen, rejected, beta=0.3))
    proves(ours, 4 * 0.3**2 * ipo)


@pytest.mark.theorem(
    "Preference losses",
    "IPO over means of tokens, at equal lengths L and τ, is IPO over sums at τ/L, divided by L²",
    paper="psipo",
    at_most=1e-12,
)
@pytest.mark.parametrize("length", [1, 5, 40])
def test_the_mean_of_equal_lengths_needs_tau_times_the_length(length):
    ipo, tau = PREFERENCE_LOSSES["psipo_identity"].function, 2.0
    args = {"chosen": [3.0, -7.0], "rejected": [1.0, 2.0], "lengths": (length, length)}
    mean = ipo(batch_of(**args, beta=tau).per_token())
    proves(mean, ipo(batch_of(**args, beta=tau / length)) / length**2)


@pytest.mark.theorem(
    "Preference losses",
    "`rpo_bwd_kl` is the logistic loss at the soft label σ(Δr) less its entropy, and `rpo_sq` is β² "
    "times `psipo_logit` there",
    paper="rpo",
    at_most=1e-12,
)
def test_reward_aware_losses_are_soft_labels_in_disguise():
    delta, beta = torch.tensor([1.5, -0.3], dtype=F64), 0.4
    batch = batch_of([0.7, -3.0], [0.1, 2.0], prob=delta.sigmoid(), beta=beta, delta=delta)
    entropy = torch.distributions.Bernoulli(delta.sigmoid()).entropy()
    losses = {name: row.function for name, row in PREFERENCE_LOSSES.items()}
    proves(losses["rpo_bwd_kl"](batch), losses["gpo_logistic"](batch) - entropy)
    proves(losses["rpo_sq"](batch), beta**2 * losses["psipo_logit"](batch))


@pytest.mark.theorem(
    "Preference losses",
    "`dpop`, `length_dpo`, `odpo`, `beta_dpo` and `margin_dpo` without their terms are DPO",
    paper="dpo",
    at_most=0,
)
def test_options_of_zero_are_dpo():
    batch = batch_of([-0.7, 3.0], [0.1, 2.0], delta=0.0)
    dpo = PREFERENCE_LOSSES["gpo_logistic"].function(batch)
    for name, options in {
        "dpop": {"lam": 0.0},
        "length_dpo": {"alpha": 0.0},
        "odpo": {"alpha": 0.0},
        "beta_dpo": {"alpha": 0.0},
        "margin_dpo": {},
    }.items():
        proves(PREFERENCE_LOSSES[name].function(batch, **options), dpo)


@pytest.mark.theorem(
    "Preference losses",
    "`rpo_sq` with a utility as reward reaches the closed form of that utility, also where Ψ is not antisymmetric",
    paper="rpo",
    at_most=1e-06,
)
def test_any_per_completion_utility_is_exact_as_a_reward():
    # (u − (g(y_w) − g(y_l)) / τ)² is τ⁻² · rpo_sq, also for a Ψ that is not antisymmetric.
    problem = intransitive()
    utility = (problem["table"].square() * problem["mu"]).sum(1)
    first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(6)] * 2, indexing="ij"))

    def with_scores(batch):
        return PREFERENCE_LOSSES["rpo_sq"].function(
            dataclasses.replace(batch, reward_margin=utility[first] - utility[second])
        )

    policy = optimum(with_scores, **problem)
    proves(policy, closed_form(torch.square, **problem))


@pytest.mark.parametrize("name", [name for name in ALL if PREFERENCE_LOSSES[name].scores])
def test_a_missing_reward_is_refused(name):
    with pytest.raises(ValueError, match="the pairs have no reward_margin"):
        PREFERENCE_LOSSES[name].function(batch_of(0.0, 0.0))


@pytest.mark.theorem(
    "Preference losses",
    "Any Ψ acts through Ψ(p) − Ψ(1 − p): the square is the identity",
    paper="psipo",
    at_most=1e-12,
)
def test_any_psi_acts_through_its_antisymmetric_part():
    batch = batch_of([0.7, -3.0, 1.0], [0.1, 2.0, 1.0], prob=[0.2, 0.9, 1.0])
    proves(psipo(batch, psi=torch.square), psipo(batch, psi=identity))


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_an_infinite_psi_refuses_hard_labels_and_says_why(prob):
    batch = batch_of([1.0, 1.0], [0.0, 0.0], prob=[0.3, prob])
    with pytest.raises(ValueError, match=f"probability of {prob:g}.*a finite Ψ collapses to IPO and an infinite one"):
        PREFERENCE_LOSSES["psipo_logit"].function(batch)
    with pytest.raises(ValueError, match="Ψ is infinite"):
        psipo(batch, psi=torch.log)
    clamped = PREFERENCE_LOSSES["psipo_logit"].function(batch, eps=0.1)
    soft = batch_of([1.0, 1.0], [0.0, 0.0], prob=[0.3, min(max(prob, 0.1), 0.9)])
    torch.testing.assert_close(clamped, PREFERENCE_LOSSES["psipo_logit"].function(soft))
    with pytest.raises(ValueError, match="eps must be between 0 and"):
        PREFERENCE_LOSSES["psipo_logit"].function(batch, eps=0.5)


def test_the_target_of_hard_labels_is_one_over_two_tau_not_tau_over_two():
    assert psipo_target(batch_of(0.0, 0.0, beta=0.1), psi=identity).item() == pytest.approx(5.0)
    near_one = batch_of(0.0, 0.0, prob=1 - 1e-6, beta=0.1)
    assert psipo_target(near_one, psi=torch.logit).item() == pytest.approx(138.155, abs=1e-3)


def test_sums_and_means_differ_in_logps_and_ratios_alike():
    batch = batch_of([2.0], [-3.0], lengths=(4, 8))
    mean = batch.per_token()
    torch.testing.assert_close(mean.chosen_logps, batch.chosen_logps / 4)
    torch.testing.assert_close(mean.margin, torch.tensor([0.5 + 0.375], dtype=F64))
    torch.testing.assert_close(mean.chosen_logratios, mean.chosen_logps - mean.ref_chosen_logps)
    assert batch.margin.item() == 5.0  # unchanged


@pytest.mark.parametrize("name", ALL)
def test_options_are_keywords_and_have_defaults(name):
    first, *rest = inspect.signature(PREFERENCE_LOSSES[name].function).parameters.values()
    assert first.name == "batch"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)


def test_pairs_of_different_shapes_are_refused_by_the_name_of_the_field():
    pairs = batch_of([1.0, 2.0], 0.0)
    for name, value in {
        "preference_prob": torch.ones(1),
        "reward_margin": torch.ones(2, 1),
        "rejected_lengths": torch.ones(3),
        "chosen_logratios": torch.ones(()),
    }.items():
        with pytest.raises(ValueError, match=rf"PairBatch.{name} has shape .*; expected one number per pair, \(2,\)"):
            dataclasses.replace(pairs, **{name: value})
    with pytest.raises(ValueError, match=r"PairBatch.chosen_logps has shape \(\); expected one number per pair"):
        dataclasses.replace(pairs, chosen_logps=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"PairBatch.chosen_logps has shape \(2, 1\)"):
        dataclasses.replace(pairs, chosen_logps=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"GlobalMargins.margins has shape \(2, 1\); expected \(N,\)"):
        GlobalMargins(torch.ones(2, 1), 0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"GlobalMargins.noise has shape \(3,\); expected that of margins, \(2,\)"):
        GlobalMargins(torch.ones(2), 0, 0.0, 1.0, torch.ones(3))


@pytest.mark.parametrize("psi", [lambda p: 0.5, lambda p: p.sum()], ids=["a number", "a scalar"])
def test_a_psi_that_returns_something_else_is_refused(psi):
    with pytest.raises(ValueError, match="Ψ must map a tensor of probabilities"):
        psipo(batch_of([1.0, 2.0], 0.0, prob=0.7), psi=psi)


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_the_facts_of_a_row_are_those_of_its_function(name):
    row = PREFERENCE_LOSSES[name]
    function = partial(row.function, psi=identity) if row.psi else row.function
    pairs = {"delta": 1.5, "prob": 0.7, "lengths": (4, 8)}
    batch = batch_of([0.7, -1.0], [0.1, 2.0], **pairs)
    value = function(batch)

    def changes(**fields):
        return not torch.equal(function(dataclasses.replace(batch, **fields)), value)

    assert changes(preference_prob=batch.preference_prob - 0.2) == row.prob
    assert changes(reward_margin=batch.reward_margin + 1) == row.scores
    assert changes(chosen_logratios=batch.chosen_logratios + 0.3) == row.reference
    assert bool(row.method) == bool(row.paper)
    if row.target is not None:
        target = row.target(batch, **({"psi": identity} if row.psi else {}))
        at_target = dataclasses.replace(batch, chosen_logratios=batch.rejected_logratios + target)
        torch.testing.assert_close(function(at_target), torch.zeros(2, dtype=F64), atol=1e-12, rtol=0)


# Policies they lead to: three completions, every pair (i, j) with probability μ_i μ_j, p(i ≻ j) known

P = torch.tensor([[0.5, 0.8, 0.6], [0.2, 0.5, 0.9], [0.4, 0.1, 0.5]], dtype=F64)
MU = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
REFERENCE = torch.tensor([0.3, -0.2, 0.1], dtype=F64).log_softmax(0)


def optimum(loss, table=P, mu=MU, reference=REFERENCE, tau=0.5, hard=False):
    """The policy that minimises the loss over all pairs; `hard`: the label is drawn from p, both outcomes summed."""
    first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(len(mu))] * 2, indexing="ij"))
    logits = reference.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def mean_loss(w, r, prob):
        logps = logits.log_softmax(0)
        ones = torch.ones(len(w), dtype=F64)
        return loss(
            PairBatch(logps[w], logps[r], reference[w], reference[r], ones, ones, preference_prob=prob, beta=tau)
        )

    def closure():
        optimizer.zero_grad()
        prob = table[first, second]
        if hard:
            ones = torch.ones_like(prob)
            losses = prob * mean_loss(first, second, ones) + (1 - prob) * mean_loss(second, first, ones)
        else:
            losses = mean_loss(first, second, prob)
        total = (mu[first] * mu[second] * losses).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return logits.detach().softmax(0)


def closed_form(psi, table=P, mu=MU, reference=REFERENCE, tau=0.5):
    """π* ∝ π_ref exp(E_μ[Ψ(p)] / τ)."""
    return (reference + (psi(table) * mu).sum(1) / tau).softmax(0)


@pytest.mark.theorem(
    "Preference losses",
    "The minimum of IPO is its closed form, from soft labels and from sampled ones",
    paper="psipo",
    at_most=1e-06,
)
@pytest.mark.parametrize("hard", [False, True])
def test_ipo_reaches_the_printed_policy_from_soft_and_from_sampled_labels(hard):
    expected = torch.tensor([0.528869, 0.223797, 0.247334], dtype=F64)
    policy = optimum(PREFERENCE_LOSSES["psipo_identity"].function, hard=hard)
    torch.testing.assert_close(policy, expected, atol=1e-6, rtol=0)
    proves(policy, closed_form(identity))


def test_logit_reaches_the_printed_policy():
    expected = torch.tensor([0.840898, 0.113648, 0.045454], dtype=F64)
    torch.testing.assert_close(optimum(PREFERENCE_LOSSES["psipo_logit"].function), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(closed_form(torch.logit), expected, atol=1e-6, rtol=0)


def intransitive(actions=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(actions, actions, generator=generator, dtype=F64).mul(0.9).add(0.05).triu(1)
    table = upper + (1 - upper).t().tril(-1) + 0.5 * torch.eye(actions, dtype=F64)
    wins = (table > 0.5).double()
    assert torch.trace(wins @ wins @ wins) > 0, "otherwise no cycle a > b > c > a"
    mu, reference = torch.rand(2, actions, generator=generator, dtype=F64).add(0.2)
    return {"table": table, "mu": mu / mu.sum(), "reference": reference.log_softmax(0), "tau": 0.3}


@pytest.mark.theorem(
    "Preference losses",
    "The minimum of ΨPO is the policy π ∝ π_ref exp(E[Ψ]/τ) for antisymmetric Ψ, with intransitive preferences",
    paper="psipo",
    at_most=1e-06,
)
@pytest.mark.parametrize("psi", [identity, torch.logit, lambda p: torch.sin(3 * (p - 0.5))], ids=["p", "logit", "sin"])
def test_an_antisymmetric_psi_reaches_its_closed_form_with_intransitive_preferences(psi):
    problem = intransitive()
    policy = optimum(lambda batch: psipo(batch, psi=psi), **problem)
    proves(policy, closed_form(psi, **problem))


@pytest.mark.parametrize("psi", [torch.square, torch.log, lambda p: -torch.log(1 - p)], ids=["square", "log", "-log"])
def test_another_psi_misses_its_closed_form(psi):
    problem = intransitive()
    policy = optimum(lambda batch: psipo(batch, psi=psi), **problem)
    assert (policy - closed_form(psi, **problem)).abs().max() > 0.01


@pytest.mark.theorem(
    "Preference losses",
    "The squared margin loss reaches the closed form; the logistic one does not where preferences are intransitive",
    paper="gpo",
    at_most=1e-06,
)
def test_the_squared_margin_loss_is_exact_and_the_logistic_is_not():
    problem = intransitive()
    squared = {**problem, "tau": 2 * problem["tau"]}  # β = 2τ
    exact = closed_form(identity, **problem)
    proves(optimum(PREFERENCE_LOSSES["gpo_squared"].function, **squared), exact)
    off = optimum(PREFERENCE_LOSSES["gpo_logistic"].function, **problem) - closed_form(torch.logit, **problem)
    assert off.abs().max() > 0.005


def test_deterministic_preferences_leave_ipo_near_the_reference_and_let_dpo_collapse():
    table = torch.tensor([[0.5, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5]], dtype=F64)
    policy = optimum(PREFERENCE_LOSSES["psipo_identity"].function, table=table)
    expected = torch.tensor([0.668600, 0.182215, 0.149185], dtype=F64)
    torch.testing.assert_close(policy, expected, atol=1e-6, rtol=0)
    assert optimum(PREFERENCE_LOSSES["gpo_logistic"].function, table=table)[2] < 1e-6
