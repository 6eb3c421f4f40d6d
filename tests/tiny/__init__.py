"""A tiny model and a task for it, so that a trainer's whole run takes a fraction of a second on a CPU."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "abcdefgh 0123456789"
PROMPTS = ["ab", "cde", "ef", "g 1", "h23", "45", "a 6", "bcd"]


def save_model(path) -> str:
    """Saves a random one-layer Qwen3 and a character tokenizer to `path`."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def digits(completions, **kwargs) -> list[float]:
    """Reward: share of digits in the completion."""
    return [sum(c.isdigit() for c in text) / (len(text) + 1) for text in completions]


def scripted_rollout(prompts, trainer) -> dict:
    """Completions that depend on the row's place in the global batch alone, with a 'tool result' inside some."""
    completion_ids, env_mask = [], []
    for i in range(len(prompts)):
        row = trainer.accelerator.process_index * len(prompts) + i + 8 * trainer.state.global_step
        length = 1 + (5 * row) % 7
        completion_ids.append([2 + (3 * row + 7 * t) % len(CHARACTERS) for t in range(length)])
        env_mask.append([0 if row % 2 and t in (1, length - 1) and length > 2 else 1 for t in range(length)])
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    # `logprobs` is required but, without vLLM, not used.
    logprobs = [[0.0] * len(ids) for ids in completion_ids]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "env_mask": env_mask}


def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * 4})


def build(
    trainer_class,
    config_class,
    model,
    output_dir,
    lora=False,
    modules_to_save=None,
    reward_funcs=digits,
    rollout_func=None,
    train_dataset=None,
    eval_dataset=None,
    **options,
):
    """A trainer over the tiny task; `options` are fields of the config."""
    settings = {
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=modules_to_save
        )
    return trainer_class(
        model=model,
        reward_funcs=reward_funcs,
        args=config_class(output_dir=str(output_dir), **settings),
        train_dataset=dataset() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        rollout_func=rollout_func,
    )


def train(trainer_class, config_class, model, output_dir, **options):
    trainer = build(trainer_class, config_class, model, output_dir, **options)
    trainer.train()
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_weights(ours, theirs, **tolerance):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"atol": 0, "rtol": 0}), msg=name)


def logged(trainer, *names) -> list:
    """Values of the metrics `names` in each log entry of a training step."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [[entry[name] for name in names] for entry in entries] if names else entries
