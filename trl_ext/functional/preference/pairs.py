r"""
What a preference loss sees: the pairs of a micro-batch, and what is known of the margins of all processes.

Symbols, here and in the losses: \\(r_w\\), \\(r_l\\) log-ratio policy over reference of the chosen and the rejected
completion, in nats; \\(u = r_w - r_l\\) the margin; \\(t = \beta u\\); \\(p\\) the probability that the chosen
completion is preferred to the rejected one; \\(\Delta\\) the difference of their external scores, chosen minus
rejected, dimensionless; \\(\ell(t) = -\log\sigma(t)\\). \\(\beta\\) is in 1/nats and is called τ in the papers of the
regression losses.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class GlobalMargins:
    """
    What a loss with a state knows beyond its own pairs: the batch of all processes, and the batches before.

    Args:
        margins (`torch.Tensor` of shape `(N,)`):
            Margin u of each pair of all processes, without graph, float64, in nats.
        offset (`int`):
            Place among them of the first of the `B` pairs of this process.
        moving_mean, moving_std (`float`):
            Of the margins of earlier batches, from [`moving_statistics`], in nats.
        noise (`torch.Tensor` of shape `(N,)`, *optional*):
            Numbers drawn uniformly from [0, 1), float64, which decide what the filter keeps. `None`: it keeps all.
    """

    margins: torch.Tensor
    offset: int
    moving_mean: float
    moving_std: float
    noise: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.margins.dim() != 1:
            raise ValueError(f"GlobalMargins.margins has shape {tuple(self.margins.shape)}; expected (N,).")
        if self.noise is not None and self.noise.shape != self.margins.shape:
            raise ValueError(
                f"GlobalMargins.noise has shape {tuple(self.noise.shape)}; expected that of margins, "
                f"{tuple(self.margins.shape)}."
            )


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """
    What a pair loss sees. Every tensor has shape `(B,)`; half precision is widened to float32.

    Args:
        chosen_logps, rejected_logps (`torch.Tensor`):
            Log-probabilities of the completions under the policy: sums over the scored tokens, or means, in nats.
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor`):
            The same under the reference.
        chosen_lengths, rejected_lengths (`torch.Tensor`):
            Number of scored tokens, at least 1.
        preference_prob (`torch.Tensor`):
            Probability that the chosen completion is preferred, in [0, 1]; 1 is a hard label.
        beta (`float`):
            Regularisation strength, positive, in 1/nats. τ of the regression losses.
        reward_margin (`torch.Tensor`, *optional*):
            Score of the chosen completion minus that of the rejected one, scaled.
        chosen_logratios, rejected_logratios (`torch.Tensor`, *optional*):
            Log-ratios, policy over reference, in nats. Default: the differences of the above.
        global_margins ([`GlobalMargins`], *optional*):
            The margins of all processes, for a loss with a state. `None`: these pairs are all, and the first.

    Raises:
        `ValueError`: If a tensor does not have the shape of `chosen_logps`, or that is not `(B,)`.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    preference_prob: torch.Tensor
    beta: float
    reward_margin: torch.Tensor | None = None
    chosen_logratios: torch.Tensor = None  # type: ignore[assignment]
    rejected_logratios: torch.Tensor = None  # type: ignore[assignment]
    global_margins: GlobalMargins | None = None

    def __post_init__(self) -> None:
        pairs = self.chosen_logps.shape[:1]
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), torch.Tensor):
                if value.shape != pairs or not pairs:
                    raise ValueError(
                        f"PairBatch.{field.name} has shape {tuple(value.shape)}; expected one number per pair, "
                        f"{tuple(pairs) or '(B,)'}."
                    )
                wide = value.to(torch.promote_types(value.dtype, torch.float32))  # half precision holds no e²⁰
                object.__setattr__(self, field.name, wide)
        for side in ("chosen", "rejected"):
            if getattr(self, f"{side}_logratios") is None:
                difference = getattr(self, f"{side}_logps") - getattr(self, f"ref_{side}_logps")
                object.__setattr__(self, f"{side}_logratios", difference)

    @property
    def margin(self) -> torch.Tensor:
        """Log-ratio of the chosen completion minus that of the rejected one, `(B,)`, nats."""
        return self.chosen_logratios - self.rejected_logratios

    def per_token(self) -> "PairBatch":
        """The same pairs, each sum over the tokens of a completion (of log-probs, of log-ratios) now a mean."""
        means = {}
        for side in ("chosen", "rejected"):
            for name in (f"{side}_logps", f"ref_{side}_logps", f"{side}_logratios"):
                means[name] = getattr(self, name) / getattr(self, f"{side}_lengths")
        return dataclasses.replace(self, **means)
