"""PPO on two processes computes what it computes on one: with DDP, and with policy and critic sharded by FSDP2."""

import launch
import pytest
import torch
import two_processes_ppo
from two_processes_ppo import CASES, FSDP2


@pytest.fixture(scope="module")
def ddp(pair, tiny_model, tmp_path_factory):
    return launch.one_and_two(pair, two_processes_ppo, tiny_model, tmp_path_factory.mktemp("ppo"))


@pytest.fixture(scope="module")
def fsdp2(tiny_model, tmp_path_factory):
    return launch.two(two_processes_ppo, tiny_model, tmp_path_factory.mktemp("ppo_fsdp2"), ["fsdp2"])


def compare(one, two):
    for step, whole in enumerate(one["seen"]):
        for name, expected in whole.items():
            for result, rows in zip(two, expected.chunk(2), strict=True):
                part = result["seen"][step][name]
                if part.dim() == 2:  # each process pads to its own longest completion
                    rows = rows[:, : part.size(1)]
                if name != "old_values":  # which means nothing at untrainable tokens
                    torch.testing.assert_close(part, rows, atol=1e-6, rtol=0, msg=f"{name}, step {step}")
    for kind in ("policy", "critic"):
        for result in two:
            assert result[kind].keys() == one[kind].keys()
            for name, weight in result[kind].items():
                torch.testing.assert_close(weight, one[kind][name], atol=1e-5, rtol=0, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(two[0]["critic"].values(), two[1]["critic"].values(), strict=True))
    names = {"value/mean", "value/return_mean", "value/explained_variance", "value/lr", "value/grad_norm", "kl"}
    for ours, theirs in zip(two[0]["log"], one["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in names & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5, nan_ok=True), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(ddp, case):
    one, two = ddp[0][case], [result[case] for result in ddp[1]]
    assert two[0]["wrapped"] == "DistributedDataParallel"
    assert one["log"][-1]["value/grad_norm"] > 0 and one["seen"][-1]["old_values"].any()
    compare(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("case", FSDP2)
def test_two_processes_that_share_the_weights_equal_one(fsdp2, tiny_model, tmp_path, case):
    one = two_processes_ppo.run(tiny_model, tmp_path, 1, {case: FSDP2[case]})[case]
    two = [result[case] for result in fsdp2]
    assert two[0]["wrapped"].startswith("FSDP")
    compare(one, two)


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit(fsdp2):
    for whole, again in (fsdp2[0]["resumed"][:2], fsdp2[0]["resumed"][2:]):
        assert whole.keys() == again.keys()
        for name in whole:
            assert torch.equal(whole[name], again[name]), name
