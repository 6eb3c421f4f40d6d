"""Losses and measures of step labels: vectors by hand, loops in plain Python, slopes."""

import math

import pytest
import torch

from trl_ext.functional import (
    STEP_OBJECTIVES,
    classification_metrics,
    classification_sums,
    regression_metrics,
    regression_sums,
    squared_error,
    step_cross_entropy,
)

LOGITS = torch.tensor([[2.0, -1.0, 3.0, 9.0], [1.0, 1.0, -2.0, 9.0], [-1.0, 1.0, 9.0, 9.0], [0.5, -3.0, 9.0, 9.0]])
LABELS = torch.tensor([[1.0, 0.0, 0.2, 7.0], [1.0, 1.0, 0.9, 7.0], [0.0, 1.0, 7.0, 7.0], [0.6, 0.0, 7.0, 7.0]])
LABELLED = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()


def added(rows):
    return {name: value.sum().item() for name, value in rows.items()}


def test_cross_entropy_is_that_of_the_paper():
    z, y = torch.tensor([-3.0, 0.0, 0.7, 40.0]).double(), torch.tensor([0.0, 0.5, 0.3, 1.0]).double()
    for loss, logit, label in zip(step_cross_entropy(z, y), z.tolist(), y.tolist(), strict=True):
        good = 1 / (1 + math.exp(-logit))
        expected = -label * math.log(good) - ((1 - label) * math.log(1 - good) if label < 1 else 0.0)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_two_outputs_with_soft_labels_have_the_same_cross_entropy():
    logits, y = torch.randn(5, 2, generator=torch.manual_seed(0)).double(), torch.linspace(0, 1, 5).double()
    both = torch.nn.functional.cross_entropy(logits, torch.stack([1 - y, y], dim=1), reduction="none")
    torch.testing.assert_close(step_cross_entropy(logits[:, 1] - logits[:, 0], y), both)


def test_the_slope_is_the_probability_minus_the_label():
    z = torch.tensor([-2.0, 0.0, 1.5, 100.0], requires_grad=True)
    y = torch.tensor([0.25, 0.5, 1.0, 0.0])
    step_cross_entropy(z, y).sum().backward()
    torch.testing.assert_close(z.grad, z.detach().sigmoid() - y)
    assert z.grad[1] == 0.0, "undecided, and so is the label"


def test_the_slope_of_the_squared_error_is_twice_the_error():
    z = torch.tensor([3.0, -100.0], requires_grad=True)
    squared_error(z, torch.tensor([1.0, -100.0])).sum().backward()
    assert z.grad.tolist() == [4.0, 0.0]


def test_metrics_of_a_worked_example():
    """Bad: row 0 steps 1, 2; row 2 step 0; row 3 step 1. Predicted bad: 0/1, 1/2, 2/0, 3/1; so 8 of 10 are right."""
    metrics = classification_metrics(added(classification_sums(LOGITS, LABELS, LABELLED)))
    assert metrics["accuracy"] == pytest.approx(8 / 10)
    assert metrics["frac_bad"] == pytest.approx(4 / 10)
    assert metrics["f1_bad"] == pytest.approx(2 * 3 / (4 + 4))
    assert metrics["first_error_accuracy"] == 1.0  # rows 0, 2 and 3
    assert metrics["clean_accuracy"] == 0.0  # row 1
    assert metrics["first_error_f1"] == 0.0
    good = [1 / (1 + math.exp(-z)) for z in LOGITS[LABELLED].tolist()]
    labels = LABELS[LABELLED].tolist()
    assert metrics["score"] == pytest.approx(sum(good) / 10)
    assert metrics["brier"] == pytest.approx(sum((p - y) ** 2 for p, y in zip(good, labels, strict=True)) / 10)


def first(flags):
    return next((i for i, flag in enumerate(flags) if flag), None)


def test_first_errors_are_those_of_a_loop_over_rows():
    generator = torch.manual_seed(3)
    logits, labels = torch.randn(200, 6, generator=generator), torch.rand(200, 6, generator=generator) + 0.25
    labelled = torch.rand(200, 6, generator=generator) < 0.6
    found, passed = [], []
    for row in range(200):
        places = [j for j in range(6) if labelled[row, j]]
        true, said = first(labels[row, places] < 0.5), first(logits[row, places] < 0)
        if places and true is None:
            passed.append(said is None)
        elif places:
            found.append(said == true)
    a, b = sum(found) / len(found), sum(passed) / len(passed)
    metrics = classification_metrics(added(classification_sums(logits, labels, labelled)))
    assert len(passed) > 20 and 0 < a < 1 and 0 < b < 1
    assert metrics["first_error_accuracy"] == pytest.approx(a) and metrics["clean_accuracy"] == pytest.approx(b)
    assert metrics["first_error_f1"] == pytest.approx(2 / (1 / a + 1 / b))


def test_the_threshold_says_which_soft_labels_are_good():
    metrics = classification_metrics(added(classification_sums(LOGITS, LABELS, LABELLED, threshold=0.95)))
    assert metrics["frac_bad"] == pytest.approx(6 / 10)


@pytest.mark.parametrize("name", STEP_OBJECTIVES)
def test_what_has_no_label_is_not_read(name):
    row = STEP_OBJECTIVES[name]
    changed = [x.where(LABELLED, float("nan")) for x in (LOGITS, LABELS)]
    metrics = row.metrics(added(row.sums(LOGITS, LABELS, LABELLED)))
    assert row.metrics(added(row.sums(*changed, LABELLED))) == pytest.approx(metrics)
    assert [*metrics] == row.metric_names


@pytest.mark.parametrize("name", STEP_OBJECTIVES)
def test_a_ratio_of_nothing_is_not_a_number(name):
    row = STEP_OBJECTIVES[name]
    metrics = row.metrics(added(row.sums(LOGITS, LABELS, torch.zeros_like(LABELLED))))
    assert all(math.isnan(value) for value in metrics.values())


def test_a_row_without_labels_is_neither_wrong_nor_clean():
    sums = classification_sums(LOGITS[:1], LABELS[:1], torch.zeros(1, 4).bool())
    assert sums["rows_wrong"].item() == sums["rows_clean"].item() == 0.0


def test_regression_is_measured_in_the_unit_of_the_labels():
    values, labels = torch.tensor([[10.0, 14.0], [99.0, 12.0]]), torch.tensor([[8.0, 16.0], [0.0, 12.0]])
    metrics = regression_metrics(added(regression_sums(values, labels, torch.tensor([[1, 1], [0, 1]]).bool())))
    assert metrics == pytest.approx({"mse": 8 / 3, "mae": 4 / 3, "r2": 1 - 8 / 32, "score": 12.0, "label": 12.0})


def test_equal_labels_explain_nothing():
    labels = torch.full((3, 1), 0.1)
    metrics = regression_metrics(added(regression_sums(torch.randn(3, 1), labels, labels > 0)))
    assert math.isnan(metrics["r2"]) and metrics["mse"] > 0
