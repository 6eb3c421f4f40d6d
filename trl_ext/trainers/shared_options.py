"""The options that our GRPO trainers share, each `None` (TRL's own code) by default."""

from dataclasses import dataclass, field

from ..functional.advantages import ADVANTAGE_ESTIMATORS
from ..functional.kl import KL_ESTIMATORS
from .callbacks import LOG_STYLE_HELP
from .input_checks import quoted


@dataclass(repr=False, eq=False)
class SharedOptions:
    """
    Stands before TRL's config among the bases of ours, so that these fields follow TRL's. The class that a user makes
    describes them.
    """

    advantage_estimator: str | None = field(
        default=None,
        metadata={
            "help": f"How rewards become advantages: {quoted(ADVANTAGE_ESTIMATORS)}, or a dotted path. Default: TRL's "
            "own."
        },
    )
    advantage_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Keyword arguments of the advantage estimator, such as \'{"weighting": "sequence"}\'.'},
    )
    reward_clip_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest value to which the weighted sum of a completion's rewards is clipped before "
            "the advantage estimator sees it."
        },
    )
    kl_estimator: str | None = field(
        default=None,
        metadata={
            "help": f"Estimator of KL(policy||reference) per token: {quoted([*KL_ESTIMATORS, 'exact'])}, or a dotted "
            "path. Default: TRL's own."
        },
    )
    kl_placement: str | None = field(
        default=None,
        metadata={
            "help": "Where the KL penalty acts: 'loss', 'reward', or 'sequence' (the KL of whole completions, in the "
            "loss). Default: TRL's own, in the loss."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL in nats at which an adaptive beta is kept. Default: beta is constant."},
    )
    kl_horizon: float | None = field(
        default=None,
        metadata={
            "help": "Completions over which the adaptive beta changes by at most about a fifth. Default: 10000."
        },
    )
    kl_target_unit: str | None = field(
        default=None,
        metadata={"help": "Unit of kl_target: 'token' (default) or 'sequence'."},
    )
    step_separator: str = field(
        default="\n",
        metadata={
            "help": "Text that ends a step of a completion, for rewards of steps. Default: %(default)r, a line break."
        },
    )
    step_ends_function: str | None = field(
        default=None,
        metadata={"help": "Dotted path of a function that finds the last token of each step, instead of a separator."},
    )
    process_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the advantages from step rewards, for estimators that take it."},
    )
    outcome_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the advantages from outcome rewards, for estimators that take it."},
    )
    process_reward_model: dict | str | None = field(
        default=None,
        metadata={
            "help": "A process-reward model to add to the reward functions, such as "
            '\'{"model": "Qwen/Qwen2.5-Math-PRM-7B", "kind": "marker"}\'.'
        },
    )
    callback_paths: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted paths of TrainerCallback classes to add to the trainer."},
    )
    log_style: str | None = field(default=None, metadata={"help": LOG_STYLE_HELP})
