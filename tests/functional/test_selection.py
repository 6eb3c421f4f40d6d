"""Choosing among answers: numbers worked by hand, what is missing, ties, refusals, laws, and pass@k by enumeration."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theorems import proves

from trl_ext.functional import accepted, aggregate, best_of_n, estimated_pass_at_k, majority_vote, weighted_vote

NAN = math.nan
ALL = ("min", "prod", "last", "mean")
some = settings(max_examples=60, deadline=None)
probability = st.floats(0, 1)
maybe = st.none() | st.just(NAN) | probability
given_answers = st.lists(st.tuples(st.sampled_from(["3", "7", "9", None]), maybe), max_size=12)


# One score from many


@pytest.mark.parametrize(("how", "expected"), [("min", 0.5), ("prod", 0.36), ("last", 0.5), ("mean", 0.733333)])
def test_scores_of_steps_worked_by_hand(how, expected):
    assert aggregate([0.9, 0.8, 0.5], how) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", ALL)
def test_steps_without_score_are_left_out(how):
    assert aggregate([None, 0.9, None, 0.8, 0.5, None], how) == aggregate([0.9, 0.8, 0.5], how)
    assert aggregate([None, 0.25], how) == 0.25
    assert aggregate(torch.tensor([0.5, 0.25]), how) == aggregate([0.5, 0.25], how)


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("scores", [[], [None, None], [NAN], [0.5, NAN], [NAN, 0.5], [0.2, NAN, 0.5]])
def test_no_score_and_a_broken_one_give_nan(how, scores):
    assert math.isnan(aggregate(scores, how))


def test_an_unknown_aggregate_is_refused_also_without_scores():
    with pytest.raises(ValueError, match=r"how must be one of \['min', 'prod', 'last', 'mean'\], got 'max'\."):
        aggregate([], "max")


@some
@given(scores=st.lists(probability, min_size=1, max_size=8), further=probability)
def test_aggregates_of_probabilities_are_ordered_and_a_step_can_only_lower_min_and_prod(scores, further):
    lowest, product, last, mean = (aggregate(scores, how) for how in ALL)
    assert product <= lowest and lowest - 1e-15 <= mean <= max(scores) + 1e-15  # the mean is rounded
    assert lowest <= last <= max(scores)
    assert aggregate([*scores, further], "min") <= lowest
    assert aggregate([*scores, further], "prod") <= product


# Best of n


def test_the_best_of_each_prompt():
    scores = [0.1, 0.9, 0.3, 0.2, 0.2, 0.2, -3.0, -math.inf, -2.0]
    assert best_of_n(scores, 3) == [1, 0, 2]
    assert best_of_n(torch.tensor(scores), 3) == [1, 0, 2]
    assert best_of_n(scores, 1) == [0] * 9
    assert best_of_n([], 4) == []


def test_nan_and_none_never_win():
    assert best_of_n([NAN, 0.1, None, None, NAN, -math.inf], 3) == [1, 2]
    assert best_of_n([NAN, None], 2) == [None]


@pytest.mark.parametrize(("number", "size"), [(5, 2), (3, 0), (3, -1), (1, 4)])
def test_scores_that_are_no_groups_are_refused(number, size):
    with pytest.raises(ValueError, match=f"{number} scores are not num_generations={size} for each prompt"):
        best_of_n([0.5] * number, size)


@some
@given(groups=st.lists(st.lists(maybe, min_size=4, max_size=4), max_size=5))
def test_the_best_is_the_first_that_none_beats(groups):
    best = best_of_n([score for group in groups for score in group], 4)
    for place, group in zip(best, groups, strict=True):
        scored = [score for score in group if score is not None and not math.isnan(score)]
        assert place == (group.index(max(scored)) if scored else None)


# Votes


def test_majority_and_weighted_vote_worked_by_hand():
    answers, weights = ["7", "3", "3", "7", "3"], [0.9, 0.2, 0.3, 0.4, 0.2]
    assert majority_vote(answers) == "3"
    assert weighted_vote(answers, weights) == "7"  # 1.3 to 0.7


def test_ties_go_to_the_answer_seen_first():
    assert majority_vote(["b", "a", "a", "b"]) == "b"
    assert majority_vote([None, "a", "b"]) == "a"
    assert weighted_vote(["b", "a"], [0.0, 0.0]) == "b"
    assert weighted_vote(["a", "b", "a", "b", "a"], [0.1, 0.3, 0.1, 0.3, 0.4]) == "a"  # .6 to .6, exactly summed


def test_no_answer_and_no_score_do_not_vote():
    assert majority_vote([None, None, "7"]) == "7"
    assert weighted_vote([None, "7", "3", "3"], [0.9, 0.1, None, NAN]) == "7"
    for nothing in ([], [None]):
        assert majority_vote(nothing) is None
        assert weighted_vote(nothing, [0.5] * len(nothing)) is None
    assert weighted_vote(["7"], [None]) is None


def test_votes_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        weighted_vote(["7", None], [0.5, -0.1])
    for scores in ([0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(ValueError, match=f"2 answers have {len(scores)} scores"):
            weighted_vote(["7", "3"], scores)


@some
@given(votes=given_answers, data=st.data())
def test_the_order_of_votes_decides_ties_alone(votes, data):
    answers, scores = [answer for answer, _ in votes], [score for _, score in votes]
    order = data.draw(st.permutations(range(len(votes))))
    won, again = (
        weighted_vote([answers[i] for i in places], [scores[i] for i in places])
        for places in (range(len(votes)), order)
    )
    counted = [vote for vote in votes if vote[0] is not None and vote[1] is not None and not math.isnan(vote[1])]
    total = {answer: sum(Fraction(s) for a, s in counted if a == answer) for answer, _ in counted}
    assert (won is None) == (again is None) == (not total)
    if total:
        assert float(total[won]) == float(total[again]) == float(max(total.values()))


@some
@given(answers=st.lists(st.sampled_from(["3", "7", "9", None]), max_size=12), weight=st.floats(1e-300, 1e300))
def test_equal_weights_make_a_majority_vote(answers, weight):
    assert weighted_vote(answers, [weight] * len(answers)) == majority_vote(answers)


# pass@k


def test_pass_at_k_worked_by_hand():
    assert estimated_pass_at_k(5, 2, 3) == 0.9  # of the 10 triples of 5 samples only one has none of the 2 right ones


@pytest.mark.theorem(
    "Selection",
    "`estimated_pass_at_k` is the share of the subsets of k samples that hold a right one (enumeration, n ≤ 7)",
    paper="codex",
    at_most=0.0,
)
@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in itertools.combinations(right, k)]
            proves(estimated_pass_at_k(n, c, k), float(Fraction(sum(subsets), len(subsets))))


@pytest.mark.theorem(
    "Selection",
    "The expectation of `estimated_pass_at_k` over independent samples is 1 − (1 − p)^k (enumeration)",
    paper="codex",
    at_most=1e-14,
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (4, 3), (6, 6), (9, 4)])
@pytest.mark.parametrize("p", [Fraction(0), Fraction(1, 10), Fraction(2, 3), Fraction(1)])
def test_pass_at_k_is_unbiased(n, k, p):
    """Over all numbers of right ones of n independent samples, exactly."""
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(float(weight) * estimated_pass_at_k(n, c, k) for c, weight in enumerate(weights))
    proves(expected, float(1 - (1 - p) ** k))


@some
@given(n=st.integers(1, 3000), data=st.data())
def test_pass_at_k_is_between_its_ends_and_grows(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    value = estimated_pass_at_k(n, c, k)
    assert 0.0 <= value <= 1.0
    assert value == 0.0 if c == 0 else value >= c / n * (1 - 1e-15)
    assert (value == 1.0) >= (n - c < k)
    assert estimated_pass_at_k(n, c, 1) == c / n
    if k < n:
        assert estimated_pass_at_k(n, c, k + 1) >= value


def test_pass_at_k_is_accurate_where_a_product_of_floats_is_not():
    assert estimated_pass_at_k(10**12, 1, 1) == 1e-12
    assert estimated_pass_at_k(1000, 500, 500) == 1.0  # 1 − 4e-300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 6, 1), "c counts the right ones of n=5 samples, got 6"),
        ((5, -1, 1), "got -1"),
        ((5, 2, 6), "k must be 1 to n=5"),
        ((5, 2, 0), "k must be 1 to n=5"),
        ((0, 0, 1), "k must be 1 to n=0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimated_pass_at_k(*arguments)


# Rejection sampling


def row(prompt, text, outcome=1.0):
    return {"prompt": prompt, "completions": text.splitlines(keepends=True), "outcome": outcome}


def test_kept_are_right_and_distinct_answers():
    rows = [
        row("p", "a\n#2", 0.0),
        row("p", "a\n#2"),
        row("p", " a\t\n# 2"),  # the same without white space
        row("q", "a\n#2"),  # of another prompt
        row("p", "b\n#2", True),
        row("p", "ab#2"),  # other steps
        row("p", "c", None),
        row("p", "d", NAN),
        row("p", "e", 0.5),
    ]
    assert accepted(rows) == [1, 3, 4, 5]
    assert accepted(rows, 2) == [1, 3, 4]
    assert accepted(rows, 1) == [1, 3]
    assert accepted([]) == []


def test_a_prompt_is_its_text_or_its_messages():
    chat = [{"role": "user", "content": "p"}]
    same = [{"content": "p", "role": "user"}]
    assert accepted([row(prompt, "a") for prompt in ("p", chat, same, "p", "q")]) == [0, 1, 4]


def test_fewer_than_one_answer_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        accepted([], 0)


@some
@given(
    rows=st.lists(st.tuples(st.sampled_from("pq"), st.text("ab \n", max_size=4), st.booleans()), max_size=15),
    limit=st.none() | st.integers(1, 3),
)
def test_nothing_is_kept_twice_nor_left_out_without_reason(rows, limit):
    rows = [row(*r) for r in rows]
    kept = accepted(rows, limit)
    assert kept == sorted({*kept}) and all(rows[i]["outcome"] for i in kept)

    def way(r):
        return r["prompt"], *("".join(step.split()) for step in r["completions"])

    ways = [way(rows[i]) for i in kept]
    assert len({*ways}) == len(ways)
    for prompt in "pq":
        of_prompt = {way(r) for r in rows if r["outcome"] and r["prompt"] == prompt}
        number = sum(w[0] == prompt for w in ways)
        assert number == (len(of_prompt) if limit is None else min(limit, len(of_prompt)))
