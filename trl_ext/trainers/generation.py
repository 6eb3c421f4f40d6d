"""Generating exactly as asked: a model's own `generation_config` fills what a call leaves open."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig


@contextmanager
def bare_generation_config(model: torch.nn.Module) -> Iterator[None]:
    """
    `model` with an empty `generation_config`; afterwards with its own again.

    `generate` takes from the model's own whatever the config of the call does not set: repetition penalty, beams,
    least length, stop strings, number of sequences. Samples would then not come from the policy's distribution.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            Model to generate with. PEFT hands the config of the outer model to the inner one, so both are set.
    """
    holders = [part for part in model.modules() if "generation_config" in vars(part)]
    before = [part.generation_config for part in holders]
    for part in holders:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, config in zip(holders, before, strict=True):
            part.generation_config = config
