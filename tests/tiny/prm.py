"""Tiny models to train process-reward models from, labelled steps of the clock task, and a trainer of both."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.clock import task
from trl_ext.trainers.prm import PRMConfig, PRMTrainer

CLOCK = Path(task.__file__).parent / "model"
KINDS = ["token_classifier", "marker", "good_bad", "chat"]
CLASSIFIERS = KINDS[:2]
PROMPTS = ["4 a+3 b-5:", "8 a+5:", "1 a+1:", "6 a-2 b+4:"]
STEPS = [["a4+3=7", "b7-5=2", "#2"], ["a8+5=3"], ["a1+1=3", "#3"], ["a6-2=4", "b4+4=9", "#9"]]
LABELS = [[True, True, False], [0.25], [None, 1.0], [0.75, None, False]]


def base(folder, kind: str) -> str:
    """Saves a language model with the tokens of that kind to `folder`; only chats have a template."""
    tokenizer = AutoTokenizer.from_pretrained(CLOCK)
    tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
    tokenizer.add_tokens(["ки"])
    if kind in ("token_classifier", "good_bad"):
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(CLOCK)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return str(folder)


def rows(count: int = 4) -> Dataset:
    """Rows with hard, soft and missing labels, of 1 to 3 steps; conversations and texts cannot be mixed in one."""
    given = {"prompt": PROMPTS, "completions": STEPS, "labels": LABELS}
    return Dataset.from_dict({name: [values[i % 4] for i in range(count)] for name, values in given.items()})


def lora(kind: str, **options):
    from peft import LoraConfig

    task_type = "TOKEN_CLS" if kind in CLASSIFIERS else "CAUSAL_LM"
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": task_type, **options})


def build(model, folder, weights: str = "full", **options) -> PRMTrainer:
    """A trainer over the tiny rows; `options` are fields of the config, or arguments of the trainer."""
    names = ("train_dataset", "eval_dataset", "peft_config", "quantization_config", "compute_metrics")
    given = {name: options.pop(name) for name in names if name in options}
    settings = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **options,
    }  # fmt: skip
    if weights != "full":
        given.setdefault("peft_config", lora(settings.get("kind", "token_classifier")))
    if weights == "4-bit":
        from transformers import BitsAndBytesConfig

        given.setdefault("quantization_config", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    given.setdefault("train_dataset", rows())
    return PRMTrainer(model=model, args=PRMConfig(output_dir=str(folder), **settings), **given)


def outputs_of(trainer, dataset=None) -> torch.Tensor:
    """What the model says of each labelled step of the rows, in one batch as an evaluation sees it, flat."""
    encoded = trainer._prepare_dataset(dataset or rows(), trainer.processing_class, trainer.args, "eval")
    trainer.model.eval()
    batch = trainer.data_collator(list(encoded))
    _, outputs, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    return outputs[batch["labels"] != -100]
