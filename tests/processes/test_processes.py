"""Two processes compute what one computes on the same global batch."""

import launch
import pytest
import torch
import two_processes
from theorems import proves
from two_processes import BATCH, CASES, GREEDY, REFUSED


@pytest.fixture(scope="module")
def one_and_two(pair, tiny_model, tmp_path_factory):
    """Results of one process, and of each of two gloo processes."""
    return launch.one_and_two(pair, two_processes, tiny_model, tmp_path_factory.mktemp("processes"))


@pytest.mark.theorem(
    "Several processes",
    "Two processes train to the weights of one, for every estimator, KL and reward of steps (float32)",
    at_most=1e-05,
)
@pytest.mark.parametrize("case", CASES | GREEDY)
def test_two_processes_equal_one(one_and_two, case):
    one, two = one_and_two[0][case], [result[case] for result in one_and_two[1]]
    rows = GREEDY.get(case, {}).get("rows", BATCH)
    for step, whole in enumerate(one["advantages"]):
        parts = [result["advantages"][step] for result in two]
        assert [len(part) for part in parts] == [rows // 2] * 2
        for part, expected in zip(parts, whole.split(rows // 2), strict=True):
            if part.dim() == 2:  # each process pads to its own longest completion
                assert not expected[:, part.size(1) :].any()
                expected = expected[:, : part.size(1)]
            torch.testing.assert_close(part, expected, atol=1e-6, rtol=0)
    for result in two:
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], atol=1e-5, rtol=0, msg=name)
            proves(weight, one["weights"][name])
    assert two[0]["table"] == pytest.approx(one["table"], abs=1e-6)
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert ours.keys() == theirs.keys()
        names = {"reward", "advantages/mean", "advantages/std", "advantages/frac_groups_zero_std"}
        names |= {"kl", "kl/k3", "kl/beta", *(name for name in ours if name.startswith(("process/", "remax/")))}
        for name in names:
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-6), name


def test_lengths_differ_between_the_processes(one_and_two):
    widths = [result["reinforce"]["advantages"][0].size(1) for result in one_and_two[1]]
    widths += [result["reinforce"]["advantages"][1].size(1) for result in one_and_two[1]]
    assert len(set(widths)) > 1, "otherwise the padding across processes is not tested"


def test_the_completions_have_several_steps_and_advantages(one_and_two):
    for name in ("step rewards", "step and outcome rewards", "step rewards, softmin"):
        result = one_and_two[0][name]
        assert result["log"][0]["process/steps_max"] > 1
        assert all(advantages.any() for advantages in result["advantages"]), name


WRONG = {
    "one_too_many": "ValueError: Process 1: Reward function 'one_too_many' returned",
    "lists_on_one_process": "ValueError: Reward function 'lists_on_one_process' returned both numbers and lists.",
    "raises": "RuntimeError: Process 1: Reward function 'raises' raised KeyError: 'answer'",
    "async_raises": "RuntimeError: Process 1: Reward function 'async_raises' raised TimeoutError",
    "one_number": "ValueError: Process 1: Reward function 'one_number' returned 0.5; it must return a list",
    "too_few": "ValueError: Process 1: The reward function 'too_few' returned 1 rewards, but 4 were expected",
    "a_word": "ValueError: Process 1: Reward function 'a_word' returned 'good' for completion 1; a reward is",
    "a model raises": "RuntimeError: Process 1: Reward model 'model' raised MemoryError: no space is left",
    "not cut": "ValueError: Process 1: Completion 0 was not cut into steps: ValueError: step_ends_function returned",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_on_one_process_is_raised_on_all(one_and_two, case):
    (first, no_cause), (second, cause) = (result["refused"][case] for result in one_and_two[1])
    assert first == second and first.startswith(WRONG[case])
    assert no_cause == "None" and ("raises" in case) == (cause != "None"), "the traceback of the function is kept"
    if case == "one_too_many":
        assert "for completion 1, which has" in first


def test_all_processes_skip_the_same_steps(one_and_two, tiny_model, tmp_path):
    one, two = two_processes.bounded(tiny_model, tmp_path, 1), [result["bounded"] for result in one_and_two[1]]
    assert one["free"]["kl"][1] > 1e-5
    for name, second in (("free", 0.0), ("below", 1.0), ("above", 0.0)):
        for result in two:
            assert result[name]["kl"] == pytest.approx(one[name]["kl"], rel=1e-3, abs=1e-9)
            assert result[name]["skipped"][:2] == one[name]["skipped"][:2] == [0.0, second]
            for key, weight in two[0][name]["weights"].items():
                assert torch.equal(result[name]["weights"][key], weight), key
