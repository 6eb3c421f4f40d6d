"""DPO with selectable preference losses: entries of TRL's own `loss_type`, and options that are off by default."""

from .config import DPOConfig as DPOConfig
from .trainer import DPOTrainer as DPOTrainer
