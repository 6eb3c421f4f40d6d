"""
The mathematics: functions of tensors that know torch and nothing else.

Tables: `ADVANTAGE_ESTIMATORS`, `KL_ESTIMATORS`, `PREFERENCE_LOSSES`, `STEP_LABELS`, `STEP_OBJECTIVES`. Everything
public can be imported from here.
"""

from . import preference
from .advantages import (
    ADVANTAGE_ESTIMATORS,
    Estimator,
    group_mean,
    group_relative,
    leave_one_out,
    length_weighted,
    process_group_relative,
)
from .attempts import best_of_group, gpg, pass_at_k
from .halves import centred_token_rewards, token_rewards
from .kl import KL_ESTIMATORS, k1, k2, k3, kl_in_loss, kl_of_completions, later_kl, next_beta
from .preference import *  # noqa: F403
from .process_rewards import implicit_reward_loss, step_advantages
from .reductions import SATURATION, aggregated, is_constant, reward_to_go, weighted_mean, weighted_std, whiten
from .rewards import RewardBatch, reward_at_end, reward_at_steps
from .selection import accepted, aggregate, best_of_n, estimated_pass_at_k, majority_vote, weighted_vote
from .step_labels import STEP_LABELS, first_error, hard_label, rollouts_for, search_together, soft_label
from .step_objectives import (
    STEP_OBJECTIVES,
    StepObjective,
    classification_metrics,
    classification_sums,
    regression_metrics,
    regression_sums,
    squared_error,
    step_cross_entropy,
)
from .token_advantages import (
    prime,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
)
from .values import clipped_value_loss, explained_variance, gae, lambda_advantages, lambda_returns

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "Estimator",
    "KL_ESTIMATORS",
    "RewardBatch",
    "SATURATION",
    "STEP_LABELS",
    "STEP_OBJECTIVES",
    "StepObjective",
    "accepted",
    "aggregate",
    "aggregated",
    "best_of_group",
    "best_of_n",
    "centred_token_rewards",
    "classification_metrics",
    "classification_sums",
    "clipped_value_loss",
    "estimated_pass_at_k",
    "explained_variance",
    "first_error",
    "gae",
    "gpg",
    "group_mean",
    "group_relative",
    "hard_label",
    "implicit_reward_loss",
    "is_constant",
    "k1",
    "k2",
    "k3",
    "kl_in_loss",
    "kl_of_completions",
    "lambda_advantages",
    "lambda_returns",
    "later_kl",
    "leave_one_out",
    "length_weighted",
    "majority_vote",
    "next_beta",
    "pass_at_k",
    "prime",
    "process_group_relative",
    "regression_metrics",
    "regression_sums",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "reward_at_end",
    "reward_at_steps",
    "reward_to_go",
    "rollouts_for",
    "search_together",
    "soft_label",
    "squared_error",
    "step_advantages",
    "step_cross_entropy",
    "token_rewards",
    "weighted_mean",
    "weighted_std",
    "weighted_vote",
    "whiten",
    *preference.__all__,
]
