"""
What a model of steps learns from labels: a loss per step, and sums over the steps of each row whose ratios are logged.

One axis order throughout: `B` rows, `S` steps of a row; where a step has no label its entries are not read.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits


def step_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""
    Cross-entropy of good against bad, with labels that may be soft.

    $$ \ell(z, y) = -y\log\sigma(z) - (1 - y)\log\sigma(-z) $$

    For hard labels Wang et al., 2023, Eq. 2 (https://huggingface.co/papers/2312.08935). Its slope is
    \\(\sigma(z) - y\\): a step of label 0.5 pulls towards \\(z = 0\\).

    Args:
        logits (`torch.Tensor` of shape `(n,)`):
            Log-odds \\(z\\) of good against bad, in nats.
        labels (`torch.Tensor` of shape `(n,)`):
            Probability \\(y\\) in [0, 1] that the step is good.

    Returns:
        `torch.Tensor` of shape `(n,)`: Loss of each step, in nats.

    Example:

    >>> step_cross_entropy(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.0]))
    tensor([0.6931, 2.1269])
    """
    return binary_cross_entropy_with_logits(logits, labels, reduction="none")


def squared_error(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""
    \\((z - y)^2\\), for labels that are any number.

    Args:
        values (`torch.Tensor` of shape `(n,)`):
            What the model says of each step, in the unit of the labels.
        labels (`torch.Tensor` of shape `(n,)`):
            Labels.

    Returns:
        `torch.Tensor` of shape `(n,)`: Loss of each step, in the square of that unit.

    Example:

    >>> squared_error(torch.tensor([1.0, -2.0]), torch.tensor([3.0, -2.0]))
    tensor([4., 0.])
    """
    return (values - labels).square()


def classification_sums(
    logits: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor, threshold: float = 0.5
) -> dict[str, torch.Tensor]:
    r"""
    Counts and sums over the labelled steps of each row, for [`classification_metrics`].

    A step is predicted good where \\(z \ge 0\\), and good where its label is at least `threshold`. The first error of
    a row is its first bad step that has a label.

    Args:
        logits (`torch.Tensor` of shape `(B, S)`):
            Log-odds of good against bad, in nats.
        labels (`torch.Tensor` of shape `(B, S)`):
            Probabilities in [0, 1] that the step is good.
        labelled (`torch.Tensor` of shape `(B, S)`, bool):
            Which steps have a label.
        threshold (`float`, *optional*, defaults to `0.5`):
            Smallest label of a good step.

    Returns:
        `dict[str, torch.Tensor]`: Each of shape `(B,)`, float64.
    """
    bad, predicted = labelled & (labels < threshold), labelled & (logits < 0)
    probability = logits.double().sigmoid()
    found = bad.any(1) & predicted.any(1) & (bad.int().argmax(1) == predicted.int().argmax(1))
    clean = labelled.any(1) & ~bad.any(1)
    sums = {
        "steps": labelled.sum(1),
        "right": (labelled & (bad == predicted)).sum(1),
        "bad": bad.sum(1),
        "predicted_bad": predicted.sum(1),
        "both_bad": (bad & predicted).sum(1),
        "score": probability.where(labelled, 0.0).sum(1),
        "squares": (probability - labels).square().where(labelled, 0.0).sum(1),
        "rows_wrong": bad.any(1),
        "rows_found": found,
        "rows_clean": clean,
        "rows_passed": clean & ~predicted.any(1),
    }
    return {name: value.double() for name, value in sums.items()}


def classification_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    r"""
    How well good steps are told from bad ones. A share of nothing is NaN.

    `accuracy`; `f1_bad`, the F1 of the class bad; `frac_bad`, the share of bad steps; `score`, the mean P(good);
    `brier`, the mean of \\((P(\text{good}) - y)^2\\); and as in ProcessBench (Zheng et al., 2024,
    https://huggingface.co/papers/2412.06559, §3.3), over rows: `first_error_accuracy`, of those with a bad step the
    share in which the first step predicted bad is the first bad one; `clean_accuracy`, of the others the share in
    which no step is predicted bad; `first_error_f1`, the harmonic mean of the two.

    Args:
        sums (`Mapping[str, float]`):
            Those of [`classification_sums`], added up over rows, batches and processes.

    Returns:
        `dict[str, float]`: The metrics, each in [0, 1].

    Example:

    >>> logits = torch.tensor([[2.0, -1.0, 3.0], [1.0, 1.0, -2.0]])
    >>> labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    >>> rows = classification_sums(logits, labels, torch.ones(2, 3).bool())
    >>> metrics = classification_metrics({name: value.sum().item() for name, value in rows.items()})
    >>> [round(metrics[name], 3) for name in ("accuracy", "f1_bad", "first_error_accuracy", "clean_accuracy")]
    [0.667, 0.5, 1.0, 0.0]
    """
    found, passed = _ratio(sums, "rows_found", "rows_wrong"), _ratio(sums, "rows_passed", "rows_clean")
    both = sums["bad"] + sums["predicted_bad"]
    return {
        "accuracy": _ratio(sums, "right", "steps"),
        "f1_bad": 2 * sums["both_bad"] / both if both else math.nan,
        "frac_bad": _ratio(sums, "bad", "steps"),
        "score": _ratio(sums, "score", "steps"),
        "brier": _ratio(sums, "squares", "steps"),
        "first_error_accuracy": found,
        "clean_accuracy": passed,
        "first_error_f1": 0.0 if found == passed == 0.0 else 2 * found * passed / (found + passed),
    }


def regression_sums(
    values: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor, threshold: float = 0.5
) -> dict[str, torch.Tensor]:
    """
    Sums over the labelled steps of each row, for [`regression_metrics`].

    Args:
        values (`torch.Tensor` of shape `(B, S)`):
            What the model says of each step, in the unit of the labels.
        labels (`torch.Tensor` of shape `(B, S)`):
            Labels.
        labelled (`torch.Tensor` of shape `(B, S)`, bool):
            Which steps have a label.
        threshold (`float`, *optional*):
            Not read: there is no good and bad.

    Returns:
        `dict[str, torch.Tensor]`: Each of shape `(B,)`, float64.
    """
    values, labels = values.double().where(labelled, 0.0), labels.double().where(labelled, 0.0)
    errors = values - labels
    sums = {
        "steps": labelled.double(),
        "score": values,
        "label": labels,
        "label_squares": labels.square(),
        "errors": errors.abs(),
        "squares": errors.square(),
    }
    return {name: value.sum(1) for name, value in sums.items()}


def regression_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    r"""
    How far predictions are from labels: `mse`, `mae`, `score`, the mean prediction, `label`, the mean label, and `r2`,
    \\(1 - \sum(z - y)^2 / \sum(y - \bar y)^2\\), which is NaN where all labels are the same.

    Args:
        sums (`Mapping[str, float]`):
            Those of [`regression_sums`], added up over rows, batches and processes.

    Returns:
        `dict[str, float]`: The metrics; `mse` in the square of the labels' unit, `r2` without one.

    Example:

    >>> rows = regression_sums(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), torch.ones(1, 2).bool())
    >>> regression_metrics({name: value.sum().item() for name, value in rows.items()})
    {'mse': 0.5, 'mae': 0.5, 'r2': 0.5, 'score': 1.5, 'label': 2.0}
    """
    steps = sums["steps"]
    spread = sums["label_squares"] - sums["label"] ** 2 / steps if steps else 0.0
    constant = spread <= 1e-12 * sums["label_squares"]  # what rounding leaves of equal labels
    return {
        "mse": _ratio(sums, "squares", "steps"),
        "mae": _ratio(sums, "errors", "steps"),
        "r2": math.nan if constant else 1 - sums["squares"] / spread,
        "score": _ratio(sums, "score", "steps"),
        "label": _ratio(sums, "label", "steps"),
    }


def _ratio(sums: Mapping[str, float], part: str, whole: str) -> float:
    return sums[part] / sums[whole] if sums[whole] else math.nan


@dataclass(frozen=True)
class StepObjective:
    """
    A row of [`STEP_OBJECTIVES`].

    Args:
        loss (`Callable`):
            Function of outputs and labels of the labelled steps, `(n,)` each, to their losses.
        sums, metrics (`Callable`):
            What is logged: sums per row, and their ratios.
        probability (`bool`):
            Labels are probabilities and the score is the sigmoid of the output. Else both are any numbers.
        method (`str`):
            Name in a model card.
        paper (`str`, *optional*):
            Key of its paper in `trl_ext.papers`.
    """

    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sums: Callable[..., dict[str, torch.Tensor]]
    metrics: Callable[[Mapping[str, float]], dict[str, float]]
    probability: bool
    method: str
    paper: str | None = None

    @property
    def metric_names(self) -> list[str]:
        """Names of what `metrics` gives."""
        nothing = torch.zeros(1, 1)
        return [*self.metrics(dict.fromkeys(self.sums(nothing, nothing, nothing.bool()), 0.0))]


STEP_OBJECTIVES: dict[str, StepObjective] = {
    "classification": StepObjective(
        step_cross_entropy,
        classification_sums,
        classification_metrics,
        probability=True,
        method="process-reward model (PRM)",
        paper="process_feedback",
    ),
    "regression": StepObjective(
        squared_error, regression_sums, regression_metrics, probability=False, method="process-reward regression"
    ),
}
