"""
TRL's asynchronous trainer on a CPU, for examples and tests: what it asks of a GPU and of vLLM, done otherwise.

Whoever has a GPU and vLLM needs nothing of this.
"""

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import requests
import safetensors.torch
import torch
from transformers import AttentionInterface, AutoTokenizer

from recipes.clock.accuracy import AccuracyReport, HardAccuracyReport

TREE_ATTENTION = "tree_fa3"  # TRL's name for it
# How a completion is read as a message, which TRL knows of published chat templates. Not in the tokenizer's file, as
# the synchronous trainer would read completions by it, too.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {"content": {"close_pattern": "<eos>", "content": "text"}},
}


def tree_attention(
    module, query, key, value, attention_mask, *, tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k, **kwargs
):
    """TRL's attention over a tree of samples, without its kernel: each segment sees its path from the root."""
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    outputs = []
    of_queries, of_keys = (itertools.pairwise(ends.tolist()) for ends in (tree_cu_seqlens_q, tree_cu_seqlens_k))
    for (start, end), (first, last) in zip(of_queries, of_keys, strict=True):
        path, before = tree_kv_index[first:last], (last - first) - (end - start)
        seen = torch.ones(end - start, last - first, dtype=torch.bool, device=query.device).tril(before)
        if window:
            seen = seen.triu(before - window + 1)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, path], value[:, :, path], seen, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def without_gpu() -> None:
    """
    For the rest of the process, and in TRL alone: no question for a GPU's name, no kernel for its attention, and a
    server that is not vLLM's. Before a trainer is made.
    """
    from trl.experimental.async_grpo import async_grpo_trainer, async_rollout_worker, packing

    async_grpo_trainer.get_peak_flops_per_device = lambda *args: None
    async_rollout_worker.is_vllm_available = lambda *args, **kwargs: True
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    packing.tree_attention = tree_attention  # which the trainer registers when it is made


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a clock model, with [`RESPONSE_TEMPLATE`]."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


@contextlib.contextmanager
def serving(model: str, max_lora_rank: int | None = None, seed: int = 0) -> Iterator[str]:
    """A server of `recipes.clock.server` for the time of the block; gives its address."""
    lora = [] if max_lora_rank is None else ["--lora", str(max_lora_rank)]
    command = [sys.executable, "-m", "recipes.clock.server", model, "--seed", str(seed), *lora]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.stdin.close()


class Weights:
    """
    Weights to that server in the body of one request, in place of NCCL: a `weight_transfer` of TRL's trainer.

    Args:
        url (`str`):
            Address of the server.
    """

    def __init__(self, url: str):
        self._url = url

    def _post(self, path: str, data: bytes | None = None):
        requests.post(f"{self._url}{path}", data=data, timeout=600).raise_for_status()

    def init_weight_transfer(self):
        """There is nothing to prepare."""

    def pause(self):
        """Before the weights are replaced."""
        self._post("/pause")

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]):
        """All of them at once."""
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in iterator}
        self._post("/weights", safetensors.torch.save(weights))

    def resume(self):
        """After they have been replaced."""
        self._post("/resume")

    def destroy(self):
        """There is nothing to release."""


class AsyncAccuracyReport(AccuracyReport):
    """As [`AccuracyReport`], for a model that the asynchronous trainer has given an attention of its own."""

    def _measure(self, model: Any, processing_class: Any, **kwargs) -> tuple[tuple[float, float], list[str]]:
        inner = getattr(model, "module", model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        inner.set_attn_implementation("sdpa")
        try:
            return super()._measure(model, processing_class)
        finally:
            inner.set_attn_implementation(TREE_ATTENTION)


class AsyncHardAccuracyReport(AsyncAccuracyReport):
    """The same on the held-out prompts of the hard base's data."""

    test_file = HardAccuracyReport.test_file
