r"""
Choosing among sampled answers to a prompt: scores of answers from scores of steps, best of n, votes, pass@k, and the
right and distinct answers that rejection sampling keeps.

Plain numbers and lists in and out: a prompt has a handful of answers, and they are texts. `None` and NaN are no score,
and `None` is no answer. What has no score never wins and never votes; where nothing is left to choose from, the result
is `None`, which no list takes for an index.
"""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

_Answer = TypeVar("_Answer", bound=Hashable)

_AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "last": lambda scores: scores[-1],
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


def _number(score: Any) -> float | None:
    """`None` for a score that is missing, `None` or NaN."""
    return None if score is None or math.isnan(score) else float(score)


def aggregate(step_scores: Iterable[float | None], how: str) -> float:
    """
    One score of an answer from the scores of its steps.

    With probabilities, `"min"` and `"prod"` can only fall from step to step, which punishes long answers; `"mean"`
    rises with every easy step that is added; `"last"` is right where the scores are values, the chance to end right
    from there, and blind to earlier mistakes where they judge each step by itself. Lightman et al., 2023, compare
    `"prod"` and `"min"` (https://huggingface.co/papers/2305.20050), Snell et al., 2024, take `"last"`
    (https://huggingface.co/papers/2408.03314).

    Args:
        step_scores (`Iterable[float | None]`):
            Scores of the steps, in order. `None`, a step that was not scored, is left out.
        how (`str`):
            `"min"`, `"prod"`, `"last"` or `"mean"`.

    Returns:
        `float`: Score of the answer; larger is better. NaN where no step has a score, or a score is NaN.

    Raises:
        `ValueError`: If `how` is none of the above.

    Example:

    >>> [aggregate([0.5, None, 1.0], how) for how in ("min", "prod", "last", "mean")]
    [0.5, 0.5, 1.0, 0.75]
    """
    if how not in _AGGREGATES:
        raise ValueError(f"how must be one of {list(_AGGREGATES)}, got {how!r}.")
    scores = [float(score) for score in step_scores if score is not None]
    if not scores or any(map(math.isnan, scores)):
        return math.nan
    return _AGGREGATES[how](scores)


def best_of_n(scores: torch.Tensor | Sequence[float | None], num_generations: int) -> list[int | None]:
    r"""
    The best answer to each prompt.

    Args:
        scores (`torch.Tensor` of shape `(N,)` or `Sequence[float | None]`):
            Scores of the answers, larger is better; the answers to one prompt stand side by side.
        num_generations (`int`):
            Answers per prompt, \\(G\\).

    Returns:
        `list[int | None]` of length `N / G`: Place of the largest score among the answers to the prompt, 0 to G − 1;
        of equal ones the first. `None` for a prompt without any score.

    Raises:
        `ValueError`: If `num_generations` is not positive or does not divide the number of scores.

    Example:

    >>> best_of_n([0.1, 0.9, 0.9, float("nan"), None, 0.2, None, None, None], num_generations=3)
    [1, 2, None]
    """
    values = scores.tolist() if isinstance(scores, torch.Tensor) else scores
    if num_generations < 1 or len(values) % num_generations:
        raise ValueError(f"{len(values)} scores are not num_generations={num_generations} for each prompt.")
    best: list[int | None] = []
    for start in range(0, len(values), num_generations):
        group = {place: _number(score) for place, score in enumerate(values[start : start + num_generations])}
        scored = {place: score for place, score in group.items() if score is not None}
        best.append(max(scored, key=scored.__getitem__, default=None))
    return best


def majority_vote(answers: Iterable[_Answer | None]) -> _Answer | None:
    """
    The answer that is given most often (self-consistency; Wang et al., 2022, https://huggingface.co/papers/2203.11171,
    with equal weights).

    Args:
        answers (`Iterable`):
            Final answers to one prompt, such as extracted numbers, in one form per meaning: `"7"` and `"7.0"` are two
            answers. `None`, no answer, does not vote.

    Returns:
        One of `answers`: of equally frequent ones the one seen first. `None` where nobody votes.

    Example:

    >>> majority_vote(["7", "3", None, "3", "7", None, None])
    '7'
    """
    votes = [answer for answer in answers if answer is not None]
    return weighted_vote(votes, [1.0] * len(votes))


def weighted_vote(answers: Iterable[_Answer | None], scores: Iterable[float | None]) -> _Answer | None:
    """
    The answer whose givers have the largest sum of scores: best of n and the majority in one (Li et al., 2022,
    https://huggingface.co/papers/2206.02336, with the score of a verifier).

    Args:
        answers (`Iterable`):
            Final answers to one prompt, as for [`majority_vote`].
        scores (`Iterable[float | None]`):
            Score of each. One without score, `None` or NaN, does not vote.

    Returns:
        One of `answers`: of those with equal sums the one seen first. `None` where nobody votes.

    Raises:
        `ValueError`: If there are more or fewer scores than answers, or a score is negative.

    Example:

    >>> weighted_vote(["7", "3", "3"], [0.9, 0.3, 0.4])
    '7'
    """
    answers, weights = list(answers), [_number(score) for score in scores]
    if len(answers) != len(weights):
        raise ValueError(f"{len(answers)} answers have {len(weights)} scores; each needs one, or None.")
    votes: dict[_Answer, list[float]] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if weight is not None and weight < 0:
            raise ValueError(f"A score of a vote is a weight and must not be negative, got {weight!r}.")
        if answer is not None and weight is not None:
            votes.setdefault(answer, []).append(weight)
    # An exact sum, so that equal sums are equal in whatever order the votes come.
    return max(votes, key=lambda answer: math.fsum(votes[answer]), default=None)


def estimated_pass_at_k(n: int, c: int, k: int) -> float:
    r"""
    Probability that at least one of `k` of the `n` samples, drawn without replacement, is right:

    $$ 1 - \binom{n-c}{k} \Big/ \binom{n}{k} $$

    Chen et al., 2021, Eq. 1 (https://huggingface.co/papers/2107.03374). Over samples that are drawn independently, its
    expectation is \\(1-(1-p)^k\\) for every n ≥ k, where \\(1-(1-c/n)^k\\) is too small. Their product of floats is
    not needed: whole numbers are exact, and the quotient is rounded once.

    Args:
        n (`int`):
            Samples of the prompt.
        c (`int`):
            How many of them are right.
        k (`int`):
            How many may be tried, at most `n`.

    Returns:
        `float`: Probability, in [0, 1].

    Raises:
        `ValueError`: Unless 0 ≤ `c` ≤ `n` and 1 ≤ `k` ≤ `n`.

    Example:

    >>> estimated_pass_at_k(5, 2, 3)
    0.9
    """
    if not 0 <= c <= n:
        raise ValueError(f"c counts the right ones of n={n} samples, got {c}.")
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to n={n}: more samples than there are cannot be tried, got {k}.")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def accepted(rows: Iterable[Mapping[str, Any]], how_many: int | None = None) -> list[int]:
    """
    The answers that rejection sampling keeps: the right ones, distinct in their steps, so many per prompt.

    Two answers are the same if their steps are, once white space is removed. Yuan et al., 2023
    (https://huggingface.co/papers/2308.01825), compare the equations of an answer, which presupposes arithmetic; what
    helps according to them is the number of distinct ways, not of samples.

    Args:
        rows (`Iterable[Mapping]`):
            Sampled answers: `prompt` (`str` or messages), `completions` (`list[str]`, the steps) and `outcome`, which
            is right above 0.5; `None` and NaN are wrong. Answers to one prompt need not be side by side.
        how_many (`int`, *optional*):
            Kept per prompt at most, the first ones. Default: all.

    Returns:
        `list[int]`: Places in `rows` of those that are kept, increasing.

    Raises:
        `ValueError`: If `how_many` is below 1.

    Example:

    >>> steps = [["1+1=2", "#2"], ["1 + 1 = 2", "#2"], ["2", "#2"], ["#3"]]
    >>> accepted([{"prompt": "1+1?", "completions": s, "outcome": s[-1] == "#2"} for s in steps])
    [0, 2]
    """
    if how_many is not None and how_many < 1:
        raise ValueError(f"how_many answers are kept per prompt must be at least 1, got {how_many!r}.")
    kept: list[int] = []
    ways: dict[str, set[tuple[str, ...]]] = {}
    for place, row in enumerate(rows):
        of_prompt = ways.setdefault(json.dumps(row["prompt"], sort_keys=True), set())
        way = tuple("".join(step.split()) for step in row["completions"])
        right = (_number(row["outcome"]) or 0.0) > 0.5
        if right and way not in of_prompt and (how_many is None or len(of_prompt) < how_many):
            of_prompt.add(way)
            kept.append(place)
    return kept
