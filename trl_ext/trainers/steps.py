"""
Reasoning steps of sampled completions: where they end, what they say, and the rewards that functions gave them.

Positions are exact on the sampled token ids. Text is never encoded again: a policy samples `a`, `b` where its
tokenizer writes `ab`, so positions from a second tokenisation drift. Only decoding is used.
"""

import bisect
import itertools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from ..functional import advantages as outcome
from ..functional.process_rewards import PROCESS_ESTIMATORS, reward_at_steps

ESTIMATORS: dict[str, Any] = outcome.ADVANTAGE_ESTIMATORS | PROCESS_ESTIMATORS
NEEDS_SIBLINGS = outcome.NEEDS_SIBLINGS | {*PROCESS_ESTIMATORS}
PER_TOKEN = outcome.PER_TOKEN | {*PROCESS_ESTIMATORS}

# Segmentation


def _decode(tokenizer, token_ids: list[int], skip_special_tokens: bool = False) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def separator_ends(token_ids: list[int], tokenizer, separator: str) -> list[int]:
    """
    Index of the token in which each occurrence of `separator` is completed.

    That is the smallest k for which the text of the first k + 1 tokens starts with the whole text up to the end of the
    occurrence. A prefix that stops inside a multi-byte character has a text of its own, so the search goes over the
    prefixes whose text begins the whole text and scans only between two of these.

    Args:
        token_ids (`list[int]`):
            Sampled tokens of one turn.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        separator (`str`):
            Text that ends a step.

    Returns:
        `list[int]`: Increasing token indices; occurrences that end in one token count once.
    """
    text, prefixes = _decode(tokenizer, token_ids), {-1: ""}

    def prefix(k: int) -> str:
        if k not in prefixes:
            prefixes[k] = _decode(tokenizer, token_ids[: k + 1])
        return prefixes[k]

    def whole(k: int) -> int:
        """The last prefix up to k that stops between characters."""
        return next(j for j in range(k, -2, -1) if text.startswith(prefix(j)))

    # The lengths of the tokens' own texts tell where to look; they need not add up, so the prefixes decide.
    own_length = {token: len(_decode(tokenizer, [token])) for token in set(token_ids)}
    length_to = [0, *itertools.accumulate(own_length[token] for token in token_ids)]

    def search(boundary: int, previous: int) -> int:
        wanted = length_to[previous + 1] + boundary - len(prefix(previous))
        guess = min(max(bisect.bisect_left(length_to, wanted) - 1, previous + 1, 0), len(token_ids) - 1)
        is_reached = prefix(guess).startswith(text[:boundary])
        if is_reached and whole(guess - 1) == guess - 1 and len(prefix(guess - 1)) < boundary:
            return guess
        places = range(len(token_ids))
        past = bisect.bisect_left(places, True, key=lambda k: len(prefix(whole(k))) >= boundary)
        return next(k for k in places[whole(past - 1) + 1 :] if prefix(k).startswith(text[:boundary]))

    ends: list[int] = []
    start = text.find(separator)
    while start >= 0:
        boundary = start + len(separator)
        end = search(boundary, ends[-1] if ends else -1)
        if not ends or end > ends[-1]:
            ends.append(end)
        start = text.find(separator, boundary)
    return ends


def segment(
    token_ids: list[int],
    trainable: list[int] | None,
    tokenizer,
    separator: str = "\n",
    step_function: Callable[[list[int], Any], list[int]] | None = None,
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
        step_function (`Callable`, *optional*):
            Used instead of `separator`: `(token_ids, tokenizer)` of a turn to the increasing indices of the last token
            of each step. The tokens after the last of them are a step too.

    Returns:
        `list[list[int]]`: Positions in `token_ids`, disjoint, in order; together they are all trainable tokens.

    Raises:
        `ValueError`: If `step_function` returns anything else.
    """
    steps: list[list[int]] = []
    positions = range(len(token_ids)) if trainable is None else [t for t, own in enumerate(trainable) if own]
    for _, run in itertools.groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0]):
        turn = [position for _, position in run]
        turn_ids = [token_ids[position] for position in turn]
        if step_function is None:
            ends = separator_ends(turn_ids, tokenizer, separator)
        else:
            ends = step_function(turn_ids, tokenizer)
            _check_ends(ends, len(turn))
        cuts = [0, *(end + 1 for end in ends), len(turn)]
        pieces = [turn[a:b] for a, b in itertools.pairwise(cuts) if a < b]
        texts = [_decode(tokenizer, [token_ids[t] for t in piece], skip_special_tokens=True) for piece in pieces]
        if step_function is None:
            texts = [text.replace(separator, "") for text in texts]
        steps += _without_empty(pieces, [not text.strip() for text in texts])
    return steps


def _check_ends(ends: Any, n: int) -> None:
    valid = isinstance(ends, list) and all(isinstance(end, int) for end in ends)
    if not valid or any(b <= a for a, b in itertools.pairwise([-1, *ends, n])):
        raise ValueError(
            f"step_function returned {ends!r} for {n} tokens; it must return increasing token indices below {n}."
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
    return [_decode(tokenizer, [token_ids[t] for t in step], skip_special_tokens=True) for step in steps]


# Rewards


class _Returned(NamedTuple):
    """What one reward function returned on one process, or the first thing that is wrong with it."""

    numbers: bool
    lists: bool
    error: str | None


class Steps:
    """
    The steps of one generation batch on this process, and the rewards that functions give them.

    A function that returns a list for a completion is a process function; TRL sees the mean over the scored steps in
    its place. Nothing is raised while the functions run: what is wrong is exchanged between the processes afterwards,
    so that all of them raise the same error and none is left waiting.

    Args:
        token_ids (`list[list[int]]`):
            Sampled tokens of each completion.
        tool_mask (`list[list[int]]` or `None`):
            Which of them are the policy's.
        tokenizer, separator, step_function:
            As for [`segment`].
    """

    def __init__(self, token_ids, tool_mask, tokenizer, separator="\n", step_function=None):
        masks = tool_mask or [None] * len(token_ids)
        steps = [
            segment(ids, mask, tokenizer, separator, step_function) for ids, mask in zip(token_ids, masks, strict=True)
        ]
        self.ends = [[step[-1] for step in parts] for parts in steps]
        self.texts = [step_texts(ids, parts, tokenizer) for ids, parts in zip(token_ids, steps, strict=True)]
        self.returned: dict[int, list] = {}  # index of the reward function to its step rewards per completion
        self._kinds: dict[int, _Returned] = {}

    def wrapped(self, index: int, function: Any, name: str) -> Any:
        """`function` as TRL calls it, given the steps too; a model, which returns one number, is left as it is."""
        if isinstance(function, torch.nn.Module):
            self._kinds[index] = _Returned(numbers=True, lists=False, error=None)
            return function
        steps = {"completion_steps": self.texts, "completion_step_ends": self.ends}

        async def asynchronous(**kwargs):
            return self._take(index, name, await function(**{**kwargs, **steps}))

        def synchronous(**kwargs):
            return self._take(index, name, function(**{**kwargs, **steps}))

        return asynchronous if is_async_callable(function) else synchronous

    def _take(self, index: int, name: str, result: Any) -> list:
        """One number per completion for TRL, of whatever `function` returned; lists are kept here."""
        rewards = list(result)
        values = [reward.tolist() if hasattr(reward, "tolist") else reward for reward in rewards]
        lists = [isinstance(value, list | tuple) for value in values]
        numbers = any(value is not None and not is_list for value, is_list in zip(values, lists, strict=True))
        if not any(lists) or numbers or len(values) != len(self.ends):
            self._kinds[index] = _Returned(numbers, any(lists), None)
            return [math.nan if is_list else reward for reward, is_list in zip(rewards, lists, strict=True)]
        self.returned[index], error = _checked(name, values, self.ends)
        self._kinds[index] = _Returned(numbers, True, error)
        known = [[v for v in row if v is not None] for row in self.returned[index]]
        return [sum(row) / len(row) if row else math.nan for row in known]

    def agree(self, names: list[str], estimator: str | None) -> list[int]:
        """
        The indices of the process functions, the same on every process.

        Raises:
            `ValueError`: On every process, if a function returned what it must not, or what `estimator` cannot use.
        """
        everywhere: list[dict[int, _Returned]] = gather_object([self._kinds])
        process = []
        for index, name in enumerate(names):
            kinds = [kinds[index] for kinds in everywhere]
            if not any(kind.lists for kind in kinds):
                continue
            if any(kind.numbers for kind in kinds):
                raise ValueError(
                    f"Reward function {name!r} returned both numbers and lists. Return one number per completion "
                    "(outcome) or one list per completion (process)."
                )
            if estimator is None:
                raise ValueError(
                    f"Reward function {name!r} returned step rewards, but advantage_estimator is not set. Use "
                    "advantage_estimator='process_group_relative'."
                )
            if estimator in ESTIMATORS and estimator not in PER_TOKEN:
                raise ValueError(
                    f"advantage_estimator={estimator!r} would add up the step rewards of a completion and favour many "
                    "steps. Use 'process_group_relative', or return one number (for example the minimum)."
                )
            for kind in kinds:
                if kind.error is not None:
                    raise ValueError(kind.error)
            process.append(index)
        silent = any(not any(kinds[i].numbers for kinds in everywhere) for i in range(len(names)))
        if estimator in PROCESS_ESTIMATORS and not process and not silent:
            raise ValueError(
                f"advantage_estimator={estimator!r} needs a reward function that returns one list per completion; "
                "got numbers only."
            )
        return process

    def token_rewards(self, process: list[int], weights: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """
        Weighted sum of the process functions that scored a step, on the step's last token.

        Returns:
            `torch.Tensor` of shape `(B, num_tokens)`, float64: NaN where no step ends or no function scored it.
        """
        nothing = [[None] * len(ends) for ends in self.ends]
        each = [reward_at_steps(self.returned.get(i, nothing), self.ends, num_tokens).double() for i in process]
        stacked = torch.stack(each, dim=-1)
        total = (stacked * weights[process].double()).nansum(-1)
        return total.masked_fill(stacked.isnan().all(-1), torch.nan)


def _checked(name: str, values: list, ends: list[list[int]]) -> tuple[list[list[float | None]], str | None]:
    """Step rewards with `None` for those not scored, and the first thing that is wrong with them."""
    rewards: list[list[float | None]] = []
    for i, (row, steps) in enumerate(zip(values, ends, strict=True)):
        row = [None] * len(steps) if row is None else list(row)
        if len(row) != len(steps):
            return [[None] * len(e) for e in ends], (
                f"Reward function {name!r} returned {len(row)} step rewards for completion {i}, which has "
                f"{len(steps)} steps. Return one number per entry of completion_steps[{i}], and None for a step that "
                "cannot be scored."
            )
        row = [value.tolist() if hasattr(value, "tolist") else value for value in row]
        for j, value in enumerate(row):
            if value is not None and (not isinstance(value, numbers.Real) or math.isinf(value)):
                return [[None] * len(e) for e in ends], (
                    f"Reward function {name!r} returned {value!r} for step {j} of completion {i}; a step reward is a "
                    "finite number or None."
                )
        rewards.append([None if value is None or math.isnan(value) else float(value) for value in row])
    return rewards, None
