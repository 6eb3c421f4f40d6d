"""Sampled answers: cut into steps, verified, rolled out from behind their steps, labelled. Token ids throughout."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import TrainerState
from trl.trainer.utils import is_async_callable

from ..functional.step_labels import STEP_LABELS, first_error, search_together
from ..lookup import import_path
from ..trainers.grpo.reward_calls import RewardError, reward_values
from ..trainers.grpo.steps import segment, step_texts
from .config import LabelStepsConfig, SamplingConfig
from .sampling import Sampler

_NOT_GIVEN = ("prompt", "completion", "completion_ids")  # columns that TRL keeps from reward functions


class Verifier:
    """
    Whether answers are right, by a reward function that is called as TRL calls it.

    Args:
        config ([`SamplingConfig`]):
            Its `verifier` and `threshold`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
    """

    def __init__(self, config: SamplingConfig, tokenizer: Any):
        self.function, self.name = import_path(config.verifier, "verifier"), config.verifier
        self.threshold, self.tokenizer = config.threshold, tokenizer

    def __call__(self, rows: list[dict[str, Any]], ids: list[list[int]]) -> list[bool]:
        """
        Whether each answer is right; one without a reward is not.

        Args:
            rows (`list[dict[str, Any]]`):
                Row of the data that each answers.
            ids (`list[list[int]]`):
                Token ids of whole answers.

        Raises:
            `ValueError`: If the function returns anything but one number or `None` for each.
        """
        if not ids:
            return []
        prompts, texts = [row["prompt"] for row in rows], self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in _NOT_GIVEN}
        nothing = {"trainer_state": TrainerState(), "log_extra": _ignore, "log_metric": _ignore}
        given = {"prompts": prompts, "completions": completions, "completion_ids": ids, **columns, **nothing}
        result = self.function(**given)
        result = asyncio.run(result) if is_async_callable(self.function) else result
        rewards = reward_values(self.name, result, len(ids), one_per_completion=True)
        if any(isinstance(reward, list | tuple) for reward in rewards):
            raise RewardError(f"verifier {self.name!r} returned a list for an answer; a verifier returns one number.")
        return [reward is not None and reward > self.threshold for reward in rewards]


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What TRL would log."""


@dataclass
class Totals:
    """What was done: answers, those that are right, prefixes that were rolled out."""

    answers: int = 0
    right: int = 0
    prefixes: int = 0


class Answer(NamedTuple):
    """
    A sampled answer.

    Args:
        row (`int`):
            Index of its prompt in the chunk.
        ids (`list[int]`):
            Its tokens.
        ends (`list[int]`):
            Number of tokens up to the end of each step.
        texts (`list[str]`):
            Text of each step.
        right (`bool`):
            Whether it is right as it stands.
    """

    row: int
    ids: list[int]
    ends: list[int]
    texts: list[str]
    right: bool


class AnswerSampler:
    """
    From rows of the data to sampled answers, cut into steps and verified.

    Args:
        config ([`SamplingConfig`]):
            Options.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        policy ([`Sampler`]):
            What samples.
    """

    def __init__(self, config: Any, tokenizer: Any, policy: Sampler):
        self.config, self.tokenizer, self.policy = config, tokenizer, policy
        self.verifier = Verifier(config, tokenizer)
        path = config.step_ends_function
        self.step_ends = None if path is None else import_path(path, "step_ends_function")
        self.totals = Totals()

    def sample(self, rows: list[dict[str, Any]], heads: list[list[int]]) -> list[Answer]:
        """`num_generations` answers to each prompt, in their order; `heads` are the prompts' token ids."""
        each, budget = self.config.num_generations, self.config.max_completion_length
        sampled = self.policy(heads, [each] * len(heads), [budget] * len(heads))
        places = [i for i, group in enumerate(sampled) for _ in group]
        ids = [completion for group in sampled for completion in group]
        separator = self.config.step_separator
        steps = [segment(completion, None, self.tokenizer, separator, self.step_ends) for completion in ids]
        ends = [[step[-1] + 1 for step in cut] for cut in steps]
        texts = [step_texts(completion, cut, self.tokenizer) for completion, cut in zip(ids, steps, strict=True)]
        right = self.verifier([rows[i] for i in places], ids)
        self.totals.answers += len(ids)
        self.totals.right += sum(right)
        return [Answer(*parts) for parts in zip(places, ids, ends, texts, right, strict=True)]

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is written of the rows of a chunk."""
        raise NotImplementedError


class Labeller(AnswerSampler):
    """
    From rows of the data to labelled answers.

    Args:
        config ([`LabelStepsConfig`]):
            Options.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        policy, completer ([`Sampler`]):
            What samples. They may be the same.
    """

    def __init__(self, config: LabelStepsConfig, tokenizer: Any, policy: Sampler, completer: Sampler):
        super().__init__(config, tokenizer, policy)
        self.completer = completer

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Labelled answers to the prompts of `rows`, `num_generations` to each, in their order."""
        heads = [prompt_ids(row["prompt"], self.tokenizer, self.config.chat_template_kwargs) for row in rows]
        answers = self.sample(rows, heads)
        rollouts = Rollouts(self.config, rows, heads, self.completer, self.verifier)
        labels = SEARCHES[self.config.search](answers, rollouts)
        self.totals.prefixes += len(rollouts.counts)
        return [
            {**rows[a.row], "completions": a.texts, "labels": row_labels, "outcome": float(a.right)}
            for a, row_labels in zip(answers, labels, strict=True)
        ]


def prompt_ids(prompt: Any, tokenizer: Any, template_options: Any) -> list[int]:
    """Token ids of a prompt, as TRL's trainers make them."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_options
    )["input_ids"]


class Rollouts:
    """
    How often the prefixes of answers end right. Each prefix of a prompt is rolled out once: where `m` answers share
    it, with `m` times the rollouts, and all have the same label. What is known is not asked for again.

    Args:
        config ([`LabelStepsConfig`]):
            Options.
        rows (`list[dict[str, Any]]`), heads (`list[list[int]]`):
            The rows of the data, and their prompts' token ids.
        completer ([`Sampler`]):
            What samples continuations.
        verifier ([`Verifier`]):
            What is right.
    """

    def __init__(
        self, config: LabelStepsConfig, rows: list, heads: list[list[int]], completer: Sampler, verifier: Any
    ):
        self.config, self.rows, self.heads, self.completer, self.verifier = config, rows, heads, completer, verifier
        self.label = STEP_LABELS[config.estimate or "soft"]
        self.counts: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (right, all) of a row's prefix

    def labels(self, places: Sequence[tuple[Answer, int]]) -> list[float]:
        """
        The label of each prefix.

        Args:
            places (`list[tuple[Answer, int]]`):
                Answers, and the number of tokens up to which each is kept.
        """
        keys = [(answer.row, tuple(answer.ids[:end])) for answer, end in places]
        asked: dict[tuple[int, tuple[int, ...]], int] = {}
        for key in keys:
            if key not in self.counts:
                asked[key] = asked.get(key, 0) + self.config.rollouts
        self._roll_out(asked)
        return [self.label(*self.counts[key]) for key in keys]

    def _roll_out(self, asked: dict[tuple[int, tuple[int, ...]], int]) -> None:
        longest = self.config.max_completion_length
        continued = self.completer(
            [[*self.heads[row], *prefix] for row, prefix in asked],
            [*asked.values()],
            [longest - len(prefix) for _, prefix in asked],
        ) if asked else []  # fmt: skip
        whole = [
            (row, [*prefix, *continuation])
            for (row, prefix), group in zip(asked, continued, strict=True)
            for continuation in group
        ]
        right = iter(self.verifier([self.rows[row] for row, _ in whole], [ids for _, ids in whole]))
        for key, n in asked.items():
            self.counts[key] = sum(next(right) for _ in range(n)), n


def every_step(answers: list[Answer], rollouts: Rollouts) -> list[list[float | None]]:
    """Labels of all steps; the last one's is the outcome of the answer."""
    labels = iter(rollouts.labels([(answer, end) for answer in answers for end in answer.ends[:-1]]))
    return [[*(next(labels) for _ in answer.ends[:-1]), float(answer.right)] for answer in answers]


def until_first_error(answers: list[Answer], rollouts: Rollouts) -> list[list[float | None]]:
    """1 in right answers; in wrong ones 1 before the step with which they die, 0 there, and `None` behind it."""
    wrong = [answer for answer in answers if not answer.right]

    def are_dead(questions: list[tuple[int, int]]) -> list[bool]:
        places = [(wrong[i], wrong[i].ends[steps - 1]) for i, steps in questions]
        return [label == 0.0 for label in rollouts.labels(places)]

    errors = iter(search_together([first_error(len(answer.ends)) for answer in wrong], are_dead))
    first = [len(answer.ends) if answer.right else next(errors) for answer in answers]
    return [
        [1.0 if j < bad else 0.0 if j == bad else None for j in range(len(answer.ends))]
        for answer, bad in zip(answers, first, strict=True)
    ]


SEARCHES = {"all": every_step, "first_error": until_first_error}
