"""Generating exactly as asked, and without a trace in the training that it interrupts."""

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


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """
    Evaluation mode and a seed; afterwards the mode of each module, and the random states of the CPU and of `device`,
    are as they were.

    Args:
        model (`torch.nn.Module`):
            Model that is evaluated.
        device (`torch.device`):
            Where it is.
        seed (`int`):
            Seed of what is drawn meanwhile.
    """
    in_training = [module for module in model.modules() if module.training]
    on_gpu = device.type == "cuda"
    model.eval()
    try:
        with torch.random.fork_rng([device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would also seed the other devices
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for module in in_training:
            module.training = True
