"""GRPO's own part of a reference that moves: at which batch, the KL that decides it, and that to the first policy."""

from collections import defaultdict
from typing import Any

import torch

from ..moving_reference import MovesReference
from .kl import log_probs
from .metrics import kl_metrics, kl_sums

_TOTAL = "ref/total_kl"


class RefreshesReference(MovesReference):
    """
    The overrides of TRL's GRPO trainer; each is TRL's own where the reference does not move. Logged where it does:

    - `ref/refreshes`, how many there were, and `ref/age`, the optimizer steps since the last;
    - `ref/total_kl`, KL(policy‖first policy), nats: the mean of k1 over the trainable tokens of all processes, of the
      first generation batch since the last log.
    """

    model: Any
    accelerator: Any
    _metrics: dict[str, defaultdict[str, list[float]]]
    _samples = True
    _inside_a_step = False  # whether an optimizer step has some of its gradient

    def _generate_and_score_completions(self, inputs):
        moving = self._moving if self.model.training else None
        if moving is not None and not self._inside_a_step:
            moving.refresh_if_due()
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if moving is not None and moving.measures_total and not self._metrics["train"].get(_TOTAL):
            self._metrics["train"][_TOTAL].append(self._total_kl(moving, output))
        return output

    @torch.no_grad()
    def _total_kl(self, moving, output: dict) -> float:
        """KL(policy‖first policy) per trainable token of all processes, nats: the mean of k1 over the policy's own."""
        logps = output.get("old_per_token_logps")
        logps = log_probs(self, self.model, output) if logps is None else logps
        with moving.reference.of_first() as model:
            first = log_probs(self, model, output)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        sums = kl_sums(torch.zeros_like(logps), logps, first, logps, mask)
        return kl_metrics(self.accelerator.reduce(sums, reduction="sum"))["kl/k1"]

    def training_step(self, *args, **kwargs):
        if self._moving is None:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        known = len(self._metrics["train"].get("kl", ()))
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._moving.observe(self._metrics["train"].get("kl", [])[known:])
        self._inside_a_step = not self.accelerator.sync_gradients
        return loss
