"""The estimators: the spec of each as numbers worked by hand, as float64 loops, as laws and as exact expectations."""

import dataclasses
import inspect
import itertools
import math
import warnings
from typing import NamedTuple

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theorems import proves

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.rewards import RewardBatch, reward_at_end

F64 = torch.float64
NAN = float("nan")
ALL = sorted(ADVANTAGE_ESTIMATORS)
SIBLINGS = [name for name in ALL if ADVANTAGE_ESTIMATORS[name].siblings]
WITHOUT_A_MEAN = ["reinforce", "remax"]  # of the samples
REINFORCE_PP = ["reinforce_plus_plus", "reinforce_plus_plus_baseline"]


def close(actual, expected, atol=1e-6, rtol=0.0, **options):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=rtol, **options)


def mask_of(lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def estimate(name, batch, **options):
    return ADVANTAGE_ESTIMATORS[name].function(batch, **options)


def rewarded(name, rewards, scored, mask, size, penalty=None):
    """A batch of these rewards, which are those of steps where the estimator needs steps."""
    if ADVANTAGE_ESTIMATORS[name].steps == "needed":
        nothing = torch.zeros_like(rewards), torch.zeros_like(scored)
        return RewardBatch(*nothing, mask, size, steps=rewards, steps_scored=scored)
    row = ADVANTAGE_ESTIMATORS[name]
    values = torch.zeros(len(mask), mask.size(1) + 1) if row.values else None
    greedy = torch.zeros(len(mask)) if row.baseline else None
    return RewardBatch(rewards, scored, mask, size, kl_penalty=penalty, values=values, baseline=greedy)


def of_returns(name, returns, mask, size):
    return rewarded(name, *reward_at_end(torch.as_tensor(returns, dtype=F64), mask), mask, size)


def outcome(name, returns, lengths=None, size=4, **options):
    """Advantage per row (its first token) of an outcome batch."""
    advantages = estimate(name, of_returns(name, returns, mask_of(lengths or [1] * len(returns)), size), **options)
    return advantages[:, 0] if advantages.dim() == 2 else advantages


# Numbers worked by hand

KL_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
KL = torch.tensor([[0.1, -0.5, 0.1, 1.2], [0.2, 0.3, 9.9, -0.1]], dtype=F64)
KL_PENALTY = 0.1 * KL * KL_MASK


def with_kl(name, returns, size=1, beta=1.0, **options):
    rewards, scored = reward_at_end(torch.tensor(returns, dtype=F64), KL_MASK)
    return estimate(name, rewarded(name, rewards, scored, KL_MASK, size, beta * KL_PENALTY), **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0.898338, 0.920481, 0.809770, 0.831912], [-1.205165, -1.160881, 0, -1.094455]]),
        ({"correction": 1}, [[0.831700, 0.852199, 0.749701, 0.770201], [-1.115766, -1.074767, 0, -1.013268]]),
        ({"gamma": 0.9}, [[0.596028, 0.812626, 0.884166, 1.132779], [-1.198354, -1.152944, 0, -1.074301]]),
        ({"beta": 0.0}, [[0.866025] * 4, [-1.154701, -1.154701, 0, -1.154701]]),
    ],
)
def test_reinforce_plus_plus_with_kl_in_the_reward(options, expected):
    close(with_kl("reinforce_plus_plus", [1.0, 0.0], **options), expected)


def test_equal_outcomes_do_not_turn_kl_noise_into_advantages_of_unit_size():
    with pytest.warns(UserWarning, match="All outcome rewards of the batch are equal while the KL is in the reward"):
        advantages = with_kl("reinforce_plus_plus", [1.0, 1.0])
    close(advantages, [[-0.022857, -0.012857, -0.062857, -0.052857], [0.027143, 0.047143, 0, 0.077143]])
    with pytest.warns(UserWarning, match="All outcome rewards of a group are equal while the KL is in the reward"):
        close(with_kl("group_relative", [1.0, 1.0], size=2), [-0.025, 0.025])


def test_estimators_of_one_return_sum_the_kl_over_the_sequence():
    close(with_kl("leave_one_out", [1.0, 0.0], size=2), [0.95, -0.95])
    close(with_kl("group_relative", [1.0, 0.0], size=2), [0.707002, -0.707002])


PER_GROUP = ["group_relative", "pass_at_k", "process_group_relative"]  # divided by the standard deviation of the group
GROUPS = [1, 0, 0, 0, 0.9, 1, 1, 0.8]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group_relative", [1.4997, -0.4999, -0.4999, -0.4999, -0.260844, 0.782532, 0.782532, -1.304220]),
        ("group_mean", [0.75, -0.25, -0.25, -0.25, -0.025, 0.075, 0.075, -0.125]),
        ("leave_one_out", [1, -1 / 3, -1 / 3, -1 / 3, -1 / 30, 0.1, 0.1, -1 / 6]),
        (
            "reinforce_plus_plus",
            [0.897814, -1.278704, -1.278704, -1.278704, 0.680162, 0.897814, 0.897814, 0.462510],
        ),
        (
            "reinforce_plus_plus_baseline",
            [2.405781, -0.801927, -0.801927, -0.801927, -0.080193, 0.240578, 0.240578, -0.400963],
        ),
        ("reinforce", GROUPS),
        ("process_group_relative", [1.4997, -0.4999, -0.4999, -0.4999, -0.260844, 0.782532, 0.782532, -1.304220]),
    ],
)
def test_two_groups_of_four(name, expected):
    close(outcome(name, GROUPS), expected, atol=1e-4 if name in PER_GROUP else 1e-6)


LENGTHS = [10, 2, 2, 2, 2, 2, 2, 10]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "reinforce_plus_plus",
            {},
            [0.697525, -2.024524, -2.024524, -2.024524, 0.425320, 0.697525, 0.697525, 0.153115],
        ),
        (
            "reinforce_plus_plus_baseline",
            {},
            [1.445546, -0.989058, -0.989058, -0.989058, -0.441272, -0.197812, -0.197812, -0.684732],
        ),
        (
            "reinforce_plus_plus_baseline",
            {"weighting": "sequence"},
            [2.405781, -0.801927, -0.801927, -0.801927, -0.080193, 0.240578, 0.240578, -0.400963],
        ),
        ("length_weighted", {}, [0.375, -0.625, -0.625, -0.625, 0.0375, 0.1375, 0.1375, -0.0625]),
    ],
)
def test_long_completions_weigh_more_with_token_weighting(name, options, expected):
    close(outcome(name, GROUPS, LENGTHS, **options), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group_relative", [1.154501, 0, -0.577250, -0.577250]),
        ("leave_one_out", [1, 0, -0.5, -0.5]),
        ("reinforce_plus_plus", [1.414214, 0, -0.707107, -0.707107]),
    ],
)
def test_an_unscored_completion_is_left_out(name, expected):
    close(outcome(name, [1, NAN, 0, 0]), expected)


def test_worked_examples_of_the_literature():
    close(outcome("group_mean", [8.5, 8.2, 8.0], size=3), [0.266667, -0.033333, -0.233333])
    eight = [0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.5, 0.4]
    close(outcome("group_relative", eight, size=8)[:4], [1.428286, 1.020204, 0.612123, 0.204041])
    close(outcome("leave_one_out", eight, size=8)[:4], [0.4, 0.285714, 0.171429, 0.057143])
    close(outcome("leave_one_out", [0.9, 0.1, 0.4, 0.7]), [0.5, -0.566667, -0.166667, 0.233333])


def test_eps_decides_near_ties():
    close(outcome("group_relative", [1, 1, 1, 1 + 1e-6]), [-0.0025, -0.0025, -0.0025, 0.0075], atol=1e-4)


def test_the_recentring_of_a_group_without_signal_is_a_fact_of_token_weighting():
    # The documentation says so: −μ/σ, not 0, for the second group.
    returns, lengths = [1, 0, 0, 0, 1, 1, 1, 1], [10, 2, 2, 2, 2, 2, 2, 2]
    assert outcome("reinforce_plus_plus_baseline", returns, lengths)[4] < -0.1
    close(outcome("reinforce_plus_plus_baseline", returns, lengths, weighting="sequence")[4:], [0.0] * 4)


# Degenerate batches


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("empty", ["no reward", "no trainable token"])
def test_a_batch_that_cannot_teach_gives_zeros_and_a_warning(name, empty):
    mask = torch.zeros(4, 3) if empty == "no trainable token" else torch.ones(4, 3)
    returns = torch.full((4,), NAN if empty == "no reward" else 1.0)
    message = "No completion of the batch has both a reward and a trainable token; all advantages are 0."
    with pytest.warns(UserWarning) as caught:
        batch = of_returns(name, returns, mask, 2)
        advantages = estimate(name, batch)
    assert [str(warning.message) for warning in caught] == [message]
    assert not advantages.any()


@pytest.mark.parametrize("name", ALL)
def test_one_trainable_token_gives_zero(name):
    size = 1
    if name in WITHOUT_A_MEAN:
        close(outcome(name, [3.0], size=size), [3.0])
    elif name == "gae":
        with pytest.warns(UserWarning, match="All rewards of the batch are equal"):
            close(outcome(name, [3.0], size=size), [0.0])
    else:
        for options in [{}] if name not in REINFORCE_PP else [{}, {"correction": 1}, {"weighting": "sequence"}]:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                close(outcome(name, [3.0], size=size, **options), [0.0])


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_row_without_scored_sibling_gets_zero(name):
    close(outcome(name, [5.0, NAN, NAN, NAN, 1.0, 0.0, 0.0, 1.0])[:4], [0.0] * 4)


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_A_MEAN])
def test_equal_rewards_give_zero(name):
    close(outcome(name, [0.7] * 8), [0.0] * 8, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_a_fully_masked_row_gets_zero_but_its_reward_counts_for_its_siblings(name):
    mask = mask_of([2, 2, 0, 2, 2, 2])
    advantages = []
    for masked_reward in (0.0, 5.0):
        advantages.append(estimate(name, of_returns(name, [1.0, 0.0, masked_reward, 0.0, 0.0, 1.0], mask, 3)))
    assert not any(a[2].any() for a in advantages)
    sees_sequences = name in SIBLINGS and name != "length_weighted"
    assert torch.equal(*advantages) is not sees_sequences


# Laws, over the whole table


def matrix(draw, rows, width, entries):
    row = st.lists(entries, min_size=width, max_size=width)
    return draw(st.lists(row, min_size=rows, max_size=rows))


class Case(NamedTuple):
    """A batch as lists, for the loops; `steps` and `penalty` may be missing. NaN: not scored."""

    returns: list
    mask: list
    size: int
    steps: list | None
    penalty: list | None

    def batch(self, pad=0, order=None):
        """The batch as tensors; with further columns, or its rows in another order."""

        def tensor(rows, dtype=F64):
            found = torch.tensor(rows, dtype=dtype)
            found = found if order is None else found[order]
            return torch.nn.functional.pad(found, (0, pad)) if found.dim() == 2 else found

        mask = tensor(self.mask, torch.long)
        outcome, scored = reward_at_end(tensor(self.returns), mask)
        steps, penalty = (None if x is None else tensor(x) for x in (self.steps, self.penalty))
        known = None
        if steps is not None:
            known = tensor([[not math.isnan(x) for x in row] for row in self.steps], torch.bool)
            steps = steps.where(known, 0.0)
        values = tensor(self.values)
        own, end = values[:, : values.size(1) - pad - 1], values[:, values.size(1) - pad - 1, None]
        values = torch.cat([torch.nn.functional.pad(own, (0, pad)), end], dim=1)
        greedy = tensor(self.greedy)
        return quiet(RewardBatch, outcome, scored, mask, self.size, steps, known, penalty, greedy, values)

    @property
    def values(self):
        """What a critic might say, one number more than tokens."""
        return [[(3 * i + 7 * t) % 5 / 4 for t in range(len(mask) + 1)] for i, mask in enumerate(self.mask)]

    @property
    def greedy(self):
        """What the greedy answers to the prompts might have returned; one in four was not scored."""
        groups = (i // self.size for i in range(len(self.mask)))
        return [NAN if (g + len(self.mask)) % 4 == 0 else (g * 3 + 1) % 4 / 4 for g in groups]

    @property
    def scored(self):
        """Which rows have a reward at all."""
        steps = self.steps or [[NAN]] * len(self.returns)
        return [not all(math.isnan(x) for x in (r, *row)) for r, row in zip(self.returns, steps, strict=True)]

    @property
    def without_kl(self):
        """Token rewards, the outcome on the last trainable token, or on the first of a row without any."""
        rows = []
        for i, mask in enumerate(self.mask):
            row = [
                0.0 if self.steps is None or math.isnan(self.steps[i][t]) else self.steps[i][t]
                for t in range(len(mask))
            ]
            last = max((t for t, trainable in enumerate(mask) if trainable), default=0)
            row[last] += 0.0 if math.isnan(self.returns[i]) else self.returns[i]
            rows.append(row)
        return rows

    @property
    def rewards(self):
        """Token rewards less the KL."""
        if self.penalty is None:
            return self.without_kl
        return [
            [r - p for r, p in zip(*rows, strict=True)] for rows in zip(self.without_kl, self.penalty, strict=True)
        ]


@st.composite
def cases(draw, steps="refused"):
    size = draw(st.sampled_from([2, 3, 4]))
    rows = size * draw(st.integers(1, 3))
    width = draw(st.integers(1, 6))
    mask = matrix(draw, rows, width, st.integers(0, 1))
    numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
    few = numbers | st.sampled_from([0.0, 1.0])  # outcomes are often equal
    all_equal = draw(st.booleans())
    one = draw(few)
    returns = [NAN if draw(st.integers(0, 3)) == 0 else one if all_equal else draw(few) for _ in range(rows)]
    kl = [
        [0.01 * x * m for x, m in zip(*pair, strict=True)]
        for pair in zip(matrix(draw, rows, width, numbers), mask, strict=True)
    ]
    penalty = draw(st.sampled_from([None, kl])) if steps != "needed" else None
    of_steps = None
    if steps == "needed" or (steps == "added" and draw(st.booleans())):
        of_steps = matrix(draw, rows, width, numbers | st.just(NAN))
    return Case(returns, mask, size, of_steps, penalty)


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def as_tokens(advantages, mask):
    return advantages if advantages.dim() == 2 else advantages[:, None] * mask


def tensors(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_laws_of_every_estimator(name, data):
    row = ADVANTAGE_ESTIMATORS[name]
    case = data.draw(cases(row.steps))
    batch = case.batch()
    before = {key: value.clone() for key, value in tensors(batch).items()}
    advantages = quiet(row.function, batch)
    tokens = as_tokens(advantages, batch.mask)

    assert advantages.shape == (batch.outcome.shape if row.per_token else batch.outcome.shape[:1])
    assert advantages.dtype == batch.outcome.dtype
    assert advantages.isfinite().all()
    assert not tokens[batch.mask == 0].any()
    assert not advantages[~torch.tensor(case.scored)].any()
    for key, value in before.items():
        close(tensors(batch)[key], value, atol=0, equal_nan=True)  # inputs are not changed

    padded = quiet(row.function, case.batch(pad=2))
    close(padded if padded.dim() == 1 else padded[:, :-2], advantages, atol=1e-9, rtol=1e-9)

    reversed_ = torch.arange(len(advantages)).view(-1, case.size).flip(0, 1).flatten()  # prompts and siblings, both
    permuted = quiet(row.function, case.batch(order=reversed_))
    close(permuted, advantages[reversed_], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in ALL if ADVANTAGE_ESTIMATORS[name].within is not None])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_half_within_prompts_and_the_half_across_them_are_the_whole(name, data):
    row = ADVANTAGE_ESTIMATORS[name]
    case = data.draw(cases(row.steps))
    whole = case.batch()
    known = ("outcome", "outcome_scored", "mask", "steps", "steps_scored", *(() if row.across else ("kl_penalty",)))
    parts = []
    for start in range(0, len(case.returns), case.size):
        fields = {key: getattr(whole, key) for key in known}  # where rows meet the trainer's, the KL comes later
        own = {key: None if x is None else x[start : start + case.size] for key, x in fields.items()}
        parts.append(quiet(RewardBatch, num_generations=case.size, **own))
    values = torch.cat([quiet(row.within, part) for part in parts])
    if row.across is not None:
        scored = whole.mask.bool() & ~values.isnan()
        rows = quiet(RewardBatch, values.nan_to_num(), scored, whole.mask, 1, kl_penalty=whole.kl_penalty)
        values = quiet(ADVANTAGE_ESTIMATORS[row.across].function, rows)
    close(values, quiet(row.function, whole), atol=1e-8, rtol=1e-8)


def written(name, case, **options):
    """What the loop written from the paper says, or `None` where the paper says nothing."""
    rows, masks, known = case.rewards, case.mask, case.scored
    without_kl = None if case.penalty is None else case.without_kl
    returns, outcomes = (
        [sum(r) if k else None for r, k in zip(x, known, strict=True)] for x in (rows, case.without_kl)
    )
    lengths = [sum(mask) for mask in masks]
    if name == "reinforce":
        return reference.reinforce(rows, masks, known, **options)
    if name == "remax":
        return reference.remax(rows, masks, known, [None if math.isnan(b) else b for b in case.greedy])
    if name == "reinforce_plus_plus":
        return reference.reinforce_plus_plus(rows, masks, known, without_kl, **options)
    if name == "reinforce_plus_plus_baseline":
        return reference.reinforce_plus_plus_baseline(rows, masks, known, outcomes, case.size, without_kl, **options)
    if name == "gae":
        return reference.gae(rows, masks, known, case.values, case.without_kl, **options)
    if name == "prime":
        steps = [[None if math.isnan(x) else x for x in row] for row in case.steps]
        alone = [None if math.isnan(x) else x for x in case.returns]
        return reference.prime(steps, alone, masks, case.size, **options)
    if name == "process_group_relative":
        steps, ends = (
            [[value(t, x) for t, x in enumerate(row) if not math.isnan(x)] for row in case.steps]
            for value in (lambda t, x: x, lambda t, x: t)
        )
        alone = [None if math.isnan(x) else x for x in case.returns]
        return reference.process_group_relative(steps, ends, masks, alone, case.size, **options)[0]
    if name == "length_weighted":
        groups = range(0, len(rows), case.size)
        if any(sum(lengths[i] for i in range(s, s + case.size) if known[i]) == 0 for s in groups):
            return None  # no token in a group: no baseline to write down; zeros, see the laws
    if name in ("group_relative", "pass_at_k", "best_of_group", "gpg"):
        outcomes = None if without_kl is None else outcomes
        expected = getattr(reference, name)(returns, lengths, case.size, outcomes, **options)
    else:
        expected = getattr(reference, name)(returns, lengths, case.size)
    return [x if n else 0.0 for x, n in zip(expected, lengths, strict=True)]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_estimator_equals_the_loop_written_from_its_paper(name, data):
    case = data.draw(cases(ADVANTAGE_ESTIMATORS[name].steps))
    expected = written(name, case)
    if expected is not None:
        close(quiet(estimate, name, case.batch()), expected, atol=1e-8, rtol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    case=cases("added"),
    weighting=st.sampled_from(["token", "sequence"]),
    correction=st.sampled_from([0, 1]),
    norm=st.sampled_from(["whiten", "center"]),
    gamma=st.sampled_from([1.0, 0.7]),
    discount=st.sampled_from(["trainable", "all"]),
)
def test_reinforce_plus_plus_options_equal_the_loop(case, weighting, correction, norm, gamma, discount):
    options = {"weighting": weighting, "correction": correction, "norm": norm}
    discounting = {"gamma": gamma, "discount": discount}
    for name, given_options in (
        ("reinforce", discounting),
        ("reinforce_plus_plus", options | discounting),
        ("reinforce_plus_plus_baseline", options),
    ):
        actual = quiet(estimate, name, case.batch(), **given_options)
        close(actual, written(name, case, **given_options), atol=1e-8, rtol=1e-8)


@settings(max_examples=100, deadline=None)
@given(case=cases(), k=st.integers(1, 4), scale=st.booleans(), correction=st.sampled_from(["groups", "nonzero"]))
def test_options_of_the_estimators_of_attempts_equal_the_loop(case, k, scale, correction):
    for name, given_options in (
        ("pass_at_k", {"k": k, "scale": scale}),
        ("best_of_group", {"scale": scale}),
        ("gpg", {"correction": correction}),
    ):
        actual = quiet(estimate, name, case.batch(), **given_options)
        close(actual, written(name, case, **given_options), atol=1e-8, rtol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    case=cases("needed"),
    credit=st.sampled_from(["sum", "mean", "min", "softmin"]),
    weights=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, -2.0])] * 2),
)
def test_process_group_relative_options_equal_the_loop(case, credit, weights):
    options = {"credit": credit, "process_weight": weights[0], "outcome_weight": weights[1]}
    options |= {"temperature": 5.0} if credit == "softmin" else {}
    actual = quiet(estimate, "process_group_relative", case.batch(), **options)
    close(actual, written("process_group_relative", case, **options), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", [*PER_GROUP, *REINFORCE_PP])
def test_scale_and_shift_of_the_reward_do_not_matter(name):
    base = outcome(name, GROUPS, LENGTHS)
    close(outcome(name, [3 * x + 7 for x in GROUPS], LENGTHS), base, atol=1e-2 if name in PER_GROUP else 1e-6)


@pytest.mark.theorem(
    "Advantages",
    "The advantages of `reinforce_plus_plus` have mean 0 over the batch",
    paper="reinforce_plus_plus",
    at_most=1e-12,
)
@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_reinforce_plus_plus_has_mean_zero_and_unit_variance_over_the_batch(weighting):
    mask = mask_of(LENGTHS).double()
    batch = of_returns("reinforce_plus_plus", GROUPS, mask, 4)
    advantages = estimate("reinforce_plus_plus", batch, weighting=weighting)
    weights = mask if weighting == "token" else mask / mask.sum(1, keepdim=True)
    mean = (weights * advantages).sum() / weights.sum()
    proves(mean)
    close((weights * advantages.square()).sum() / weights.sum(), 1.0, atol=1e-6)


def test_center_subtracts_the_batch_mean_only():
    close(outcome("reinforce_plus_plus", GROUPS, norm="center"), [x - 0.5875 for x in GROUPS])


@pytest.mark.theorem(
    "Advantages",
    "`group_relative`, `group_mean` and `leave_one_out` sum to 0 over the completions of a prompt",
    paper="deepseekmath",
    at_most=1e-12,
)
@pytest.mark.parametrize("name", [*PER_GROUP, "group_mean", "leave_one_out"])
def test_group_advantages_sum_to_zero_over_the_siblings(name):
    proves(outcome(name, GROUPS).view(2, 4).sum(1))


@pytest.mark.theorem(
    "Advantages",
    "`length_weighted` sums to 0 over the completions of a prompt, weighted by their lengths",
    paper="opo",
    at_most=1e-12,
)
def test_length_weighted_advantages_sum_to_zero_weighted_by_length():
    weighted = outcome("length_weighted", GROUPS, LENGTHS) * torch.tensor(LENGTHS)
    proves(weighted.view(2, 4).sum(1))


# Exact expectation: every group of two or three draws from a three-armed bandit


@pytest.mark.theorem(
    "Advantages",
    "The expected policy gradient of `leave_one_out` and `reinforce` is the true one, that of "
    "`group_mean` is (G − 1)/G times it (enumeration, G = 2 and 3)",
    paper="rloo",
    at_most=1e-12,
)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("name", "factor"), [("leave_one_out", lambda g: 1.0), ("group_mean", lambda g: (g - 1) / g), ("reinforce", None)]
)
def test_expected_policy_gradient_by_enumeration(name, factor, size):
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=F64, requires_grad=True)
    reward = torch.tensor([1.0, 0.2, -0.5], dtype=F64)
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    logps = logits.log_softmax(0)
    expected = torch.zeros((), dtype=F64)
    for arms in itertools.product(range(3), repeat=size):
        arms = torch.tensor(arms)
        probability = logps[arms].sum().exp().detach()
        advantages = outcome(name, reward[arms].tolist(), size=size)
        expected = expected + probability * (advantages * logps[arms]).mean()
    (gradient,) = torch.autograd.grad(expected, logits)
    proves(gradient, exact * (factor(size) if factor else 1.0))


# The table itself: what each row says, found out from its function


def asked(name, **fields):
    """A batch of all that an estimator may ask for, with equal lengths, no two rewards equal."""
    rng = torch.Generator().manual_seed(0)
    outcome, scored = reward_at_end(torch.rand(8, generator=rng, dtype=F64), torch.ones(8, 3))
    ends = torch.tensor([[False, True, True]]).expand(8, 3)
    row = ADVANTAGE_ESTIMATORS[name]
    steps = torch.rand(8, 3, generator=rng, dtype=F64).where(ends, 0.0)
    given_fields = {
        "steps": steps if row.steps == "needed" else None,
        "steps_scored": ends if row.steps == "needed" else None,
        "baseline": torch.rand(8, generator=rng, dtype=F64) if row.baseline else None,
        "values": torch.rand(8, 4, generator=rng, dtype=F64) if row.values else None,
        "num_generations": 4,
    } | fields
    return RewardBatch(outcome=outcome, outcome_scored=scored, mask=torch.ones(8, 3), **given_fields)


@pytest.mark.parametrize("name", ALL)
def test_a_row_says_whether_the_result_has_one_number_per_token(name):
    advantages = estimate(name, asked(name))
    assert advantages.shape == ((8, 3) if ADVANTAGE_ESTIMATORS[name].per_token else (8,))


@pytest.mark.parametrize("name", ALL)
def test_a_row_says_whether_completions_of_one_prompt_are_compared(name):
    needed = ADVANTAGE_ESTIMATORS[name].completions
    sizes = [size for size in (1, 2, 4, 8) if size == 1 or needed is None or size >= needed()]
    results = {size: estimate(name, asked(name, num_generations=size)) for size in sizes}
    if ADVANTAGE_ESTIMATORS[name].siblings:
        assert all(not torch.allclose(a, b) for a, b in itertools.combinations(results.values(), 2))
        if ADVANTAGE_ESTIMATORS[name].steps != "needed":  # the two steps of one completion are compared, too
            close(results[1], torch.zeros_like(results[1]), atol=1e-12)  # alone, there is nothing to compare with
    else:
        assert all(torch.equal(results[1], other) for other in results.values()), "whose sibling a row is matters not"


@pytest.mark.parametrize("name", ALL)
def test_a_row_says_what_becomes_of_step_rewards(name):
    steps, ends = torch.zeros(8, 3, dtype=F64), torch.zeros(8, 3, dtype=torch.bool)
    steps[0, 1], ends[:, 1] = 3.0, True
    without, changed = ({"steps": x, "steps_scored": None if x is None else ends} for x in (None, steps))
    kind = ADVANTAGE_ESTIMATORS[name].steps
    if kind == "needed":
        with pytest.raises(ValueError) as error:
            estimate(name, asked(name, **without))
        assert str(error.value) == f"{name} needs step rewards; set steps and steps_scored of the batch."
        assert not torch.allclose(estimate(name, asked(name)), estimate(name, asked(name, **changed)))
    elif kind == "added":
        before, after = estimate(name, asked(name, **without)), estimate(name, asked(name, **changed))
        # The reward of a step teaches its token and those before it, beyond what a reward at the end would.
        assert not torch.allclose(before[0], after[0])
        assert after[0, 1] > after[0, 2]
        assert before[0].unique().numel() == 1 or ADVANTAGE_ESTIMATORS[name].values
    else:
        assert kind == "refused"
        assert not ADVANTAGE_ESTIMATORS[name].per_token, "one number per completion cannot tell its steps apart"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("field", "shape"), [("baseline", (8,)), ("values", (8, 4))])
def test_a_row_says_whether_the_greedy_answer_or_a_critic_is_read(name, field, shape):
    rising = torch.linspace(0.0, 1.0, math.prod(shape), dtype=F64).view(shape)
    one, other = (asked(name, **{field: x * rising}) for x in (0.25, 0.5))
    reads = not torch.allclose(estimate(name, one), estimate(name, other))
    assert reads is getattr(ADVANTAGE_ESTIMATORS[name], field)


def options_of(name):
    return inspect.signature(ADVANTAGE_ESTIMATORS[name].function).parameters


@pytest.mark.parametrize("name", REINFORCE_PP)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_a_row_divides_by_times_the_result_is_the_centred_one(name, data):
    case = data.draw(cases("added"))
    options = {
        "weighting": data.draw(st.sampled_from(["token", "sequence"])),
        "correction": data.draw(st.sampled_from([0, 1])),
    }
    if "discount" in options_of(name):
        options |= {
            "gamma": data.draw(st.sampled_from([1.0, 0.7])),
            "discount": data.draw(st.sampled_from(["trainable", "all"])),
        }
    batch, function = case.batch(), ADVANTAGE_ESTIMATORS[name].function
    std = quiet(ADVANTAGE_ESTIMATORS[name].std, batch, **options)
    assert std.dim() == 0 and std.dtype == F64 and std > 0
    centred = quiet(function, batch, **options, norm="center")
    close(quiet(function, batch, **options) * std, centred, atol=1e-9, rtol=1e-9)
    assert quiet(ADVANTAGE_ESTIMATORS[name].std, batch, **options, norm="center") == 1.0


@pytest.mark.parametrize("name", ALL)
def test_a_row_without_a_divisor_divides_by_nothing_or_by_one_number_for_each_prompt(name):
    batch, first = asked(name), torch.tensor([[3.0]] * 4 + [[1.0]] * 4, dtype=F64)

    def scaled(factor):
        steps = None if batch.steps is None else factor * batch.steps
        values = None if batch.values is None else factor * batch.values
        greedy = None if batch.baseline is None else (factor * torch.ones(8, 1)).flatten() * batch.baseline
        new = {"outcome": factor * batch.outcome, "steps": steps, "values": values, "baseline": greedy}
        return estimate(name, dataclasses.replace(batch, **new))

    before, all_tripled, first_tripled = estimate(name, batch), scaled(3), scaled(first)
    if ADVANTAGE_ESTIMATORS[name].std is not None:  # one number for the batch
        close(all_tripled, before, atol=1e-6)
        assert not torch.allclose(first_tripled[4:], before[4:], rtol=0.05)
        assert {"norm", "whiten_advantages"} & {*options_of(name)}
    elif name in PER_GROUP:
        close(all_tripled, before, atol=5e-3)
        close(first_tripled, before, atol=5e-3)
    else:
        close(all_tripled, 3 * before, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_share_of_the_steps_equals_the_loop(data):
    name = "process_group_relative"
    assert {name, "gae", "remax"} == {other for other in ALL if ADVANTAGE_ESTIMATORS[other].metrics}, (
        "each needs its loop"
    )
    case = data.draw(cases("needed"))
    weights = {key: data.draw(st.sampled_from([0.0, 0.5, 1.0, -2.0])) for key in ("process_weight", "outcome_weight")}
    options = {**weights, "credit": data.draw(st.sampled_from(["sum", "mean", "min"]))}
    batch = case.batch()
    advantages = quiet(estimate, name, batch, **options)
    metrics = quiet(ADVANTAGE_ESTIMATORS[name].metrics, batch, advantages, **options)
    steps = [[x for x in row if not math.isnan(x)] for row in case.steps]
    ends = [[t for t, x in enumerate(row) if not math.isnan(x)] for row in case.steps]
    alone = [None if math.isnan(x) else x for x in case.returns]
    _, share = reference.process_group_relative(steps, ends, case.mask, alone, case.size, **options)
    assert [*metrics] == ["process/advantage_share"]
    assert metrics["process/advantage_share"] == pytest.approx(share, abs=1e-8, nan_ok=True)


def test_every_function_of_the_table_takes_a_batch_and_options_by_name():
    for name in ALL:
        first, *others = options_of(name).values()
        assert first.name == "batch" and first.kind is first.POSITIONAL_OR_KEYWORD, name
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in others), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reinforce_plus_plus", {"weighting": "row"}, "weighting must be 'token' or 'sequence', got 'row'"),
        ("reinforce_plus_plus", {"norm": "none"}, "norm must be 'whiten' or 'center', got 'none'"),
        ("reinforce_plus_plus", {"correction": 2}, "correction must be 0 .* or 1 .*, got 2"),
        ("reinforce_plus_plus", {"gamma": 0.0}, r"gamma must be a number in \(0, 1\], got 0.0"),
        ("reinforce_plus_plus_baseline", {"gamma": 0.9}, "gamma must be 1.0 for 'reinforce_plus_plus_baseline'"),
        ("process_group_relative", {"credit": "max"}, "credit must be 'sum', 'mean', 'min' or 'softmin', got 'max'"),
    ],
)
def test_options_outside_their_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        outcome(name, GROUPS, **options)
