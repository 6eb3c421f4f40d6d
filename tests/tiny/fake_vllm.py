"""
A stand-in for vLLM that samples with the same tiny model on a CPU: what TRL's `server` and `colocate` modes ask of
vLLM, and nothing more. What TRL must not do to an engine is an error here: unknown sampling options, weights with
unknown names or other shapes, use while it sleeps. An engine that sleeps loses its weights, as vLLM's does at level 2.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import trl.generation.vllm_generation as place
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Logprob(NamedTuple):
    logprob: float
    rank: int


class SamplingParams:
    """Names and defaults of vLLM's, of those that the stand-in follows."""

    DEFAULTS = {
        "n": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "max_tokens": 16, "logprobs": None, "seed": None, "ignore_eos": False, "structured_outputs": None,
    }  # fmt: skip

    def __init__(self, **given):
        if unknown := sorted(given.keys() - self.DEFAULTS.keys()):
            raise TypeError(f"SamplingParams takes no {unknown}")
        self.__dict__.update(self.DEFAULTS | given)

    @property
    def warpers(self) -> LogitsProcessorList:
        """What is done to logits before one token is drawn; nothing but the penalty where it is the likeliest."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0.0:
            return found
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0.0:
            found.append(MinPLogitsWarper(self.min_p))
        return found


class Engine:
    """Weights, sampling and log-probs of both modes. A test sets the three knobs and reads what was asked for."""

    noise = 0.0  # standard deviation of what is added to the log-probs it reports, as of other kernels
    nan_every = 0  # every so many tokens of a completion have no log-prob
    made: list["Engine"] = []

    def __init__(self, model: str, seed: int, max_model_len: int | None = None):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.max_model_len = max_model_len or self.model.config.max_position_embeddings
        self._sampling = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator().manual_seed(seed)  # its own, so that noise changes no token
        self._tensors = dict(self.model.named_parameters())
        self.asleep = False
        self._written: set[str] = set()
        self.synced: list[set[str]] = []  # names of the weights written, for each synchronisation
        self.requests: list[tuple[int, SamplingParams]] = []  # prompts, and what was asked
        Engine.made.append(self)

    @torch.no_grad()
    def load_weights(self, pairs) -> None:
        if self.asleep:
            raise RuntimeError("weights are written while the engine sleeps")
        for name, tensor in pairs:
            if name not in self._tensors:
                raise KeyError(f"the engine has no weight {name!r}")
            if self._tensors[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
            self._tensors[name].copy_(tensor)
            self._written.add(name)

    def reset_prefix_cache(self) -> None:
        """TRL calls it behind the last weight; a cache that outlives its weights would be a defect."""
        self.synced.append(self._written)
        self._written = set()

    @torch.no_grad()
    def sleep(self) -> None:
        self.asleep = True
        for weight in self._tensors.values():
            weight.fill_(math.nan)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens, with the one that ends, and their log-probs, of `n` completions of each prompt."""
        if self.asleep:
            raise RuntimeError("the engine is asked while it sleeps")
        self.requests.append((len(prompts), params))
        rows = [ids for ids in prompts for _ in range(params.n)]
        width = max(map(len, rows))
        if width >= self.max_model_len:
            raise ValueError(f"a prompt of {width} tokens is longer than max_model_len {self.max_model_len}")
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        random = self._sampling if params.seed is None else torch.Generator().manual_seed(params.seed)
        tokens: list[list[int]] = [[] for _ in rows]
        logps: list[list[float]] = [[] for _ in rows]
        going = [True] * len(rows)
        while any(going) and ids.size(1) - width < min(params.max_tokens, self.max_model_len - width):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
            all_logps = params.warpers(ids, logits).log_softmax(-1)
            greedy = params.temperature == 0.0
            drawn = all_logps.argmax(-1) if greedy else torch.multinomial(all_logps.exp(), 1, generator=random)[:, 0]
            for i, token in enumerate(drawn.tolist()):
                if going[i]:
                    tokens[i].append(token)
                    logps[i].append(self._reported(all_logps[i, token].item(), len(tokens[i])))
                    going[i] = params.ignore_eos or token != self.model.config.eos_token_id
            ids, mask = torch.cat([ids, drawn[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return tokens, logps

    def _reported(self, logp: float, place: int) -> float:
        if self.nan_every and place % self.nan_every == 0:
            return math.nan
        return logp + self.noise * torch.randn((), generator=self._noise).item()


class LLM:
    """`vllm.LLM`, as much of it as TRL's colocate mode uses."""

    def __init__(
        self, model, *, tensor_parallel_size, gpu_memory_utilization, max_model_len, max_num_seqs, enable_sleep_mode,
        model_impl, distributed_executor_backend, seed, max_num_batched_tokens, logprobs_mode, quantization,
        trust_remote_code,
    ):  # fmt: skip
        if tensor_parallel_size != 1 or logprobs_mode != "processed_logprobs":
            raise NotImplementedError("the stand-in is one worker, with the log-probs of what it draws from")
        self.engine, self._can_sleep = Engine(model, seed, max_model_len), enable_sleep_mode
        self.reset_prefix_cache = self.engine.reset_prefix_cache
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.engine.load_weights))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)),
            model_config=SimpleNamespace(max_model_len=self.engine.max_model_len),
        )

    def generate(self, prompts, sampling_params, use_tqdm=True):
        ids = [row["prompt_token_ids"] for row in prompts]
        tokens, logps = self.engine.sample(ids, sampling_params)
        completions = [
            SimpleNamespace(token_ids=row, logprobs=[{t: Logprob(p, 1)} for t, p in zip(row, values, strict=True)])
            for row, values in zip(tokens, logps, strict=True)
        ]
        n = sampling_params.n
        return [
            SimpleNamespace(prompt_token_ids=prompt, outputs=completions[n * i : n * i + n])
            for i, prompt in enumerate(ids)
        ]

    def sleep(self, level=1):
        if not self._can_sleep or level != 2:
            raise NotImplementedError("made without enable_sleep_mode, or another level than TRL's")
        self.engine.sleep()

    def wake_up(self, tags=None):
        self.engine.asleep = False


class VLLMClient:
    """TRL's client of a server, with the server inside."""

    path: str  # of the model that the server was started with

    def __init__(self, base_url, group_port=51216, connection_timeout=0.0):
        self.engine = Engine(self.path, 0)
        self.reset_prefix_cache = self.engine.reset_prefix_cache

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        sent = [(name, tensor.clone()) for name, tensor in named_params]
        if [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in sent] != metadata:
            raise RuntimeError("the weights are not those announced")
        self.engine.load_weights(sent)

    def generate(self, prompts, features=None, structured_outputs_regex=None, generation_kwargs=None, **params):
        tokens, logps = self.engine.sample(prompts, SamplingParams(**{**params, **(generation_kwargs or {})}))
        return {
            "prompt_ids": prompts,
            "completion_ids": tokens,
            "logprobs": [[[None if math.isnan(p) else p] for p in row] for row in logps],
            "logprob_token_ids": [[[token] for token in row] for row in tokens],
        }


def install(path: str, put: Callable = setattr) -> None:
    """
    TRL finds the stand-in in place of vLLM, and a server that was started with the model at `path`.

    Args:
        path (`str`):
            Path of a saved model.
        put (`Callable`, *optional*, defaults to `setattr`):
            `functools.partial(monkeypatch.setattr, raising=False)` in a test.
    """
    put(place, "is_vllm_available", lambda *args, **kwargs: True)
    for fake in (LLM, SamplingParams, VLLMClient):
        put(place, fake.__name__, fake)
    put(place, "empty_cache", lambda: None)  # TRL's falls back to CUDA
    put(VLLMClient, "path", path)
    Engine.made.clear()
