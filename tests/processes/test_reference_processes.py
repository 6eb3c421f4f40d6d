"""On two processes a reference moves as on one: at the same steps, with the same weights and metrics."""

import launch
import pytest
import torch
import two_processes_reference
from two_processes_reference import CASES


@pytest.fixture(scope="module")
def one_and_two(pair, tiny_model, tmp_path_factory):
    return launch.one_and_two(pair, two_processes_reference, tiny_model, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(one_and_two, case):
    one, two = one_and_two[0][case], [result[case] for result in one_and_two[1]]
    for result in two:
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], atol=1e-5, rtol=0, msg=name)
        for ours, theirs in zip(result["reference"], one["reference"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(two[0]["reference"], two[1]["reference"], strict=True))
    names = {"ref/refreshes", "ref/age", "kl", "ref/total_kl"} & one["log"][-1].keys()
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        for name in names & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert one["log"][-1]["ref/refreshes"] >= 1
    if not case.startswith("pairs"):
        assert any(abs(entry.get("ref/total_kl", 0.0)) > 1e-5 for entry in one["log"])
