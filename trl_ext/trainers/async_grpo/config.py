"""The options of our asynchronous GRPO trainer, each off (TRL's own code) by default."""

from dataclasses import dataclass, field

from trl.experimental.async_grpo.async_grpo_config import AsyncGRPOConfig as _AsyncGRPOConfig

from ..callbacks import check_log
from ..foreign import OnlyInOurTrainer, Options, warn_of_foreign_fields
from ..grpo.checks import check_num_generations, check_steps, check_texts
from ..shared_options import SharedOptions
from ..written import read_as_meant
from .checks import check_advantages, check_kl, check_process_reward_model, check_reward_weights


@dataclass
class AsyncGRPOConfig(OnlyInOurTrainer, SharedOptions, _AsyncGRPOConfig):
    r"""
    TRL's [`~trl.experimental.async_grpo.AsyncGRPOConfig`] and the options below. With none of them set, training is
    TRL's, bit for bit. Those without another word are as in [`~trl_ext.GRPOConfig`].

    Parameters:
        advantage_estimator (`str`, *optional*):
            How rewards become advantages. Statistics over the batch are taken over the rows of one optimizer step of
            all processes. A function at a dotted path sees the completions of one prompt at a time. `None`: TRL's own,
            with the biased standard deviation.
        advantage_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments of the estimator.
        reward_weights (`list[float]`, *optional*):
            With `advantage_estimator`: a weight for each reward function, then for each environment with a reward.
            `None`: 1 for each.
        reward_clip_range (`list[float]`, *optional*):
            Range to which the weighted sum of the rewards of a completion is clipped.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL to the reference, the policy without its adapter: needs a `peft_config`. 0: no KL.
        kl_estimator (`str`, *optional*):
            `"k1"`, `"k2"`, `"k3"`, or a dotted path. `None`: `"k3"` in the loss, `"k1"` in the reward.
        kl_placement (`str`, *optional*):
            `"loss"` (if unset): `beta` · KL, weighted by the ratio to the sampler, is added to the loss of every
            token. `"reward"`: it is subtracted from the reward of every token, for estimators with statistics over the
            batch only.
        kl_target (`float`, *optional*):
            KL in nats at which an adaptive `beta` is kept.
        kl_horizon (`float`, *optional*):
            Training rows over which the adaptive `beta` changes by at most a factor of about e^±0.2.
        kl_target_unit (`str`, *optional*):
            `"token"` (if unset) or `"sequence"`.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text that ends a step.
        step_ends_function (`str`, *optional*):
            Dotted path of a function that finds the steps.
        process_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages from step rewards.
        outcome_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages from rewards of whole completions.
        process_reward_model (`str` or `dict[str, Any]`, *optional*):
            Options of [`~trl_ext.rewards.ProcessRewardModel`], with `device: cpu`: reward functions run in a process
            without accelerator.
        callback_paths (`list[str]` or `str`, *optional*):
            Dotted paths of [`~transformers.TrainerCallback`] classes.
        log_style (`str`, *optional*):
            `"line"` or `"full"`: what is printed of each log entry.
    """

    _VALID_DICT_FIELDS = [*_AsyncGRPOConfig._VALID_DICT_FIELDS, "advantage_kwargs", "process_reward_model"]
    _rollouts_reused = True  # every sample may be older than the policy

    kl_placement: str | None = field(
        default=None, metadata={"help": "Where the KL penalty acts: 'loss' (default) or 'reward'."}
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "With advantage_estimator, a weight for each reward function. Default: 1 for each."},
    )
    beta: float = field(
        default=0.0,
        metadata={"help": "Coefficient of the KL to the policy without its adapter. 0: no KL."},
    )

    def __post_init__(self):
        warn_of_foreign_fields(self)
        read_as_meant(self)
        options = Options(self)
        check_texts(options)
        if self.num_generations == 1 and options.advantage_estimator is not None:
            check_num_generations(options)
        super().__post_init__()
        check_advantages(options)
        check_reward_weights(options)
        check_kl(options)
        check_steps(options)
        check_process_reward_model(options)
        check_log(options)
