"""The options of our PRM trainer, and what is refused before a model loads."""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.reward_config import RewardConfig as _RewardConfig

from ...functional.step_objectives import STEP_OBJECTIVES
from ...rewards.step_format import SEPARATORS, StepFormat
from ..callbacks import LOG_STYLE_HELP, check_log
from ..foreign import OnlyInOurTrainer, Options, warn_of_foreign_fields
from ..written import read_as_meant

_KINDS = ", ".join(f"'{kind}'" for kind in SEPARATORS)
_OBJECTIVES = ", ".join(f"'{objective}'" for objective in STEP_OBJECTIVES)


def step_format(options: Any) -> StepFormat:
    """The format that the options select. `options` is a [`PRMConfig`] seen through `Options`."""
    names = ("kind", "good", "bad", "system_prompt", "objective")
    return StepFormat(separator=options.step_separator, **{name: getattr(options, name) for name in names})


def check_prm(options: Any) -> None:
    """Refuses options that PRM training cannot honour. `options` is a [`PRMConfig`] seen through `Options`."""
    objective = STEP_OBJECTIVES[step_format(options).objective]
    if options.center_rewards_coefficient is not None:
        raise ValueError(
            "center_rewards_coefficient belongs to pairs of answers and is not read by PRMTrainer. Remove it."
        )
    if options.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not read by PRMTrainer; write soft labels into the data.")
    if options.chat_template_path is not None and options.kind not in ("marker", "chat"):
        raise ValueError(
            f"chat_template_path is read by kind='marker' and 'chat', not by {options.kind!r}. Remove it."
        )
    length, threshold = options.max_length, options.label_threshold
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"max_length must be a positive whole number, or None, got {length!r}.")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.0 < threshold <= 1.0:
        raise ValueError(f"label_threshold must be a number above 0 and at most 1, got {threshold!r}.")
    if not objective.probability and options.skip_after_bad_step:
        raise ValueError("skip_after_bad_step tells good from bad, which objective='regression' does not. Remove it.")
    if not objective.probability and threshold != PRMConfig.label_threshold:
        raise ValueError(
            f"label_threshold tells good from bad, which objective={options.objective!r} does not. Remove it."
        )
    others = {name for row in STEP_OBJECTIVES.values() for name in row.metric_names} - {*objective.metric_names}
    best = options.metric_for_best_model
    if best is not None and best.removeprefix("eval_") in others:
        raise ValueError(
            f"metric_for_best_model={best!r} is not measured with objective={options.objective!r}, which has "
            f"{objective.metric_names}."
        )


@dataclass
class PRMConfig(OnlyInOurTrainer, _RewardConfig):
    r"""
    TRL's [`~trl.RewardConfig`] with other defaults, and the options of process-reward models.

    Parameters:
        kind (`str`, *optional*, defaults to `"token_classifier"`):
            What the model looks like, as in [`~trl_ext.rewards.ProcessRewardModel`]: `"token_classifier"`, `"marker"`,
            `"good_bad"` or `"chat"`.
        objective (`str`, *optional*, defaults to `"classification"`):
            `"classification"`: labels are probabilities that a step is good. `"regression"`: labels are any numbers,
            the model has one output and learns them by squared error; for `"token_classifier"` and `"marker"`.
        step_separator (`str`, *optional*):
            Text after each step. `None`: by kind, a line break, `"<extra_0>"`, `" ки\n"`.
        good, bad (`str`, *optional*):
            Answers of `"good_bad"` and `"chat"`. `None`: `"+"` and `"-"`.
        system_prompt (`str`, *optional*):
            System message before the prompt, for `"chat"`, and for `"marker"` with a chat template.
        train_on_last_step_only (`bool`, *optional*, defaults to `False`):
            Whether a row is trained on its last step alone. Evaluation keeps all labels.
        skip_after_bad_step (`bool`, *optional*, defaults to `False`):
            Whether training leaves out the steps whose predecessor is labelled bad. For labels from rollouts, which
            say whether a prefix can still end well: of a line behind the first error they say nothing. Evaluation
            keeps all labels.
        label_threshold (`float`, *optional*, defaults to `0.5`):
            Smallest soft label that counts as good, in metrics.
        callback_paths (`str` or `list[str]`, *optional*):
            Dotted paths of [`~transformers.TrainerCallback`] classes to add to the trainer, made without arguments.
            One with an attribute `trainer` is given the trainer.
        log_style (`str`, *optional*):
            What is printed of each log entry: `"line"`, the few numbers that tell whether the run learns, with all of
            them in `metrics.jsonl`; `"full"`, all of them, as transformers prints them. `None`: `"line"` with a
            command of `trl-ext`, `"full"` in Python.
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Initial learning rate of AdamW.
        max_length (`int`, *optional*, defaults to `1024`):
            Largest number of tokens of a row. Longer rows are cut, and the labels beyond are lost; TRL would leave the
            whole row out. `None`: no row is cut.
    """

    kind: str = field(default="token_classifier", metadata={"help": f"What the model looks like: {_KINDS}."})
    objective: str = field(
        default="classification", metadata={"help": f"What is learnt of each step's label: {_OBJECTIVES}."}
    )
    step_separator: str | None = field(default=None, metadata={"help": "Text after each step. Default: by kind."})
    good: str | None = field(
        default=None, metadata={"help": "Answer to a good step, of 'good_bad' and 'chat'. Default: '+'."}
    )
    bad: str | None = field(
        default=None, metadata={"help": "Answer to a bad step, of 'good_bad' and 'chat'. Default: '-'."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message before the prompt, for 'marker' and 'chat'."}
    )
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Train on the last step of each row alone; evaluation keeps all labels."}
    )
    skip_after_bad_step: bool = field(
        default=False,
        metadata={"help": "Leave the steps after a bad one out of training, for labels from rollouts."},
    )
    label_threshold: float = field(
        default=0.5, metadata={"help": "Smallest soft label that counts as good, in metrics."}
    )
    callback_paths: list[str] | None = field(
        default=None, metadata={"help": "Dotted paths of TrainerCallback classes to add to the trainer."}
    )
    log_style: str | None = field(default=None, metadata={"help": LOG_STYLE_HELP})
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Largest number of tokens of a row; longer ones are cut."}
    )

    def __post_init__(self):
        warn_of_foreign_fields(self)
        read_as_meant(self)
        check_prm(Options(self))
        check_log(Options(self))
        super().__post_init__()

    def options_for_our_trainer(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().options_for_our_trainer()}
