"""Continuations of token prefixes. A backend is a class whose instances are [`Sampler`]s."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..trainers.generation import bare_generation_config
from .config import SamplingConfig


class Source(NamedTuple):
    """
    What is known of a model before its weights are read.

    Args:
        name (`str`):
            Model id or folder.
        is_adapter (`bool`):
            Whether it is an adapter, over a model of its own choice.
        end_tokens (`list[int]`):
            Tokens that end an answer: the tokenizers' and the model's own, as in TRL's trainers.
        positions (`int` or `None`):
            Tokens of a whole text that the model knows; `None` where it does not say.
    """

    name: str
    is_adapter: bool
    end_tokens: list[int]
    positions: int | None

    @classmethod
    def of(cls, name: str, tokenizers: list[Any], trust_remote_code: bool) -> "Source":
        adapter = find_adapter_config_file(name)
        base = name if adapter is None else json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        try:
            own = GenerationConfig.from_pretrained(base).eos_token_id
        except OSError:  # it has none
            own = getattr(config, "eos_token_id", None)
        ends = [tokenizer.eos_token_id for tokenizer in tokenizers]
        ends += own if isinstance(own, list) else [own]
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(name, adapter is not None, sorted({end for end in ends if end is not None}), positions)


class Sampler(Protocol):
    """What a backend is: a count of the tokens that it has sampled, and one call."""

    tokens: int

    def __call__(self, prefixes: list[list[int]], n: list[int], budgets: list[int]) -> list[list[list[int]]]:
        """
        Continuations of each prefix, each cut behind the first token that ends an answer.

        Args:
            prefixes (`list[list[int]]`):
                Token ids, at least one each.
            n (`list[int]`):
                Number of continuations of each.
            budgets (`list[int]`):
                Largest number of tokens of a continuation of each, positive.

        Returns:
            `list[list[list[int]]]`: Token ids, `n[i]` continuations of prefix `i`.
        """
        ...


class TransformersSampler:
    """
    Samples with `generate` of transformers, from the model's distribution and nothing else of its generation config.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            Model, in evaluation mode from here on.
        end_tokens (`list[int]`):
            Tokens that end a continuation: those that end an answer, or, for one step of it, a separator's as well.
        batch_size (`int`, *optional*, defaults to `256`):
            Largest number of continuations that are sampled at once.
        temperature, top_p (`float`, *optional*, defaults to `1.0`):
            Of sampling.
    """

    def __init__(
        self, model: Any, end_tokens: list[int], batch_size: int = 256, temperature: float = 1.0, top_p: float = 1.0
    ):
        self.model, self.end_tokens, self.batch_size = model.eval(), end_tokens, batch_size
        self.options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self.tokens = 0

    @classmethod
    def load(cls, source: Source, config: SamplingConfig, share: float = 1.0) -> "TransformersSampler":
        """Reads the model onto this process's device. `share`, the part of the device's memory, is vLLM's alone."""
        model = AutoModelForCausalLM.from_pretrained(
            source.name, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        ).to(PartialState().device)
        return cls(model, source.end_tokens, config.batch_size or 256, config.temperature, config.top_p)

    def __call__(self, prefixes: list[list[int]], n: list[int], budgets: list[int]) -> list[list[list[int]]]:
        results: list[list[list[int]]] = [[] for _ in prefixes]
        # Of like budget and length together: little is sampled that is cut off, and little is padded.
        order = sorted(range(len(prefixes)), key=lambda i: (budgets[i], len(prefixes[i])))
        jobs = [i for i in order for _ in range(n[i])]
        for start in range(0, len(jobs), self.batch_size):
            rows = jobs[start : start + self.batch_size]
            sampled = self._generate([prefixes[i] for i in rows], max(budgets[i] for i in rows))
            for i, ids in zip(rows, sampled, strict=True):
                results[i].append(self._cut(ids[: budgets[i]]))
        self.tokens += sum(len(ids) for group in results for ids in group)
        return results

    @torch.inference_mode()
    def _generate(self, prefixes: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        width = max(map(len, prefixes))
        pad = self.end_tokens[0]  # never read: masked in front, cut off behind
        ids = torch.tensor([[pad] * (width - len(prefix)) + prefix for prefix in prefixes])
        mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self.end_tokens, pad_token_id=pad, **self.options
        )
        device = self.model.device
        with bare_generation_config(self.model):
            out = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        return out[:, width:].tolist()

    def _cut(self, ids: list[int]) -> list[int]:
        end = next((t for t, token in enumerate(ids) if token in self.end_tokens), len(ids) - 1)
        return ids[: end + 1]


class VLLMSampler:
    """As [`TransformersSampler`], by vLLM in this process. Samples need not be the same when a run is repeated."""

    def __init__(self, source: Source, config: SamplingConfig, share: float = 1.0):
        from vllm import LLM, SamplingParams

        if source.is_adapter:
            raise ValueError(
                f"backend='vllm' reads no adapter folder, got {source.name!r}. Merge it, or use 'transformers'."
            )
        self.llm = LLM(
            model=source.name, dtype=config.dtype, trust_remote_code=config.trust_remote_code, seed=config.seed,
            gpu_memory_utilization=0.9 * share, generation_config="vllm",  # nothing of the model's own
        )  # fmt: skip
        self.options = {"temperature": config.temperature, "top_p": config.top_p, "stop_token_ids": source.end_tokens}
        self.params, self.tokens = SamplingParams, 0

    def __call__(self, prefixes: list[list[int]], n: list[int], budgets: list[int]) -> list[list[list[int]]]:
        seeds = torch.randint(2**31, (len(prefixes),)).tolist()  # from that of the chunk
        params = [
            self.params(n=count, max_tokens=budget, seed=seed, detokenize=False, **self.options)
            for count, budget, seed in zip(n, budgets, seeds, strict=True)
        ]
        prompts = [{"prompt_token_ids": prefix} for prefix in prefixes]
        outputs = self.llm.generate(prompts, sampling_params=params, use_tqdm=False)
        results = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
        self.tokens += sum(len(ids) for group in results for ids in group)
        return results


SAMPLERS: dict[str, Callable[..., Sampler]] = {"transformers": TransformersSampler.load, "vllm": VLLMSampler}
