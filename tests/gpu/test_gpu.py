"""
On one GPU: `pytest tests/gpu`, meant to take less than 8 minutes. Skipped without one.

Plain `pytest` hides the GPUs and skips these. Nobody has run them on a GPU yet; `tests/test_gpu_checks.py` runs the
same code on a CPU.
"""

import importlib.util

import gpu_checks
import pytest
import torch
import transformers
import trl
from gpu_checks import EQUAL, FEATURES, LARGE, PRICES

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and `pytest tests/gpu`: other tests hide the GPUs"
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (trl-ext[quantization])"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield gpu_checks.save_model(tmp_path_factory.mktemp("gpu") / "model", LARGE)
    torch.use_deterministic_algorithms(False)


@needs_bitsandbytes
@pytest.mark.parametrize("feature", FEATURES)
def test_an_adapter_in_bfloat16_over_four_bit_weights_trains(model, tmp_path, feature):
    gpu_checks.check_four_bit(feature, model, tmp_path, LARGE, "cuda")


@pytest.mark.parametrize("case", EQUAL)
def test_it_trains_as_trl_does_in_float32(model, tmp_path, case):
    ours, again, moved = gpu_checks.check_equal(case, model, tmp_path, LARGE, "cuda")
    assert moved > 1e-4, "otherwise equality says nothing"
    if "nothing on" in case and again == 0.0:
        assert ours == 0.0
    else:  # where TRL does not repeat itself bit for bit, neither can we
        assert ours <= max(1e-5, 2 * again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_kl_is_the_sum_over_full_logits(dtype):
    gpu_checks.check_exact_kl(LARGE, "cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_packed_row_is_that_of_copied_prefixes(dtype):
    gpu_checks.check_packed_attention("cuda", dtype)


def test_estimators_stay_on_the_device_and_agree_with_the_cpu():
    gpu_checks.check_functional("cuda")


@needs_bitsandbytes
def test_print_step_time_and_peak_memory_against_trl(model, tmp_path, capsys):
    torch.use_deterministic_algorithms(False)
    tables = []
    for four_bit in (False, True):
        rows = [gpu_checks.price(case, model, tmp_path, LARGE, "cuda", four_bit) for case in PRICES]
        kind = "bf16, LoRA over 4-bit nf4" if four_bit else "float32, all parameters"
        tables.append("\n".join([f"\n{kind}:\n", gpu_checks.PRICE_HEAD, *rows]))
    versions = f"torch {torch.__version__}, TRL {trl.__version__}, transformers {transformers.__version__}"
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}; {versions}; {LARGE}", *tables, sep="\n")
