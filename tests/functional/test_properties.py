"""
Laws of the whole functional layer under any input: dtypes, magnitudes from 1e-30 to 1e30, holes, order, padding.

What the other files hold at ordinary magnitudes in float64 is not repeated. A finite input gives NaN nowhere. An
infinity appears only where the exact result is too large for the dtype: of returns and advantages in the unit of the
reward, of whitened entries without weight, and of the squares among the preference losses.
"""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.kl import KL_ESTIMATORS, kl_in_loss
from trl_ext.functional.preference import PREFERENCE_LOSSES, PairBatch
from trl_ext.functional.process_rewards import step_advantages
from trl_ext.functional.reductions import is_constant, reward_to_go, weighted_mean, whiten
from trl_ext.functional.rewards import RewardBatch, reward_at_end, reward_at_steps

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
EXPONENTS = st.integers(-30, 30)
UNIT_FREE = {"group_relative", "pass_at_k"}
UNIT_FREE |= {"reinforce_plus_plus", "reinforce_plus_plus_baseline", "process_group_relative"}


def values_for(name, mask):
    """What a critic that knows nothing says, and a greedy answer that is worth nothing, where one is needed."""
    row = ADVANTAGE_ESTIMATORS[name]
    values = {"values": torch.zeros(len(mask), mask.size(1) + 1)} if row.values else {}
    return values | ({"baseline": torch.zeros(len(mask))} if row.baseline else {})


def of_outcomes(name):
    """An estimator as a function of the rewards of completions: `(rewards, scored, mask, group size)`."""
    return lambda *batch: ADVANTAGE_ESTIMATORS[name].function(RewardBatch(*batch, **values_for(name, batch[2])))


def of_steps(name, **options):
    """The same, of the rewards of steps."""

    def function(rewards, scored, mask, size):
        nothing = torch.zeros_like(rewards), torch.zeros_like(scored)
        batch = RewardBatch(*nothing, mask, size, steps=rewards, steps_scored=scored, **values_for(name, mask))
        return ADVANTAGE_ESTIMATORS[name].function(batch, **options)

    return function


CREDITS = {
    f"process, {credit}": lambda *batch, credit=credit: step_advantages(*batch, credit=credit)
    for credit in ("sum", "mean", "min", "softmin")
}
OF_OUTCOMES = {name: of_outcomes(name) for name, row in ADVANTAGE_ESTIMATORS.items() if row.steps != "needed"}
OF_STEPS = {f"{name}, steps": of_steps(name) for name, row in ADVANTAGE_ESTIMATORS.items() if row.steps != "refused"}
ESTIMATORS = OF_OUTCOMES | OF_STEPS | CREDITS
PER_TOKEN = [*(name for name in OF_OUTCOMES if ADVANTAGE_ESTIMATORS[name].per_token), *OF_STEPS, *CREDITS]
UNIT_FREE |= {f"{name}, steps" for name in UNIT_FREE} | {*CREDITS}
some = settings(max_examples=60, deadline=None)


def on_cpu(x, dtype):
    return x.device.type == "cpu" and x.dtype == dtype


def numbers(draw, shape, dtype, exponent, low=-4.0):
    """Finite numbers of a dtype, up to four times 10^exponent, zeros among them, as far as the dtype goes."""
    limit = torch.finfo(dtype).max
    flat = st.floats(low, 4.0, allow_nan=False).map(lambda x: round(x, 2))
    size = int(torch.tensor(shape).prod())
    values = torch.tensor(draw(st.lists(flat, min_size=size, max_size=size)), dtype=torch.float64) * 10.0**exponent
    return values.clamp(-limit, limit).to(dtype).nan_to_num(posinf=limit, neginf=-limit).view(shape)


@st.composite
def token_rewards(draw, exponents=EXPONENTS):
    """(rewards, scored, mask, group size) with tool output, rows without tokens and rows that were not scored."""
    size, prompts, width = draw(st.sampled_from([2, 3, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (size * prompts, width)
    bits = st.lists(st.booleans(), min_size=shape[0] * width, max_size=shape[0] * width)
    mask, scored = (torch.tensor(draw(bits)).view(shape) for _ in range(2))
    rewards = numbers(draw, shape, dtype, draw(exponents)).where(scored, torch.zeros((), dtype=dtype))
    return rewards, scored, mask.long(), size


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def same(a, b):
    """Equal, infinities included."""
    return torch.equal(a, b)


# Advantages


@pytest.mark.parametrize("name", ESTIMATORS)
@some
@given(batch=token_rewards())
def test_advantages_of_any_dtype_are_those_of_float64_rounded_once(name, batch):
    rewards, scored, mask, size = batch
    before = [x.clone() for x in batch[:3]]
    advantages = quietly(ESTIMATORS[name], *batch)
    exact = quietly(ESTIMATORS[name], rewards.double(), scored, mask, size)
    assert exact.isfinite().all() and not advantages.isnan().any()
    assert same(advantages, exact.to(rewards.dtype)) and on_cpu(advantages, rewards.dtype)
    if name in UNIT_FREE:
        assert advantages.isfinite().all()
    assert all(same(a, b) for a, b in zip(batch[:3], before, strict=True)), "inputs are left as they were"


@pytest.mark.parametrize("name", ESTIMATORS)
@some
@given(batch=token_rewards(st.integers(-30, 8)), shift=st.integers(1, 5), data=st.data())
def test_order_and_padding_change_no_advantage_at_any_magnitude(name, batch, shift, data):
    rewards, scored, mask, size = batch
    rewards = rewards.double()
    scale = max(1.0, rewards.abs().max().item()) if name not in UNIT_FREE else 1.0
    # The difference of two sums in another order is rounding of the largest summand, over eps = 1e-4 at least.
    tolerance = {"atol": 1e-9 * scale + 1e-11 * rewards.abs().max().item(), "rtol": 1e-9}
    advantages = quietly(ESTIMATORS[name], rewards, scored, mask, size)
    order = data.draw(st.permutations(range(len(rewards) // size)))
    rows = torch.arange(len(rewards)).view(-1, size)[torch.tensor(order)]
    rows = torch.stack([row[torch.tensor(data.draw(st.permutations(range(size))))] for row in rows]).flatten()
    permuted = quietly(ESTIMATORS[name], rewards[rows], scored[rows], mask[rows], size)
    torch.testing.assert_close(permuted, advantages[rows], **tolerance)
    padded = quietly(
        ESTIMATORS[name], *(torch.nn.functional.pad(x, (0, shift)) for x in (rewards, scored, mask)), size
    )
    assert padded.dim() == 1 or not padded[:, -shift:].any()
    torch.testing.assert_close(padded if padded.dim() == 1 else padded[:, :-shift], advantages, **tolerance)


@pytest.mark.parametrize("name", PER_TOKEN)
@some
@given(batch=token_rewards(), data=st.data())
def test_a_hole_in_a_row_separates_nothing(name, batch, data):
    """Untrainable tokens without reward may stand anywhere: the trainable ones have the advantages they had."""
    rewards, scored, mask, size = batch
    place = data.draw(st.integers(0, rewards.size(1)))
    wider = [
        torch.cat([x[:, :place], torch.zeros_like(x[:, :1]), x[:, place:]], dim=1) for x in (rewards, scored, mask)
    ]
    advantages = quietly(ESTIMATORS[name], *batch)
    around = quietly(ESTIMATORS[name], *wider, size)
    assert not around[:, place].any()
    left = torch.cat([around[:, :place], around[:, place + 1 :]], dim=1)
    size_of_sums = rewards.double().abs().max().item()
    if size_of_sums < 1e9:  # beyond, rounding in another order is larger than the eps that scales it
        rounding = 4 * torch.finfo(rewards.dtype).eps
        torch.testing.assert_close(left.double(), advantages.double(), rtol=rounding, atol=1e-9 + 1e-11 * size_of_sums)


@st.composite
def whole_batches(draw):
    """What an estimator may be given at once: outcomes, steps and a KL penalty, each in a dtype of its own."""
    rewards, scored, mask, size = draw(token_rewards())
    outcome, outcome_scored = reward_at_end(rewards[:, 0].where(scored[:, 0], torch.nan), mask)
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(2)]
    penalty, steps = (numbers(draw, rewards.shape, dtype, draw(EXPONENTS)) for dtype in dtypes)
    steps_scored = scored.flip(1)
    fields = {
        "outcome": outcome,
        "outcome_scored": outcome_scored,
        "mask": mask,
        "num_generations": size,
        "steps": steps.where(steps_scored, torch.zeros((), dtype=steps.dtype)),
        "steps_scored": steps_scored,
        "kl_penalty": penalty * mask,
    }
    return fields


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
@some
@given(fields=whole_batches())
def test_outcomes_steps_and_kl_of_any_dtype_are_those_of_float64_rounded_once(name, fields):
    row = ADVANTAGE_ESTIMATORS[name]
    fields |= {"kl_penalty": None} if row.steps == "needed" else {}
    fields |= {"steps": None, "steps_scored": None} if row.steps == "refused" else {}
    fields |= values_for(name, fields["mask"])
    before = {key: value.clone() for key, value in fields.items() if isinstance(value, torch.Tensor)}
    doubled = {key: fields[key].double() for key in ("outcome", "steps", "kl_penalty") if fields[key] is not None}
    advantages, exact = (
        quietly(lambda given_fields: row.function(RewardBatch(**given_fields)), given_fields)
        for given_fields in (fields, fields | doubled)
    )
    dtype = fields["outcome"].dtype
    assert exact.isfinite().all() and same(advantages, exact.to(dtype)) and on_cpu(advantages, dtype)
    assert all(same(fields[key], value) for key, value in before.items()), "inputs are left as they were"


# Reductions


@some
@given(
    batch=token_rewards(),
    gamma=st.sampled_from([1.0, 0.99, 0.5, 1e-3]),
    discount=st.sampled_from(["trainable", "all"]),
)
def test_reward_to_go_ignores_what_stands_under_the_mask_in_any_dtype(batch, gamma, discount):
    rewards, _, mask, _ = batch
    result = reward_to_go(rewards, mask, gamma, discount)
    exact = reward_to_go(rewards.double(), mask, gamma, discount)
    assert exact.isfinite().all() and same(result, exact.to(rewards.dtype)) and on_cpu(result, rewards.dtype)
    for garbage in (torch.nan, torch.inf):
        assert same(reward_to_go(rewards.masked_fill(mask == 0, garbage), mask, gamma, discount), result)


@some
@given(batch=token_rewards(), correction=st.sampled_from([0.0, 1.0]), by_row=st.booleans())
def test_whitened_values_are_finite_and_rounded_once(batch, correction, by_row):
    values, _, mask, _ = batch
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1) if by_row else mask
    before = values.clone(), weights.clone()
    result, mean = whiten(values, weights, correction), weighted_mean(values, weights)
    for actual, exact in (
        (result, whiten(values.double(), weights, correction)),
        (mean, weighted_mean(values.double(), weights)),
    ):
        assert same(actual, exact.to(values.dtype)) and on_cpu(actual, values.dtype)
    assert mean.isfinite() and result[weights > 0].isfinite().all() and not result.isnan().any()
    assert is_constant(values, mask.bool(), dim=1).dtype == torch.bool
    assert same(values, before[0]) and same(weights, before[1])


@some
@given(batch=token_rewards())
def test_an_outcome_is_one_number_on_a_trainable_token_in_any_dtype(batch):
    values, _, mask, _ = batch
    returns = values[:, 0].clone()
    returns[0] = torch.nan
    rewards, scored = reward_at_end(returns, mask)
    assert on_cpu(rewards, values.dtype) and rewards.isfinite().all()
    assert not scored[0].any() and (scored[1:].sum(1) == 1).all()
    assert same(rewards[1:].sum(1, dtype=torch.float64), returns[1:].double())
    assert (mask.bool() | ~scored)[mask.any(1)].all()


@some
@given(data=st.data(), exponent=EXPONENTS, pad=st.integers(0, 4))
def test_step_rewards_are_found_again_where_the_steps_end(data, exponent, pad):
    width = data.draw(st.integers(1, 9))
    places = data.draw(st.lists(st.sets(st.integers(0, width - 1)).map(sorted), min_size=1, max_size=4))
    values = [
        [None if data.draw(st.booleans()) else data.draw(st.floats(-4, 4)) * 10.0**exponent for _ in row]
        for row in places
    ]
    rewards, scored = reward_at_steps(values, places, width + pad)
    assert on_cpu(rewards, torch.float32) and rewards.shape == scored.shape == (len(places), width + pad)
    assert not rewards[~scored].any()
    for row, found, ends, given_values in zip(rewards, scored, places, values, strict=True):
        known = {end: value for end, value in zip(ends, given_values, strict=True) if value is not None}
        assert {*found.nonzero().flatten().tolist()} == {*known}
        assert all(row[end] == torch.tensor(value, dtype=torch.float32) for end, value in known.items())


# KL


@st.composite
def log_probs(draw):
    """Three tensors of log-probs and a mask, of any size that a dtype holds: no model gives these, and none is NaN."""
    dtype, n = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 6))
    logps = [numbers(draw, (n,), dtype, draw(EXPONENTS)) for _ in range(3)]
    return logps, torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def slope_of(function, logps):
    logps = logps.clone().requires_grad_()
    value = function(logps)
    (slope,) = torch.autograd.grad(value.sum(), logps)
    return value.detach(), slope


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@some
@given(given_logps=log_probs())
def test_no_log_prob_makes_an_estimator_of_the_kl_nan(name, given_logps):
    (logps, ref, _), _ = given_logps
    before = logps.clone(), ref.clone()
    value, slope = slope_of(lambda x: KL_ESTIMATORS[name](x, ref), logps)
    assert on_cpu(value, wide(logps.dtype)) and value.isfinite().all()
    assert not slope.isnan().any()
    if name != "k1":
        assert (value >= 0).all()
    again, _ = slope_of(lambda x: KL_ESTIMATORS[name](x, ref.flip(0)), logps.flip(0))
    assert same(again.flip(0), value), "each token for itself"
    assert same(logps, before[0]) and same(ref, before[1])


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", KL_ESTIMATORS)
@some
@given(given_logps=log_probs())
def test_no_log_prob_makes_the_penalty_nan_and_masked_ones_count_for_nothing(name, corrected, given_logps):
    (logps, ref, old), mask = given_logps
    value, slope = slope_of(lambda x: kl_in_loss(KL_ESTIMATORS[name], x, ref, old, mask, corrected), logps)
    assert on_cpu(value, wide(logps.dtype)) and value.isfinite().all()
    assert not slope.isnan().any()
    assert not value[~mask].any() and not slope[~mask].any()
    dirty = [x.masked_fill(~mask, torch.nan) for x in (logps, ref, old)]
    other = slope_of(lambda x: kl_in_loss(KL_ESTIMATORS[name], x, *dirty[1:], mask, corrected), dirty[0])
    assert same(other[0], value) and same(other[1], slope)


# Preference losses


@st.composite
def pair_batches(draw):
    dtype, n = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 5))
    logps = [numbers(draw, (n,), dtype, draw(EXPONENTS)) for _ in range(4)]
    lengths = [torch.tensor(draw(st.lists(st.integers(1, 9000), min_size=n, max_size=n))).to(dtype) for _ in range(2)]
    prob = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0]), min_size=n, max_size=n))).to(dtype)
    return (
        (*logps, *lengths, prob),
        draw(st.sampled_from([1e-3, 0.1, 2.0])),
        numbers(draw, (n,), dtype, draw(EXPONENTS)),
    )


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("name", [name for name, row in PREFERENCE_LOSSES.items() if not row.psi])
@some
@given(given_pairs=pair_batches())
def test_no_pair_makes_a_preference_loss_nan(name, mean, given_pairs):
    tensors, beta, delta = given_pairs
    before = [x.clone() for x in tensors]
    options = {"eps": 0.001} if name == "psipo_logit" else {}

    def losses(rows, *logps):
        rest = [x[rows] for x in tensors[len(logps) :]]
        batch = PairBatch(*(x[rows] for x in logps), *rest, beta=beta, reward_margin=delta[rows])
        return PREFERENCE_LOSSES[name].function(batch.per_token() if mean else batch, **options)

    rows = torch.arange(len(delta))
    policy = [x.clone().requires_grad_() for x in tensors[:2]]
    value = losses(rows, *policy)
    assert on_cpu(value, wide(delta.dtype)) and not value.isnan().any()
    for slope in torch.autograd.grad(value.sum(), policy, allow_unused=True):
        assert slope is None or not slope.isnan().any()
    assert same(losses(rows.flip(0), *tensors[:2]).flip(0), value.detach()), "each pair for itself"
    if max(x.double().abs().max() for x in (*tensors[:4], delta)) <= 1e4:
        assert value.isfinite().all()
    if (target := PREFERENCE_LOSSES[name].target) is not None:
        batch = PairBatch(*tensors, beta=beta, reward_margin=delta)
        assert target(batch, **options).isfinite().all()
    assert all(same(a, b) for a, b in zip(tensors, before, strict=True))
