"""PPO: our GRPO trainer with a critic beside the policy."""

from .config import PPOConfig as PPOConfig
from .trainer import PPOTrainer as PPOTrainer
