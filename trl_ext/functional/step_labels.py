r"""
Labels of steps from rollouts: how often an answer ends right when it is continued from behind a step.

Symbols: \\(S\\) steps of an answer; \\(K\\) rollouts of a prefix; \\(c\\) of them end right; \\(p\\) chance that one
does. A prefix is *alive* if \\(p > 0\\), *dead* otherwise.
"""

import math
from collections.abc import Callable, Generator

Search = Generator[int, bool, int]


def soft_label(right: int, rollouts: int) -> float:
    r"""
    Share of the rollouts that end right, \\(c/K\\).

    Wang et al., 2023, Eq. 4 (https://huggingface.co/papers/2312.08935), their soft estimation. Expectation: over
    continuations sampled from the completer; equals \\(p\\). Standard deviation \\(\sqrt{p(1-p)/K}\\).

    Args:
        right (`int`):
            Rollouts that end right.
        rollouts (`int`):
            All rollouts, positive.

    Returns:
        `float`: Label, in [0, 1].

    Example:

    >>> soft_label(3, 8)
    0.375
    """
    return right / rollouts


def hard_label(right: int, rollouts: int) -> float:
    r"""
    1 if any rollout ends right, else 0.

    Wang et al., 2023, Eq. 3 (https://huggingface.co/papers/2312.08935), their hard estimation. Expectation: over
    continuations sampled from the completer; equals \\(1-(1-p)^K\\), so that the label of a dead prefix is exact and
    that of a living one is 0 with probability \\((1-p)^K\\). [`rollouts_for`] gives the \\(K\\) that bounds it.

    Args:
        right (`int`):
            Rollouts that end right.
        rollouts (`int`):
            All rollouts. Not read; it is there because the soft label needs it.

    Returns:
        `float`: Label, 0 or 1.

    Example:

    >>> hard_label(3, 8), hard_label(0, 8)
    (1.0, 0.0)
    """
    return float(right > 0)


def rollouts_for(finish_rate: float, error: float) -> int:
    r"""
    Rollouts with which a living prefix is called dead with at most this probability.

    $$ K = \min\{k \ge 1 : (1-p)^k \le \varepsilon\} $$

    Args:
        finish_rate (`float`):
            \\(p\\), chance that the completer ends right from a prefix without an error, in (0, 1].
        error (`float`):
            \\(\varepsilon\\), in (0, 1).

    Returns:
        `int`: \\(K\\).

    Raises:
        `ValueError`: If an argument is out of range.

    Example:

    >>> rollouts_for(0.1, 0.05), rollouts_for(0.99, 0.05)
    (29, 1)
    """
    if not 0.0 < finish_rate <= 1.0:
        raise ValueError(f"finish_rate must be in (0, 1], got {finish_rate!r}.")
    if not 0.0 < error < 1.0:
        raise ValueError(f"error must be in (0, 1), got {error!r}.")
    if finish_rate == 1.0:
        return 1
    # At an exact power the quotient of the logarithms may lie on either side of the whole number.
    rollouts = max(1, math.floor(math.log(error) / math.log1p(-finish_rate)))
    return rollouts if (1.0 - finish_rate) ** rollouts <= error else rollouts + 1


def first_error(num_steps: int) -> Search:
    r"""
    Bisection for the step with which a wrong answer dies.

    The binary search of Luo et al., 2024 (https://huggingface.co/papers/2406.06592). It assumes that the prompt alone
    is alive, that the whole answer is dead, and that a dead prefix stays dead. It asks \\(\lceil\log_2 S\rceil\\)
    questions at most, and none about an answer of one step. One wrong answer to a question sends it to the wrong half.

    A generator, so that many answers can be searched at once ([`search_together`]): it yields the number of steps of
    the prefix to roll out, is sent whether that prefix is dead, and returns its result.

    Args:
        num_steps (`int`):
            \\(S\\), positive.

    Returns:
        `Generator[int, bool, int]`: Its return value is the index of the first dead step, in 0 … S − 1.

    Example:

    >>> search = first_error(9)
    >>> next(search), search.send(True), search.send(False)  # 4 steps are dead, 2 are alive: what about 3?
    (4, 2, 3)
    """
    alive, dead = 0, num_steps  # numbers of steps
    while dead - alive > 1:
        middle = (alive + dead) // 2
        if (yield middle):
            dead = middle
        else:
            alive = middle
    return dead - 1


def search_together(searches: list[Search], are_dead: Callable[[list[tuple[int, int]]], list[bool]]) -> list[int]:
    """
    Runs searches side by side, so that the questions of a round can be rolled out in one batch.

    Args:
        searches (`list[Generator[int, bool, int]]`):
            Searches as [`first_error`] makes them.
        are_dead (`Callable`):
            Given the open questions of a round, `(index of the search, number of steps of the prefix)`; returns for
            each whether that prefix is dead.

    Returns:
        `list[int]`: What each search found.

    Example:

    >>> search_together([first_error(4), first_error(1)], lambda questions: [steps > 2 for _, steps in questions])
    [2, 0]
    """
    found = [0] * len(searches)
    asked: dict[int, int] = {}

    def advance(i: int, answer: bool | None) -> None:
        try:
            asked[i] = next(searches[i]) if answer is None else searches[i].send(answer)
        except StopIteration as end:
            found[i] = end.value
            asked.pop(i, None)

    for i in range(len(searches)):
        advance(i, None)
    while asked:
        questions = [*asked.items()]
        for (i, _), dead in zip(questions, are_dead(questions), strict=True):
            advance(i, dead)
    return found


STEP_LABELS = {"soft": soft_label, "hard": hard_label}
