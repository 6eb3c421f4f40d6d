"""
The mathematics: functions of tensors that know torch and nothing else.

Tables: `ADVANTAGE_ESTIMATORS`, `KL_ESTIMATORS`, `PREFERENCE_LOSSES`, `STEP_LABELS`. Everything public can be
imported from here.
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
from .kl import KL_ESTIMATORS, k1, k2, k3, kl_in_loss, kl_of_completions, later_kl, next_beta
from .preference import *  # noqa: F403
from .process_rewards import implicit_reward_loss, step_advantages
from .reductions import SATURATION, aggregated, is_constant, reward_to_go, weighted_mean, weighted_std, whiten
from .rewards import RewardBatch, reward_at_end, reward_at_steps
from .step_labels import STEP_LABELS, first_error, hard_label, rollouts_for, search_together, soft_label
from .token_advantages import (
    centred_token_rewards,
    prime,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    token_rewards,
)
from .values import clipped_value_loss, explained_variance, gae, lambda_advantages, lambda_returns

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "Estimator",
    "KL_ESTIMATORS",
    "RewardBatch",
    "SATURATION",
    "STEP_LABELS",
    "aggregated",
    "centred_token_rewards",
    "clipped_value_loss",
    "explained_variance",
    "first_error",
    "gae",
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
    "next_beta",
    "prime",
    "process_group_relative",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reward_at_end",
    "reward_at_steps",
    "reward_to_go",
    "rollouts_for",
    "search_together",
    "soft_label",
    "step_advantages",
    "token_rewards",
    "weighted_mean",
    "weighted_std",
    "whiten",
    *preference.__all__,
]
