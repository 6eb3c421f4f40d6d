"""
Reasoning steps of sampled completions: where they end and what they say.

Positions are exact on the sampled token ids. Text is never encoded again: a policy samples `a`, `b` where its
tokenizer writes `ab`, so positions from a second tokenisation drift. Only decoding is used.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

from .reward_calls import RewardError, describe
from .separators import decode, separator_ends


def segment(
    token_ids: list[int],
    trainable: list[int] | None,
    tokenizer,
    separator: str = "\n",
    step_ends_function: Callable[[list[int], Any], list[int]] | None = None,
) -> list[list[int]]:
    """
    The steps of one completion, each as the positions of its tokens.

    Every maximal run of trainable tokens (a turn) is cut for itself: tool output is never part of a step, and the end
    of a turn is the end of a step. No step is empty: a piece of separators, white space and special tokens alone
    belongs to the step before it, at the start of a turn to the one after it; a turn of nothing else is one step.

    Args:
        token_ids (`list[int]`):
            Sampled tokens of the completion, tool output included.
        trainable (`list[int]` or `None`):
            1 for tokens of the policy, 0 for those of tools; `None` if all are the policy's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        separator (`str`, *optional*, defaults to `"\\n"`):
            Text that ends a step. A token that goes beyond it belongs to the step it starts in.
        step_ends_function (`Callable`, *optional*):
            Used instead of `separator`: `(token_ids, tokenizer)` of a turn to the increasing indices of the last token
            of each step. The tokens after the last of them are a step too.

    Returns:
        `list[list[int]]`: Positions in `token_ids`, disjoint, in order; together they are all trainable tokens.

    Raises:
        `ValueError`: If `step_ends_function` returns anything else.
    """
    steps: list[list[int]] = []
    positions = range(len(token_ids)) if trainable is None else [t for t, own in enumerate(trainable) if own]
    for _, run in itertools.groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0]):
        turn = [position for _, position in run]
        turn_ids = [token_ids[position] for position in turn]
        if step_ends_function is None:
            ends = separator_ends(turn_ids, tokenizer, separator)
        else:
            ends = step_ends_function(turn_ids, tokenizer)
            _check_ends(ends, len(turn))
        cuts = [0, *(end + 1 for end in ends), len(turn)]
        pieces = [turn[a:b] for a, b in itertools.pairwise(cuts) if a < b]
        texts = [decode(tokenizer, [token_ids[t] for t in piece], skip_special_tokens=True) for piece in pieces]
        if step_ends_function is None:
            texts = [text.replace(separator, "") for text in texts]
        steps += _without_empty(pieces, [not text.strip() for text in texts])
    return steps


def _check_ends(ends: Any, n: int) -> None:
    valid = isinstance(ends, list) and all(isinstance(end, int) for end in ends)
    if not valid or any(b <= a for a, b in itertools.pairwise([-1, *ends, n])):
        raise ValueError(
            f"step_ends_function returned {ends!r} for {n} tokens; it must return increasing token indices below {n}."
        )


def _without_empty(pieces: list[list[int]], empty: list[bool]) -> list[list[int]]:
    """Joins each empty piece to the piece before it, or after it where there is none before."""
    steps: list[list[int]] = []
    first_is_empty = False
    for piece, is_empty in zip(pieces, empty, strict=True):
        if steps and (is_empty or first_is_empty):
            steps[-1] += piece
            first_is_empty = first_is_empty and is_empty
        else:
            steps.append(list(piece))
            first_is_empty = is_empty
    return steps


def step_texts(token_ids: list[int], steps: list[list[int]], tokenizer) -> list[str]:
    """The text of each step, decoded from its own tokens without special tokens."""
    return [decode(tokenizer, [token_ids[t] for t in step], skip_special_tokens=True) for step in steps]


class StepCuts:
    """
    The steps of the completions of one process, cut when they are first read: most functions read none.

    Args:
        token_ids (`list[list[int]]`):
            Sampled tokens of each completion.
        tool_mask (`list[list[int]]` or `None`):
            Which of them are the policy's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        separator (`str`):
            Text that ends a step.
        step_ends_function (`Callable`, *optional*):
            Finds the ends in place of the separator; see [`segment`].
    """

    def __init__(
        self,
        token_ids: list[list[int]],
        tool_mask: list[list[int]] | None,
        tokenizer: Any,
        separator: str,
        step_ends_function: Callable | None = None,
    ):
        self.token_ids, self._masks = token_ids, tool_mask or itertools.repeat(None, len(token_ids))
        self._tokenizer, self._options = tokenizer, (separator, step_ends_function)

    @functools.cached_property
    def _steps(self) -> list[list[list[int]]]:
        steps = []
        for i, (ids, mask) in enumerate(zip(self.token_ids, self._masks, strict=True)):
            try:
                steps.append(self._cut(ids, mask))
            except Exception as error:
                raise RewardError(f"Completion {i} was not cut into steps: {describe(error)}") from error
        return steps

    def _cut(self, ids: list[int], mask: list[int] | None) -> list[list[int]]:
        return segment(ids, mask, self._tokenizer, *self._options)

    @functools.cached_property
    def ends(self) -> list[list[int]]:
        """Index of the last token of each step of each completion."""
        return [[step[-1] for step in steps] for steps in self._steps]

    @functools.cached_property
    def texts(self) -> list[list[str]]:
        """Text of each step of each completion."""
        return [step_texts(ids, s, self._tokenizer) for ids, s in zip(self.token_ids, self._steps, strict=True)]
