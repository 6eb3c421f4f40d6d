"""GRPO's own part of `shared_prefix`: groups stay together, and rows with advantage 0 cost nothing."""

from contextlib import nullcontext
from typing import Any

import torch

from ...packed.forward import plain_attention
from ...packed.order import keep_groups
from ..foreign import Options, is_ours, overriding_class
from ..input_checks import warn_user
from ..shared_prefix import SharesPrefixes, base_model, check_shared_prefix
from .checks import kl_choice


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
    _skips = False  # whether rows with advantage 0 are left out
    _keeps_order = False  # whether a loss that we do not know may depend on which rows share a micro-batch

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self._shared:
            return
        self._skips, others = bool(Options(self.args).skip_zero_advantages), self._losses_of_others()
        if others:
            if self._skips:
                warn_user(f"skip_zero_advantages is off: {others[0]} may use rows whose advantage is 0.")
            if self.args.gradient_accumulation_steps > 1:
                warn_user(
                    f"shared_prefix leaves rows in TRL's order: which of them share a micro-batch may matter to "
                    f"{others[0]}. Rows that share a prompt and a micro-batch are computed together."
                )
            self._skips, self._keeps_order = False, True

    def _losses_of_others(self) -> list[str]:
        """Methods of somebody else's on the way to the loss."""
        base = next(cls for cls in type(self).__mro__ if is_ours(cls))
        names = ("_get_per_token_logps_and_entropies", "_compute_loss", "compute_loss")
        found = {name: overriding_class(self, base, name) for name in names}
        return [f"{cls.__module__}.{cls.__qualname__}.{name}" for name, cls in found.items() if cls is not None]

    def _generate_single_turn(self, *args, **kwargs):
        with plain_attention(base_model(self, self.model)) if self._shared else nullcontext():
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

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

    def _compute_loss(self, model, inputs):
        without = rows_without_effect(inputs) if self._skips and self.model.training else None
        if without is None:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        if (old := inputs.get("old_per_token_logps")) is not None:
            # Their log-probs will be 0, and 0 · exp(0 − old) must not be 0 · ∞.
            inputs = {**inputs, "old_per_token_logps": old.masked_fill(without[:, None], 0.0)}
        with self._shared["policy"].leaving_out(without):
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
