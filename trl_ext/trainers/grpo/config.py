"""The options of our GRPO trainer, each `None` (TRL's own code) by default."""

from dataclasses import dataclass, field

from trl.trainer.grpo_config import GRPOConfig as _GRPOConfig

from ..callbacks import check_log
from ..foreign import OnlyInOurTrainer, Options, warn_of_foreign_fields
from ..reference_checks import check_reference
from ..shared_options import SharedOptions
from ..written import read_as_meant
from .checks import check_advantages, check_num_generations, check_steps, check_texts, kl_choice
from .implicit_prm import check_implicit_prm
from .kl_checks import check_kl
from .packed_steps import check_packed_steps
from .policy_kl import check_policy_kl


class _AcceptedAsOne(int):
    """A 1 that TRL's check `num_generations < 2` lets through."""

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class GRPOConfig(OnlyInOurTrainer, SharedOptions, _GRPOConfig):
    r"""
    TRL's [`~trl.GRPOConfig`] and the options below. With none of them set, training is TRL's, bit for bit.

    Parameters:
        advantage_estimator (`str`, *optional*):
            How rewards become advantages: an entry of `trl_ext.functional.advantages.ADVANTAGE_ESTIMATORS`, such as
            `"reinforce_plus_plus"`, or a dotted path to a function of a
            [`~trl_ext.functional.rewards.RewardBatch`]. `None`: TRL's own.
        advantage_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments of the estimator, such as `{"weighting": "sequence"}`.
        reward_clip_range (`list[float]`, *optional*):
            Two numbers, lowest and highest: range to which the weighted sum of the rewards of a completion is clipped
            before `advantage_estimator` sees it.
        kl_estimator (`str`, *optional*):
            Estimator of KL(policy‖reference) per token: `"k1"`, `"k2"`, `"k3"`, `"exact"` (over the whole vocabulary),
            or a dotted path to a function of `(per_token_logps, ref_per_token_logps)`. `None`: TRL's own, or, with
            `kl_placement`, the one that is right there: `"k3"` in the loss, `"k1"` in the reward, `"exact"` for the
            sequence.
        kl_placement (`str`, *optional*):
            `"loss"`: `beta` · KL is added to the loss of every token, with TRL's `use_bias_correction_kl`. `"reward"`:
            it is subtracted from the reward of every token before the advantages. `"sequence"`: as `"loss"`, and each
            token also pays for the KL of later ones, so that the gradient is that of the KL of whole completions.
            `None`: the loss if `kl_estimator` is set, else TRL's own.
        kl_target (`float`, *optional*):
            KL in nats at which an adaptive `beta` is kept. `None`: `beta` is constant.
        kl_horizon (`float`, *optional*):
            Completions over which the adaptive `beta` changes by at most a factor of about e^±0.2; 10,000 if unset.
        kl_target_unit (`str`, *optional*):
            Unit of `kl_target`: `"token"` (if unset), mean per trainable token, or `"sequence"`, mean of the
            completions' sums.
        policy_kl_stop (`float`, *optional*):
            KL(old‖new) in nats per token, measured in each optimizer step of a generation batch, above which that step
            and the rest of the batch's are skipped: a trust region for rollouts that are reused. `None`: no bound.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text that ends a step. With `advantage_estimator`, reward functions that have `completion_steps` or
            `completion_step_ends` among their parameters are given the steps, or the index of the last token of each.
        step_ends_function (`str`, *optional*):
            Dotted path of a function of `(token_ids, tokenizer)` that returns the indices of the last token of each
            step, used instead of `step_separator`.
        process_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages from step rewards, for estimators that take it.
        outcome_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages from rewards of whole completions there. Both are normalised separately.
        process_reward_model (`str` or `dict[str, Any]`, *optional*):
            Options of [`~trl_ext.rewards.ProcessRewardModel`], to be added to the reward functions.
        implicit_prm (`str` or `dict[str, Any]`, *optional*):
            Options of an implicit process-reward model, trained on the outcomes while the policy is, which rewards
            every token: [`~trl_ext.trainers.grpo.implicit_prm.ImplicitPRMOptions`]. `{}` switches it on as it is.
        callback_paths (`list[str]` or `str`, *optional*):
            Dotted paths of [`~transformers.TrainerCallback`] classes to add to the trainer, made without arguments.
            One with an attribute `trainer` is given the trainer.
        log_style (`str`, *optional*):
            What is printed of each log entry: `"line"`, the few numbers that tell whether the run learns, with all of
            them in `metrics.jsonl`; `"full"`, all of them, as transformers prints them. `None`: `"line"` with a
            command of `trl-ext`, `"full"` in Python.
        shared_prefix (`bool`, *optional*):
            Whether the prompt of each group is computed once and padding not at all, with the same losses and
            gradients. See docs/performance.md for what it gains and when it falls back to TRL's forward.
        skip_zero_advantages (`bool`, *optional*):
            With `shared_prefix`, whether rows whose advantage is 0 are left out of the loss's forward pass; the update
            is the same.
        ref_refresh_steps (`int`, *optional*):
            Optimizer steps after which the reference becomes the policy, at the start of the next generation batch.
            See docs/methods/reference.md.
        ref_refresh_kl (`float`, *optional*):
            The same where the logged `kl`, in nats per token, averaged since the last generation batch began, is above
            this. With both, either suffices.
        ref_refresh_alpha (`float`, *optional*):
            The new reference is (1 - alpha) times the old one plus alpha times the policy; 1 if unset. Below 1 only
            without an adapter.
        ref_refresh_optimizer (`bool`, *optional*):
            Whether a refresh also empties the policy's optimizer, as ProRL does. Schedule and step count go on.
        ref_total_kl (`bool`, *optional*):
            Whether the KL to the *first* policy is logged as `ref/total_kl`, once per log interval. `None`: with an
            adapter. Without one it keeps a copy of the model in main memory.
    """

    _VALID_DICT_FIELDS = [*_GRPOConfig._VALID_DICT_FIELDS, "advantage_kwargs", "process_reward_model", "implicit_prm"]

    policy_kl_stop: float | None = field(
        default=None,
        metadata={
            "help": "KL(old||new) in nats per token above which the rest of the updates of a generation batch is "
            "skipped. Default: no bound."
        },
    )
    implicit_prm: dict | str | None = field(
        default=None,
        metadata={
            "help": "Reward every token by an implicit process-reward model that is trained on the outcomes, such as "
            '\'{"beta": 0.05, "learning_rate": 1e-4}\'.'
        },
    )
    shared_prefix: bool | None = field(
        default=None,
        metadata={"help": "Compute the prompt of each group once and no padding. Default: TRL's own forward."},
    )
    skip_zero_advantages: bool | None = field(
        default=None,
        metadata={"help": "With shared_prefix, leave out rows whose advantage is 0; the update is the same."},
    )
    ref_refresh_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps after which the reference becomes the policy. Default: never."},
    )
    ref_refresh_kl: float | None = field(
        default=None,
        metadata={"help": "KL in nats per token above which the reference becomes the policy. Default: never."},
    )
    ref_refresh_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the policy in the new reference, below 1 only without an adapter. Default: 1."},
    )
    ref_refresh_optimizer: bool | None = field(
        default=None,
        metadata={"help": "Empty the optimizer's state too when the reference is refreshed."},
    )
    ref_total_kl: bool | None = field(
        default=None,
        metadata={
            "help": "Log the KL to the first policy when the reference is refreshed. Default: with an adapter only."
        },
    )

    def __post_init__(self):
        warn_of_foreign_fields(self)
        read_as_meant(self)
        options = Options(self)
        check_texts(options)
        if self.num_generations == 1 and options.advantage_estimator is not None:
            check_num_generations(options)
            self.num_generations: int = _AcceptedAsOne(1)
        super().__post_init__()
        if isinstance(self.num_generations, _AcceptedAsOne):
            self.num_generations = 1
        check_advantages(options)
        check_kl(options)
        check_steps(options)
        check_implicit_prm(options)
        check_packed_steps(options, kl_in_loss=self.beta != 0.0 and kl_choice(options)[0] != "reward")
        check_policy_kl(options)
        check_reference(options)
        check_log(options)

    @property
    def _rollouts_reused(self) -> bool:
        """Whether a completion is trained on after the policy that sampled it has changed (TRL's own test)."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) != 0
