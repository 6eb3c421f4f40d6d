"""Training of process-reward models, which [`~trl_ext.rewards.ProcessRewardModel`] then reads."""

from .config import PRMConfig as PRMConfig
from .trainer import PRMTrainer as PRMTrainer
