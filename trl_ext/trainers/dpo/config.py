"""The options of our DPO trainer, and what is refused before a model loads."""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.dpo_config import DPOConfig as _DPOConfig

from ...functional.preference import PREFERENCE_LOSSES, PSIS
from ..callbacks import LOG_STYLE_HELP, check_log
from ..foreign import OnlyInOurTrainer, Options, option, options_set, warn_of_foreign_fields
from ..reference_checks import check_reference
from ..shared_prefix import check_shared_prefix
from ..written import read_as_meant
from .losses import TRL_LOSSES, parse_losses
from .refusals import check_columns, check_loss_kwargs, check_losses

_PSIS = ", ".join(f"'{name}'" for name in PSIS)


@dataclass
class DPOConfig(OnlyInOurTrainer, _DPOConfig):
    r"""
    TRL's [`~trl.DPOConfig`] and the options below. With none of them set and only TRL's names in `loss_type`, training
    is TRL's, bit for bit.

    Parameters:
        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            TRL's names, entries of `trl_ext.functional.preference.PREFERENCE_LOSSES`, or dotted paths to functions of
            a [`~trl_ext.functional.preference.PairBatch`]; mixed at will, and weighted with `loss_weights`.
        psi (`str`, *optional*):
            \\(\Psi\\) of `loss_type="psipo"`: `"identity"` (IPO), `"logit"`, or a dotted path to a non-decreasing
            function of a probability.
        logp_reduction (`str`, *optional*):
            `"sum"` or `"mean"` over the scored tokens of a completion. `None`: the objective's own, a sum, but the
            mean for `simpo`; TRL's names keep TRL's.
        preference_prob_column (`str`, *optional*):
            Column of the probability, in [0, 1], that the chosen completion is preferred. `None`: `1 -
            label_smoothing`.
        chosen_reward_column, rejected_reward_column (`str`, *optional*):
            Columns of the scores of the two completions, for the reward-aware losses.
        reward_margin_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the difference of the two scores, chosen minus rejected.
        pair_weight_column (`str`, *optional*):
            Column of non-negative weights of the pairs. The loss is the mean over the pairs of weight times loss.
        loss_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments per entry of `loss_type`, such as `{"psipo_logit": {"eps": 0.01}}`.
        callback_paths (`str` or `list[str]`, *optional*):
            Dotted paths of [`~transformers.TrainerCallback`] classes to add to the trainer, made without arguments.
            One with an attribute `trainer`, such as `trl_ext.trainers.dpo.samples.PolicySamples`, is given the
            trainer.
        log_style (`str`, *optional*):
            What is printed of each log entry: `"line"`, the few numbers that tell whether the run learns, with all of
            them in `metrics.jsonl`; `"full"`, all of them, as transformers prints them. `None`: `"line"` with a
            command of `trl-ext`, `"full"` in Python.
        shared_prefix (`bool`, *optional*):
            Whether the prompt of each pair is computed once and padding not at all, with the same losses and
            gradients. See docs/performance.md for what it gains and when it falls back to TRL's forward.
        ref_refresh_steps (`int`, *optional*):
            Optimizer steps after which the reference becomes the policy, at the start of the next one. See
            docs/methods/reference.md.
        ref_refresh_kl (`float`, *optional*):
            Of `GRPOConfig`, and refused here: the log-ratios of pairs are no KL.
        ref_refresh_alpha (`float`, *optional*):
            The new reference is (1 - alpha) times the old one plus alpha times the policy; 1 if unset. Below 1 only
            without an adapter.
        ref_refresh_optimizer (`bool`, *optional*):
            Whether a refresh also empties the optimizer. Schedule and step count go on.
    """

    _VALID_DICT_FIELDS = [*_DPOConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    psi: str | None = field(
        default=None,
        metadata={"help": f"Psi of loss_type 'psipo': {_PSIS}, or a dotted path."},
    )
    logp_reduction: str | None = field(
        default=None,
        metadata={
            "help": "'sum' or 'mean' over the scored tokens of a completion. Default: the objective's own; TRL's "
            "names keep TRL's."
        },
    )
    preference_prob_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the probability that the chosen completion is preferred. Default: 1 - label_smoothing."
        },
    )
    chosen_reward_column: str | None = field(
        default=None,
        metadata={"help": "Column of the score of the chosen completion, for the reward-aware losses."},
    )
    rejected_reward_column: str | None = field(
        default=None,
        metadata={"help": "Column of the score of the rejected completion, for the reward-aware losses."},
    )
    reward_margin_scale: float = field(
        default=1.0,
        metadata={"help": "Factor on the difference of the scores of the chosen and the rejected completion."},
    )
    pair_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column of non-negative weights of the pairs."},
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Keyword arguments per entry of loss_type, such as \'{"psipo_logit": {"eps": 0.01}}\'. loss_type '
            f"takes, besides TRL's names and dotted paths: {', '.join(PREFERENCE_LOSSES)}."
        },
    )
    callback_paths: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted paths of TrainerCallback classes to add to the trainer."},
    )
    log_style: str | None = field(default=None, metadata={"help": LOG_STYLE_HELP})
    shared_prefix: bool | None = field(
        default=None,
        metadata={"help": "Compute the prompt of each pair once and no padding. Default: TRL's own forward."},
    )
    ref_refresh_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps after which the reference becomes the policy. Default: never."},
    )
    ref_refresh_kl: float | None = field(
        default=None,
        metadata={"help": "Of GRPO, and refused here: the log-ratios of pairs are no KL."},
    )
    ref_refresh_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the policy in the new reference, below 1 only without an adapter. Default: 1."},
    )
    ref_refresh_optimizer: bool | None = field(
        default=None,
        metadata={"help": "Empty the optimizer's state too when the reference is refreshed."},
    )

    def __post_init__(self):
        warn_of_foreign_fields(self)
        read_as_meant(self)
        super().__post_init__()
        check_log(Options(self))
        check_columns(self)
        if (reduction := option(self, "logp_reduction")) not in (None, "sum", "mean"):
            raise ValueError(f"logp_reduction must be 'sum' or 'mean', got {reduction!r}.")
        check_loss_kwargs(self)
        check_losses(self, parse_losses(self))
        check_shared_prefix(Options(self))
        check_reference(Options(self), pairs=True)

    def options_for_our_trainer(self) -> dict[str, Any]:
        """Our fields that are set, and `loss_type` where it holds names of ours."""
        names = {} if {*self.loss_type} <= {*TRL_LOSSES} else {"loss_type": self.loss_type}
        return names | options_set(self)
