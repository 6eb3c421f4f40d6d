"""A trust region: a generation batch stops moving the policy once that is far from the one that sampled."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import TrainerCallback

from ...functional.kl import k3
from ...upstream import UpstreamChanged
from ..foreign import Options, is_ours, overriding_class, watching, without_super

_NAMES = ("_compute_loss", "compute_loss")
_IN_BACKWARD = ("lomo", "layerwise")  # optimizers that update while gradients are computed


def check_policy_kl(options: Any) -> None:
    """Refuses a bound on the policy's KL that can never act, or cannot be honoured."""
    bound = options.policy_kl_stop
    if bound is None:
        return
    if not (isinstance(bound, int | float) and 0 < bound < math.inf):
        raise ValueError(f"policy_kl_stop must be a positive number, got {bound!r}.")
    accumulation, losses = options.gradient_accumulation_steps, options.steps_per_generation * options.num_iterations
    if not options._rollouts_reused:
        raise ValueError(
            "policy_kl_stop skips further updates of a generation batch, but there is one only. Raise num_iterations "
            "or steps_per_generation, or remove it."
        )
    if losses % accumulation:
        raise ValueError(
            "policy_kl_stop skips whole optimizer steps, but a generation batch ends inside one: "
            f"steps_per_generation * num_iterations = {losses} is no multiple of "
            f"gradient_accumulation_steps={accumulation}."
        )
    optim, keeps = getattr(options.optim, "value", options.optim), None
    if options.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        keeps = "DeepSpeed"
    elif any(name in optim for name in _IN_BACKWARD):
        keeps = f"optim={optim!r}"
    if keeps is not None:
        raise ValueError(f"policy_kl_stop takes gradients away before the optimizer's step, but {keeps} keeps them.")
    if options.skip_zero_advantages:
        raise ValueError(
            "policy_kl_stop measures the KL on all rows, but skip_zero_advantages leaves some out. Remove one."
        )


class PolicyKL(TrainerCallback):
    """
    Measures KL(old‖new) per token in each optimizer step, and takes its gradients away once that exceeded a bound.

    Args:
        trainer ([`TrustRegion`]):
            Trainer after its construction.
        bound (`float`):
            In nats per trainable token.
    """

    def __init__(self, trainer: Any, bound: float):
        self.trainer, self.bound = trainer, bound
        self.stopped = False  # for the rest of the generation batch
        self._sums: torch.Tensor | None = None  # KL and tokens of the step so far, of this process

    @contextmanager
    def measuring(self, inputs: dict) -> Iterator[None]:
        """Around the loss of a micro-batch."""
        seen: list[torch.Tensor] = []

        def computed(theirs: Callable, *args: Any, **kwargs: Any) -> Any:
            result = theirs(*args, **kwargs)
            seen.append(result[0].detach())
            return result

        with watching(self.trainer, "_get_per_token_logps_and_entropies", computed):
            yield
        if not seen:
            raise UpstreamChanged("_compute_loss takes no log-probs of the policy")
        old = inputs.get("old_per_token_logps")  # None: the policy has not moved since it sampled
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        kl = k3(seen[-1] if old is None else old, seen[-1]).where(mask, 0.0)  # tokens are of the old policy
        sums = torch.stack([kl.sum(), mask.sum().to(kl)])
        self._sums = sums if self._sums is None else self._sums + sums

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """The same on all processes. Without gradients an optimizer neither decays weights nor moves its moments."""
        trainer = self.trainer
        if self._sums is None:
            raise self._not_measured()
        total, tokens = trainer.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums, kl = None, total / max(tokens, 1.0)
        self.stopped = self.stopped or not kl <= self.bound  # NaN is too far
        if self.stopped:
            for parameter in trainer.model.parameters():
                parameter.grad = None
        metrics = trainer._metrics["train"]
        metrics["policy_kl"].append(kl)
        metrics["policy_kl/skipped"].append(float(self.stopped))

    def _not_measured(self) -> Exception:
        trainer = self.trainer
        base = next(cls for cls in type(trainer).__mro__ if is_ours(cls))
        for name in _NAMES:
            if overriding_class(trainer, base, name) is not None:
                return without_super(trainer, base, name, "policy_kl_stop")
        return UpstreamChanged("a training step does not call _compute_loss")


class TrustRegion:
    """The override of TRL's loss in which the KL is measured; TRL's own where the option is off."""

    args: Any
    model: Any
    _policy_kl: PolicyKL | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        bound = Options(self.args).policy_kl_stop
        if bound is not None:
            self._policy_kl = PolicyKL(self, bound)
            self.add_callback(self._policy_kl)  # type: ignore[attr-defined]

    def _starts_generation_batch(self) -> None:
        if self._policy_kl is not None and self.model.training:
            self._policy_kl.stopped = False

    def _compute_loss(self, model, inputs):
        watch = self._policy_kl if self.model.training else None
        with nullcontext() if watch is None else watch.measuring(inputs):
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
