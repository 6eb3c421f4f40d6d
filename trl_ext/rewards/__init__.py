"""Reward functions: process-reward models, and the reward that a policy implies."""

from .process_reward_model import ProcessRewardModel as ProcessRewardModel
from .step_format import StepFormat as StepFormat
