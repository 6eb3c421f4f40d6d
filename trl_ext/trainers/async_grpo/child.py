"""
In the rollout process: one number for each token of a prompt's completions, in place of TRL's advantages.

A *conversation* is a completion with its turns; it becomes one training *row*, or several where a turn rewrites what
came before. Its tokens are the trained tokens of its rows, one row after the other. The numbers travel as a second
column of `old_log_probs`, whose entries TRL hands through queue, packing, padding and dispatch as they are; NaN is a
token that takes no part.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, RolloutSample, TrainingSequence

from ...functional.rewards import RewardBatch, reward_at_end
from ...lookup import import_path
from ..grpo.checks import names_of
from ..grpo.metrics import frac_groups_zero_std, step_metrics
from ..grpo.reward_calls import RewardCalls
from ..grpo.steps import StepCuts, segment
from ..grpo.weighted import NOTHING_TO_CLIP, SINGLE_STEPS, checked_advantages, weighted_returns, weighted_steps
from ..input_checks import warn_user
from .checks import row_in_halves

_NO_TOKEN = TrainingSequence([0], [0], [0.0], "")
_ENOUGH = 64  # completions without a cut before we say so


class ScoringOptions(NamedTuple):
    """What the rollout process is told; names, because it is pickled."""

    estimator: str
    kwargs: dict[str, Any]  # of the half within a prompt
    reward_weights: list[float] | None
    reward_clip_range: list[float] | None
    step_separator: str
    step_ends_function: str | None


def scoring_loop(base: type, options: ScoringOptions, **kwargs: Any) -> Any:
    """The rollout loop `base` with our scoring before its own. Called in the rollout process."""
    loop = type(f"Scoring{base.__name__}", (ScoringLoop, base), {})(**kwargs)
    loop.scoring = GroupScoring(options, loop.tokenizer)
    return loop


class ScoringLoop:
    """Stands before a rollout loop of TRL's: its samples get our numbers."""

    scoring: "GroupScoring"
    reward_funcs: list
    reward_func_names: list[str]
    _counters: dict[str, float]

    async def _score_group(self, group: RolloutGroup) -> list[RolloutSample]:
        # A conversation without trained token has no row, but its reward belongs to the group.
        rows = [sequences or [_NO_TOKEN] for sequences in group.completions_sequences]
        calls = self.scoring.calls(group.completions_ids, rows, self.reward_func_names[: len(self.reward_funcs)])
        with self._watching(calls) as names:
            whole = dataclasses.replace(group, completions_sequences=rows)
            samples = await super()._score_group(whole)  # type: ignore[misc]
        stream = iter(samples)
        conversations = [Conversation([*itertools.islice(stream, len(r))], calls, i) for i, r in enumerate(rows)]
        self.scoring.score(conversations, calls, names)
        if calls.steps_given:
            self._counters["process/realigned_total"] += sum(conversation.moved for conversation in conversations)
        return [sample for sample in samples if sample.completion_mask.any()]

    @contextlib.contextmanager
    def _watching(self, calls: "GroupCalls") -> Iterator[list[str]]:
        """Around TRL's scoring: the functions are given the steps, and each reward has a name of its own."""
        functions, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs = [calls.wrapped(index, function) for index, function in enumerate(functions)]
        self.reward_func_names = [str(index) for index in range(len(names))]
        try:
            yield names
        finally:
            self.reward_funcs, self.reward_func_names = functions, names


class TurnCuts(StepCuts):
    """`StepCuts` whose mask is the number of tokens of each turn: a turn is cut for itself."""

    def _cut(self, ids, turns):
        starts = itertools.accumulate(turns, initial=0)
        pieces = [(start, ids[start : start + length]) for start, length in zip(starts, turns, strict=False)]
        return [
            [start + position for position in step]
            for start, turn in pieces
            for step in segment(turn, None, self._tokenizer, *self._options)
        ]


class GroupCalls(RewardCalls):
    """The calls of the reward functions for one group: no other process knows of it."""

    def _of_all_processes(self):
        return [self._kinds]

    @property
    def steps_given(self) -> bool:
        """Whether a function has rewarded steps."""
        return bool(self._steps)


class Conversation:
    """
    One completion: its training rows, and where its tokens are.

    Args:
        samples (`list[RolloutSample]`):
            Its rows, as TRL has scored them.
        calls ([`GroupCalls`]):
            Of its group.
        index (`int`):
            Its place there.
    """

    def __init__(self, samples: list[RolloutSample], calls: GroupCalls, index: int):
        self.samples = samples
        self.masks = [sample.completion_mask == 1 for sample in samples]
        self.counts = [int(mask.sum()) for mask in self.masks]
        # A realigned turn has lost tokens to the context, so its steps are no longer where they were cut.
        self.moved = sum(self.counts) != len(calls.cuts.token_ids[index])

    def stamp(self, values: torch.Tensor, metrics: dict[str, float], totals: bool) -> None:
        """
        Writes `values`, `(T,)`, one number per token, beside the sampler's log-probs. With `totals`, where they are
        token rewards, the last token of a row gets those of the later rows too: a reward-to-go ends with its row.
        """
        parts = values[: sum(self.counts)].float().split(self.counts)
        for i, (sample, mask, part) in enumerate(zip(self.samples, self.masks, parts, strict=True)):
            column = np.full(mask.shape, np.nan, np.float32)
            column[mask] = part.numpy()
            if totals and len(part):
                column[np.flatnonzero(mask)[-1]] += sum(float(later.sum()) for later in parts[i + 1 :])
            sample.old_log_probs = np.stack([sample.old_log_probs, column], axis=1)
            sample.advantage = float(np.nan_to_num(column[mask]).mean()) if len(part) else 0.0  # TRL shows it
            sample.metrics |= metrics


class GroupScoring:
    """
    From the rewards of one prompt's completions to one number for each of their tokens.

    Args:
        options ([`ScoringOptions`]):
            What the trainer's config says.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
    """

    def __init__(self, options: ScoringOptions, tokenizer: Any):
        self.options, self.row, self._tokenizer = options, row_in_halves(options.estimator), tokenizer
        path = options.step_ends_function
        self._step_options = options.step_separator, import_path(path) if path else None
        self._uncut: float = 0  # completions of one step so far; NaN once there was another, or we have said so

    def calls(self, completions_ids: list[list[int]], rows: list[list[TrainingSequence]], names: list[str]) -> Any:
        """What the reward functions of a group are called through."""
        turns = [_turns(sequences, len(ids)) for ids, sequences in zip(completions_ids, rows, strict=True)]
        cuts = TurnCuts(completions_ids, turns, self._tokenizer, *self._step_options)
        return GroupCalls(names, self.options.estimator, self.row, cuts, names_of(lambda row: row.steps == "needed"))

    def score(self, conversations: list[Conversation], calls: GroupCalls, names: list[str]) -> None:
        """Stamps the samples of a group; `names` are those of its rewards."""
        process = calls.agree()
        rewards = _pop_rewards(conversations, names)
        weights = torch.tensor(self.options.reward_weights or [1.0] * len(names), dtype=torch.float64)
        if len(weights) != len(names):
            raise ValueError(f"reward_weights has {len(weights)} entries for the rewards {names}; give one for each.")
        metrics = _weighted_reward(rewards, weights) if self.options.reward_weights else [{} for _ in conversations]
        if len(process) == len(names) and self.options.reward_clip_range is not None:
            raise ValueError(NOTHING_TO_CLIP)
        rewards[:, process] = torch.nan
        returns = weighted_returns(rewards, weights, names, self.options.reward_clip_range)
        batch, step_ends = self._batch(conversations, returns, calls, process, weights)
        if not batch.trainable.any():  # no estimator is asked
            values = torch.full(batch.mask.shape, torch.nan)
        else:
            values = self.row.within(batch, **self.options.kwargs)  # type: ignore[misc]
        found = {}
        if len(process) < len(names) and batch.num_generations > 1:
            found["advantages/frac_groups_zero_std"] = frac_groups_zero_std(batch)
        values, of_estimator = self._finished(values, batch, step_ends)
        for conversation, numbers, own in zip(conversations, values, metrics, strict=True):
            conversation.stamp(numbers, {**found, **of_estimator, **own}, totals=self.row.across is not None)

    def _batch(
        self, conversations: list[Conversation], returns: torch.Tensor, calls: Any, process: list[int], weights: Any
    ) -> tuple[RewardBatch, torch.Tensor | None]:
        """The rewards of the group, and where steps end; `None` without step rewards."""
        lengths = torch.tensor([sum(conversation.counts) for conversation in conversations])
        width = max(1, int(lengths.max()), *map(len, calls.cuts.token_ids))
        mask = (torch.arange(width) < lengths[:, None]).long()
        rewards = scored = ends = None
        if process or self.row.steps == "needed":
            rewards, scored, ends = weighted_steps(calls, process, weights, width)
            self._say_if_uncut(ends)
            moved = torch.tensor([conversation.moved for conversation in conversations])[:, None]
            rewards, scored, ends = rewards.masked_fill(moved, 0.0), scored & ~moved, ends & ~moved
        outcome, outcome_scored = reward_at_end(returns, mask)
        return RewardBatch(outcome, outcome_scored, mask, len(conversations), rewards, scored), ends

    def _finished(self, values: torch.Tensor, batch: RewardBatch, step_ends: Any) -> tuple[torch.Tensor, dict]:
        """One number per token, `(G, T)`, NaN where none takes part, and what is logged about the group."""
        if self.row.across is None and batch.trainable.any():
            if self.row.per_token is None:
                values = checked_advantages(self.options.estimator, values, batch)
            found = {} if self.row.metrics is None else self.row.metrics(batch, values, **self.options.kwargs)
            values = values if values.dim() == 2 else values[:, None].expand(batch.mask.shape)
            values = values.masked_fill(~batch.scorable[:, None], torch.nan)
            shown = values.nan_to_num()
        else:
            found, shown = {}, torch.full(batch.mask.shape, torch.nan)  # the advantages are not known here
        if step_ends is not None and step_ends.any():
            found |= step_metrics(batch, step_ends, shown)
        return values, {name: value for name, value in found.items() if not math.isnan(value)}

    def _say_if_uncut(self, step_ends: torch.Tensor) -> None:
        separator, function = self._step_options
        if function is None:
            self._uncut += math.nan if step_ends.sum(1).max() > 1 else len(step_ends)
        if self._uncut >= _ENOUGH:
            warn_user(SINGLE_STEPS.format(self._uncut, "the first groups", separator))
            self._uncut = math.nan


def _turns(sequences: list[TrainingSequence], count: int) -> list[int]:
    """Tokens of each turn: the runs of trained tokens of the rows. One turn where these are not the completion's."""
    runs = [
        len([*run]) for row in sequences for trained, run in itertools.groupby(row.completion_mask) if trained == 1
    ]
    return runs if sum(runs) == count else [count]


def _pop_rewards(conversations: list[Conversation], names: list[str]) -> torch.Tensor:
    """What each reward says of each conversation, `(G, rewards)`; in the metrics they get their names back."""
    rewards = torch.full((len(conversations), len(names)), torch.nan, dtype=torch.float64)
    for i, conversation in enumerate(conversations):
        for sample in conversation.samples:
            for j, name in enumerate(names):
                rewards[i, j] = sample.metrics.pop(f"rewards/{j}")
                sample.metrics[f"rewards/{name}"] = float(rewards[i, j])
    return rewards


def _weighted_reward(rewards: torch.Tensor, weights: torch.Tensor) -> list[dict[str, float]]:
    """TRL's `reward` and `reward_std` of each conversation, with the weights that are in force."""
    totals = (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
    scored = totals[~totals.isnan()]
    std = scored.std(correction=0).item() if len(scored) else math.nan
    return [{"reward": total, "reward_std": std} for total in totals.tolist()]
