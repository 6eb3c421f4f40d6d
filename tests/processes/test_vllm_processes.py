"""Two processes and vLLM's stand-in: after every update each engine has the policy's weights, also sharded ones."""

import launch
import pytest
import torch
import two_processes_vllm
from two_processes_vllm import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"stand_in_{request.param}")
    results = launch.two(two_processes_vllm, tiny_model, folder, [request.param])
    for result in results:
        name = result["server, full"]["wrapped"]
        assert name.startswith("FSDP" if request.param == "fsdp2" else "DistributedDataParallel")
    return results


@pytest.mark.parametrize("case", CASES)
def test_every_engine_has_the_policys_weights_at_every_step(two, case):
    for result in two:
        log = result[case]["log"]
        assert len(log) == 3
        for entry in log:
            assert entry["sampling/sampling_logp_difference/max"] < 1e-5
        for name, weight in two[0][case]["weights"].items():
            assert torch.equal(result[case]["weights"][name], weight), name


def test_one_process_asks_a_server_and_each_its_own_engine(two):
    first, second = (result["server, full"]["asked"] for result in two)
    assert first == [[2, 2, 2]] and second == []  # two prompts, for four completions each
    assert [result["colocate, full"]["asked"] for result in two] == [[[4, 4, 4]]] * 2
