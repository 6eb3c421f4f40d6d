"""GRPO on TRL's asynchronous engine with selectable advantages, step rewards and a KL to a reference."""

from .trainer import AsyncGRPOConfig as AsyncGRPOConfig
from .trainer import AsyncGRPOTrainer as AsyncGRPOTrainer
