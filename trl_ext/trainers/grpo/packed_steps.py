"""
GRPO's own part of `shared_prefix`: groups stay together, rows with advantage 0 cost nothing, and reused rollouts take
their old log-probs from the first training pass.
"""

from typing import Any

import torch

from ...packed.order import keep_groups
from ...packed.verdict import has_dropout
from ...upstream import UpstreamChanged
from ..foreign import Options, is_ours, overriding_class
from ..input_checks import warn_user
from ..shared_prefix import SharesPrefixes, base_model, check_shared_prefix
from .checks import kl_choice

_ON_THE_WAY_TO_THE_LOSS = ("_get_per_token_logps_and_entropies", "_compute_loss", "compute_loss")
_OLD = "old_per_token_logps"


def check_packed_steps(options: Any, kl_in_loss: bool) -> None:
    """Refuses options of shared prefixes that cannot be honoured."""
    check_shared_prefix(options)
    skip = options.skip_zero_advantages
    if skip not in (None, False, True):
        raise ValueError(f"skip_zero_advantages must be true or false, got {skip!r}.")
    if not skip:
        return
    if not options.shared_prefix:
        raise ValueError("skip_zero_advantages is read only with shared_prefix; set that too, or remove it.")
    for reads, option in {
        "beta > 0 with the KL in the loss": kl_in_loss,
        "entropy_coef": options.entropy_coef != 0.0,
        "use_adaptive_entropy": options.use_adaptive_entropy,
        "top_entropy_quantile < 1": options.top_entropy_quantile < 1.0,
    }.items():
        if option:
            raise ValueError(
                f"skip_zero_advantages leaves out rows that the loss does not depend on, but with {reads} it depends "
                "on all rows. Remove one."
            )


def rows_without_effect(inputs: dict[str, Any]) -> torch.Tensor | None:
    """
    The rows of a micro-batch that nothing is learned from, `(B,)` bool: all their advantages are 0. `None`: none.

    The backward pass must start somewhere, on every process: if all rows are such, the shortest scored one is kept.
    """
    advantages, mask = inputs["advantages"], inputs["completion_mask"].bool()
    without = advantages == 0 if advantages.dim() == 1 else ((advantages == 0) | ~mask).all(1)
    if not without.any():
        return None
    scored = mask.any(1)
    if not (scored & ~without).any():
        without[mask.sum(1).where(scored, mask.size(1) + 1).argmin()] = False
    return without


class PackedSteps(SharesPrefixes):
    """The overrides of TRL's GRPO trainer; each is TRL's own where the option is off."""

    loss_type: str
    top_entropy_quantile: float
    _entropy_bonus_enabled: bool
    _buffered_inputs: list[dict[str, Any]] | None
    _step: int
    num_iterations: int
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    _skips = False  # whether rows with advantage 0 are left out
    _keeps_order = False  # whether a loss that we do not know may depend on which rows share a micro-batch
    _takes_old = False  # whether old log-probs are those of the first training pass
    _logps: torch.Tensor | None = None  # of the last pass, until the loss has been computed

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self._shared:
            return
        self._skips, others = bool(Options(self.args).skip_zero_advantages), self._others(_ON_THE_WAY_TO_THE_LOSS)
        self._takes_old = self._first_pass_is_old()
        if others:
            if self._skips:
                warn_user(f"skip_zero_advantages is off: {others[0]} may use rows whose advantage is 0.")
            if self.args.gradient_accumulation_steps > 1:
                warn_user(
                    f"shared_prefix leaves rows in TRL's order: which of them share a micro-batch may matter to "
                    f"{others[0]}. Rows that share a prompt and a micro-batch are computed together."
                )
            self._skips, self._keeps_order = False, True

    def _others(self, names: tuple[str, ...]) -> list[str]:
        """Methods of these names that are somebody else's."""
        base = next(cls for cls in type(self).__mro__ if is_ours(cls))
        found = {name: overriding_class(self, base, name) for name in names}
        return [f"{cls.__module__}.{cls.__qualname__}.{name}" for name, cls in found.items() if cls is not None]

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs if self._shared else None
        inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        if not self._shared or not self.model.training or self._buffered_inputs is before or self._fixed_order:
            return inputs
        assert self._buffered_inputs is not None
        self._buffered_inputs = keep_groups(self._buffered_inputs, self.args.gradient_accumulation_steps)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @property
    def _fixed_order(self) -> bool:
        """Whether the loss has a mean or a quantile over a micro-batch: which rows share one is part of it then."""
        known = self.loss_type == "bnpo" or self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        has_baseline = kl_choice(Options(self.args))[0] == "sequence"
        return known or has_baseline or self._keeps_order

    # Old log-probs

    def _first_pass_is_old(self) -> bool:
        """
        Whether rollouts are reused, and each row is trained on once before the weights first change: the log-probs of
        that pass are the old ones. Not where somebody reads them earlier, nor with dropout, of which a pass of their
        own draws another mask.
        """
        args, options = self.args, Options(self.args)
        window, batch = args.gradient_accumulation_steps, args.steps_per_generation
        reused = window % batch == 0 and window % (batch * self.num_iterations) != 0
        earlier = (self.use_vllm and self.vllm_importance_sampling_correction) or kl_choice(options)[0] == "reward"
        names = (*_ON_THE_WAY_TO_THE_LOSS, "_generate_and_score_completions", "_prepare_inputs")
        return reused and not (earlier or has_dropout(base_model(self, self.model)) or self._others(names))

    def _generate_and_score_completions(self, inputs):
        if not self._takes_old:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        iterations, self.num_iterations = self.num_iterations, 1  # TRL leaves the old log-probs out then
        try:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        finally:
            self.num_iterations = iterations

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        if self._takes_old:
            self._logps = result[0].detach()
        return result

    def _compute_loss(self, model, inputs):
        if not self._shared:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        first = self._takes_old and self.model.training and inputs.get(_OLD) is None
        batches = self.args.steps_per_generation
        if first and self._step % (batches * self.num_iterations) >= batches:
            raise UpstreamChanged("the rows of a generation batch are not kept between its passes")
        loss = self._loss_of_rows(model, inputs)
        if first:
            inputs[_OLD] = self._logps  # in TRL's buffer, from which the next passes take it
        self._logps = None
        return loss

    def _loss_of_rows(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss, for which rows without effect may be left out of the forward pass."""
        without = rows_without_effect(inputs) if self._skips and self.model.training else None
        if without is None:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        if (old := inputs.get(_OLD)) is not None:
            # Their log-probs will be 0, and 0 · exp(0 − old) must not be 0 · ∞.
            inputs = {**inputs, _OLD: old.masked_fill(without[:, None], 0.0)}
        with self._shared["policy"].leaving_out(without):
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
