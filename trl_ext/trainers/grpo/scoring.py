"""From what TRL shows of a generation batch to its advantages."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...functional.rewards import RewardBatch, reward_at_end
from ...lookup import import_path
from ...upstream import UpstreamChanged
from ..foreign import Options, overriding_class, watching
from ..input_checks import warn_user
from .checks import NEEDS_CRITIC, estimator_row, names_of, refuse_per_token
from .greedy import Answers, GreedyBaseline
from .metrics import advantage_metrics, step_metrics
from .reward_calls import RewardCalls
from .steps import StepCuts
from .weighted import (
    NOTHING_TO_CLIP,
    SINGLE_STEPS,
    checked_advantages,
    options_of,
    weighted_returns,
    weighted_steps,
)


@dataclass
class Rollout:
    """One generation batch of this process, as the parent's call in progress has shown it so far."""

    tool_mask: list[list[int]] | None = None  # 0 for tokens of tools
    calls: RewardCalls | None = None
    process: list[int] = field(default_factory=list)  # indices of the functions that returned step rewards
    rewards_per_func: torch.Tensor | None = None  # (N, functions), all processes; NaN for process functions
    step_ends: torch.Tensor | None = None  # (N, T), all processes, where a step ends; None without step rewards
    answers: Answers | None = None  # greedy ones, of all processes; None where the estimator needs none
    batch: RewardBatch | None = None  # of all processes


class Scoring:
    """
    Rewards of steps and outcomes to advantages. Keeps nothing of a batch.

    Args:
        trainer ([`GRPOTrainer`]):
            Trainer after its construction.
        options ([`Options`]):
            Its config, with `advantage_estimator` set.
        base (`type`):
            Our trainer class, whose methods a subclass may override.
    """

    def __init__(self, trainer: Any, options: Options, base: type):
        self.trainer, self.options, self.base = trainer, options, base
        self.name: str = options.advantage_estimator
        self.row = estimator_row(self.name)
        if self.row.values and not hasattr(trainer, "critic"):
            raise ValueError(NEEDS_CRITIC.format(self.name))
        # With an implicit process-reward model no function need give step rewards.
        self._row_of_calls = self.row._replace(steps="added") if options.implicit_prm is not None else self.row
        self._kwargs = options_of(self.row, options)
        path = options.step_ends_function
        self._step_options = options.step_separator, import_path(path) if path else None
        self._baseline: GreedyBaseline | None = None
        if self.row.baseline:
            option = f"advantage_estimator={self.name!r}, whose baseline is a greedy answer,"
            self._baseline = GreedyBaseline(trainer, base, option)
        self._warned = False
        self._shown: set[int] = set()  # functions whose step rewards are in the completions table

    # Rewards

    @contextmanager
    def watching(self, rollout: Rollout) -> Iterator[None]:
        """Around TRL's scoring: the functions are given the steps, and what TRL's methods return is kept."""

        def generated(theirs: Callable, *args: Any, **kwargs: Any) -> Any:
            result = theirs(*args, **kwargs)
            rollout.tool_mask = result[2]
            return result

        def calculated(theirs: Callable, inputs: Any, prompts: Any, completions: Any, ids: list[list[int]]) -> Any:
            if self._baseline is not None:  # first, so that whatever a class remembers is about the samples
                sampled_mask = rollout.tool_mask
                scored = partial(self._returns_of_answers, theirs)
                rollout.answers = self._baseline.answers(inputs, prompts, scored)
                rollout.tool_mask = sampled_mask
            rewards_per_func = self._scored(rollout, theirs, inputs, prompts, completions, ids)
            self._show_steps(rollout)
            return rewards_per_func

        with (
            watching(self.trainer, "_generate", generated),
            watching(self.trainer, "_calculate_rewards", calculated),
        ):
            yield

    def _scored(self, rollout: Rollout, theirs: Callable, *args: Any) -> torch.Tensor:
        """What TRL's method returns, called with functions that are given the steps, and kept in `rollout`."""
        with self._wrapped_functions(rollout, args[-1]):
            rewards_per_func = theirs(*args)
        self._keep(rollout, rewards_per_func)
        return rewards_per_func

    def _returns_of_answers(self, theirs: Callable, inputs: list, prompts: list, generated: tuple) -> torch.Tensor:
        """Sum of all rewards of each answer of all processes, `(N,)` float64, NaN where no function scored it."""
        ids, tool_mask, completions = generated[1], generated[2], generated[3]
        if len(ids) != len(prompts):
            raise self._changed("_generate", f"returns {len(ids)} completions for {len(prompts)} prompts")
        rollout = Rollout(tool_mask)
        self._scored(rollout, theirs, inputs, prompts, completions, ids)
        assert rollout.rewards_per_func is not None
        mask = torch.ones(len(ids), max(map(len, ids)), device=self.trainer.accelerator.device)
        returns, (steps, scored) = self.returns(rollout), self._steps(rollout, mask)
        if steps is None or scored is None:
            return returns
        return (returns.nan_to_num() + steps.sum(1)).masked_fill(returns.isnan() & ~scored.any(1), torch.nan)

    @contextmanager
    def _wrapped_functions(self, rollout: Rollout, completion_ids: list[list[int]]) -> Iterator[None]:
        trainer = self.trainer
        lengths = [len(mask) for mask in rollout.tool_mask or completion_ids]
        if lengths != [len(ids) for ids in completion_ids]:
            raise self._changed("_generate", "does not return the tool mask third")
        tokenizer = getattr(trainer, "_tokenizer", None)  # needed only where steps are cut
        cuts = StepCuts(completion_ids, rollout.tool_mask, tokenizer, *self._step_options)
        advice = names_of(lambda row: row.steps == "needed")
        rollout.calls = calls = RewardCalls(trainer.reward_func_names, self.name, self._row_of_calls, cuts, advice)
        functions = trainer.reward_funcs
        trainer.reward_funcs = [calls.wrapped(i, function) for i, function in enumerate(functions)]
        try:
            yield
        finally:
            trainer.reward_funcs = functions

    def _keep(self, rollout: Rollout, rewards_per_func: torch.Tensor) -> None:
        """What TRL gathered, less the functions that reward steps."""
        calls, names = rollout.calls, self.trainer.reward_func_names
        assert calls is not None
        rollout.process = calls.agree()
        if self._row_of_calls.steps == "needed" and not calls.called:
            raise self._changed("_calculate_rewards", "calls no reward function, so that there are no step rewards")
        if rewards_per_func.dim() != 2 or rewards_per_func.size(1) != len(names):
            raise self._changed(
                "_calculate_rewards", f"returns shape {tuple(rewards_per_func.shape)}, not (N, {len(names)})"
            )
        if rollout.process:
            self._refuse_changed_means(rollout, rewards_per_func)
        rollout.rewards_per_func = rewards_per_func.clone()
        rollout.rewards_per_func[:, rollout.process] = torch.nan

    def _show_steps(self, rollout: Rollout) -> None:
        """Step rewards go into the completions table."""
        assert rollout.calls is not None
        self._shown |= {*rollout.process}
        for index in sorted(self._shown):  # also in a batch without any, or the table would show those of the last one
            name = self.trainer.reward_func_names[index]
            self.trainer._log_completion_extra(f"{name}/steps", rollout.calls.steps_of(index))

    def _refuse_changed_means(self, rollout: Rollout, rewards_per_func: torch.Tensor) -> None:
        """A subclass that changes the number of a process function would change nothing: its steps are used."""
        if overriding_class(self.trainer, self.base, "_calculate_rewards") is None:
            return
        assert rollout.calls is not None
        means = torch.tensor([rollout.calls.means_of(index) for index in rollout.process]).T.to(rewards_per_func)
        means = self.trainer.accelerator.gather(means.contiguous())
        found = rewards_per_func[:, rollout.process]
        if not torch.allclose(found, means, equal_nan=True):
            names = [self.trainer.reward_func_names[index] for index in rollout.process]
            raise self._changed(
                "_calculate_rewards",
                f"changes the rewards of {names}, of which advantage_estimator={self.name!r} uses the steps",
            )

    def _changed(self, method: str, what: str) -> Exception:
        cls = overriding_class(self.trainer, self.base, method)
        if cls is None:
            return UpstreamChanged(f"{method} {what}")
        return ValueError(
            f"{cls.__module__}.{cls.__qualname__} overrides {method} and {what}. Keep to what GRPOTrainer's returns, "
            f"or remove advantage_estimator={self.name!r}."
        )

    # Advantages

    def batch(
        self,
        rollout: Rollout,
        local_mask: torch.Tensor,
        num_generations: int,
        of_tokens: torch.Tensor | None = None,
        **extras: torch.Tensor | None,
    ) -> RewardBatch:
        """
        The rewards of all processes. Gather first, then compute: estimators know no ranks.

        Args:
            rollout ([`Rollout`]):
                What was seen of the batch.
            local_mask (`torch.Tensor` of shape `(B, T)`):
                Trainable tokens of this process.
            num_generations (`int`):
                Completions per prompt.
            of_tokens (`torch.Tensor` of shape `(N, T)`, *optional*):
                Rewards of all trainable tokens, each a step, of all processes.
            extras:
                Further fields of [`RewardBatch`], of all processes already.
        """
        mask = self.gathered(local_mask)
        outcome, scored = reward_at_end(self.returns(rollout), mask)
        steps, steps_scored = self._steps(rollout, local_mask)
        if rollout.step_ends is not None:
            self._warn_of_single_steps(rollout.step_ends)
        if rollout.answers is not None:
            extras = {"baseline": rollout.answers.returns, **extras}
        if of_tokens is not None:
            steps = of_tokens.double() if steps is None else of_tokens.double() + steps
            rollout.step_ends = steps_scored = mask.bool()
        rollout.batch = RewardBatch(outcome, scored, mask, num_generations, steps, steps_scored, **extras)
        return rollout.batch

    def advantages(self, batch: RewardBatch) -> torch.Tensor:
        """`(N,)` or `(N, T)`, for the rows of all processes."""
        advantages = self.row.function(batch, **self._kwargs)
        if self.row.per_token is not None:
            return advantages
        advantages = checked_advantages(self.name, advantages, batch)
        if advantages.dim() == 2:
            refuse_per_token(self.options)
        return advantages

    def metrics(self, rollout: Rollout, batch: RewardBatch, advantages: torch.Tensor, beta: float) -> dict[str, float]:
        """Everything that is logged about the advantages of a batch; `beta` is that of its KL."""
        found = advantage_metrics(batch, advantages, len(rollout.process) < len(self.trainer.reward_func_names))
        if rollout.step_ends is not None:
            found |= step_metrics(batch, rollout.step_ends, advantages)
        if rollout.answers is not None:
            found[f"{self.name}/baseline_length"] = rollout.answers.lengths.double().mean().item()
        if self.row.metrics is not None:
            found |= self.row.metrics(batch, advantages, **self._kwargs)
        if self.row.std is not None and batch.kl_penalty is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the estimator has warned
                found["kl/effective_beta"] = beta / self.row.std(batch, **self._kwargs).item()
        return found

    def gathered(self, local: torch.Tensor) -> torch.Tensor:
        """`(B, T_local)` of this process to `(N, T)` of all, padded with 0, where the statistics are taken."""
        accelerator = self.trainer.accelerator
        # Padding makes int64 of bool, on the processes alone that are padded: the next gather would fail, or wait.
        padded = accelerator.pad_across_processes(local.byte() if local.dtype == torch.bool else local, dim=1)
        gathered = accelerator.gather(padded).to(local.dtype)
        # The statistics are in float64, which Apple's accelerator does not have.
        return gathered.cpu() if gathered.device.type == "mps" else gathered

    def local(self, advantages: torch.Tensor, output: dict) -> torch.Tensor:
        """The rows of this process, and its columns, in float32."""
        rows, width = output["completion_ids"].shape
        start = self.trainer.accelerator.process_index * rows
        own = advantages[start : start + rows].to(output["completion_ids"].device, torch.float32)
        return own if own.dim() == 1 else own[:, :width]

    def returns(self, rollout: Rollout) -> torch.Tensor:
        """Weighted sum of the rewards of each completion, `(N,)` float64, NaN where no function scored it."""
        if rollout.rewards_per_func is None:
            raise self._changed("_generate_and_score_completions", "does not call _calculate_rewards")
        names, clip = self.trainer.reward_func_names, self.options.reward_clip_range
        return weighted_returns(rollout.rewards_per_func, self.trainer.reward_weights, names, clip)

    def _steps(self, rollout: Rollout, local_mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weighted sum of the step rewards of all process functions, and where there is one; `(N, T)` each."""
        if not rollout.process and self._row_of_calls.steps != "needed":
            return None, None
        trainer, calls = self.trainer, rollout.calls
        assert calls is not None
        if self.options.reward_clip_range is not None and len(rollout.process) == len(trainer.reward_func_names):
            raise ValueError(NOTHING_TO_CLIP)
        rewards, scored, is_end = weighted_steps(calls, rollout.process, trainer.reward_weights, local_mask.size(1))
        device = local_mask.device
        rewards = self.gathered(rewards.to(device, torch.float32 if device.type == "mps" else torch.float64))
        # As numbers: padding on some of the processes only would make a bool another type there.
        rollout.step_ends = self.gathered(is_end.long().to(device)).bool()
        return rewards.double(), self.gathered(scored.long().to(device)).bool()

    def _warn_of_single_steps(self, step_ends: torch.Tensor) -> None:
        """Once, if no completion of a batch was cut: then step rewards are rewards of completions."""
        separator, function = self._step_options
        if self._warned or function is not None or step_ends.sum(1).max() > 1:
            return
        self._warned = True
        if self.trainer.accelerator.is_main_process:
            warn_user(SINGLE_STEPS.format(len(step_ends), "a generation batch", separator))
