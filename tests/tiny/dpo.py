"""Preference pairs for the tiny model of `tiny.py`, and trainers over them."""

import gc

import torch
import trl.trainer.dpo_trainer  # noqa: F401
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tiny import CHARACTERS

gc.freeze()  # each training run collects garbage: not among all that the imports made


def words(seed: int, longest: int) -> str:
    """A text of 1 to `longest` characters that depends on the seed alone."""
    return "".join(CHARACTERS[(7 * seed + 5 * t + seed * t) % len(CHARACTERS)] for t in range(1 + seed % longest))


def pairs(rows: int = 16, **columns) -> Dataset:
    """Plain-text pairs of different lengths; `columns` map a row's index to a value."""
    data = {
        "prompt": [words(3 * i + 1, 6) for i in range(rows)],
        "chosen": [words(5 * i + 2, 9) for i in range(rows)],
        "rejected": [words(11 * i + 3, 13) for i in range(rows)],
        **{name: [value(i) for i in range(rows)] for name, value in columns.items()},
    }
    return Dataset.from_dict(data)


def save_moe(dense: str, path) -> str:
    """A tiny mixture of experts with the tokenizer of `dense`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def noisy(model, seed: int = 1):
    """The model with every weight moved a little, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def adapter(model: str, seed: int = 2):
    """A PEFT model whose adapter is trained already: its B matrices are not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    return fill_b(peft_model, seed)


def fill_b(model, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def build(
    trainer_class,
    config_class,
    model,
    output_dir,
    kind="full",
    modules_to_save=None,
    train_dataset=None,
    eval_dataset=None,
    **options,
):
    """
    A DPO trainer over the tiny pairs; `options` are fields of the config.

    `kind`: `"full"`; `"reference"`, one is given and differs from the policy; `"lora"`, a new adapter, moved away from
    its start; `"adapter"`, a PEFT model is given.
    """
    settings = {
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    given = {}
    if kind == "reference":
        given["ref_model"] = noisy(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    if kind == "lora":
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=modules_to_save
        )
    trainer = trainer_class(
        model=adapter(model) if kind == "adapter" else model,
        args=config_class(output_dir=str(output_dir), **settings),
        train_dataset=pairs() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        **given,
    )
    if kind in ("lora", "adapter"):
        fill_b(trainer.model)
    return trainer
