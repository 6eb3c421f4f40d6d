"""The calls of the reward functions: what they are given, what they may return, and what is said otherwise."""

import contextlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from ...functional.advantages import Estimator
from ...rewards import ProcessRewardModel

STEP_COLUMNS = {"completion_steps": "texts", "completion_step_ends": "ends"}  # parameter → attribute of the cuts


class RewardError(ValueError):
    """Something that a reward function must not return, in a sentence. Any other exception is the function's own."""


def describe(error: Exception) -> str:
    """Class and text of an exception, in one line of a message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Parameters of a reward function; none where it does not say."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled code need not have one
        return {}


def _number(reward: Any) -> float | None:
    """A reward as a Python number, NaN for `None`; `None` for anything but a finite number of float32 or NaN."""
    if reward is None:
        return math.nan
    try:
        value = float(reward) if not isinstance(reward, str | bytes) else math.inf
    except (TypeError, ValueError, OverflowError):
        return None
    return None if abs(value) > torch.finfo(torch.float32).max else value


def reward_values(name: str, result: Any, num_completions: int, one_per_completion: bool) -> list:
    """What a function returned, one entry per completion: a number (NaN: not scored), `None`, or a list."""
    if isinstance(result, str | bytes | Mapping | Set) or not _has_rows(result):
        raise RewardError(
            f"Reward function {name!r} returned {result!r}; it must return a list, one reward per completion."
        )
    rewards = list(result)
    if len(rewards) != num_completions:
        raise RewardError(
            f"The reward function {name!r} returned {len(rewards)} rewards, but {num_completions} were expected (one "
            "per completion)."
        )
    values = []
    for i, reward in enumerate(rewards):
        value = reward.tolist() if hasattr(reward, "tolist") else reward
        if one_per_completion and value is not reward and isinstance(value, list) and len(value) == 1:
            value = value[0]  # of a tensor of shape (N, 1), as models return them
        if value is not None and not isinstance(value, list | tuple) and (value := _number(value)) is None:
            raise RewardError(
                f"Reward function {name!r} returned {reward!r} for completion {i}; a reward is a finite number, or "
                "None for a completion that cannot be scored."
            )
        values.append(value)
    return values


def _has_rows(result: Any) -> bool:
    if hasattr(result, "ndim"):
        return result.ndim > 0
    return hasattr(result, "__iter__") or hasattr(result, "__getitem__")


def checked_steps(name: str, values: list, ends: list[list[int]]) -> list[list[float | None]]:
    """Step rewards with `None` for those not scored; raises the first thing that is wrong with them."""
    rewards: list[list[float | None]] = []
    for i, (row, steps) in enumerate(zip(values, ends, strict=True)):
        row = [None] * len(steps) if row is None else list(row)
        if len(row) != len(steps):
            raise RewardError(
                f"Reward function {name!r} returned {len(row)} step rewards for completion {i}, which has "
                f"{len(steps)} steps. Return one number per entry of completion_steps[{i}], and None for a step that "
                "cannot be scored."
            )
        row = [value.tolist() if hasattr(value, "tolist") else value for value in row]
        for j, value in enumerate(row):
            if value is not None and (not isinstance(value, numbers.Real) or _number(value) is None):
                raise RewardError(
                    f"Reward function {name!r} returned {value!r} for step {j} of completion {i}; a step reward is a "
                    "finite number or None."
                )
        rewards.append([None if value is None or math.isnan(value) else float(value) for value in row])
    return rewards


class _Kind(NamedTuple):
    """What one reward function returned on one process, or the first thing that is wrong with it."""

    plain: bool = False
    lists: bool = False
    error: str | None = None
    raised: bool = False


class RewardCalls:
    """
    The reward functions of one generation batch on this process.

    A function that returns a list for a completion is a process function; TRL sees the mean over the scored steps in
    its place. Nothing is raised while the functions run: errors are collected and raised on all processes together in
    [`agree`], so that none waits for ever.

    Args:
        names (`list[str]`):
            Names of the functions, in TRL's order.
        estimator (`str`):
            The trainer's `advantage_estimator`.
        row ([`Estimator`]):
            Its row.
        cuts ([`StepCuts`]):
            Steps of the completions.
        advice (`str`):
            What to use for step rewards, for a sentence.
    """

    def __init__(self, names: list[str], estimator: str, row: Estimator, cuts: Any, advice: str):
        self.names, self.estimator, self.row, self.cuts, self.advice = names, estimator, row, cuts, advice
        self._kinds = [_Kind() for _ in names]
        self._steps: dict[int, list[list[float | None]]] = {}
        self._causes: dict[int, Exception] = {}  # what the functions raised on this process
        self.called = False  # whether any function was called at all

    def wrapped(self, index: int, function: Any) -> Any:
        """`function` for TRL to call; a model, which returns one number, in one that keeps what it raises."""
        if isinstance(function, torch.nn.Module):
            self._kinds[index] = _Kind(plain=True)
            return _KeepsErrors(function, partial(self._collecting_errors, index, "model"))
        parameters = parameters_of(function)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        # A function that only passes its keyword arguments on is spared what most callees cannot store.
        wanted = [key for key in STEP_COLUMNS if key in parameters or (takes_any and self.row.steps == "needed")]

        def given(kwargs: dict[str, Any]) -> dict[str, Any]:
            for key in kwargs.keys() & set(wanted):  # of a stream, or of a rollout function
                raise RewardError(
                    f"The data have a column {key!r}, the name under which reward functions are given the steps with "
                    "advantage_estimator. Rename the column."
                )
            return {**kwargs, **{key: getattr(self.cuts, STEP_COLUMNS[key]) for key in wanted}}

        async def asynchronous(**kwargs):
            self.called = True
            with self._collecting_errors(index):
                return self._accepted(index, await function(**given(kwargs)))
            return [0.0] * len(self.cuts.token_ids)

        def synchronous(**kwargs):
            self.called = True
            with self._collecting_errors(index):
                return self._accepted(index, function(**given(kwargs)))
            return [0.0] * len(self.cuts.token_ids)

        return asynchronous if is_async_callable(function) else synchronous

    @contextlib.contextmanager
    def _collecting_errors(self, index: int, what: str = "function") -> Iterator[None]:
        try:
            yield
        except RewardError as error:
            self._kinds[index] = _Kind(error=str(error))
        except Exception as error:
            message = f"Reward {what} {self.names[index]!r} raised {describe(error)}"
            self._kinds[index] = _Kind(error=message, raised=True)
            self._causes[index] = error

    def _accepted(self, index: int, result: Any) -> list[float]:
        """One number per completion for TRL, of whatever a function returned; lists are kept here."""
        name = self.names[index]
        values = reward_values(name, result, len(self.cuts.token_ids), self.row.steps == "refused")
        lists = [isinstance(value, list | tuple) for value in values]
        plain = any(value is not None and not is_list for value, is_list in zip(values, lists, strict=True))
        self._kinds[index] = _Kind(plain, any(lists))
        if not any(lists) or plain:
            return [math.nan if is_list else reward for reward, is_list in zip(values, lists, strict=True)]
        self._steps[index] = checked_steps(name, values, self.cuts.ends)
        return self.means_of(index)

    def steps_of(self, index: int) -> list[list[float | None]]:
        """The step rewards that a function gave, `None` for a step that it did not score."""
        return self._steps.get(index) or [[None] * len(ends) for ends in self.cuts.ends]

    def means_of(self, index: int) -> list[float]:
        """What TRL is given for a process function: the mean over the scored steps of each completion."""
        known = [[value for value in row if value is not None] for row in self.steps_of(index)]
        return [sum(row) / len(row) if row else math.nan for row in known]

    def agree(self) -> list[int]:
        """
        The indices of the process functions, the same on every process.

        Raises:
            `ValueError`: On every process, if a function returned what it must not, or what the estimator cannot use.
            `RuntimeError`: On every process, if a function raised something, which is the cause where it did.
        """
        if self.row.steps == "needed" and self.names:
            with self._collecting_errors(0):
                _ = self.cuts.ends  # needed later on, also if every function leaves a process's completions unscored
        everywhere = self._of_all_processes()
        process = [index for index in range(len(self.names)) if self._is_process(index, everywhere)]
        numbers_only = all(any(kinds[i].plain for kinds in everywhere) for i in range(len(self.names)))
        if self.row.steps == "needed" and not process and numbers_only:
            raise ValueError(
                f"advantage_estimator={self.estimator!r} needs a reward function that returns one list per "
                "completion; got numbers only."
            )
        return process

    def _of_all_processes(self) -> list[list[_Kind]]:
        return gather_object([self._kinds])

    def _is_process(self, index: int, everywhere: list[list[_Kind]]) -> bool:
        """Whether function `index` returned lists on any process; raises what is wrong with it."""
        name, kinds = self.names[index], [kinds[index] for kinds in everywhere]
        for rank, kind in enumerate(kinds):
            if kind.error is not None:
                where = f"Process {rank}: " if len(kinds) > 1 else ""
                raise (RuntimeError if kind.raised else ValueError)(where + kind.error) from self._causes.get(index)
        lists = any(kind.lists for kind in kinds)
        if lists and any(kind.plain for kind in kinds):
            raise ValueError(
                f"Reward function {name!r} returned both numbers and lists. Return one number per completion "
                "(outcome) or one list per completion (process)."
            )
        if lists and self.row.steps == "refused":
            raise ValueError(
                f"advantage_estimator={self.estimator!r} would add up the step rewards of a completion and favour "
                f"many steps. Use {self.advice}, or return one number (for example the minimum)."
            )
        return lists


class _KeepsErrors(torch.nn.Module):
    """
    A reward model for TRL to call: what it raises is kept, and scores of 0 take its place until all processes know.

    Args:
        model (`torch.nn.Module`):
            Returns an output with `logits`, of which TRL reads the first column. It is called, and nothing else.
        keeping (`Callable`):
            Makes the context that keeps an exception.
    """

    def __init__(self, model: torch.nn.Module, keeping: Callable[[], Any]):
        super().__init__()
        self._model, self._keeping = [model], keeping  # in a list: its parameters are not ours

    def forward(self, **inputs: Any) -> Any:
        rows = len(inputs["input_ids"])
        with self._keeping():
            output = self._model[0](**inputs)
            output.logits.new_empty(rows).copy_(output.logits[:, 0])  # what TRL does with it
            return output
        return SimpleNamespace(logits=torch.zeros(rows, 1))


def with_process_reward_model(arguments: dict[str, Any], options: Any) -> dict[str, Any]:
    """The trainer's arguments with the process-reward model of its config, loaded, as the last reward function."""
    model = ProcessRewardModel.from_options(options)
    model.load()
    functions = arguments.get("reward_funcs") or []
    functions = [*functions, model] if isinstance(functions, list) else [functions, model]
    classes = arguments.get("reward_processing_classes")
    if classes is not None:
        classes = [*classes, None] if isinstance(classes, list) else [classes, None]
    arguments = {name: value for name, value in arguments.items() if name != "self"}
    return {**arguments, "reward_funcs": functions, "reward_processing_classes": classes}
