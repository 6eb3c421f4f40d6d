"""Two processes where the batches do not come out even."""

import launch
import pytest
import torch
import two_processes_edges
from two_processes_edges import DPO, GRPO

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def one_and_two(pair, tiny_model, tmp_path_factory):
    """Results of one process, and of each of two gloo processes."""
    return launch.one_and_two(pair, two_processes_edges, tiny_model, tmp_path_factory.mktemp("processes"))


def same_for_all(entry):
    """What is measured by the clock differs."""
    return {name: value for name, value in entry.items() if not any(w in name for w in ("time", "per_second"))}


@pytest.mark.parametrize("case", [*GRPO, *DPO])
def test_both_processes_see_one_run(one_and_two, case):
    first, second = (result[case] for result in one_and_two[1])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]) and weight.isfinite().all(), name
    for ours, theirs in zip(first["log"], second["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in same_for_all(theirs).items():
            assert ours[name] == (value if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)), name


@pytest.mark.parametrize("case", GRPO)
def test_two_processes_equal_one(one_and_two, case):
    one, two = one_and_two[0][case], one_and_two[1][0][case]
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
    entries = [[entry for entry in result["log"] if "loss" in entry] for result in (one, two)]
    assert len(entries[0]) == len(entries[1]) == GRPO[case]["max_steps"]
    for theirs, ours in zip(*entries, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"reward", "advantages/mean", "advantages/std", "kl", "kl/k3", "kl/beta"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name


def test_a_run_that_learns_nothing_is_told_so_by_one_process_about_all(one_and_two):
    constant, between = "Reward function 'ones' returned 1.0 for all 320", "All advantages of advantage_estimator="
    alone, (first, second) = one_and_two
    for said, begins in (
        (alone["ones"], constant),
        (alone["of_process"], "Reward function 'of_process' returned 0.0 for all 320"),
        (first["ones"], constant),
        (first["of_process"], between),  # constant on each process, and not over both
    ):
        assert len(said) == 1 and said[0].startswith(begins), said
    assert second["ones"] == second["of_process"] == []


@pytest.mark.parametrize("rows", [13, 14, 15])
def test_uneven_pairs_are_trained_as_by_trl_bit_for_bit(one_and_two, rows):
    for result in (one_and_two[0], *one_and_two[1]):
        ours, theirs = result[f"uneven pairs: {rows}, ours"], result[f"uneven pairs: {rows}, TRL"]
        for name, weight in theirs["weights"].items():
            assert torch.equal(ours["weights"][name], weight), name
        for our_entry, their_entry in zip(ours["log"], theirs["log"], strict=True):
            for name, value in same_for_all(their_entry).items():
                assert our_entry[name] == value, name


def test_the_cases_are_what_they_say(one_and_two):
    truncated = one_and_two[1][0]["truncated: reinforce"]["log"][0]
    assert truncated["completions/clipped_ratio"] == 0.5
    evaluated = [entry for entry in one_and_two[1][0]["uneven: leave_one_out"]["log"] if "eval_loss" in entry]
    assert len(evaluated) == 3
