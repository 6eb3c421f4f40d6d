"""GRPO with selectable advantages and KL: options of TRL's own config, each `None` (TRL's own code) by default."""

from .trainer import GRPOConfig as GRPOConfig
from .trainer import GRPOTrainer as GRPOTrainer
