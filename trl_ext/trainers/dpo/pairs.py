"""From TRL's batch and the output of the policy to a [`PairBatch`], and from there to metrics."""

from typing import Any

import torch

from ...functional.preference import PairBatch
from ..foreign import option
from .losses import PairLosses


def pair_batch(
    trainer: Any, outputs: Any, inputs: dict[str, torch.Tensor], columns: dict[str, torch.Tensor]
) -> tuple[PairBatch, torch.Tensor | None]:
    """
    The pairs of a micro-batch, with sums over tokens, and the weight of each (`None`: 1).

    Args:
        trainer ([`DPOTrainer`]):
            Gives `beta`, `ld_alpha`, `label_smoothing`, `use_weighting` and the scale of the scores.
        outputs:
            What the policy returned for `inputs`, `2B` rows, the chosen completions first.
        inputs (`dict[str, torch.Tensor]`):
            TRL's batch, with the references' log-probs.
        columns (`dict[str, torch.Tensor]`):
            Our columns, `(B,)` each.
    """
    mask = inputs["completion_mask"][:, 1:]  # the first token of a row is not predicted
    per_token_logps = outputs.log_probs[:, -mask.size(1) :]
    lengths = mask.sum(1)
    chosen_logps, rejected_logps = completion_logps(per_token_logps, mask, lengths, trainer.ld_alpha).chunk(2)
    chosen_lengths, rejected_lengths = lengths.clamp(min=1.0).to(per_token_logps.dtype).chunk(2)
    smoothing = 0.0 if trainer._losses.hard_labels else trainer.label_smoothing
    reward_margin = None
    if "pair_chosen_reward" in columns:
        scale = option(trainer.args, "reward_margin_scale")
        reward_margin = scale * (columns["pair_chosen_reward"] - columns["pair_rejected_reward"])
    batch = PairBatch(
        chosen_logps,
        rejected_logps,
        inputs["ref_chosen_logps"],
        inputs["ref_rejected_logps"],
        chosen_lengths,
        rejected_lengths,
        preference_prob=columns.get("pair_prob", torch.full_like(chosen_logps, 1.0 - smoothing)),
        beta=trainer.beta,
        reward_margin=reward_margin,
    )
    weights = columns.get("pair_weight")
    if trainer.use_weighting:  # WPO: the probability of the pair, each token's relative to the policy's mean
        aligned = (per_token_logps - outputs.log_sum_sq_probs[:, -mask.size(1) :]).detach() * mask
        chosen, rejected = torch.exp(aligned.sum(1) / lengths.clamp_min(1)).chunk(2)
        weights = chosen * rejected if weights is None else weights * (chosen * rejected)
    return batch, weights


def completion_logps(
    per_token_logps: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, ld_alpha: float | None
) -> torch.Tensor:
    """
    Log-prob of each completion, `(2B,)`, nats: the sum of `per_token_logps`, `(2B, T)`, in which `ld_alpha` weighs the
    tokens beyond the length of the shorter completion of the pair.
    """
    if ld_alpha is None:
        return per_token_logps.sum(1)
    position = mask.cumsum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    tail = (per_token_logps * (position > shared)).sum(1)
    return (per_token_logps * ((position > 0) & (position <= shared))).sum(1) + ld_alpha * tail


def pair_metrics(losses: PairLosses, batch: PairBatch, per_pair: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is logged of the pairs, `(B,)` each; `per_pair` holds the losses by name."""
    columns = {f"loss/{name}": values for name, values in per_pair.items()}
    if losses.reference_free:
        columns |= _rewards_without_reference(losses.ours[0].view(batch))
    else:
        prob, chosen, rejected = batch.preference_prob, batch.chosen_logratios, batch.rejected_logratios
        columns["rewards/agreement"] = torch.where(batch.margin > 0, prob, 1 - prob)
        columns["logratios/chosen"], columns["logratios/rejected"] = chosen, rejected
        columns["logratios/chosen_per_token"] = chosen / batch.chosen_lengths
        columns["logratios/rejected_per_token"] = rejected / batch.rejected_lengths
        columns["logratios/chosen_falling"] = chosen < 0
    for loss in losses.ours:
        view = loss.view(batch)
        if (target := loss.target(view)) is not None and "margins/target_distance" not in columns:
            distance = view.margin - target
            columns["margins/target_distance"] = distance.abs()
            columns["margins/target_reached"] = distance * target.sign() >= 0  # a target of 0 is reached
        if loss.row.metrics is not None:
            columns |= loss.row.metrics(view)
    return columns


def _rewards_without_reference(view: PairBatch) -> dict[str, torch.Tensor]:
    """TRL's names for the reward of SimPO: beta times the log-probs as the loss takes them, sums or means."""
    chosen, rejected = view.beta * view.chosen_logps, view.beta * view.rejected_logps
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
    }


def mean_over_processes(accelerator: Any, columns: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean of each column over the pairs of all processes, with one collective."""
    table = torch.stack([column.detach().to(torch.float32) for column in columns.values()])
    return dict(zip(columns, accelerator.gather(table.T.contiguous()).mean(0).tolist(), strict=True))
