"""Every feature with every way to hold the weights: a few cells in plain `pytest`, all with `pytest -m ''`."""

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import tiny.dpo as tiny_dpo
import torch
from cells import BF16, DPO, FEATURES, TEMPERATURE, WEIGHTS, base_state, build, load, log_probs, trainable
from plain_peft import probe

QUICK = [
    ("full", "k1 in the reward"),
    (BF16, "exact in the loss"),
    (BF16, "process rewards"),
    (BF16, "REINFORCE++"),
    (BF16, "IPO, soft labels"),
    ("LoRA", "exact in the loss"),
    ("adapter", "process rewards"),
    ("4-bit", "REINFORCE++"),
    ("4-bit", "IPO, soft labels"),
    ("4-bit", "shared prefix"),
]
ALL = list(product(WEIGHTS, FEATURES))
CELLS = [pytest.param(*cell, marks=[] if cell in QUICK else [pytest.mark.slow], id=", ".join(cell)) for cell in ALL]
FULL = ("full", BF16)
every_cell = pytest.mark.parametrize(("weights", "feature"), CELLS)
pytestmark = pytest.mark.filterwarnings("ignore:kl_estimator='k1' in the loss is unbiased")


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """Folder of an adapter that is trained already."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_dpo.adapter(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def weights_as_they_are_on_a_gpu():
    """
    Without this, bitsandbytes packs 4-bit weights anew in the first evaluation on processors with AVX512-BF16, which
    rounds their scales to bfloat16 and fails for layers of less than 64 inputs.
    """
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("bitsandbytes"):
            patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def cell(tiny_model, adapter, tmp_path_factory):
    """`cell(weights, feature)`: its trainer after training, its weights before, and where it was saved."""
    cache = {}

    def trained(weights, feature):
        if weights.startswith("4-bit"):
            pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes (trl-ext[quantization])")
        if (weights, feature) not in cache:
            folder = tmp_path_factory.mktemp("cell")
            trainer = build(tiny_model, adapter, weights, feature, folder)
            before = base_state(trainer.model), trainable(trainer.model)
            trainer.train()
            trainer.save_model(folder / "saved")
            cache[weights, feature] = trainer, before, folder / "saved"
        return cache[weights, feature]

    return trained


@every_cell
def test_it_trains(cell, weights, feature):
    trainer, (_, before), _ = cell(weights, feature)
    assert trainer.args.bf16 == (weights == BF16) and trainer.args.gradient_checkpointing
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    assert ("shared prefix" in feature) == any(c["packed"] > 0 for c in trainer.shared_prefix_counts.values())
    after = trainable(trainer.model)
    assert after.keys() == before.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(p.isfinite().all() for p in after.values())
    assert len(moved) >= len(before) - 1  # `lora_A` of a layer whose input is always zero would stay
    expected = torch.bfloat16 if weights.startswith("4-bit") else torch.float32
    assert {p.dtype for p in after.values()} == {expected}


@every_cell
def test_the_base_stays_bit_for_bit_what_it_was(cell, tiny_model, weights, feature):
    trainer, (before, _), _ = cell(weights, feature)
    on_disk = base_state(load(tiny_model, weights))
    held = trainer.ref_model if weights in FULL else trainer.model
    if held is None:
        assert weights in FULL and trainer.precompute_ref_logps
        return
    after = base_state(held)
    assert after.keys() == on_disk.keys()
    for name, value in after.items():
        assert torch.equal(value, on_disk[name]) and (weights in FULL or torch.equal(value, before[name])), name


@every_cell
def test_the_reference_is_the_untouched_model(cell, tiny_model, adapter, weights, feature):
    trainer, _, saved = cell(weights, feature)
    references = trainer.references
    precomputed = feature in DPO and trainer.precompute_ref_logps
    reference = load(tiny_model, weights, adapter if weights.endswith("adapter") else None)
    temperature = 1.0 if feature in DPO else TEMPERATURE
    assert len(references) >= 3
    bf16 = weights == BF16
    tolerance = {"atol": 2e-2, "rtol": 1e-2} if bf16 else {"atol": 2e-5, "rtol": 1e-5}
    for rows in references:
        expected = log_probs(reference, rows, temperature, bf16)
        expected = expected.sum(1) if feature in DPO else expected
        found = rows.logps if feature in DPO else rows.logps * rows.mask
        torch.testing.assert_close(found.double(), expected, **tolerance)
    if not precomputed:
        policy, held = (log_probs(m, references[-1], temperature, bf16) for m in (trainer.model, reference))
        apart = (policy - held).abs().max()
        assert apart > (0.1 if bf16 else 1e-2), "otherwise the policy could stand for the reference"
    assert saved.exists()


@every_cell
def test_only_the_adapter_is_saved(cell, adapter, weights, feature):
    _, _, saved = cell(weights, feature)
    assert saved.joinpath("adapter_model.safetensors").exists() == (weights not in FULL)
    assert saved.joinpath("model.safetensors").exists() == (weights in FULL)
    if weights.endswith("adapter"):  # TRL keeps the original as the adapter `ref`
        from safetensors.torch import load_file

        kept = load_file(saved / "ref" / "adapter_model.safetensors")
        original = load_file(Path(adapter, "adapter_model.safetensors"))
        assert kept.keys() == original.keys()
        assert all(torch.equal(kept[name], original[name]) for name in kept)


@pytest.mark.parametrize("cells", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_plain_peft_reads_what_was_saved(cell, tiny_model, tmp_path, cells):
    if not importlib.util.find_spec("bitsandbytes"):
        cells = [(weights, feature) for weights, feature in cells if not weights.startswith("4-bit")]
    written, logits = [], []
    for weights, feature in cells:
        trainer, _, saved = cell(weights, feature)
        written.append({"model": tiny_model, "saved": str(saved), "four_bit": weights.startswith("4-bit")})
        # Below the autocast that accelerate has laid over the forward: plain transformers has none.
        logits.append(probe(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)))
    (tmp_path / "cells.json").write_text(json.dumps(written))
    torch.save(logits, tmp_path / "logits.pt")
    script = Path(__file__).parent / "plain_peft.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(len(cells))
