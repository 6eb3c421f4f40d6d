"""
Which models a packed row is exact for: found out from the first packed forward, never by catching an error.

A model qualifies if every layer attends through our function, with nothing that it does not honour, and carries
nothing from token to token otherwise; then two rows are compared with TRL's forward, for architectures that no rule
knows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .attention import UNSUPPORTED
from .packing import Layout

LARGEST_DIFFERENCE = {"full": 1e-4, "half": 0.1}  # nats per token on average, by precision


def unfit(model: Any, layout: Layout) -> str | None:
    """
    Why a model's attention cannot be that of a packed row, as the end of a sentence; `None`: it can.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that has just run on a packed row.
        layout ([`~trl_ext.packed.packing.Layout`]):
            Layout of that row, with the arguments of the attention function.
    """
    calls, layers = layout.calls or [], model.config.get_text_config().num_hidden_layers
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False) or getattr(config, "attention_chunk_size", None):
        return "its attention depends on the place of a token in the row that it is given"
    if getattr(model, "_is_stateful", False) or any(isinstance(m, torch.nn.Conv1d) for m in model.modules()):
        return "it has layers that carry a state from token to token"
    if len(calls) != layers:
        return f"{len(calls)} of its {layers} layers use the attention interface of transformers"
    unsupported = {name for call in calls for name in UNSUPPORTED if call.get(name) is not None}
    unsupported |= {"attention dropout"} if any(call["dropout"] > 0 for call in calls) else set()
    unsupported |= {"attention that is not causal"} if not all(call["is_causal"] for call in calls) else set()
    return f"its attention uses {', '.join(sorted(unsupported))}" if unsupported else None


def smallest_window(layout: Layout) -> int | None:
    """The shortest sliding window of a model's layers, in tokens."""
    return min((call["sliding_window"] for call in layout.calls or [] if call.get("sliding_window")), default=None)


def rotary_limit(model: Any) -> int | None:
    """
    Tokens of a padded row from which on the rotary embeddings of all its tokens depend on its length; `None`: never.
    """
    config = model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in found.values() if found and all(isinstance(x, dict) for x in found.values()) else [found]:
        kind = one.get("rope_type", one.get("type", "default"))
        if "dynamic" in kind or kind == "longrope":
            trained_on = one.get("original_max_position_embeddings")
            return trained_on or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    return None


def different(model: Any, ours: torch.Tensor, theirs: torch.Tensor, scored: int) -> str | None:
    """Why the log-probs of the same rows, of ours and of TRL's forward, are too far from each other; `None`: equal."""
    half = torch.is_autocast_enabled(ours.device.type) or model.dtype in (torch.float16, torch.bfloat16)
    mean = ((ours - theirs.to(ours.device)).abs().sum() / max(1, scored)).item()
    if mean <= LARGEST_DIFFERENCE["half" if half else "full"]:  # not so for NaN
        return None
    return f"its log-probs differ from those of the padded rows by {mean:.1e} nats per token"


def has_dropout(model: Any) -> bool:
    """Whether a model drops anything while it trains: two passes over the same rows differ then."""
    values = vars(model.config.get_text_config()).items()
    in_config = any(value for name, value in values if "drop" in name and isinstance(value, int | float))
    return in_config or any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout and without gradient; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
