r"""
Margin losses \\(f(t)\\), and one of them under soft labels, [`gpo`].

Everywhere here \\(t = \beta u\\), `(B,)`, is \\(\beta\\) times the margin \\(u\\) of a pair, which is in nats:
dimensionless, and positive where the policy has moved towards the chosen completion. Each function returns the loss of
each pair, `(B,)`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..reductions import SATURATION
from .pairs import PairBatch


def logistic(t: torch.Tensor) -> torch.Tensor:
    r"""\\(\log(1 + e^{-t})\\). DPO: Rafailov et al., 2023, Eq. 7 (https://huggingface.co/papers/2305.18290)."""
    return -F.logsigmoid(t)


def hinge(t: torch.Tensor) -> torch.Tensor:
    r"""\\(\max(0, 1-t)\\). SLiC, as a loss of log-ratios (https://huggingface.co/papers/2402.05749)."""
    return torch.relu(1 - t)


def squared(t: torch.Tensor) -> torch.Tensor:
    r"""\\((1-t)^2\\). IPO with \\(\beta = 2\tau\\), times \\(4\tau^2\\)."""
    return (1 - t).square()


def exponential(t: torch.Tensor) -> torch.Tensor:
    r"""\\(e^{-t}\\); below t = −20 its tangent \\(e^{20}(1 - t - 20)\\): float32 overflows at −88."""
    beyond = torch.relu(-t - SATURATION)
    return torch.exp((-t).clamp(max=SATURATION)) + math.exp(SATURATION) * beyond


def truncated_quadratic(t: torch.Tensor) -> torch.Tensor:
    r"""\\(\max(0, 1-t)^2\\)."""
    return torch.relu(1 - t).square()


def savage(t: torch.Tensor) -> torch.Tensor:
    r"""\\(1/(1+e^t)^2\\). Bounded by 1, and the only one of the six that is not convex."""
    return torch.sigmoid(-t).square()


MARGIN_LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "logistic": logistic,
    "hinge": hinge,
    "squared": squared,
    "exponential": exponential,
    "truncated_quadratic": truncated_quadratic,
    "savage": savage,
}


def gpo(batch: PairBatch, *, margin_loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    r"""
    A margin loss under soft labels.

    $$ p\,f(\beta u) + (1-p)\,f(-\beta u) $$

    GPO: Tang et al., 2024 (https://huggingface.co/papers/2402.05749), who have hard labels, \\(p = 1\\). With
    \\(f\\) = [`logistic`] and constant \\(p = 1-\varepsilon\\) it is conservative DPO. Near the reference the loss is
    \\(f(0) + f'(0)\,\beta u + \tfrac12 f''(0)\,\beta^2u^2\\): one \\(\beta\\) means different things for different
    \\(f\\); match \\(f'(0)\beta\\).

    Args:
        batch ([`PairBatch`]):
            Pairs.
        margin_loss (`Callable`):
            \\(f\\): an entry of `MARGIN_LOSSES`, or any `(B,)` to `(B,)`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair.
    """
    t = batch.beta * batch.margin
    return _weighted(batch.preference_prob, margin_loss(t)) + _weighted(1 - batch.preference_prob, margin_loss(-t))


def _weighted(weight: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """The product, and 0 where `weight` is 0 and the loss infinite."""
    return torch.where(weight == 0, 0.0, weight * losses)
