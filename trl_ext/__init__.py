"""
The missing pieces of TRL, as options of TRL's own trainers.

Importing this package loads neither torch nor TRL and changes nothing; each public name is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "AsyncGRPOConfig": "trl_ext.trainers.async_grpo",
    "AsyncGRPOTrainer": "trl_ext.trainers.async_grpo",
    "DPOConfig": "trl_ext.trainers.dpo",
    "DPOTrainer": "trl_ext.trainers.dpo",
    "GRPOConfig": "trl_ext.trainers.grpo",
    "GRPOTrainer": "trl_ext.trainers.grpo",
    "KTOConfig": "trl_ext.trainers.kto",
    "KTOTrainer": "trl_ext.trainers.kto",
    "PPOConfig": "trl_ext.trainers.ppo",
    "PPOTrainer": "trl_ext.trainers.ppo",
    "PRMConfig": "trl_ext.trainers.prm",
    "PRMTrainer": "trl_ext.trainers.prm",
    "ProcessRewardModel": "trl_ext.rewards",
    "register": "trl_ext.registration",
    "unregister": "trl_ext.registration",
}
__all__ = [
    "AsyncGRPOConfig",
    "AsyncGRPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "ProcessRewardModel",
    "__version__",
    "register",
    "unregister",
]

if TYPE_CHECKING:
    from .registration import register as register
    from .registration import unregister as unregister
    from .rewards import ProcessRewardModel as ProcessRewardModel
    from .trainers.async_grpo import AsyncGRPOConfig as AsyncGRPOConfig
    from .trainers.async_grpo import AsyncGRPOTrainer as AsyncGRPOTrainer
    from .trainers.dpo import DPOConfig as DPOConfig
    from .trainers.dpo import DPOTrainer as DPOTrainer
    from .trainers.grpo import GRPOConfig as GRPOConfig
    from .trainers.grpo import GRPOTrainer as GRPOTrainer
    from .trainers.kto import KTOConfig as KTOConfig
    from .trainers.kto import KTOTrainer as KTOTrainer
    from .trainers.ppo import PPOConfig as PPOConfig
    from .trainers.ppo import PPOTrainer as PPOTrainer
    from .trainers.prm import PRMConfig as PRMConfig
    from .trainers.prm import PRMTrainer as PRMTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
