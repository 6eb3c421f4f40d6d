r"""
Losses of completions that are good or bad by themselves, without a pair, and the table of them.

Symbols: \\(r = \beta\,(\log\pi(y\mid x) - \log\pi_{\mathrm{ref}}(y\mid x))\\) the implicit reward of a completion,
dimensionless; \\(\delta\\) the reward shift.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .margin_losses import logistic


@dataclasses.dataclass(frozen=True)
class UnpairedBatch:
    """
    What an unpaired loss sees. Half precision is widened to float32.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of each completion: β times the log-ratio, policy over reference, summed over the tokens.
        desirable (`torch.Tensor` of shape `(B,)`, bool):
            Whether each completion is a good one.
        shift (`float`):
            Reward that is neither good nor bad, \\(\\delta\\).

    Raises:
        `ValueError`: If the two tensors do not have one shape `(B,)`.
    """

    rewards: torch.Tensor
    desirable: torch.Tensor
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.rewards.dim() != 1 or self.rewards.shape != self.desirable.shape:
            raise ValueError(
                f"UnpairedBatch needs one reward and one label per completion, got shapes {tuple(self.rewards.shape)} "
                f"and {tuple(self.desirable.shape)}."
            )
        wide = self.rewards.to(torch.promote_types(self.rewards.dtype, torch.float32))
        object.__setattr__(self, "rewards", wide)


def bco(batch: UnpairedBatch) -> torch.Tensor:
    r"""
    A binary classifier of good and bad completions, whose logit is the implicit reward less a shift.

    $$ -\log\sigma(r - \delta)\ \text{ if good},\qquad -\log\sigma(\delta - r)\ \text{ if bad} $$

    Jung et al., 2024 (https://huggingface.co/papers/2404.04656). The sum over a good and a bad completion of one
    prompt is an upper bound of DPO's loss for every \\(\delta\\); theirs is the mean of the two mean rewards, which
    [`MovingRewards`] keeps. Their reweighting of data of different prompts (underlying distribution matching) is not
    part of it.

    Args:
        batch ([`UnpairedBatch`]):
            Completions.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each completion.

    Example:

    >>> bco(UnpairedBatch(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), shift=1.0))
    tensor([0.1269, 2.1269])
    """
    distance = batch.rewards - batch.shift
    return logistic(torch.where(batch.desirable, distance, -distance))


class MovingRewards:
    r"""
    The reward shift, halfway between the moving averages of the rewards of good and of bad completions:

    $$ \delta = \tfrac12\,(\bar r_{\mathrm{good}} + \bar r_{\mathrm{bad}}) $$

    The averages are exponential. They move once per optimizer step, over the completions of all its micro-batches and
    processes, and start at the means of the first micro-batch. A kind that a step does not have keeps its average;
    before it is first seen, that is 0, the reward of the reference. A reward that is not finite is left out.
    Evaluation reads only.

    Args:
        momentum (`float`, *optional*, defaults to `0.9`):
            Weight of what was before, at least 0 and below 1.
    """

    def __init__(self, momentum: float = 0.9):
        self.momentum = momentum
        self.means: list[float | None] = [None, None]  # of bad, of good
        self.window: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observe(self, rewards: torch.Tensor, desirable: torch.Tensor, training: bool) -> float:
        """The shift for a micro-batch with these rewards, `(N,)`, and labels, `(N,)` bool, of all processes."""
        rewards, desirable = rewards.detach().to("cpu", torch.float64), desirable.to("cpu")
        means = [_mean(rewards[desirable == kind], known) for kind, known in enumerate(self.means)]
        known = means if self.means == [None, None] else self.means
        if training:
            self.means = known
            self.window.append((rewards, desirable))
        return sum(mean or 0.0 for mean in known) / 2

    def step(self) -> None:
        """Ends an optimizer step."""
        rewards, desirable = map(torch.cat, zip(*self.window, strict=True))
        for kind, before in enumerate(self.means):
            now = _mean(rewards[desirable == kind], before)
            if now is not None:
                self.means[kind] = now if before is None else self.momentum * before + (1 - self.momentum) * now
        self.window = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"means": self.means}

    def restore(self, state: dict[str, Any]) -> None:
        """The counterpart of [`MovingRewards.state`]."""
        self.means = list(state["means"])

    def metrics(self) -> dict[str, float]:
        """The two averages, in the unit of the reward; of those that have been seen."""
        names = ("rejected", "chosen")
        return {f"bco/mean_{name}": mean for name, mean in zip(names, self.means, strict=True) if mean is not None}


def _mean(rewards: torch.Tensor, otherwise: float | None) -> float | None:
    finite = rewards[rewards.isfinite()]
    return finite.mean().item() if len(finite) else otherwise


class UnpairedLoss(NamedTuple):
    """A row of [`UNPAIRED_LOSSES`]: the loss, and everything that is known about it."""

    function: Callable[[UnpairedBatch], torch.Tensor]
    state: Callable[..., MovingRewards]  # of the momentum: gives the shift of each batch
    method: str = ""  # as in the model card
    paper: str = ""  # key in `papers.py`


UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {
    "bco": UnpairedLoss(bco, MovingRewards, method="BCO", paper="bco"),
}
