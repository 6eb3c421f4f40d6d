"""Rewards of reasoning steps: what reward functions return for them, collected from all processes and checked."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from ...functional import advantages as _table
from ...functional.advantages import group_relative
from ...functional.process_rewards import PROCESS_ESTIMATORS, reward_at_steps
from ...functional.reductions import nearly_equal
from ...lookup import import_path
from ...rewards import ProcessRewardModel
from .reward_calls import Fault, checked_steps, parameters_of, said, values_of
from .steps import step_texts

ESTIMATORS: dict[str, Any] = _table.ADVANTAGE_ESTIMATORS | PROCESS_ESTIMATORS
NEEDS_SIBLINGS = _table.NEEDS_SIBLINGS | {*PROCESS_ESTIMATORS}
PER_TOKEN = _table.PER_TOKEN | {*PROCESS_ESTIMATORS}
_ONE_PER_COMPLETION = {*ESTIMATORS} - PER_TOKEN


class _Returned(NamedTuple):
    """What one reward function returned on one process, or the first thing that is wrong with it."""

    plain: bool = False
    lists: bool = False
    error: str | None = None


class _WhenRead(Sequence):
    """A list that is made when it is first read: cutting takes time, and most functions read no steps."""

    def __init__(self, make: Callable[[], list]):
        self._make = make

    @functools.cached_property
    def _list(self) -> list:
        return self._make()

    def __getitem__(self, index):
        return self._list[index]

    def __len__(self) -> int:
        return len(self._list)

    def __eq__(self, other) -> bool:
        return self._list == other

    def __repr__(self) -> str:
        return repr(self._list)


class Steps:
    """
    The steps of one generation batch on this process, and the rewards that functions give them.

    A function that returns a list for a completion is a process function; TRL sees the mean over the scored steps in
    its place. With an estimator nothing is raised while the functions run: what is wrong, or what they raise, is
    exchanged between the processes afterwards, so that all of them raise the same error and none is left waiting.

    Args:
        token_ids (`list[list[int]]`):
            Sampled tokens of each completion.
        tool_mask (`list[list[int]]` or `None`):
            Which of them are the policy's.
        estimator (`str` or `None`):
            The trainer's `advantage_estimator`. Without one, functions are called as TRL calls them, but for those
            that name the steps among their parameters.
        cut (`Callable`):
            `(token_ids, trainable)` of a completion to its steps: [`segment`] with the trainer's options.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
    """

    def __init__(self, token_ids, tool_mask, estimator, cut, tokenizer):
        self.token_ids, self.estimator, self.tokenizer = token_ids, estimator, tokenizer
        self._masks, self._cut = tool_mask or [None] * len(token_ids), cut
        self._returned: dict[int, list] = {}  # index of a reward function to its step rewards of each completion
        self._kinds: dict[int, _Returned] = {}
        self._causes: dict[int, Exception] = {}  # what the functions raised on this process

    @functools.cached_property
    def _steps(self) -> list[list[list[int]]]:
        steps = []
        for i, (ids, mask) in enumerate(zip(self.token_ids, self._masks, strict=True)):
            try:
                steps.append(self._cut(ids, mask))
            except Exception as error:
                raise Fault(f"Completion {i} was not cut into steps: {said(error)}") from error
        return steps

    @functools.cached_property
    def ends(self) -> list[list[int]]:
        return [[step[-1] for step in steps] for steps in self._steps]

    @functools.cached_property
    def texts(self) -> list[list[str]]:
        return [step_texts(ids, s, self.tokenizer) for ids, s in zip(self.token_ids, self._steps, strict=True)]

    def wrapped(self, index: int, function: Any, name: str) -> Any:
        """`function` for TRL to call, given the steps too; a model, which returns one number, is left as it is."""
        if isinstance(function, torch.nn.Module):
            self._kinds[index] = _Returned(plain=True)
            return function
        parameters = parameters_of(function)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

        def steps() -> dict[str, Sequence]:
            wanted = {"completion_steps": "texts", "completion_step_ends": "ends"}
            given: dict[str, Sequence] = {}
            for key, attribute in wanted.items():
                if key in parameters:
                    given[key] = getattr(self, attribute)
                elif takes_any and self.estimator is not None:
                    given[key] = _WhenRead(functools.partial(getattr, self, attribute))
            return given

        async def asynchronous(**kwargs):
            with self._kept(index, name):
                return self._take(index, name, await function(**{**kwargs, **steps()}))
            return [0.0] * len(self.token_ids)

        def synchronous(**kwargs):
            with self._kept(index, name):
                return self._take(index, name, function(**{**kwargs, **steps()}))
            return [0.0] * len(self.token_ids)

        return asynchronous if is_async_callable(function) else synchronous

    @contextlib.contextmanager
    def _kept(self, index: int, name: str) -> Iterator[None]:
        """Keeps for [`agree`] what goes wrong inside; without an estimator it is raised at once, as by TRL."""
        try:
            yield
        except Exception as error:
            if self.estimator is None:
                raise
            message = str(error) if isinstance(error, Fault) else f"Reward function {name!r} raised {said(error)}"
            self._kinds[index] = _Returned(error=message)
            if not isinstance(error, Fault):
                self._causes[index] = error

    def _take(self, index: int, name: str, result: Any) -> list:
        """One number per completion for TRL, of whatever a function returned; lists are kept here."""
        if self.estimator is None:  # TRL's own errors, but for lists, of which it knows nothing
            rewards = values = list(result)
        else:
            rewards = values = values_of(name, result, len(self.token_ids), self.estimator in _ONE_PER_COMPLETION)
        lists = [isinstance(value, list | tuple) for value in values]
        plain = any(value is not None and not is_list for value, is_list in zip(values, lists, strict=True))
        self._kinds[index] = _Returned(plain, any(lists))
        if not any(lists) or plain or self.estimator is None:
            return [math.nan if is_list else reward for reward, is_list in zip(rewards, lists, strict=True)]
        self._returned[index] = checked_steps(name, values, self.ends)
        known = [[value for value in row if value is not None] for row in self._returned[index]]
        return [sum(row) / len(row) if row else math.nan for row in known]

    def of(self, index: int) -> list[list[float | None]]:
        """The step rewards that a function gave, `None` for a step that it did not score."""
        return self._returned.get(index) or [[None] * len(ends) for ends in self.ends]

    def agree(self, names: list[str]) -> list[int]:
        """
        The indices of the process functions, the same on every process.

        Raises:
            `ValueError`: On every process, if a function returned what it must not, or what the estimator cannot use.
            `RuntimeError`: On every process, if a function raised something, which is the cause where it did.
        """
        estimator = self.estimator
        if estimator in PROCESS_ESTIMATORS:
            with self._kept(0, names[0]):
                _ = self.ends  # needed later on, also if every function leaves the completions of a process unscored
        everywhere: list[tuple[dict[int, _Returned], list[int]]] = gather_object([(self._kinds, [*self._causes])])
        process = []
        for index, name in enumerate(names):
            for rank, (returned, raised) in enumerate(everywhere):
                if (error := returned[index].error) is not None:
                    where = f"Process {rank}: " if len(everywhere) > 1 else ""
                    error_class = RuntimeError if index in raised else ValueError
                    raise error_class(where + error) from self._causes.get(index)
            kinds = [returned[index] for returned, _ in everywhere]
            if not any(kind.lists for kind in kinds):
                continue
            if any(kind.plain for kind in kinds):
                raise ValueError(
                    f"Reward function {name!r} returned both numbers and lists. Return one number per completion "
                    "(outcome) or one list per completion (process)."
                )
            if estimator is None:
                raise ValueError(
                    f"Reward function {name!r} returned step rewards, but advantage_estimator is not set. Use "
                    "advantage_estimator='process_group_relative'."
                )
            if estimator in _ONE_PER_COMPLETION:
                raise ValueError(
                    f"advantage_estimator={estimator!r} would add up the step rewards of a completion and favour many "
                    "steps. Use 'process_group_relative', or return one number (for example the minimum)."
                )
            process.append(index)
        silent = any(not any(returned[i].plain for returned, _ in everywhere) for i in range(len(names)))
        if estimator in PROCESS_ESTIMATORS and not process and not silent:
            raise ValueError(
                f"advantage_estimator={estimator!r} needs a reward function that returns one list per completion; "
                "got numbers only."
            )
        return process

    def token_rewards(
        self, process: list[int], weights: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weighted sum of the rewards of those process functions that scored a step, on the step's last token.

        Returns:
            `tuple` of `torch.Tensor`, both `(B, num_tokens)`: `rewards` (float64, 0 where nothing was scored) and
            `marks` (2 where a step ends that was scored, 1 where one ends that was not, else 0).
        """
        marks = reward_at_steps([[1.0] * len(ends) for ends in self.ends], self.ends, num_tokens).nan_to_num().long()
        rewards = torch.zeros(marks.shape, dtype=torch.float64)
        scored = torch.zeros(marks.shape, dtype=torch.bool)
        for index in process:
            values = reward_at_steps(self.of(index), self.ends, num_tokens).double()
            rewards += (weights[index].double().cpu() * values).nan_to_num()
            scored |= ~values.isnan()
        return rewards, marks + scored.long()


# Of all processes


class StepRewards(NamedTuple):
    """Steps of all processes, `(N, T)` each: rewards (0 where not scored), whether scored, whether a step ends."""

    rewards: torch.Tensor
    scored: torch.Tensor
    ends: torch.Tensor

    def added_to(self, rewards: torch.Tensor, scored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token rewards and `scored` of outcomes and steps together."""
        return rewards + self.rewards, scored | self.scored


def mixed(
    advantages: torch.Tensor,
    outcomes: torch.Tensor,
    scored: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    process_weight: float,
    outcome_weight: float,
) -> tuple[torch.Tensor, float]:
    r"""
    `process_weight` · advantages of the steps + `outcome_weight` · group-relative advantages of the outcomes.

    Each source has its own baseline and scale: pooled, the spread of the step rewards would set that of the outcomes.
    `outcomes` and `scored`, `(N, T)`, are those of the outcome rewards; without any, the first term is all.

    Returns:
        `tuple`: The advantages `(N, T)`, and the share of the steps in \\(\sum|A|\\) before adding (NaN if that is 0).
    """
    of_steps, of_outcomes = process_weight * advantages, torch.zeros_like(advantages)
    if scored.any():
        per_row = group_relative(outcomes, scored, completion_mask, num_generations)
        of_outcomes = outcome_weight * per_row[:, None] * completion_mask.to(per_row)
    sizes = of_steps.abs().sum(), of_outcomes.abs().sum()
    return of_steps + of_outcomes, (sizes[0] / (sizes[0] + sizes[1])).item()


def step_metrics(
    steps: StepRewards, advantages: torch.Tensor, completion_mask: torch.Tensor, num_generations: int
) -> dict[str, float]:
    """
    Metrics of the steps of a generation batch of all processes; NaN where there is nothing to measure.

    `steps_mean`, `steps_max`: steps per completion. `step_reward_mean`: over the scored steps; `step_reward/<j>`: over
    the scored j-th steps, up to the tenth. `frac_steps_unscored`. `frac_groups_zero_std`: prompts whose scored steps
    all have the same reward. `steps_advantage_corr`, `steps_abs_advantage_corr`: correlation, over the completions
    with trainable tokens, of the number of steps with the advantage of the first trainable token, and with its size.
    """
    ends, scored = steps.ends.bool(), steps.scored.bool()
    count, number = ends.sum(1).double(), ends.cumsum(1)
    rewards = steps.rewards.double()
    metrics = {
        "steps_mean": count.mean().item(),
        "steps_max": count.max().item(),
        "step_reward_mean": rewards[scored].mean().item(),
        "frac_steps_unscored": 1.0 - (scored.sum() / ends.sum()).item(),
    }
    for j in range(1, min(10, int(count.max())) + 1):
        metrics[f"step_reward/{j}"] = rewards[scored & (number == j)].mean().item()
    pooled = (-1, num_generations * ends.size(1))
    equal = nearly_equal(rewards.reshape(pooled), scored.reshape(pooled), dim=1)
    metrics["frac_groups_zero_std"] = equal.double().mean().item()
    trainable = completion_mask.bool()
    per_token = advantages if advantages.dim() == 2 else advantages[:, None].expand(trainable.shape)
    first = per_token.gather(1, trainable.long().argmax(1, keepdim=True))[:, 0].double()
    rows = trainable.any(1)
    for name, values in (("steps_advantage_corr", first), ("steps_abs_advantage_corr", first.abs())):
        both = torch.stack([count[rows], values[rows]])
        metrics[name] = torch.corrcoef(both)[0, 1].item() if rows.sum() > 1 else math.nan
    return {f"process/{name}": value for name, value in metrics.items()}


def check_steps(config) -> None:
    """Refuses options of a config for rewards of steps that cannot be honoured."""
    name = config.advantage_estimator
    if not isinstance(config.step_separator, str) or not config.step_separator:
        raise ValueError(f"step_separator must be a text of at least one character, got {config.step_separator!r}.")
    if config.step_function is not None:
        import_path(config.step_function)
        if config.step_separator != "\n":
            raise ValueError("step_function finds the steps by itself, so step_separator is not read. Remove one.")
    for option, default in (("step_separator", "\n"), ("step_function", None)):
        if name is None and getattr(config, option) != default:
            raise ValueError(f"{option} is read only with advantage_estimator; set that too, or remove it.")
    for option in ("process_weight", "outcome_weight"):
        weight = getattr(config, option)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"{option} must be a number, got {weight!r}. Use 0 to leave a source out.")
        if weight != 1.0 and name not in PROCESS_ESTIMATORS:
            raise ValueError(f"{option} is read only with advantage_estimator='process_group_relative'.")
    if config.process_reward_model is not None:
        ProcessRewardModel.from_options(config.process_reward_model)
        if name is None or name in _ONE_PER_COMPLETION:
            raise ValueError(
                "process_reward_model gives one reward per step, which advantage_estimator="
                f"{name!r} cannot use. Use 'process_group_relative'."
            )
    if name in PROCESS_ESTIMATORS and config.kl_placement == "reward":
        raise ValueError(
            f"{name!r} normalises step rewards, and a KL penalty belongs to no step. Use kl_placement='loss'."
        )


def with_process_reward_model(arguments: dict[str, Any]) -> dict[str, Any]:
    """The trainer's arguments with the process-reward model of its config, loaded, as the last reward function."""
    model = ProcessRewardModel.from_options(arguments["args"].process_reward_model)
    model.load()
    functions = arguments.get("reward_funcs") or []
    functions = [*functions, model] if isinstance(functions, list) else [functions, model]
    classes = arguments.get("reward_processing_classes")
    if classes is not None:
        classes = [*classes, None] if isinstance(classes, list) else [classes, None]
    return {**arguments, "reward_funcs": functions, "reward_processing_classes": classes}
