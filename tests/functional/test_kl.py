"""KL estimators: worked numbers, every cell of the gradient table by enumeration, extremes, and the controller."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kl_enumeration import (
    COMPLETIONS,
    FORMS,
    POLICY,
    REFERENCE,
    SAMPLER,
    TERMS,
    Chain,
    bias_and_variance,
    expected_gradient,
    gradient_variance,
    kl,
    kl_gradient,
    plain_k2,
    table,
    table_of_completions,
    tensor,
)
from theorems import proves

from trl_ext.functional.kl import KL_ESTIMATORS, k1, k2, k3, kl_in_loss, kl_of_completions, later_kl, next_beta

F64 = torch.float64
LOGPS = torch.tensor([-1.2, -2.5, -0.8, -0.3], dtype=F64)
REF = torch.tensor([-1.3, -2.0, -0.9, -1.5], dtype=F64)
OLD = torch.tensor([-1.3, -2.4, -0.8, -0.4], dtype=F64)


def close(actual, expected, atol=1e-6, rtol=0.0):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=rtol)


def value_and_slope(function, logps=LOGPS):
    logps = logps.clone().requires_grad_()
    value = function(logps)
    return value.detach(), torch.autograd.grad(value.sum(), logps)[0]


# Worked numbers


@pytest.mark.parametrize(
    ("estimator", "values", "total", "slopes"),
    [
        (k1, [0.1, -0.5, 0.1, 1.2], 0.9, [1, 1, 1, 1]),
        (k2, [0.005, 0.125, 0.005, 0.72], 0.855, [0.1, -0.5, 0.1, 1.2]),
        (k3, [0.00483742, 0.14872127, 0.00483742, 0.50119421], 0.65959032,
         [0.09516258, -0.64872127, 0.09516258, 0.69880579]),
    ],
)  # fmt: skip
def test_four_tokens(estimator, values, total, slopes):
    value, slope = value_and_slope(lambda logps: estimator(logps, REF))
    close(value, values)
    close(value.sum(), total)
    close(slope, slopes)


@pytest.mark.parametrize(
    ("estimator", "total", "slopes"),
    [
        (k1, 1.08430348, [1.21568801, 0.45241871, 1.1, 2.43137602]),
        (k2, 0.91935359, [0.11051709, -0.45241871, 0.1, 1.32620510]),
        (k3, 0.69865743, [0.11051709, -0.45241871, 0.1, 1.32620510]),
    ],
)
def test_four_tokens_off_policy(estimator, total, slopes):
    value, slope = value_and_slope(lambda logps: kl_in_loss(estimator, logps, REF, OLD, torch.ones(4)))
    close(value.sum(), total)
    close(slope, slopes)


def test_the_direction_of_k3_is_reference_over_policy():
    # With the ratio upside down it would estimate chi-square minus KL: 0.3395, not 0.2238.
    policy, reference = tensor(POLICY), tensor(REFERENCE)
    close((policy * k3(policy.log(), reference.log())).sum(), 0.223805)
    close((policy * k3(reference.log(), policy.log())).sum(), 0.339529)


# Values and gradients, by enumeration


@pytest.mark.parametrize(("estimator", "expected"), [(k1, 0.223805), (k2, 0.265479), (k3, 0.223805)])
def test_expected_value(estimator, expected):
    policy, reference = tensor(POLICY), tensor(REFERENCE)
    close((policy * estimator(policy.log(), reference.log())).sum(), expected)


@pytest.mark.theorem(
    "KL",
    "The expected values of k1 and k3 are the KL (enumeration); that of k2 is not",
    paper="kl_approx",
    at_most=1e-12,
)
@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator):
    policy, reference = tensor(POLICY), tensor(REFERENCE)
    proves((policy * estimator(policy.log(), reference.log())).sum(), kl(policy, reference))


REVERSE, FORWARD, ZERO = [0.346243, -0.220389, -0.125854], [0.3, -0.2, -0.1], [0.0, 0.0, 0.0]
CELLS = {  # term: (on-policy, off-policy)
    "k1 in the loss": (ZERO, [-0.1, 0.1, 0.0]),
    "k2 in the loss": (REVERSE, [0.325970, -0.228658, -0.097312]),
    "k3 in the loss": (FORWARD, None),
    "|d| in the loss": (None, None),
    "ratio · k1 in the loss": (REVERSE, REVERSE),
    "ratio · k2 in the loss, ratio attached": ([0.423401, -0.260891, -0.162510],) * 2,
    "ratio · k2 in the loss, ratio detached": (REVERSE, REVERSE),
    "ratio · k3 in the loss": (REVERSE, REVERSE),
    "ratio · k1 in the loss, ratio detached": (ZERO, ZERO),
    "ratio · k3 in the loss, ratio detached": (FORWARD, FORWARD),
    "k1 in the reward": (REVERSE, REVERSE),
    "k2 in the reward": ([0.077158, -0.040502, -0.036656],) * 2,
    "k3 in the reward": ([0.046243, -0.020389, -0.025854],) * 2,
}


@pytest.mark.parametrize("label", TERMS)
def test_every_cell_of_the_gradient_table(label):
    on, off = (expected_gradient(TERMS[label][0], sampler=s) for s in (POLICY, SAMPLER))
    expected_on, expected_off = CELLS[label]
    if expected_on is not None:
        close(on, expected_on)
    if expected_off is not None:
        close(off, expected_off)
    biased = [g for g, e in ((on, expected_on), (off, expected_off)) if e is None]
    for gradient in biased:
        assert (gradient - kl_gradient()).norm() > 0.02, "a cell without number is one of a biased term"


def test_the_gradients_of_the_table_are_those_of_the_two_divergences():
    close(kl_gradient(), REVERSE)
    close(kl_gradient(forward=True), FORWARD)


@pytest.mark.parametrize(
    ("label", "on", "off"),
    [
        ("k2 in the loss", 0.0685, None),
        ("ratio · k3 in the loss", 0.0685, 0.0931),
        ("ratio · k1 in the loss", 0.6387, 0.7991),
        ("k1 in the loss", 0.6200, None),
    ],
)
def test_gradient_variances(label, on, off):
    assert gradient_variance(TERMS[label][0]) == pytest.approx(on, abs=1e-4)
    if off is not None:
        assert gradient_variance(TERMS[label][0], sampler=SAMPLER) == pytest.approx(off, abs=1e-4)


@pytest.mark.theorem(
    "KL",
    "k1 and k3 times the ratio and k2 times the detached ratio, in the loss, have the gradient of the KL "
    "for any three distributions, also off-policy (enumeration)",
    paper="kl_approx",
    at_most=1e-09,
)
@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_k2_and_k3_with_the_ratio_have_the_gradient_of_the_kl_for_any_pair(policy, reference):
    policy, reference = tensor(policy).softmax(0), tensor(reference).softmax(0)
    sampler = (policy.sqrt() * reference.sqrt()) / (policy.sqrt() * reference.sqrt()).sum()
    for label in ("ratio · k1 in the loss", "ratio · k2 in the loss, ratio detached", "ratio · k3 in the loss"):
        gradient = expected_gradient(TERMS[label][0], policy, reference, sampler)
        proves(gradient, kl_gradient(policy, reference))


def test_k3_in_the_reward_vanishes_near_the_reference():
    torch.manual_seed(0)
    direction, lengths = torch.randn(5, dtype=F64), []
    for scale in (1.2, 0.3, 0.05):
        policy, reference = (scale * direction).softmax(0), torch.full((5,), 0.2, dtype=F64)
        gradient = expected_gradient(TERMS["k3 in the reward"][0], policy, reference, policy)
        lengths.append((gradient.norm() / kl_gradient(policy, reference).norm()).item())
    assert lengths[0] > lengths[1] > lengths[2] and lengths[2] < 0.05


def test_the_documentation_shows_the_enumerated_table():
    page = Path(__file__).parents[2] / "docs/methods/kl.md"
    assert table() in page.read_text()


# The KL of a sequence: two steps, each of two tokens


@pytest.mark.theorem(
    "KL",
    "k1 in the reward, summed or as reward-to-go, has the gradient of the KL of whole completions; a KL "
    "per token in the loss has not (enumeration of two tokens)",
    paper="kl_approx",
    at_most=1e-12,
)
def test_only_k1_in_the_reward_sees_that_early_tokens_decide_about_later_ones():
    first = torch.tensor([0.2, -0.1], dtype=F64).requires_grad_()
    second = torch.tensor([[2.0, -1.0], [0.1, 0.3]], dtype=F64).requires_grad_()  # by the first token
    ref_first, ref_second = torch.zeros(2, dtype=F64).log_softmax(0), torch.zeros(2, 2, dtype=F64).log_softmax(1)

    def expectation(term):
        total = torch.zeros((), dtype=F64)
        for a, b in itertools.product(range(2), repeat=2):
            logps = torch.stack([first.log_softmax(0)[a], second.log_softmax(1)[a, b]])
            ref = torch.stack([ref_first[a], ref_second[a, b]])
            total = total + logps.sum().exp().detach() * term(logps, ref).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, (first, second), materialize_grads=True)])

    def sequence_kl():
        total = torch.zeros((), dtype=F64)
        for a, b in itertools.product(range(2), repeat=2):
            logp = first.log_softmax(0)[a] + second.log_softmax(1)[a, b]
            total = total + logp.exp() * (logp - ref_first[a] - ref_second[a, b])
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, (first, second))])

    exact = sequence_kl()
    summed = expectation(lambda logps, ref: logps * k1(logps, ref).detach().sum())
    to_go = expectation(lambda logps, ref: logps * k1(logps, ref).detach().flip(0).cumsum(0).flip(0))
    in_loss = expectation(lambda logps, ref: kl_in_loss(k3, logps, ref, logps.detach(), torch.ones(2)))
    proves(summed, exact)
    proves(to_go, exact)
    assert (in_loss - exact).norm() > 0.05 * exact.norm()
    close(in_loss[2:], exact[2:], atol=1e-12)  # for the last token the two agree


# The KL of whole completions: every completion of three tokens, or every pair of them, in float64

SEQUENCE = FORMS["sequence, one completion (no baseline)"]


@pytest.mark.theorem(
    "KL",
    "`kl_placement: sequence` has the gradient of the KL of whole completions, of single ones and with a baseline "
    "from another one (enumeration of three tokens)",
    paper="better_kl",
    at_most=1e-12,
)
@pytest.mark.parametrize("rows", [1, 2], ids=["one completion", "pairs, with a baseline"])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_sequence_form_has_the_gradient_of_the_kl_of_completions(scale, rows):
    chain = Chain(scale, seed=1)
    found, probabilities = chain.gradients(SEQUENCE, rows)
    expected = chain.gradient(chain.kl())
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-12)
    proves(probabilities @ found, expected)
    in_the_loss, probabilities = chain.gradients(FORMS["exact in the loss"])
    assert (probabilities @ in_the_loss - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("step", "nats", "of_sequence", "of_reward"), [(0.1, 0.0017, 0.023, 0.088), (0.3, 0.0139, 0.070, 0.252)]
)
def test_on_a_second_pass_it_is_nearer_to_the_kl_than_k1_in_the_reward(step, nats, of_sequence, of_reward):
    """The ratio corrects the choice of a token, not the distribution of states; a reward knows the sampler only."""
    chain = Chain(1.0, seed=1)
    policy, generator = chain.logits.detach().clone(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        chain.logits += step * torch.randn(policy.shape, dtype=F64, generator=generator)
        moved, p = chain.kl_from(policy).item(), chain.probabilities()
        old, ref, _ = chain.rows(COMPLETIONS)
        cost = k1(old, ref).flip(1).cumsum(1).flip(1)
        chain.logits.copy_(policy)
    exact = chain.gradient(chain.kl())

    def error(form):
        terms = torch.cat([form(i, *(x[i : i + 1] for x in chain.rows(COMPLETIONS))) for i in range(len(COMPLETIONS))])
        return ((chain.gradient((p[:, None] * terms).sum()) - exact).norm() / exact.norm()).item()

    ones = torch.ones(1, 3)
    sequence = error(lambda i, logps, ref, kl: kl_of_completions(kl, logps, old[i : i + 1], ones))
    reward = error(lambda i, logps, ref, kl: (logps - old[i : i + 1]).exp() * cost[i : i + 1])
    assert (moved, sequence, reward) == pytest.approx((nats, of_sequence, of_reward), rel=0.03)


def test_its_gradient_is_the_formula_written_as_a_loop():
    chain = Chain(0.7, seed=2)
    completions = [COMPLETIONS[i] for i in (3, 8, 20, 20)]
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]])
    logps, _, kl = chain.rows(completions)
    old = logps.detach() + torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    value = kl_of_completions(torch.where(mask.bool(), kl, 0.0), logps, old, mask)
    assert torch.equal(value, kl * mask)
    later = [[sum((kl * mask)[i, t + 1 :].tolist()) for t in range(3)] for i in range(4)]
    loss = torch.zeros((), dtype=F64)
    for i in range(3):  # the last row has no trainable token: it learns nothing, and is part of no baseline
        for t in mask[i].nonzero().flatten().tolist():
            others = [later[j][t] for j in range(3) if j != i]
            ratio = math.exp(logps[i, t].item() - old[i, t].item())
            loss = loss + kl[i, t] + ratio * (later[i][t] - sum(others) / 2) * logps[i, t]
    (expected,) = torch.autograd.grad(loss, chain.logits, retain_graph=True)
    close(torch.autograd.grad(value.sum(), chain.logits)[0], expected, atol=1e-12)


def test_rows_of_other_processes_are_a_baseline_as_ones_own():
    chain = Chain(1.0)
    completions, mask = COMPLETIONS[:4], torch.ones(4, 3)
    whole = chain.gradient(SEQUENCE(*chain.rows(completions)).sum())
    parts = torch.zeros_like(whole)
    later = later_kl(chain.rows(completions)[2], mask)
    for own in (slice(0, 1), slice(1, 4)):
        logps, _, kl = chain.rows(completions[own])
        parts += chain.gradient(kl_of_completions(kl, logps, logps.detach(), mask[own], later_of_all=later).sum())
    close(parts, whole, atol=1e-12)


def test_where_every_state_has_one_kl_the_baseline_leaves_no_noise_of_later_tokens():
    chain = Chain(1.0)
    with torch.no_grad():
        chain.logits.copy_(chain.logits[:1].expand_as(chain.logits))
    chain.reference = chain.reference[:1].expand_as(chain.reference)
    for rows, form in ((1, SEQUENCE), (2, SEQUENCE), (1, FORMS["exact in the loss"])):
        found, _ = chain.gradients(form, rows)
        rest = chain.gradients(FORMS["exact in the loss"], rows)[0] - found
        assert (rest.norm() < 1e-11) == (rows == 2 or form is not SEQUENCE)


def test_the_table_of_completions_in_the_documentation():
    page = Path(__file__).parents[2] / "docs/methods/kl.md"
    assert table_of_completions() in page.read_text()


def test_the_sequence_form_has_a_fraction_of_the_noise_of_k1_in_the_reward():
    for scale in (0.3, 1.0):
        chain = Chain(scale)
        noise = {label: bias_and_variance(chain, form)[1] for label, form in FORMS.items()}
        reward = noise["k1 in the reward, to go"]
        assert noise["sequence, one completion (no baseline)"] < 0.5 * reward
        assert reward < noise["k1 in the reward, sum of the completion"]


@pytest.mark.parametrize("garbage", [-torch.inf, torch.inf, torch.nan])
def test_garbage_at_masked_tokens_changes_no_gradient_of_completions(garbage):
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    kl = torch.where(mask.bool(), torch.rand(2, 4, dtype=F64), 0.0)

    def run(logps, old):
        logps = logps.clone().requires_grad_()
        value = kl_of_completions(kl, logps, old, mask)
        return value.detach(), torch.autograd.grad(value.sum(), logps)[0]

    clean = run(LOGPS.expand(2, 4), OLD.expand(2, 4))
    dirty = run(*(torch.where(mask.bool(), x.expand(2, 4), garbage) for x in (LOGPS, OLD)))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert not clean[1][~mask.bool()].any() and clean[1][mask.bool()].any()


def test_no_ratio_of_the_sequence_form_overflows():
    logps, old = torch.tensor([[0.0, -1.0, -1.0]], requires_grad=True), torch.tensor([[-200.0, 0.0, 0.0]])
    value = kl_of_completions(torch.tensor([[1.0, 1e4, 1e4]]), logps, old, torch.ones(1, 3))
    (slope,) = torch.autograd.grad(value.sum(), logps)
    assert value.tolist() == [[1.0, 1e4, 1e4]] and slope.isfinite().all() and slope[0, 2] == 0


def test_a_batch_without_trainable_tokens_has_no_gradient_of_completions():
    logps = torch.zeros(2, 3, requires_grad=True)
    value = kl_of_completions(torch.zeros(2, 3), logps, torch.zeros(2, 3), torch.zeros(2, 3))
    (slope,) = torch.autograd.grad(value.sum(), logps)
    assert not value.any() and not slope.any()


# Numerics


def test_extreme_log_ratios_keep_their_gradient_and_do_not_overflow():
    log_ratio = torch.tensor([-100.0, -89.0, -25.0, -17.0, -12.0, 12.0, 50.0, 100.0])
    logps = log_ratio.clamp(max=0.0)
    ref = logps - log_ratio
    value, slope = value_and_slope(lambda x: kl_in_loss(k3, x, ref, logps, torch.ones(8)), logps)
    assert torch.equal(slope, log_ratio)
    close(value, [4.85165184e8] * 3 + [2.4154936e7, 162741.8, 11, 19, 19], rtol=1e-6, atol=1e-4)
    value, slope = value_and_slope(lambda x: kl_in_loss(k2, x, ref, logps, torch.ones(8)), logps)
    assert torch.equal(slope, log_ratio) and value.max() == 200


@pytest.mark.parametrize("estimator", [k1, k2, k3, plain_k2])
@pytest.mark.parametrize("corrected", [True, False])
def test_no_estimator_overflows(estimator, corrected):
    logps = torch.tensor([-100.0, -50.0, 0.0, 0.0, -30.0], requires_grad=True)
    ref, old = torch.tensor([0.0, 0.0, -50.0, -100.0, -30.0]), torch.tensor([-1.0, -80.0, -60.0, 0.0, -30.0])
    value = kl_in_loss(estimator, logps, ref, old, torch.ones(5), corrected)
    (slope,) = torch.autograd.grad(value.sum(), logps)
    assert value.isfinite().all() and slope.isfinite().all()


def test_the_plain_k3_saturates_in_its_slope():
    _, slope = value_and_slope(lambda x: k3(x, torch.zeros(1)), torch.tensor([-50.0]))
    close(slope, [-4.85165184e8], rtol=1e-6)


def test_k3_near_the_reference_is_not_rounded_to_zero():
    close(k3(torch.tensor([1e-4]), torch.tensor([0.0])), [5.0e-9], atol=1e-11)


@pytest.mark.parametrize("garbage", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS.values())
@pytest.mark.parametrize("corrected", [True, False])
def test_garbage_at_masked_tokens_changes_nothing(estimator, garbage, corrected):
    mask = torch.tensor([1, 0, 1, 1])

    def run(*tensors):
        logps = tensors[0].clone().requires_grad_()
        value = kl_in_loss(estimator, logps, *tensors[1:], mask, corrected)
        return value.detach(), torch.autograd.grad(value.sum(), logps)[0]

    clean = run(LOGPS, REF, OLD)
    dirty = run(*(torch.where(mask.bool(), x, garbage) for x in (LOGPS, REF, OLD)))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert b[1] == 0


def test_half_precision_is_computed_in_float32():
    value = kl_in_loss(k3, LOGPS.bfloat16(), REF.bfloat16(), OLD.bfloat16(), torch.ones(4))
    assert value.dtype == torch.float32


# The controller


@pytest.mark.parametrize(("measured", "expected"), [(0.2, 0.100512), (0.05, 0.099488), (-0.1, 0.099488), (0.1, 0.1)])
def test_next_beta(measured, expected):
    assert next_beta(0.1, measured, 0.1, 256) == pytest.approx(expected, abs=1e-6)
    small = next_beta(0.1, 0.101, 0.1, 256)  # inside the clip: proportional
    assert small == pytest.approx(0.1 * (1 + 0.01 * 256 / 10_000), abs=1e-12)
