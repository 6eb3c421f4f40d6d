"""The options of our KTO trainer, and what is refused before a model loads."""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.kto_config import KTOConfig as _KTOConfig

from ...functional.preference import UNPAIRED_LOSSES
from ..callbacks import LOG_STYLE_HELP, check_log
from ..foreign import OnlyInOurTrainer, Options, options_set, warn_of_foreign_fields
from ..input_checks import is_number, quoted
from ..written import read_as_meant

TRL_LOSSES = ["kto", "apo_zero_unpaired"]
WITHOUT_KL = "apo_zero_unpaired"  # TRL's loss that needs no second forward pass for an estimate of a KL


@dataclass
class KTOConfig(OnlyInOurTrainer, _KTOConfig):
    r"""
    TRL's [`~trl.KTOConfig`] and the options below. With none of them set and one of TRL's names as `loss_type`,
    training is TRL's, bit for bit.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"kto"`):
            One of TRL's names, or an entry of `trl_ext.functional.preference.UNPAIRED_LOSSES`: `"bco"`.
        bco_momentum (`float`, *optional*):
            Momentum, at least 0 and below 1, of the moving averages from which BCO takes its reward shift; 0.9 if
            unset.
        callback_paths (`list[str]` or `str`, *optional*):
            Dotted paths of [`~transformers.TrainerCallback`] classes to add to the trainer, made without arguments.
            One with an attribute `trainer` is given the trainer.
        log_style (`str`, *optional*):
            What is printed of each log entry: `"line"`, the few numbers that tell whether the run learns, with all of
            them in `metrics.jsonl`; `"full"`, all of them, as transformers prints them. `None`: `"line"` with a
            command of `trl-ext`, `"full"` in Python.
    """

    loss_type: str = field(
        default="kto",
        metadata={"help": "Type of loss to use.", "choices": [*TRL_LOSSES, *UNPAIRED_LOSSES]},
    )
    bco_momentum: float | None = field(
        default=None,
        metadata={"help": "Momentum of the averages behind the reward shift of loss_type 'bco'. Default: 0.9."},
    )
    callback_paths: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted paths of TrainerCallback classes to add to the trainer."},
    )
    log_style: str | None = field(default=None, metadata={"help": LOG_STYLE_HELP})

    def __post_init__(self):
        warn_of_foreign_fields(self)
        read_as_meant(self)
        super().__post_init__()
        options = Options(self)
        check_log(options)
        check_loss(options)

    def options_for_our_trainer(self) -> dict[str, Any]:
        """Our fields that are set, and `loss_type` where it is a name of ours."""
        names = {"loss_type": self.loss_type} if self.loss_type in UNPAIRED_LOSSES else {}
        return names | options_set(self)


def check_loss(options: Any) -> None:
    """Refuses a loss that does not exist, and options that it does not read."""
    name, momentum = options.loss_type, options.bco_momentum
    if name not in UNPAIRED_LOSSES:
        if name not in TRL_LOSSES:
            raise ValueError(f"loss_type must be one of {quoted([*TRL_LOSSES, *UNPAIRED_LOSSES])}, got {name!r}.")
        if momentum is not None:
            raise ValueError(
                f"bco_momentum is read only with loss_type {quoted(UNPAIRED_LOSSES)}; set that too, or remove it."
            )
        return
    if momentum is not None and not (is_number(momentum) and 0.0 <= momentum < 1.0):
        raise ValueError(f"bco_momentum must be a number of at least 0 and below 1, got {momentum!r}.")
    for weight in ("desirable_weight", "undesirable_weight"):
        value = getattr(options, weight)
        if not is_number(value) or value < 0.0:
            raise ValueError(f"{weight} must be a finite number of at least 0, got {value!r}.")
    if not options.beta > 0.0:
        raise ValueError(f"beta must be positive, got {options.beta}.")
