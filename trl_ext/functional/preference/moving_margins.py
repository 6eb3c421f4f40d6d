"""The state of β-DPO: moving mean and deviation of the margins, and how many batches its filter has drawn from."""

import random
from typing import Any

import torch

from .beta_dpo import BETA_FLOOR, batch_beta, moving_statistics
from .pairs import GlobalMargins, PairBatch


class MovingMargins:
    """
    Moves once per optimizer step, over the pairs of all its micro-batches and processes. Evaluation reads it only.

    The noise of the filter depends on the seed and the number of the micro-batch, not on torch's generators.

    Args:
        seed (`int`):
            Seed of the filter.
        options:
            Keyword arguments of [`beta_dpo`], for the metrics.
    """

    def __init__(self, seed: int, **options: Any):
        self.seed = seed
        self.options = options
        self.moving: tuple[float, float] | None = None
        self.draws = 0
        self.window: list[torch.Tensor] = []

    def observe(self, margins: torch.Tensor, offset: int, training: bool) -> GlobalMargins:
        """What `beta_dpo` is to know of the margins of all processes, `(N,)`, of one micro-batch."""
        margins = margins.detach().to("cpu", torch.float64)
        start = moving_statistics(margins) if self.moving is None else self.moving
        if not training:
            return GlobalMargins(margins, offset, *start)
        self.moving = start
        self.window.append(margins)
        # Through `random`, which hashes the text: torch reads the lower 32 bits of a seed only.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.draws}").getrandbits(32))
        self.draws += 1
        noise = torch.rand(len(margins), generator=generator, dtype=torch.float64)
        return GlobalMargins(margins, offset, *start, noise)

    def step(self) -> None:
        """Ends an optimizer step."""
        self.moving, self.window = moving_statistics(torch.cat(self.window), self.moving), []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"moving": self.moving, "draws": self.draws}

    def restore(self, state: dict[str, Any]) -> None:
        """The counterpart of [`MovingMargins.state`]."""
        self.moving, self.draws = state["moving"] and tuple(state["moving"]), state["draws"]

    def metrics(self, batch: PairBatch) -> dict[str, float]:
        """β of the batch, whether it is at its floor, and what the batch was compared with; the same everywhere."""
        beta, known = batch_beta(batch, **self.options), batch.global_margins
        assert known is not None
        return {
            "beta_dpo/beta": beta,
            "beta_dpo/clamped": float(beta <= BETA_FLOOR),
            "beta_dpo/moving_mean": known.moving_mean,
            "beta_dpo/moving_std": known.moving_std,
        }
