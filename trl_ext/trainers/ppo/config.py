"""The options of our PPO trainer, and what is refused before a model loads."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..foreign import Options
from ..grpo.config import GRPOConfig
from ..input_checks import is_number

# Optimisers that read the model, or take no parameter groups, or have to be told whether training goes on.
_NOT_FOR_THE_CRITIC = ("galore", "apollo", "lomo", "schedule_free", "adamw_torch_4bit", "adamw_torch_8bit")


def _check_numbers(options: Any) -> None:
    """Refuses numbers out of range."""
    inside = {"lam": (0.0, 1.0), "critic_lam": (0.0, 1.0), "missing_eos_penalty": (0.0, math.inf)}
    for name, (low, high) in inside.items():
        value = getattr(options, name)
        if (value is not None or name == "lam") and not (is_number(value) and low <= value <= high):
            allowed = "a number in [0, 1]" if high == 1.0 else "a finite number >= 0"
            raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    if not (is_number(options.gamma) and 0.0 < options.gamma <= 1.0):
        raise ValueError(f"gamma must be a number in (0, 1], got {options.gamma!r}.")
    for name in ("cliprange_value", "critic_learning_rate"):
        value = getattr(options, name)
        if value is not None and not (is_number(value) and value > 0.0):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
    steps = options.critic_warmup_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"critic_warmup_steps must be a whole number >= 0, got {steps!r}.")


def check_ppo(options: Any) -> None:
    """Refuses options that PPO cannot honour. `options` is a [`PPOConfig`] seen through `Options`."""
    if options.advantage_estimator != "gae":
        raise ValueError(
            "PPOTrainer estimates advantages with its critic: advantage_estimator must be 'gae', got "
            f"{options.advantage_estimator!r}. Use GRPOTrainer for the others."
        )
    if options.advantage_kwargs:
        raise ValueError("advantage_kwargs is not read by 'gae'; set gamma, lam and whiten_advantages.")
    _check_numbers(options)
    if options.bootstrap_truncated and options.mask_truncated_completions:
        raise ValueError(
            "bootstrap_truncated trains on cut-off completions, mask_truncated_completions drops them. Use one of the "
            "two."
        )
    if options.fp16:
        raise ValueError("The critic has no gradient scaler; use bf16=True or full precision.")
    if any(name in str(options.optim) for name in _NOT_FOR_THE_CRITIC):
        raise ValueError(
            f"optim={getattr(options.optim, 'value', options.optim)!r} cannot be used for the critic; use a plain "
            "optimiser such as 'adamw_torch' or 'paged_adamw_8bit'."
        )


@dataclass
class PPOConfig(GRPOConfig):
    r"""
    Our [`~trl_ext.GRPOConfig`] with other defaults, and the options of the critic.

    Parameters:
        advantage_estimator (`str`, *optional*, defaults to `"gae"`):
            The only value: generalised advantages of the critic's values.
        kl_placement (`str`, *optional*, defaults to `"reward"`):
            As in `GRPOConfig`; with `beta=0.0` it is `None`.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt; nothing compares them.
        beta (`float`, *optional*, defaults to `0.05`):
            Coefficient of the KL.
        num_iterations (`int`, *optional*, defaults to `4`):
            Passes over a generation batch. With 1 every ratio is 1 and neither clip acts.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            With dropout a value differs from the one that the completion was scored with before anything is learnt.
        value_model (`str`, *optional*):
            Path or hub id of the critic: a reward model with one label, or a language model with the policy's
            vocabulary. `None`: with PEFT a second adapter on the policy's base model, else a copy of the policy.
        critic_learning_rate (`float`, *optional*):
            Learning rate of the critic. `None`: 10 · `learning_rate`.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps in which only the critic learns.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per trainable token, in (0, 1].
        lam (`float`, *optional*, defaults to `0.95`):
            λ of the advantages, in [0, 1]: 1 is unbiased, 0 of the least variance.
        critic_lam (`float`, *optional*):
            λ of what the critic learns. `None`: `lam`. 1.0 for long completions.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            How far a value may move towards its target in a generation batch, in the unit of the reward. `None`: any.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Divide the centred advantages by their standard deviation over the generation batch of all processes.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Divide the token rewards by their standard deviation. Not recommended: most of them are 0.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the reward of completions that were cut off.
        bootstrap_truncated (`bool`, *optional*, defaults to `False`):
            A completion that was cut off is worth what the critic expects of its continuation, not 0.
    """

    _makes_critic = True

    advantage_estimator: str | None = field(
        default="gae", metadata={"help": "How rewards become advantages: 'gae', with the critic's values."}
    )
    kl_placement: str | None = field(
        default="reward",
        metadata={"help": "Where the KL penalty acts: 'reward', 'loss' or 'sequence'. With beta 0 nowhere."},
    )
    num_generations: int = field(default=1, metadata={"help": "Completions per prompt; nothing compares them."})
    beta: float = field(default=0.05, metadata={"help": "Coefficient of the KL."})
    num_iterations: int = field(default=4, metadata={"help": "Passes over a generation batch."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train and score without dropout."})
    value_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or hub id of the critic. Default: with PEFT a second adapter on the policy's base model, "
            "else a copy of the policy."
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic. Default: 10 times learning_rate."}
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps in which only the critic learns."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per trainable token, in (0, 1]."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the advantages, in [0, 1]."})
    critic_lam: float | None = field(
        default=None, metadata={"help": "Lambda of what the critic learns. Default: lam."}
    )
    cliprange_value: float | None = field(
        default=0.2,
        metadata={"help": "How far a value may move per generation batch, in the unit of the reward; null: freely."},
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Normalise the advantages over the generation batch of all processes."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Divide token rewards by their standard deviation."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the reward of completions that were cut off."}
    )
    bootstrap_truncated: bool = field(
        default=False,
        metadata={"help": "Value a completion that was cut off by what the critic expects of its continuation."},
    )

    def __post_init__(self):
        options = Options(self)
        check_ppo(options)
        if self.beta == 0.0 and self.kl_placement == "reward" and options.kl_estimator is None:
            self.kl_placement = None
        super().__post_init__()

    def options_for_our_trainer(self):
        return {"advantage_estimator": "gae", **super().options_for_our_trainer()}
