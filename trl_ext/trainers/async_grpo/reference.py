"""The KL to the policy without its adapter: the reference's log-probs, a term of the loss, a penalty in the reward."""

import time
from typing import Any

import torch

from ...functional.kl import KL_ESTIMATORS, kl_in_loss
from ...lookup import lookup
from ...upstream import UpstreamChanged
from ..grpo.metrics import kl_metrics, kl_sums
from .layout import Layout


class _Asked(Exception):
    """Raised in place of a forward, with its arguments."""


class FirstOutput:
    """Stands for the model in one call of TRL's loss, and keeps what it returned."""

    def __init__(self, model: Any):
        self._model, self._outputs = model, list[Any]()

    def __call__(self, **kwargs):
        self._outputs.append(self._model(**kwargs))
        return self._outputs[-1]

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probs of the packed positions, with graph."""
        if len(self._outputs) != 1:
            raise UpstreamChanged(f"compute_loss runs the model {len(self._outputs)} times")
        return self._outputs[0].log_probs.flatten()


class ReferenceKL:
    """
    The KL of the samples to the reference. Keeps nothing of a step.

    Args:
        trainer ([`AsyncGRPOTrainer`]):
            Trainer after its construction, with an adapter.
        placement (`str`):
            `"loss"` or `"reward"`.
        name (`str`):
            Entry of `KL_ESTIMATORS`, or a dotted path.
    """

    def __init__(self, trainer: Any, placement: str, name: str):
        self.trainer, self.in_reward, self.name = trainer, placement == "reward", name
        self._estimator = lookup(name, KL_ESTIMATORS)

    def attach(self, batches: list[dict[str, torch.Tensor]], loss: Any) -> None:
        """
        Adds `ref_log_probs`, `(1, M)`, to each micro-batch. `loss` is TRL's: it says how it would run the model, and
        is left before it does or logs anything.
        """
        start, model = time.perf_counter(), self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()  # no dropout, nothing recomputed
        with torch.no_grad(), model.disable_adapter():
            for batch in batches:
                log_probs = self.trainer.model_wrapped(**_arguments(loss, batch)).log_probs.flatten()
                batch["ref_log_probs"] = log_probs[batch["token_index"].clamp(min=0)].float()
        model.train(training)
        self.trainer._metrics["train"]["perf/reference_s"].append(time.perf_counter() - start)

    def penalties(self, batches: list[dict[str, torch.Tensor]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The KL of the policy that sampled, `(samples, T)` for each micro-batch, nats; and its sums, `kl_sums`."""
        found, sums = [], []
        for batch in batches:
            layout = Layout(batch)
            old, ref = layout.dense(batch["old_log_probs"]), layout.dense(batch["ref_log_probs"])
            found.append(kl_in_loss(self._estimator, old, ref, old, layout.mask, bias_correction=False))
            sums.append(kl_sums(found[-1], old, ref, old, layout.mask))
        return found, torch.stack(sums).sum(0)

    def in_loss(self, inputs: dict[str, torch.Tensor], model: FirstOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """The KL of the micro-batch, weighted by the ratio: its sum over the tokens, with graph; and its sums."""
        layout = Layout(inputs)
        logps = layout.dense(model.log_probs[inputs["token_index"][layout.selected]])
        old, ref = layout.dense(inputs["old_log_probs"]), layout.dense(inputs["ref_log_probs"])
        per_token_kl = kl_in_loss(self._estimator, logps, ref, old, layout.mask)
        return per_token_kl.sum(), kl_sums(per_token_kl, logps.detach(), ref, old, layout.mask)


def reference_metrics(sums: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of each mean over tokens; `kl` is TRL's, the mismatch of trainer and sampler."""
    tokens = max(sums[-3].item(), 1.0)
    return {
        name.replace("kl", "kl/reference") if name == "kl" else name: (mean * tokens, tokens)
        for name, mean in kl_metrics(sums).items()
    }


def _arguments(loss: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What TRL's loss runs the model with."""

    def ask(**kwargs):
        raise _Asked(kwargs)

    try:
        loss(ask, batch)
    except _Asked as asked:
        return asked.args[0]
    raise UpstreamChanged("compute_loss does not run the model")
