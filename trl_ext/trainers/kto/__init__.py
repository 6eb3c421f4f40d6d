"""KTO with further losses of completions that are good or bad by themselves: names for TRL's own `loss_type`."""

from .config import KTOConfig as KTOConfig
from .trainer import KTOTrainer as KTOTrainer
