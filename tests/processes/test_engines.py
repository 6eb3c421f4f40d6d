"""FSDP2, ZeRO-2 and ZeRO-3, two processes over gloo, train to what DistributedDataParallel trains to."""

import importlib.util
import math
import os

import launch
import pytest
import torch
import two_processes_engines
from engines import ENGINES
from two_processes_engines import CASES, KINDS_OF_STATE, RESUMED, of_engine

pytestmark = pytest.mark.engines
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install -c constraints.txt -e '.[test-engines]'",
)
ZERO = [pytest.param(name, marks=[needs_deepspeed, pytest.mark.slow]) for name in ("zero2", "zero3")]
# One launch each, of what is most easily wrong there.
DIAGONAL = {
    "fsdp2": ["exact, full", "a trained head", "pairs, a trained head"],
    "zero2": ["PPO, LoRA", "REINFORCE++, KL in the reward, full"],
    "zero3": ["exact, full", "exact, accumulated, checkpointing, LoRA"],
}
ROUNDED = [case for case in CASES if case.startswith("TRL's defaults")]
CELLS = [
    pytest.param(engine, case, marks=[needs_deepspeed] if engine.startswith("zero") else [])
    for engine in ("fsdp2", "zero2", "zero3")
    for case in of_engine(engine)
    if case not in ROUNDED
]


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    two_processes_engines.save_models(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """`trained(engine, *cases)`: the results of its first process, from one launch; without a case those of all."""
    known = {}

    def of(*words):
        if words not in known:
            folder = tmp_path_factory.mktemp(words[0])
            known[words] = launch.two(two_processes_engines, str(models), folder, [*words])[0]
        return known[words]

    return of


def same(ours, theirs):
    """Weights and logs agree; log-ratios are differences of sums of some 30 nats, in float32."""
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
    for mine, other in zip(ours["log"], theirs["log"], strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if name not in ("step_time", "total_flos") and not name.endswith(("runtime", "_per_second")):
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=5e-6, nan_ok=True), (name, other["step"])


def learned(result):
    assert any(entry.get("grad_norm", 0.0) > 1e-4 for entry in result["log"])


@pytest.mark.slow  # `.ci/run` runs it after the others, when DeepSpeed is there
@pytest.mark.parametrize("engine", ["fsdp2", *ZERO])
def test_the_diagonal_trains_as_one_process_does(trained, models, tmp_path, engine):
    cases = DIAGONAL[engine]
    ours, theirs = trained(engine, *cases), two_processes_engines.run(models, tmp_path, 1, cases)
    for case in cases:
        assert ours[case]["wrapped"].startswith(ENGINES[engine])
        learned(theirs[case])
        for name, weight in theirs[case]["weights"].items():
            torch.testing.assert_close(ours[case]["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
        for mine, other in zip(ours[case]["log"], theirs[case]["log"], strict=True):
            for name in {"loss", "grad_norm", "kl"} & other.keys():
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=5e-6), (case, name)


@pytest.mark.slow  # as the diagonal
def test_the_gradient_of_a_weight_in_parts_is_the_mean_of_all(trained):
    found = trained("fsdp2", *DIAGONAL["fsdp2"])["gradients"]
    mean = 1.5 * torch.arange(24.0).view(4, 6)  # of 1 and 2 times that
    assert torch.equal(found["ours"], mean)
    assert not torch.equal(found["by itself"], mean), "torch gives it by now: `whole` needs no more than full_tensor"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "case"), CELLS)
def test_an_engine_trains_as_ddp_does(trained, engine, case):
    ours, theirs = trained(engine)[case], trained("ddp")[case]
    assert ours["wrapped"].startswith(ENGINES[engine]) and theirs["wrapped"] == ENGINES["ddp"]
    learned(theirs)
    same(ours, theirs)
    if "shared prefixes" in case:
        together = engine != "zero2"  # where weights are whole, each process decides for itself
        assert (ours["counts"]["policy"]["packed"] > 0) == (not together or "on no process" not in case)
    if "a reference that is refreshed" in case:
        assert ours["log"][-2]["ref/refreshes"] >= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUNDED)
def test_trls_defaults_train_under_fsdp2(trained, case):
    ours, theirs = (trained(name)[case]["log"] for name in ("fsdp2", "ddp"))
    for mine, other in zip(ours, theirs, strict=True):
        for name in {"loss", "kl", "grad_norm"} & other.keys():
            assert math.isfinite(mine[name]) and mine[name] == pytest.approx(other[name], rel=0.1, abs=0.02), name


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *[pytest.param("fsdp2", kind) for kind in KINDS_OF_STATE],
        *[pytest.param(*engine.values, KINDS_OF_STATE[0], marks=needs_deepspeed) for engine in ZERO],
    ],
)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(trained, engine, kind, case):
    whole, again = trained(engine, "resumed")[case, kind]
    for name, weight in whole["weights"].items():
        assert torch.equal(again["weights"][name], weight), name
    rows, more = ({row["step"]: row for row in run["log"] if "loss" in row} for run in (whole, again))
    assert rows.keys() == more.keys() and max(rows) > 2
    for step, row in rows.items():
        for name in row.keys() - {"step_time", "num_tokens"}:  # which TRL's DPO and KTO count anew
            assert more[step][name] == pytest.approx(row[name], abs=0.0, nan_ok=True), (step, name)


@pytest.mark.slow
@needs_deepspeed
def test_nothing_is_compiled(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    launch.two(two_processes_engines, str(models), tmp_path, ["zero3", "exact, full"])
    assert not os.path.exists(tmp_path / "extensions") or not os.listdir(tmp_path / "extensions")
