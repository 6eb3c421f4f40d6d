"""In the training process: the advantages of one optimizer step, from the numbers that came with the samples."""

import math
import warnings
from typing import Any

import torch

from ...functional.advantages import ADVANTAGE_ESTIMATORS, Estimator
from ...functional.rewards import RewardBatch
from ..foreign import Options
from ..grpo.weighted import options_of
from ..input_checks import warn_user
from .checks import row_in_halves
from .child import ScoringOptions
from .layout import Layout


class StepAdvantages:
    """
    The half of an estimator across prompts. Gather first, then compute: over the rows of one optimizer step of all
    processes. Keeps nothing of a step.

    Args:
        trainer ([`AsyncGRPOTrainer`]):
            Trainer after its construction.
        options ([`Options`]):
            Its config, with `advantage_estimator` set.
    """

    def __init__(self, trainer: Any, options: Options):
        self.trainer, self.options, self.name = trainer, options, options.advantage_estimator
        self.row = row_in_halves(self.name)
        self.across: Estimator | None = ADVANTAGE_ESTIMATORS[self.row.across] if self.row.across else None
        self._kwargs = options_of(self.row, options)
        self._warned = False

    def for_the_child(self) -> ScoringOptions:
        """What the rollout process is told."""
        options = self.options
        return ScoringOptions(
            self.name,
            {} if self.across else self._kwargs,
            None if options.reward_weights is None else [float(weight) for weight in options.reward_weights],
            options.reward_clip_range,
            options.step_separator,
            options.step_ends_function,
        )

    def take_apart(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Puts the second column of the sampler's log-probs in place of TRL's advantages, NaN included."""
        for batch in batches:
            columns = batch["old_log_probs"]
            if columns.dim() != 3 or columns.size(2) != 2:
                raise ValueError(
                    f"advantage_estimator={self.name!r}: the samples came without our numbers, old_log_probs of shape "
                    f"{tuple(columns.shape)}. The rollout loop must score its groups by TRL's _score_group."
                )
            batch["old_log_probs"], batch["advantages"] = (x.contiguous() for x in columns.unbind(-1))

    def finish(self, batches: list[dict[str, torch.Tensor]], kl_penalties: list[torch.Tensor] | None) -> None:
        """Makes advantages of them, 0 where no token takes part, and logs what they are."""
        layouts = [Layout(batch) for batch in batches]
        values = [layout.dense(batch["advantages"]) for layout, batch in zip(layouts, batches, strict=True)]
        if self.across is None:
            taking_part = [layout.mask & ~value.isnan() for layout, value in zip(layouts, values, strict=True)]
            self._log(self._sums(values, taking_part))
        else:
            values = self._over_the_step(self.across, values, [layout.mask for layout in layouts], kl_penalties)
        for batch, layout, value in zip(batches, layouts, values, strict=True):
            batch["advantages"] = layout.flat(value.nan_to_num().float())

    def _over_the_step(
        self, row: Estimator, values: list, masks: list, kl_penalties: list | None
    ) -> list[torch.Tensor]:
        """The function across prompts on the rows of all processes; back the rows of each micro-batch of this one."""
        columns = [values, masks, *([kl_penalties] if kl_penalties else [])]
        stacked = torch.stack([_above_each_other(column) for column in columns], dim=-1)
        everything, own = self._gathered(stacked)
        values_of_all, mask = everything[..., 0].double(), everything[..., 1].bool()
        scored = mask & ~values_of_all.isnan()
        penalty = everything[..., 2].double() if kl_penalties else None
        batch = RewardBatch(values_of_all.nan_to_num(), scored, mask.long(), 1, kl_penalty=penalty)
        self._warn_of_few(int(mask.any(1).sum()))
        if not batch.trainable.any():
            advantages = torch.zeros_like(values_of_all)
        else:
            advantages = row.function(batch, **self._kwargs)
        self._log(_sums_of([advantages], [scored]))
        self._log_facts(row, batch, advantages)
        return [*advantages[own].split([len(value) for value in values])]

    def _gathered(self, local: torch.Tensor) -> tuple[torch.Tensor, slice]:
        """`(rows, T, C)` of all processes, and which rows are ours. Rows and columns that only fill up are 0."""
        accelerator = self.trainer.accelerator
        padded = accelerator.pad_across_processes(accelerator.pad_across_processes(local, dim=1), dim=0)
        start = accelerator.process_index * len(padded)
        return accelerator.gather(padded.contiguous()), slice(start, start + len(local))

    def _sums(self, values: list[torch.Tensor], where: list[torch.Tensor]) -> torch.Tensor:
        return self.trainer.accelerator.reduce(_sums_of(values, where), reduction="sum")

    def _log(self, sums: torch.Tensor) -> None:
        """Mean and standard deviation over the tokens that take part, of all processes, in this step."""
        count, total, squares = sums.tolist()
        mean = total / count if count else math.nan
        metrics = self.trainer._metrics["train"]
        metrics["advantages/mean"].append(mean)
        metrics["advantages/std"].append(math.sqrt(max(squares / count - mean**2, 0.0)) if count else math.nan)

    def _log_facts(self, row: Estimator, batch: RewardBatch, advantages: torch.Tensor) -> None:
        """What the row has to say about a step: further numbers, and what a KL in the reward is divided by."""
        found: dict[str, float] = {}
        if row.metrics is not None:
            found |= row.metrics(batch, advantages, **self._kwargs)
        if row.std is not None and batch.kl_penalty is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the estimator has warned
                found["kl/effective_beta"] = self.trainer.beta / row.std(batch, **self._kwargs).item()
        for name, value in found.items():
            self.trainer._metrics["train"][name].append(value)

    def _warn_of_few(self, count: int) -> None:
        """Once, where the statistics of a step rest on a handful of rows."""
        args = self.trainer.args
        if self._warned or count >= 2 * args.num_generations:
            return
        self._warned = True
        if self.trainer.accelerator.is_main_process:
            warn_user(
                f"advantage_estimator={self.name!r} takes its statistics over the {count} rows of this optimizer "
                f"step, fewer than two groups of {args.num_generations}. With token_budget={args.token_budget} a "
                "micro-batch is what fits into that many tokens; set token_budget: -1 to count "
                "per_device_train_batch_size rows, or raise gradient_accumulation_steps."
            )


def _above_each_other(parts: list[torch.Tensor]) -> torch.Tensor:
    """`(rows, T)` of the micro-batches as one tensor, float32, padded with 0."""
    width = max(part.size(1) for part in parts)
    return torch.cat([torch.nn.functional.pad(part.float(), (0, width - part.size(1))) for part in parts])


def _sums_of(values: list[torch.Tensor], where: list[torch.Tensor]) -> torch.Tensor:
    """Count, sum and sum of squares of the selected entries, `(3,)`, float64."""
    chosen = torch.cat([value[w].double() for value, w in zip(values, where, strict=True)])
    return torch.stack([torch.tensor(len(chosen)).to(chosen), chosen.sum(), chosen.square().sum()])
