"""docs/theorems.md says what the tests prove. What they find is compared with it at the end of every run."""

import math

import pytest
import theorems
import torch


def test_the_page_has_every_statement_and_no_other():
    found = theorems.printed()
    assert {theorem.test for theorem in theorems.written()} == found.keys(), theorems.AGAIN
    assert theorems.page(found) == theorems.PAGE.read_text(), theorems.AGAIN


def test_what_is_printed_is_accepted():
    found = theorems.printed()
    assert len(found) > 30
    assert all(found[theorem.test] <= theorem.at_most for theorem in theorems.written())


def test_deviations_are_the_largest_of_all_that_was_compared(monkeypatch):
    monkeypatch.setattr(theorems, "_deviations", found := [])
    theorems.proves({"a": torch.tensor([1.0, 2.5]), "b": 0.0}, {"a": [1.0, 2.0], "b": 0.25})
    theorems.proves(torch.tensor(-1e-3))
    assert found == [0.5, 0.25, pytest.approx(1e-3)]
    assert theorems.largest(found, at_most=0.5) == 0.5


@pytest.mark.parametrize("found", [[0.0, 1e-2], [math.nan], []])
def test_too_much_and_nan_and_nothing_are_no_proof(found):
    with pytest.raises(AssertionError):
        theorems.largest(found, at_most=1e-3)
