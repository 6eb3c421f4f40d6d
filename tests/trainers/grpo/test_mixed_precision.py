"""The exact KL under accelerate's autocast, TRL's default wherever bfloat16 exists, against the sum over all words."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from tiny import CHARACTERS, dataset, digits, logged
from transformers import BitsAndBytesConfig

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.grpo.exact_kl import lm_head

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
CASES = {
    "full, TRL's defaults": {},
    "full, head in float32": {"cast_lm_head_to_fp32": True},
    "full, reused": {"num_iterations": 2},
    "full, without gradient checkpointing": {"gradient_checkpointing": False},
    "full, float32": {"bf16": False},
    "LoRA": {"peft_config": LORA},
    "LoRA, head in float32": {"peft_config": LORA, "cast_lm_head_to_fp32": True},
    "full, the KL of completions": {"kl_estimator": None, "kl_placement": "sequence"},
    "4-bit LoRA": {"peft_config": LORA, "quantization_config": FOUR_BIT},
}


class ByHand(GRPOTrainer):
    """Keeps, before each loss, the mean KL over the vocabulary; and after it the one that was logged."""

    found: list

    def _compute_loss(self, model, inputs):
        with torch.no_grad():
            peft = self.ref_model is None
            with self.accelerator.unwrap_model(model).disable_adapter() if peft else nullcontext():
                reference = self._log_probs(model if peft else self.ref_model, inputs)
            policy = self._log_probs(model, inputs)
        kl = (policy.exp() * (policy - reference)).sum(-1)
        mask = inputs["completion_mask"]
        loss = super()._compute_loss(model, inputs)
        self.found.append(((kl * mask).sum().item() / mask.sum().item(), self._metrics["train"]["kl"][-1]))
        return loss

    def _log_probs(self, model, inputs):
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        width = inputs["completion_ids"].size(1)
        with self.accelerator.autocast():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
        return (logits.double() / self.temperature).log_softmax(-1)


def trained(model, folder, **options):
    given = {name: options.pop(name) for name in ("peft_config", "quantization_config") if name in options}
    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 5e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "beta": 0.1,
        "kl_estimator": "exact",
        **options,
    }
    trainer = ByHand(model, digits, args=GRPOConfig(str(folder), **settings), train_dataset=dataset(), **given)
    trainer.found = []
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_exact_is_the_sum_over_the_vocabulary_in_mixed_precision(tiny_model, tmp_path, monkeypatch, case):
    if case.startswith("4-bit"):
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # see test_matrix.py
    trainer = trained(tiny_model, tmp_path, **CASES[case])
    assert trainer.args.bf16 == (case != "full, float32")
    assert len(trainer.found) == 4 and trainer.found[-1][0] > 1e-3
    for expected, found in trainer.found:
        assert found == pytest.approx(expected, rel=0.05, abs=2e-4)
    assert all(entry["kl"] >= -1e-6 for entry in logged(trainer))


def test_a_trainer_that_trains_twice_still_finds_its_head(tiny_model, tmp_path):
    trainer = trained(tiny_model, tmp_path, max_steps=1)
    trainer.train()  # accelerate lays a second autocast over the first
    assert len(trainer.found) == 2
    head = lm_head(trainer.accelerator.unwrap_model(trainer.model))
    assert head.weight.shape == (len(CHARACTERS) + 2, 32) and not head.in_float32


def test_bfloat16_is_trls_default_here():
    """Otherwise the cases above would test float32; it says so if TRL changes its mind."""
    assert GRPOConfig("out", use_cpu=True, report_to="none").bf16
