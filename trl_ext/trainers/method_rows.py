"""Names in the model card and papers, until they stand in the rows of the tables themselves; then this file goes."""

from typing import Any, NamedTuple

from ..functional.preference import MARGIN_LOSSES


class MethodRow(NamedTuple):
    """What a model card says about an entry of a table."""

    method: str
    paper: str  # key of trl_ext.papers.PAPERS


METHODS = {
    "group_mean": MethodRow("GRPO with mean-only advantages (Dr. GRPO)", "dr_grpo"),
    "leave_one_out": MethodRow("GRPO with leave-one-out advantages (RLOO)", "rloo"),
    "length_weighted": MethodRow("GRPO with a length-weighted baseline (OPO)", "opo"),
    "reinforce": MethodRow("REINFORCE", "reinforce"),
    "reinforce_plus_plus": MethodRow("REINFORCE++", "reinforce_plus_plus"),
    "reinforce_plus_plus_baseline": MethodRow("REINFORCE++ with baseline", "reinforce_plus_plus"),
    "process_group_relative": MethodRow("GRPO with process rewards", "deepseekmath"),
    "psipo": MethodRow("ΨPO", "psipo"),
    "psipo_logit": MethodRow("ΨPO", "psipo"),
    "psipo_identity": MethodRow("IPO", "psipo"),
    **{f"gpo_{name}": MethodRow("GPO", "gpo") for name in MARGIN_LOSSES},
    **{name: MethodRow("RPO", "rpo") for name in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")},
    "odpo": MethodRow("ODPO", "odpo"),
    "dpop": MethodRow("DPO-Positive", "dpop"),
    "length_dpo": MethodRow("R-DPO", "length_dpo"),
    "simpo": MethodRow("SimPO", "simpo"),
    "sppo": MethodRow("SPPO", "sppo"),
    "chipo": MethodRow("χPO", "chipo"),
    "cal_dpo": MethodRow("Cal-DPO", "cal_dpo"),
    "beta_dpo": MethodRow("β-DPO", "beta_dpo"),
    "margin_dpo": MethodRow("", ""),
}


def rows_of(value: Any) -> list[MethodRow]:
    """The rows of the names in an option: itself, or those of a list."""
    entries = value if isinstance(value, list) else [value]
    return [METHODS[entry] for entry in entries if isinstance(entry, str) and entry in METHODS]
