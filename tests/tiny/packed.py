"""A tiny model for shared prefixes: large weights, so that a wrong neighbour shows; prompts worth sharing."""

from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, set_seed

from tiny import CHARACTERS

PROMPTS = ["abcdefgh 0123", "h23 f45 a", "45 a 6 bcd ef", "cde"]


def config(**changes) -> Qwen3Config:
    settings = {
        "vocab_size": len(CHARACTERS) + 2, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2,
        "max_position_embeddings": 128, **changes,
    }  # fmt: skip
    return Qwen3Config(**settings)


def save(tokenizer_from: str, path, **changes) -> str:
    """Saves a random two-layer Qwen3, whose log-probs spread by about a nat, with the tokenizer of another model."""
    set_seed(0)
    Qwen3ForCausalLM(config(**changes)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(path)
    return str(path)


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * 8})


def by_tokens(completion_ids, **kwargs) -> list[float]:
    """A reward of the completion alone."""
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


def rollout(prompts, trainer) -> dict:
    """Completions of different lengths that depend on the row's place alone, with tokens of a tool inside some."""
    completion_ids, env_mask = [], []
    for i in range(len(prompts)):
        row = trainer.accelerator.process_index * len(prompts) + i + 8 * trainer.state.global_step
        length = 1 + (5 * row) % 8
        completion_ids.append([2 + (3 * row + 7 * t + t * t * row) % len(CHARACTERS) for t in range(length)])
        if row % 2:  # as if it had come to its end
            completion_ids[-1][-1] = 1
        env_mask.append([0 if row % 3 == 1 and t in (1, 2) else 1 for t in range(length)])
    ids = trainer.processing_class(prompts)["input_ids"]
    logprobs = [[0.0] * len(tokens) for tokens in completion_ids]
    return {"prompt_ids": ids, "completion_ids": completion_ids, "logprobs": logprobs, "env_mask": env_mask}
