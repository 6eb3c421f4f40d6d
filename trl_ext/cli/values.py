"""What options of ours may be: names of our tables and texts that are checked, for the schema and docs/options.md."""

from collections.abc import Mapping

from ..functional.advantages import ADVANTAGE_ESTIMATORS
from ..functional.kl import KL_ESTIMATORS
from ..functional.preference import PREFERENCE_LOSSES, PSIS
from ..functional.step_labels import STEP_LABELS
from ..functional.step_objectives import STEP_OBJECTIVES
from ..labels.config import BACKENDS, SEARCHES
from ..rewards.step_format import SEPARATORS
from ..trainers.callbacks import LOG_STYLES
from ..trainers.dpo.losses import TRL_LOSSES
from ..trainers.grpo.checks import DEFAULT_ESTIMATOR

GRPO_LOSSES = ["bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"]  # TRL's

# Names of a table, to which dotted paths are added.
NAMES: Mapping[tuple[str, str], list[str]] = {
    ("grpo", "advantage_estimator"): [name for name, row in ADVANTAGE_ESTIMATORS.items() if not row.values],
    ("grpo", "kl_estimator"): [*KL_ESTIMATORS, "exact"],
    ("ppo", "kl_estimator"): [*KL_ESTIMATORS, "exact"],
    ("dpo", "loss_type"): [*TRL_LOSSES, *PREFERENCE_LOSSES],
    ("dpo", "psi"): [*PSIS],
}
# All there are.
CHOICES: Mapping[tuple[str, str], list[str]] = {
    ("ppo", "advantage_estimator"): [name for name, row in ADVANTAGE_ESTIMATORS.items() if row.values],
    **{(command, "kl_placement"): [*DEFAULT_ESTIMATOR] for command in ("grpo", "ppo")},
    **{(command, "kl_target_unit"): ["token", "sequence"] for command in ("grpo", "ppo")},
    **{(command, "loss_type"): GRPO_LOSSES for command in ("grpo", "ppo")},
    ("dpo", "logp_reduction"): ["sum", "mean"],
    **{(command, "log_style"): [*LOG_STYLES] for command in ("grpo", "ppo", "dpo", "kto", "prm")},
    ("prm", "kind"): [*SEPARATORS],
    ("prm", "objective"): [*STEP_OBJECTIVES],
    ("label-steps", "estimate"): [*STEP_LABELS],
    ("label-steps", "search"): [*SEARCHES],
    **{(command, "backend"): [*BACKENDS] for command in ("sampling", "label-steps", "rejection-sampling")},
}
