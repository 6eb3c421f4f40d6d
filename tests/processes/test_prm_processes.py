"""PRM training in two processes with unequal numbers of labelled steps is that of one on the same global batch."""

import launch
import pytest
import torch
import two_processes_prm
from two_processes_prm import CASES, write


@pytest.fixture(scope="module")
def one_and_two(pair, tiny_model, tmp_path_factory):
    """Results of one process, and of each of two gloo processes."""
    folder = tmp_path_factory.mktemp("processes")
    write(folder)
    return launch.one_and_two(pair, two_processes_prm, tiny_model, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(one_and_two, case):
    one, two = one_and_two[0][case], [result[case] for result in one_and_two[1]]
    for result in two:
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], atol=1e-5, rtol=0, msg=name)
    compared = set()
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        for name in theirs:
            if not any(word in name for word in ("runtime", "per_second", "preparation", "total_flos")):
                compared.add(name)
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name
    measured = {"mse"} if case == "regression" else {"accuracy", "first_error_accuracy", "brier"}
    assert {f"eval_{name}" for name in {"loss", *measured}} | {
        "loss",
        "grad_norm",
        "num_tokens",
        *measured,
    } <= compared
