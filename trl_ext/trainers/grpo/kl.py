"""Our KL to the reference inside TRL's GRPO trainer: in the loss, or in the reward."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import GRPOTrainer as _GRPOTrainer

from ...functional.kl import KL_ESTIMATORS, kl_in_loss, kl_of_completions, later_kl, next_beta
from ...lookup import lookup
from ...upstream import UpstreamChanged
from ..foreign import overriding_class, watching
from ..gathering import is_sharded
from .exact_kl import exact_kl_inside, last_hidden_states, lm_head
from .metrics import kl_sums

_LOG_PROBS = "_get_per_token_logps_and_entropies"


class BetaProxy(float):
    """
    Stands in for `beta` while TRL computes one loss.

        TRL:   per_token_loss + self.beta * per_token_kl
                                    │            └ TRL's k3, not used
                                    └ BetaProxy.__mul__: beta · our KL per token, (B, T), with graph

    TRL's loss contains this product in exactly one place, so TRL's masks, aggregation and metrics stay in force for
    every `loss_type` and nothing of them is copied. `penalties` keeps each KL given: anything but one entry means that
    TRL has changed.

    Args:
        beta (`float`):
            Coefficient of the KL.
        per_token_kl (`Callable`):
            Gives the KL per token, `(B, T)`, in nats, when the product is asked for.
    """

    _per_token_kl: Callable[[], torch.Tensor]
    penalties: list[torch.Tensor]

    def __new__(cls, beta: float, per_token_kl: Callable[[], torch.Tensor]) -> "BetaProxy":
        self = super().__new__(cls, beta)
        self._per_token_kl, self.penalties = per_token_kl, []
        return self

    def _times(self, theirs: torch.Tensor) -> torch.Tensor:
        ours = self._per_token_kl()
        if theirs.shape != ours.shape:
            raise UpstreamChanged(f"beta is multiplied by a tensor of shape {tuple(theirs.shape)} in the loss")
        self.penalties.append(ours)
        return float(self) * ours

    def __mul__(self, other):
        return self._times(other) if isinstance(other, torch.Tensor) else float(self) * other

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__):
            beta, tensor = sorted(args, key=lambda arg: isinstance(arg, torch.Tensor))
            return beta._times(tensor)
        return func(*(float(arg) if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


class BetaController:
    """
    Keeps the KL at a target by moving `beta`. Sums what it is told until the end of a step.

    Args:
        target (`float`):
            KL to keep, in nats.
        horizon (`float`, *optional*):
            Completions over which `beta` changes by at most a factor of about e^±0.2. Default: 10,000.
        unit (`str`, *optional*):
            `"token"`, the default, or `"sequence"`.
    """

    def __init__(self, target: float, horizon: float | None = None, unit: str | None = None):
        self.target, self.horizon, self.unit = target, horizon or 10_000.0, unit
        self._window: Any = 0.0

    def after(self, beta: float, sums: torch.Tensor, end_of_step: bool = True) -> float:
        """
        `beta` from now on.

        Args:
            beta (`float`):
                Coefficient up to now, which stays inside a step.
            sums (`torch.Tensor` of shape `(4,)`):
                Of all processes: KL in nats, trainable tokens, completions that have any, completions.
            end_of_step (`bool`, *optional*, defaults to `True`):
                Whether an optimizer step, or a generation batch with the KL in the reward, ends here.
        """
        self._window = self._window + sums
        if not end_of_step:
            return beta
        (kl, tokens, sequences, completions), self._window = self._window.tolist(), 0.0
        count = sequences if self.unit == "sequence" else tokens
        return next_beta(beta, kl / count, self.target, completions, self.horizon) if count else beta


def log_probs(trainer: Any, model: Any, output: dict) -> torch.Tensor:
    """Log-probs of the tokens of a scored batch under a model as it is now, `(B, T)`, without graph."""
    args = trainer.args
    taken = inspect.signature(getattr(_GRPOTrainer, _LOG_PROBS)).parameters
    size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs):
        return trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
            output["completion_ids"].size(1),
            batch_size=size,
            **{name: value for name, value in output.items() if name in taken},  # images and their like
        )[0]


class ForwardPass(NamedTuple):
    """
    Log-probs of the completions, `(B, T)`, and, for the exact KL, what was collected inside the model: the last hidden
    states, or in the loss the KL `(B, T)`; nothing where the KL came with the log-probs.
    """

    logps: torch.Tensor
    collected: Any


class KLPenalty:
    """
    Our KL in a trainer of TRL's. Keeps nothing of a batch.

    Args:
        trainer ([`GRPOTrainer`]):
            Trainer after its construction.
        placement (`str`):
            `"loss"`, `"reward"` or `"sequence"`.
        name (`str`):
            Entry of `KL_ESTIMATORS`, `"exact"`, or a dotted path.
        base (`type`):
            Our trainer class, whose methods a subclass may override.
    """

    def __init__(self, trainer: Any, placement: str, name: str, base: type):
        self.trainer, self.base = trainer, base
        self.in_reward, self.exact = placement == "reward", name == "exact"
        self.of_completions = placement == "sequence"
        self.option = "kl_placement='sequence'" if self.of_completions else f"kl_estimator={name!r}"
        self.in_words = self.option if self.of_completions else f"{self.option} in the {placement}"
        self._estimator: Any = None if self.exact else lookup(name, KL_ESTIMATORS)
        self.own_logps: Any = None  # what our trainer's own method last gave to a subclass's
        head = lm_head(trainer.accelerator.unwrap_model(trainer.model)) if self.exact else None
        if head is not None and trainer.ref_model is None and head.weight.requires_grad:
            raise ValueError(
                f"{self.option} needs one LM head for policy and reference with PEFT, but this adapter trains its own "
                "copy (modules_to_save). Leave the head out of it, or use 'k3' in the loss."
            )

    # Forward passes

    @contextmanager
    def recording(self, collecting: Callable = last_hidden_states) -> Iterator[list[ForwardPass]]:
        """Collects the forward passes inside the block, as the outermost method of a subclass returns them."""
        passes: list[ForwardPass] = []

        def recorded(theirs: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.exact:
                result = theirs(model, *args, **kwargs)
                passes.append(ForwardPass(result[0], None))
                return result
            self.own_logps = None
            with collecting(self.trainer.accelerator.unwrap_model(model)) as collected:
                result = theirs(model, *args, **kwargs)
            if result[0] is not self.own_logps:
                raise self._refused(_LOG_PROBS, f"returns log-probs of its own, which {self.option} does not read")
            passes.append(ForwardPass(result[0], torch.cat(collected) if collected else None))
            return result

        with watching(self.trainer, _LOG_PROBS, recorded):
            yield passes
        self.own_logps = None

    def _refused(self, method: str, what: str) -> Exception:
        cls = overriding_class(self.trainer, self.base, method)
        if cls is None:
            return UpstreamChanged(f"{method} {what}")
        return ValueError(
            f"{cls.__module__}.{cls.__qualname__} overrides {method} and {what}. Keep to what GRPOTrainer's does, or "
            f"remove {self.option}."
        )

    def reference_states(self, passes: list[ForwardPass], output: dict) -> torch.Tensor:
        """For the exact KL: TRL has run the reference over the batch; its hidden states save another pass."""
        found = [p for p in passes if p.logps is output["ref_per_token_logps"]]
        if len(found) != 1 or found[0].collected is None:
            raise UpstreamChanged("scoring does not return the log-probs of the reference as computed")
        width = found[0].logps.size(1)
        return found[0].collected[:, -width - 1 : -1].clone()  # the state before a token predicts it

    # In the reward

    def of_sampler(self, output: dict, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The KL of the policy that sampled, a constant: `(B, T)`, nats, 0 at untrainable tokens; and its sums."""
        sampler = output.get("old_per_token_logps")
        if sampler is None:  # TRL leaves it out where it equals the policy that the loss will see first
            sampler = log_probs(self.trainer, self.trainer.model, output)
        reference = output["ref_per_token_logps"]
        per_token_kl = kl_in_loss(self._estimator, sampler, reference, sampler, mask, bias_correction=False)
        return per_token_kl, kl_sums(per_token_kl, sampler, reference, sampler, mask)

    # In the loss

    @contextmanager
    def in_loss(self, inputs: dict) -> Iterator[list[torch.Tensor]]:
        """Around TRL's loss: its KL is ours. After the block the list holds the sums of the KL, [`kl_sums`]."""
        trainer, beta = self.trainer, self.trainer.beta
        sums: list[torch.Tensor] = []
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if self.exact and "ref_hidden_states" not in inputs:
            raise self._refused("_generate_and_score_completions", "leaves 'ref_hidden_states' out of its result")
        inside = partial(exact_kl_inside, trainer, ref_hidden=inputs.get("ref_hidden_states"), mask=mask)
        with self.recording(inside) as passes, self._from_log_probs(inputs) as found:
            proxy = BetaProxy(beta, lambda: self._term(*passes[-1], inputs, mask, found))
            trainer.beta = 0.0 if self.in_reward else proxy  # a KL in the reward has acted already
            try:
                yield sums
            finally:
                trainer.beta = beta
        if self.in_reward:
            return
        if len(proxy.penalties) != 1 or len(passes) != 1:
            raise self._refused("_compute_loss", "does not multiply beta by the KL per token exactly once")
        logps, old = passes[0].logps.detach(), inputs.get("old_per_token_logps")
        old = logps if old is None else old
        sums.append(kl_sums(proxy.penalties[0], logps, inputs["ref_per_token_logps"], old, mask))

    def _from_log_probs(self, inputs: dict) -> Any:
        """Around the loss: gives the exact KL, where `shared_prefix` has it from the logits of the log-probs."""
        trainer = self.trainer
        # Not where processes share the weights: one that takes TRL's forward would gather the head once more.
        with_log_probs = self.exact and trainer.ref_model is None and not is_sharded(trainer)
        shared = trainer._shared.get("policy") if with_log_probs else None
        return nullcontext([]) if shared is None else shared.exact_kl(inputs["ref_hidden_states"])

    def _term(
        self, logps: torch.Tensor, exact: Any, inputs: dict, mask: torch.Tensor, found: list[torch.Tensor]
    ) -> torch.Tensor:
        """The KL of each token as a term of the loss, `(B, T)`, with graph."""
        old = inputs.get("old_per_token_logps")
        old = logps.detach() if old is None else old
        if not self.exact:
            corrected = self.trainer.args.use_bias_correction_kl
            return kl_in_loss(self._estimator, logps, inputs["ref_per_token_logps"], old, mask, corrected)
        per_token_kl = self._with_log_probs(found, mask) if found else exact
        if not self.of_completions:
            return per_token_kl
        return kl_of_completions(per_token_kl, logps, old, mask, self._later_of_all(per_token_kl, mask))

    def _with_log_probs(self, found: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        if len(found) > 1:
            raise self._refused(_LOG_PROBS, "runs the policy more than once")
        return torch.where(mask.bool(), found[0], 0.0)

    def _later_of_all(self, per_token_kl: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[`later_kl`] of the rows of all processes that have a trainable token, `(N, T)` with our own `T`."""
        accelerator = self.trainer.accelerator
        rows = torch.cat([mask.any(1, keepdim=True).float(), later_kl(per_token_kl, mask)], dim=1)
        rows = accelerator.gather(accelerator.pad_across_processes(rows, dim=1))
        return rows[rows[:, 0] > 0, 1 : mask.size(1) + 1]
