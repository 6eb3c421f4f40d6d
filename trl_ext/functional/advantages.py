r"""
Advantage estimators: from the rewards of a generation batch to what the loss multiplies with the ratio.

An estimator is a function of a [`~trl_ext.functional.rewards.RewardBatch`] and its own options, and returns a
`torch.Tensor` of shape `(N,)` or `(N, T)` in the dtype of `batch.outcome`: 0 in rows that cannot learn, or, with one
number per token, at tokens that cannot.

Symbols: \\(r_{i,t}\\) token reward of row \\(i\\), the KL penalty subtracted; \\(p_{i,t}\\) that penalty; \\(S_i\\)
sum of the token rewards of row \\(i\\), \\(\bar S_g\\) its mean over the scorable rows of the prompt, \\(G\\)
`num_generations`, \\(n_i\\) trainable tokens of row \\(i\\), \\(m\\) the mask.
"""

import warnings
from typing import Any

import torch

from .attempts import best_of_group, gpg, pass_at_k
from .estimator import Estimator as Estimator
from .halves import centred_token_rewards, token_rewards
from .process_rewards import step_advantages
from .reductions import is_constant
from .rewards import RewardBatch
from .token_advantages import (
    KL_NOISE,
    above_the_group,
    baseline_metrics,
    left_out_to_go,
    prime,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rewards_to_go,
)
from .values import advantage_std, gae, value_metrics


def group_relative(batch: RewardBatch) -> torch.Tensor:
    r"""
    Return relative to the siblings, in units of their standard deviation (GRPO).

    $$ A_i = \frac{S_i - \bar S_g}{\mathrm{std}_g(S) + 10^{-4}} $$

    Shao et al., 2024, §4.1.2 (https://huggingface.co/papers/2402.03300), with Bessel's standard deviation and the eps
    of TRL, whose default it equals. Bias: prompts are reweighted by 1/std, which does not vanish with the batch; with
    `G = 2` the size of the gap is erased (±0.707). A group of one gets 0.

    Args:
        batch ([`RewardBatch`]):
            Rewards. In a group whose returns are equal without the KL, the deviation is not divided by the standard
            deviation, which is that of the KL alone.

    Returns:
        `torch.Tensor` of shape `(N,)`: Dimensionless advantages.
    """
    centred, scorable = batch.centred(batch.rewards), batch.group(batch.scorable)
    degrees = (scorable.sum(1, keepdim=True) - 1).clamp(min=1)
    scale = (centred.square().sum(1, keepdim=True) / degrees).sqrt() + 1e-4
    if batch.kl_penalty is not None:
        outcomes = batch.group(batch.without_kl.sum(1))
        kl_only = is_constant(outcomes, scorable, dim=1) & (centred != 0).any(1, keepdim=True)
        if kl_only.any():
            warnings.warn(KL_NOISE.format("of a group"), stacklevel=2)
        scale = scale.masked_fill(kl_only, 1.0)
    return batch.per_completion(centred / scale)


def group_mean(batch: RewardBatch) -> torch.Tensor:
    r"""
    Return minus the mean of the group.

    $$ A_i = S_i - \bar S_g $$

    Liu et al., 2025 (Dr. GRPO, https://huggingface.co/papers/2503.20783). The mean contains the row itself, so
    the expected policy gradient is \\((G-1)/G\\) times the true one; no other bias.

    Args:
        batch ([`RewardBatch`]):
            Rewards.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward.
    """
    return batch.per_completion(batch.centred(batch.rewards))


def leave_one_out(batch: RewardBatch) -> torch.Tensor:
    r"""
    Return minus the mean of the *other* completions of the prompt (RLOO).

    $$ A_i = S_i - \frac{1}{G-1}\sum_{j\ne i} S_j = \frac{G}{G-1}\,(S_i - \bar S_g) $$

    Ahmadian et al., 2024 (https://huggingface.co/papers/2402.14740). The expected policy gradient is the true
    one. A row without scorable sibling gets 0.

    Args:
        batch ([`RewardBatch`]):
            Rewards.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward.
    """
    count = batch.group(batch.scorable).sum(1, keepdim=True)
    return batch.per_completion(batch.centred(batch.rewards) * count / (count - 1).clamp(min=1))


def length_weighted(batch: RewardBatch) -> torch.Tensor:
    r"""
    Return minus the length-weighted mean of the group (OPO).

    $$ A_i = S_i - \frac{\sum_j n_j S_j}{\sum_j n_j},\qquad j \text{ over the scorable rows of the group} $$

    Hao et al., 2025 (https://huggingface.co/papers/2505.23585): the baseline of least variance if the squared
    norm of the score grows with the length; derived for exactly on-policy updates. The row itself enters the baseline
    with weight \\(n_i/\sum_j n_j\\).

    Args:
        batch ([`RewardBatch`]):
            Rewards.

    Returns:
        `torch.Tensor` of shape `(N,)`: Advantages, in the unit of the reward.
    """
    returns, scorable = batch.group(batch.rewards.sum(1)), batch.group(batch.scorable)
    length = batch.group(batch.mask.bool().sum(1)).where(scorable, 0)
    baseline = (length * returns).sum(1, keepdim=True) / length.sum(1, keepdim=True).clamp(min=1)
    return batch.per_completion((returns - baseline).where(scorable, 0.0))


def process_group_relative(
    batch: RewardBatch,
    *,
    credit: str = "sum",
    temperature: float = 0.1,
    process_weight: float = 1.0,
    outcome_weight: float = 1.0,
) -> torch.Tensor:
    r"""
    Steps relative to all steps of the siblings, and outcomes relative to theirs (GRPO with process supervision).

    $$ A_{i,t} = m_{i,t}\,\big(w_{\mathrm{process}}\,C(\{\tilde r_{i,j} : \mathrm{index}(j) \ge t\})
       + w_{\mathrm{outcome}}\,A^{\mathrm{outcome}}_i\big) $$

    Shao et al., 2024, §4.1.3 (https://huggingface.co/papers/2402.03300), where \\(C\\) is the sum and there are no
    outcomes. The first term is [`~trl_ext.functional.process_rewards.step_advantages`], the second [`group_relative`].
    Each source has its own baseline and scale: pooled, the spread of the step rewards would set that of the outcomes.

    Args:
        batch ([`RewardBatch`]):
            Rewards of steps, and of outcomes if there are any. No `kl_penalty`, which belongs to no step.
        credit, temperature:
            As for `step_advantages`.
        process_weight, outcome_weight (`float`, *optional*, default to `1.0`):
            The two weights.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Dimensionless advantages.

    Raises:
        `ValueError`: If there are no step rewards, if there is a KL penalty, or if an option is out of range.
    """
    if batch.steps is None or batch.steps_scored is None:
        raise ValueError("process_group_relative needs step rewards; set steps and steps_scored of the batch.")
    if batch.kl_penalty is not None:
        raise ValueError("process_group_relative takes no kl_penalty, which belongs to no step. Put it into the loss.")
    of_steps = step_advantages(
        batch.steps.double(),
        batch.steps_scored,
        batch.mask,
        batch.num_generations,
        credit=credit,
        temperature=temperature,
    )
    return (process_weight * of_steps + _of_outcomes(batch, outcome_weight)).to(batch.outcome.dtype)


def _of_outcomes(batch: RewardBatch, outcome_weight: float) -> torch.Tensor:
    """What outcomes contribute to [`process_group_relative`], `(N, T)`, float64."""
    trainable = batch.mask.bool() & batch.outcome_scored.any(1, keepdim=True)
    if not trainable.any():  # steps may teach all the same: no batch of outcomes alone, which would warn
        return torch.zeros_like(batch.outcome, dtype=torch.float64)
    return outcome_weight * group_relative(batch.outcomes_alone())[:, None].where(trainable, 0.0)


def _share_of_steps(batch: RewardBatch, advantages: torch.Tensor, **options: Any) -> dict[str, float]:
    """The share of the steps in the sum of |A| of steps and of outcomes, before adding; NaN if that is 0."""
    of_outcomes = _of_outcomes(batch, options.get("outcome_weight", 1.0))
    sizes = (advantages - of_outcomes).abs().sum(), of_outcomes.abs().sum()
    return {"process/advantage_share": (sizes[0] / (sizes[0] + sizes[1])).item()}


ADVANTAGE_ESTIMATORS: dict[str, Estimator] = {
    "group_relative": Estimator(group_relative, siblings=True, within=group_relative),
    "group_mean": Estimator(
        group_mean,
        siblings=True,
        within=group_mean,
        method="GRPO with mean-only advantages (Dr. GRPO)",
        paper="dr_grpo",
    ),
    "leave_one_out": Estimator(
        leave_one_out,
        siblings=True,
        within=leave_one_out,
        method="GRPO with leave-one-out advantages (RLOO)",
        paper="rloo",
    ),
    "length_weighted": Estimator(
        length_weighted,
        siblings=True,
        on_policy=True,
        within=length_weighted,
        method="GRPO with a length-weighted baseline (OPO)",
        paper="opo",
    ),
    "pass_at_k": Estimator(
        pass_at_k,
        siblings=True,
        completions=lambda k=2, **_: k + 1,
        within=pass_at_k,
        method="GRPO with the best of k attempts (Pass@k training)",
        paper="pass_at_k",
    ),
    "best_of_group": Estimator(
        best_of_group,
        siblings=True,
        within=best_of_group,
        method="GRPO with the best completion of a group",
        paper="best_of_group",
    ),
    "gpg": Estimator(gpg, siblings=True, on_policy=True, method="GPG", paper="gpg"),
    "reinforce": Estimator(
        reinforce,
        per_token=True,
        steps="added",
        within=token_rewards,
        across="reinforce",
        method="REINFORCE",
        paper="reinforce",
    ),
    "remax": Estimator(
        remax,
        per_token=True,
        steps="added",
        baseline=True,
        kl_placement="reward",
        metrics=baseline_metrics,
        method="ReMax",
        paper="remax",
    ),
    "reinforce_plus_plus": Estimator(
        reinforce_plus_plus,
        per_token=True,
        steps="added",
        kl_placement="reward",
        std=lambda batch, **options: rewards_to_go(batch, **options).std,
        within=token_rewards,
        across="reinforce_plus_plus",
        method="REINFORCE++",
        paper="reinforce_plus_plus",
    ),
    "reinforce_plus_plus_baseline": Estimator(
        reinforce_plus_plus_baseline,
        per_token=True,
        siblings=True,
        steps="added",
        std=lambda batch, **options: above_the_group(batch, **options).std,
        within=centred_token_rewards,
        across="reinforce_plus_plus",
        method="REINFORCE++ with baseline",
        paper="reinforce_plus_plus",
    ),
    "process_group_relative": Estimator(
        process_group_relative,
        per_token=True,
        siblings=True,
        steps="needed",
        metrics=_share_of_steps,
        within=process_group_relative,
        method="GRPO with process rewards",
        paper="deepseekmath",
    ),
    "prime": Estimator(
        prime,
        per_token=True,
        siblings=True,
        steps="needed",
        std=lambda batch, **options: left_out_to_go(batch, **options).std,
        method="GRPO with implicit process rewards (PRIME)",
        paper="prime",
    ),
    "gae": Estimator(
        gae,
        per_token=True,
        steps="added",
        values=True,
        kl_placement="reward",
        std=advantage_std,
        metrics=value_metrics,
        method="PPO",
        paper="ppo",
    ),
}
