"""Asynchronous GRPO on two processes computes what it computes on one: statistics are those of the whole step."""

import launch
import pytest
import torch
import two_processes_async
from two_processes_async import CASES


@pytest.fixture(scope="module")
def results(pair, tiny_model, tmp_path_factory):
    return launch.one_and_two(pair, two_processes_async, tiny_model, tmp_path_factory.mktemp("async"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(results, case):
    one, two = results[0][case], [result[case] for result in results[1]]
    for step, expected in enumerate(one["seen"]):
        rows = [result["seen"][step] for result in two]
        assert len(rows[0]) + len(rows[1]) == len(expected) == 16 and all(rows)
        for key, advantages in (rows[0] | rows[1]).items():
            torch.testing.assert_close(advantages, expected[key], rtol=1e-4, atol=2e-5)
    for result in two:
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], rtol=0, atol=1e-5, msg=name)
    names = {"advantages/mean", "advantages/std", "kl/reference", "kl/k1", "kl/k3", "kl/beta", "kl/effective_beta"}
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert names & ours.keys() == names & theirs.keys() and "advantages/std" in ours
        for name in names & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("case", ["over the step", "KL in the reward"])
def test_over_all_processes_the_mean_is_0_and_the_std_is_1(results, case):
    for step in range(3):
        rows = [*results[1][0][case]["seen"][step].values(), *results[1][1][case]["seen"][step].values()]
        values = torch.cat([row for row in rows if row.any()]).double()  # all 0: a completion without a reward
        assert values.mean().abs() < 1e-5 and abs(values.std(correction=0).item() - 1.0) < 1e-3
    for entry in results[1][0][case]["log"]:
        assert abs(entry["advantages/mean"]) < 1e-5 and abs(entry["advantages/std"] - 1.0) < 1e-3
