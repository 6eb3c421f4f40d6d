"""The state of β-DPO: moving mean and deviation of the margins, and how many batches its filter has drawn from."""

import json
import random
import warnings
from pathlib import Path

import torch

from ...functional.preference_losses import GlobalMargins, moving_statistics

_FILE = "beta_dpo.json"


class MovingMargin:
    """
    Moves once per optimizer step, over the pairs of all its micro-batches and processes. Evaluation reads it only.

    The noise of the filter depends on the seed and the number of the micro-batch, not on torch's generators.

    Args:
        seed (`int`):
            Seed of the filter.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.moving: tuple[float, float] | None = None
        self.draws = 0
        self._window: list[torch.Tensor] = []

    def __call__(self, margins: torch.Tensor, first: int, training: bool) -> GlobalMargins:
        """What `beta_dpo` is to know of the margins of all processes, `(N,)`, of one micro-batch."""
        margins = margins.detach().to("cpu", torch.float64)
        start = moving_statistics(margins) if self.moving is None else self.moving
        if not training:
            return GlobalMargins(margins, first, *start)
        self.moving = start
        self._window.append(margins)
        # Through `random`, which hashes the text: torch reads the lower 32 bits of a seed only.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.draws}").getrandbits(32))
        self.draws += 1
        noise = torch.rand(len(margins), generator=generator, dtype=torch.float64)
        return GlobalMargins(margins, first, *start, noise)

    def step(self):
        """Ends an optimizer step."""
        self.moving, self._window = moving_statistics(torch.cat(self._window), self.moving), []

    def save(self, folder: Path):
        (folder / _FILE).write_text(json.dumps({"moving": self.moving, "draws": self.draws}))

    def load(self, folder: str):
        path = Path(folder, _FILE)
        if not path.exists():
            warnings.warn(f"{folder} holds no moving margin of beta_dpo; it starts at the next batch.", stacklevel=3)
            return
        saved = json.loads(path.read_text())
        self.moving, self.draws = tuple(saved["moving"]), saved["draws"]
