"""Preference training in two processes is preference training in one on the same global batch."""

import launch
import pytest
import torch
import two_processes_dpo
from two_processes_dpo import CASES, SAME, write_rows


@pytest.fixture(scope="module")
def one_and_two(pair, tiny_model, tmp_path_factory):
    """Results of one process, and of each of two gloo processes."""
    folder = tmp_path_factory.mktemp("processes")
    write_rows(folder)
    return launch.one_and_two(pair, two_processes_dpo, tiny_model, folder)


OF_PAIRS = (
    "loss/",
    "logratios/",
    "margins/",
    "rewards/",
    "logps/",
    "beta_dpo/",
    "bco/",
)  # means over pairs, not over tokens


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(one_and_two, case):
    one, two = one_and_two[0][case], [result[case] for result in one_and_two[1]]
    for result in two:
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], atol=1e-5, rtol=0, msg=name)
    assert any(name.startswith("eval_loss") for entry in one["log"] for name in entry)
    compared = set()
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        for name in theirs:
            if name.removeprefix("eval_").startswith(OF_PAIRS) or name in ("loss", "eval_loss"):
                compared.add(name)
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name
    if case == "BCO":
        assert {"bco/shift", "bco/mean_chosen", "eval_bco/shift", "rewards/accuracies"} <= compared
    elif "TRL" not in case:
        assert f"loss/{CASES[case]['loss_type'][0]}" in compared


@pytest.mark.parametrize("name", SAME)
def test_ours_in_two_processes_are_trls_in_two_bit_for_bit(one_and_two, name):
    for result in one_and_two[1]:
        ours, theirs = result[f"ours {name}"], result[f"TRL {name}"]
        for weight in theirs["weights"]:
            torch.testing.assert_close(ours["weights"][weight], theirs["weights"][weight], atol=0, rtol=0)
        for our_entry, their_entry in zip(ours["log"], theirs["log"], strict=True):
            for metric in their_entry:
                if "runtime" not in metric and "per_second" not in metric:
                    assert our_entry[metric] == their_entry[metric], metric
