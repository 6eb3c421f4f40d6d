"""The estimators: the spec of each as numbers worked by hand, as float64 loops, as laws and as exact expectations."""

import inspect
import itertools
import warnings

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS, NEEDS_SIBLINGS, PER_TOKEN
from trl_ext.functional.reductions import reward_at_end

F64 = torch.float64
NAN = float("nan")
ALL = sorted(ADVANTAGE_ESTIMATORS)
REINFORCE_PP = ["reinforce_plus_plus", "reinforce_plus_plus_baseline"]


def close(actual, expected, atol=1e-6, rtol=0.0):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=rtol)


def mask_of(lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def outcome(name, returns, lengths=None, size=4, **options):
    """Advantage per row (its first token) of an outcome batch."""
    mask = mask_of(lengths or [1] * len(returns))
    rewards, scored = reward_at_end(torch.tensor(returns, dtype=F64), mask)
    advantages = ADVANTAGE_ESTIMATORS[name](rewards, scored, mask, size, **options)
    return advantages[:, 0] if advantages.dim() == 2 else advantages


# Numbers worked by hand

KL_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
KL = torch.tensor([[0.1, -0.5, 0.1, 1.2], [0.2, 0.3, 9.9, -0.1]], dtype=F64)
KL_PENALTY = 0.1 * KL * KL_MASK


def with_kl(name, returns, size=1, beta=1.0, **options):
    rewards, scored = reward_at_end(torch.tensor(returns, dtype=F64), KL_MASK)
    penalty = beta * KL_PENALTY
    return ADVANTAGE_ESTIMATORS[name](rewards - penalty, scored, KL_MASK, size, kl_penalty=penalty, **options)


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
    ],
)
def test_two_groups_of_four(name, expected):
    close(outcome(name, GROUPS), expected, atol=1e-4 if name == "group_relative" else 1e-6)


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
    rewards, scored = reward_at_end(returns, mask)
    with pytest.warns(UserWarning, match="No completion of the batch has both a reward and a trainable token"):
        advantages = ADVANTAGE_ESTIMATORS[name](rewards, scored, mask, 2)
    assert not advantages.any()


@pytest.mark.parametrize("name", ALL)
def test_one_trainable_token_gives_zero(name):
    size = 1
    if name == "reinforce":
        close(outcome(name, [3.0], size=size), [3.0])
    else:
        for options in [{}] if name not in REINFORCE_PP else [{}, {"correction": 1}, {"weighting": "sequence"}]:
            warns = name == "reinforce_plus_plus_baseline"
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always" if warns else "error")
                close(outcome(name, [3.0], size=size, **options), [0.0])


@pytest.mark.parametrize("name", sorted(NEEDS_SIBLINGS))
def test_a_row_without_scored_sibling_gets_zero(name):
    close(outcome(name, [5.0, NAN, NAN, NAN, 1.0, 0.0, 0.0, 1.0])[:4], [0.0] * 4)


@pytest.mark.parametrize("name", [name for name in ALL if name != "reinforce"])
def test_equal_rewards_give_zero(name):
    close(outcome(name, [0.7] * 8), [0.0] * 8, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_a_fully_masked_row_gets_zero_but_its_reward_counts_for_its_siblings(name):
    mask = mask_of([2, 2, 0, 2, 2, 2])
    advantages = []
    for masked_reward in (0.0, 5.0):
        returns = torch.tensor([1.0, 0.0, masked_reward, 0.0, 0.0, 1.0], dtype=F64)
        rewards, scored = reward_at_end(returns, mask)
        advantages.append(ADVANTAGE_ESTIMATORS[name](rewards, scored, mask, 3))
    assert not any(a[2].any() for a in advantages)
    sees_sequences = name in NEEDS_SIBLINGS - {"length_weighted"}
    assert torch.equal(*advantages) is not sees_sequences


# Laws, over the whole table


@st.composite
def batches(draw, min_scored=0):
    size = draw(st.sampled_from([2, 3, 4]))
    rows = size * draw(st.integers(1, 3))
    width = draw(st.integers(1, 6))
    mask = torch.tensor(
        draw(st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=rows, max_size=rows))
    )
    numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
    returns = draw(st.lists(st.one_of(numbers, numbers, numbers, st.just(NAN)), min_size=rows, max_size=rows))
    kl = torch.tensor(draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=rows, max_size=rows)))
    penalty = draw(st.sampled_from([None, kl.double() * 0.01 * mask]))
    rewards, scored = reward_at_end(torch.tensor(returns, dtype=F64), mask)
    if penalty is not None:
        rewards = rewards - penalty
    return rewards, scored, mask, size, penalty


def quiet(name, rewards, scored, mask, size, penalty):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ADVANTAGE_ESTIMATORS[name](rewards, scored, mask, size, kl_penalty=penalty)


def as_tokens(advantages, mask):
    return advantages if advantages.dim() == 2 else advantages[:, None] * mask


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_laws_of_every_estimator(name, batch):
    rewards, scored, mask, size, penalty = batch
    before = [x.clone() for x in (rewards, scored, mask)]
    advantages = quiet(name, *batch)
    tokens = as_tokens(advantages, mask)

    assert advantages.shape == (rewards.shape if name in PER_TOKEN else rewards.shape[:1])
    assert advantages.dtype == rewards.dtype
    assert advantages.isfinite().all()
    assert not tokens[mask == 0].any()
    assert not advantages[~scored.any(1)].any()
    for x, y in zip((rewards, scored, mask), before, strict=True):
        assert torch.equal(x, y), "inputs are not changed"

    pad = torch.nn.functional.pad
    padded = quiet(
        name,
        pad(rewards, (0, 2)),
        pad(scored, (0, 2)),
        pad(mask, (0, 2)),
        size,
        None if penalty is None else pad(penalty, (0, 2)),
    )
    close(padded if padded.dim() == 1 else padded[:, :-2], advantages, atol=1e-9, rtol=1e-9)

    groups = torch.arange(len(rewards)).view(-1, size).flip(0, 1).flatten()  # prompts and siblings, both reversed
    permuted = quiet(
        name, rewards[groups], scored[groups], mask[groups], size, None if penalty is None else penalty[groups]
    )
    close(permuted, advantages[groups], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_every_estimator_equals_the_loop_written_from_its_paper(name, batch):
    rewards, scored, mask, size, _ = batch
    advantages = quiet(name, rewards, scored, mask, size, None)
    rows, masks, known = rewards.tolist(), mask.tolist(), scored.any(1).tolist()
    returns = [sum(row) if k else None for row, k in zip(rows, known, strict=True)]
    lengths = mask.sum(1).tolist()
    if name == "reinforce":
        expected = [
            reference.reward_to_go(r, m) if k else [0.0] * len(r) for r, m, k in zip(rows, masks, known, strict=True)
        ]
    elif name == "reinforce_plus_plus":
        expected = reference.reinforce_plus_plus(rows, masks, known)
    elif name == "reinforce_plus_plus_baseline":
        expected = reference.reinforce_plus_plus_baseline(rows, masks, known, returns, size)
    else:
        lengths_or_one = [max(n, 0) for n in lengths]
        if name == "length_weighted" and any(
            sum(lengths[i] for i in range(s, s + size) if known[i]) == 0 for s in range(0, len(rows), size)
        ):
            return  # no token in a group: no baseline to write down; zeros, see the laws
        expected = getattr(reference, name)(returns, lengths_or_one, size)
        expected = [x if n else 0.0 for x, n in zip(expected, lengths, strict=True)]
    close(advantages, expected, atol=1e-8, rtol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    batch=batches(),
    weighting=st.sampled_from(["token", "sequence"]),
    correction=st.sampled_from([0, 1]),
    gamma=st.sampled_from([1.0, 0.7]),
    discount=st.sampled_from(["trainable", "all"]),
)
def test_reinforce_plus_plus_options_equal_the_loop(batch, weighting, correction, gamma, discount):
    rewards, scored, mask, size, _ = batch
    options = {"weighting": weighting, "correction": correction, "gamma": gamma, "discount": discount}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = ADVANTAGE_ESTIMATORS["reinforce_plus_plus"](rewards, scored, mask, size, **options)
    expected = reference.reinforce_plus_plus(rewards.tolist(), mask.tolist(), scored.any(1).tolist(), **options)
    close(actual, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ["group_relative", *REINFORCE_PP])
def test_scale_and_shift_of_the_reward_do_not_matter(name):
    base = outcome(name, GROUPS, LENGTHS)
    close(outcome(name, [3 * x + 7 for x in GROUPS], LENGTHS), base, atol=1e-2 if name == "group_relative" else 1e-6)


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_reinforce_plus_plus_has_mean_zero_and_unit_variance_over_the_batch(weighting):
    mask = mask_of(LENGTHS).double()
    rewards, scored = reward_at_end(torch.tensor(GROUPS, dtype=F64), mask)
    advantages = ADVANTAGE_ESTIMATORS["reinforce_plus_plus"](rewards, scored, mask, 4, weighting=weighting)
    weights = mask if weighting == "token" else mask / mask.sum(1, keepdim=True)
    mean = (weights * advantages).sum() / weights.sum()
    close(mean, 0.0, atol=1e-12)
    close((weights * advantages.square()).sum() / weights.sum(), 1.0, atol=1e-6)


def test_center_subtracts_the_batch_mean_only():
    close(outcome("reinforce_plus_plus", GROUPS, norm="center"), [x - 0.5875 for x in GROUPS])


@pytest.mark.parametrize("name", ["group_relative", "group_mean", "leave_one_out"])
def test_group_advantages_sum_to_zero_over_the_siblings(name):
    close(outcome(name, GROUPS).view(2, 4).sum(1), [0.0, 0.0], atol=1e-12)


def test_length_weighted_advantages_sum_to_zero_weighted_by_length():
    weighted = outcome("length_weighted", GROUPS, LENGTHS) * torch.tensor(LENGTHS)
    close(weighted.view(2, 4).sum(1), [0.0, 0.0], atol=1e-12)


# Exact expectation: every group of two or three draws from a three-armed bandit


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
    close(gradient, exact * (factor(size) if factor else 1.0), atol=1e-12)


# The table itself


def test_the_table_says_which_entries_need_siblings_and_which_are_per_token():
    for name, estimator in ADVANTAGE_ESTIMATORS.items():
        alone = outcome(name, [1.0, 0.0, 0.0, 0.0], size=1) if name not in NEEDS_SIBLINGS else None
        assert alone is None or alone.any(), name
        assert list(inspect.signature(estimator).parameters)[:5] == [
            "rewards", "scored", "completion_mask", "num_generations", "kl_penalty"
        ]  # fmt: skip
    assert set(ADVANTAGE_ESTIMATORS) >= NEEDS_SIBLINGS | PER_TOKEN


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reinforce_plus_plus", {"weighting": "row"}, "weighting must be 'token' or 'sequence', got 'row'"),
        ("reinforce_plus_plus", {"norm": "none"}, "norm must be 'whiten' or 'center', got 'none'"),
        ("reinforce_plus_plus", {"correction": 2}, "correction must be 0 .* or 1 .*, got 2"),
        ("reinforce_plus_plus", {"gamma": 0.0}, r"gamma must be a number in \(0, 1\], got 0.0"),
        ("reinforce_plus_plus_baseline", {"gamma": 0.9}, "gamma must be 1.0 for 'reinforce_plus_plus_baseline'"),
    ],
)
def test_options_outside_their_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        outcome(name, GROUPS, **options)
