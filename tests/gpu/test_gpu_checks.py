"""The checks of `tests/gpu` on the CPU, in float32 and small: what they call exists, and what can hold here holds."""

import gpu_checks
import pytest
import torch
from gpu_checks import EQUAL, PRICES, SMALL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return gpu_checks.save_model(tmp_path_factory.mktemp("small") / "model", SMALL)


@pytest.mark.parametrize("feature", gpu_checks.FEATURES)
@pytest.mark.filterwarnings("ignore:kl_estimator='k1' in the loss is unbiased")
def test_every_feature_trains_an_adapter_over_four_bit_weights(model, tmp_path, feature, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    # Else it packs the weights anew on some processors, with scales in bfloat16.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    gpu_checks.check_four_bit(feature, model, tmp_path, SMALL, "cpu")


@pytest.mark.parametrize("case", EQUAL)
def test_it_trains_as_trl_does(model, tmp_path, case):
    ours, again, moved = gpu_checks.check_equal(case, model, tmp_path, SMALL, "cpu")
    assert moved > 1e-4 and again == 0.0
    assert ours == 0.0 if "nothing on" in case else ours <= 1e-6


def test_the_exact_kl_and_the_estimators():
    gpu_checks.check_exact_kl(SMALL, "cpu", torch.float32)
    gpu_checks.check_functional("cpu")


def test_attention_of_a_packed_row():
    for dtype in (torch.float32, torch.bfloat16):
        gpu_checks.check_packed_attention("cpu", dtype)


def test_a_row_of_the_table(model, tmp_path):
    row = gpu_checks.price("IPO", model, tmp_path, SMALL, "cpu", four_bit=False, steps=4)
    assert row.startswith("| IPO | ") and row.count("|") == gpu_checks.PRICE_HEAD.splitlines()[0].count("|")
    assert {kind for kind, *_ in PRICES.values()} == {"grpo", "dpo"}
