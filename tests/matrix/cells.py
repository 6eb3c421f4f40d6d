"""
The cells of the matrix: every way to hold the weights times every feature, trained on the tiny tasks of `tests`.

The reference of a cell is computed without a trainer, by a model that is read from the disk once more.
"""

from pathlib import Path
from typing import NamedTuple

import tiny
import tiny.dpo as tiny_dpo
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

BF16 = "full, bf16"  # TRL's defaults wherever bfloat16 exists: autocast over float32 weights, gradient checkpointing
WEIGHTS = ["full", BF16, "LoRA", "adapter", "4-bit", "4-bit adapter"]
LETTERS = "abcdefgh"
TEMPERATURE = 0.7


def by_letters(completions, completion_steps, **kwargs):
    """Step reward: share of letters in the step."""
    return [[sum(c in LETTERS for c in s) / (len(s) + 1) for s in steps] for steps in completion_steps]


STEPS = {"advantage_estimator": "process_group_relative", "step_separator": " ", "reward_funcs": by_letters}
GRPO = {
    "REINFORCE++": {"advantage_estimator": "reinforce_plus_plus", "kl_estimator": "k3"},
    "REINFORCE++ baseline": {"advantage_estimator": "reinforce_plus_plus_baseline", "kl_estimator": "k2"},
    **{f"{name} in the loss": {"kl_estimator": name} for name in ("k1", "k2", "k3", "exact")},
    "k1 in the reward": {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward"},
    "adaptive beta": {"kl_estimator": "k2", "kl_target": 0.01, "kl_horizon": 100.0},
    "process rewards": {**STEPS, "kl_estimator": "k2"},
    "process and outcome rewards": {**STEPS, "kl_estimator": "k2", "reward_funcs": [by_letters, tiny.digits]},
}
GRPO["shared prefix"] = {"kl_estimator": "exact", "shared_prefix": True}
SOFT = {"preference_prob_column": "p"}
DPO = {
    "IPO": {"loss_type": ["psipo_identity"]},
    "IPO, soft labels": {"loss_type": ["psipo_identity"], **SOFT},
    "ΨPO logit, soft labels": {"loss_type": ["psipo_logit"], **SOFT},
    "β-DPO": {"loss_type": ["beta_dpo"]},
    "IPO, soft labels, references precomputed": {
        "loss_type": ["psipo_identity"], "precompute_ref_log_probs": True, **SOFT,
    },
}  # fmt: skip
DPO["shared prefix, IPO"] = {"loss_type": ["psipo_identity"], "shared_prefix": True}
FEATURES = {**GRPO, **DPO}


class Reference(NamedTuple):
    """Rows that a trainer has asked its reference about, and what it was told."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor  # of the completion's tokens
    logps: torch.Tensor  # per token (GRPO), or per row (DPO)


class RecordingGRPO(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if "ref_per_token_logps" in output:
            self._record(output)
        return output

    def _record(self, output):
        ids, mask = (
            torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], 1) for name in ("ids", "mask")
        )
        row = Reference(ids, mask, output["completion_mask"], output["ref_per_token_logps"])
        self.__dict__.setdefault("references", []).append(Reference(*(x.clone() for x in row)))


class RecordingDPO(DPOTrainer):
    def compute_ref_log_probs(self, model, inputs):
        result = super().compute_ref_log_probs(model, inputs)
        names = ("input_ids", "attention_mask", "completion_mask")
        row = Reference(*(inputs[name].clone() for name in names), torch.cat(result))
        self.__dict__.setdefault("references", []).append(row)
        return result


def four_bit(weights: str) -> BitsAndBytesConfig | None:
    if not weights.startswith("4-bit"):
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def load(model: str, weights: str, adapter: str | Path | None = None, **options):
    """
    The model of a cell, by transformers and PEFT alone. It has no dropout, so that training mode is evaluation; in
    evaluation mode bitsandbytes packs the weights anew on processors with AVX512-BF16, with scales in bfloat16.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=four_bit(weights))
    loaded = loaded if adapter is None else PeftModel.from_pretrained(loaded, adapter, **options)
    return loaded.train()


def build(model: str, adapter: str, weights: str, feature: str, folder: Path, **options):
    """The trainer of a cell. `adapter` is the folder of an adapter that is trained already."""
    settings = {
        "output_dir": str(folder),
        **({"bf16": False} if weights != BF16 else {}),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 5e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "model_init_kwargs": None if weights.endswith("adapter") or weights == BF16 else {"dtype": "float32"},
        **FEATURES[feature],
        **options,
    }
    given = {"model": load(model, weights, adapter, is_trainable=True) if weights.endswith("adapter") else model}
    if weights in ("LoRA", "4-bit"):
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        given["quantization_config"] = four_bit(weights)
    if feature in DPO:
        columns = {"p": lambda i: 0.1 + 0.8 * (i % 5) / 5} if "preference_prob_column" in settings else {}
        return RecordingDPO(args=DPOConfig(**settings), train_dataset=tiny_dpo.pairs(16, **columns), **given)
    reward_funcs = settings.pop("reward_funcs", tiny.digits)
    sampling = {"num_generations": 4, "max_completion_length": 8, "temperature": TEMPERATURE}
    config = GRPOConfig(**{"beta": 0.1, **sampling, **settings})
    return RecordingGRPO(reward_funcs=reward_funcs, args=config, train_dataset=tiny.dataset(), **given)


def base_state(model) -> dict[str, torch.Tensor]:
    """Weights of the model below any adapter, with the scales of quantised ones, by the names of the plain model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def log_probs(model, rows: Reference, temperature: float, bf16: bool = False) -> torch.Tensor:
    """Log-probs of the masked tokens, float64, from the model's plain logits: `(B, T)` of the last T columns."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    logits = logits.double() / temperature
    width = min(rows.mask.size(1), rows.input_ids.size(1) - 1)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None])[..., 0][:, -width:]
    return logps * rows.mask[:, -width:]
