"""
TRL's forward and ours in turns on the same rows in one process: time, FLOP limit, memory and equality, on one device.

    python docs/scripts/shared_prefix.py [--device cuda] [--dims 1.5b] [--steps 8] [--budget 420] [--out results.json]

Weights are random, made on the device from the dimensions; nothing is downloaded. A step is what a trainer does with
one micro-batch: reference without gradient, policy with gradient, optimizer. Where there is no GPU it is timed in
processor seconds on one thread, and TRL's head scores the completions only, as it does on a GPU. The script ends by
itself: a part is skipped once `--budget` seconds have passed, and what has been measured is written after every part.
"""

import argparse
import json
import os
import random
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
import trl
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_ext.packed.forward import install
from trl_ext.packed.head import scores

DIMENSIONS = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary
    "1.5b": (28, 1536, 8960, 12, 2, 151936),
    "0.5b": (24, 896, 4864, 14, 2, 151936),
    "small": (6, 256, 1024, 4, 2, 8192),
    "tiny": (2, 64, 128, 4, 2, 512),
}


class Case(NamedTuple):
    prompt: int
    completion: int
    rows: int  # per prompt
    prompts: int
    ragged: bool = False
    kl: str = "k3"  # ours: "k3", "exact", or "reward", the k1 of one more pass; TRL's is always k3
    passes: int = 1  # over the same rows; of several, TRL's old log-probs are one more without gradient
    reference: bool = True  # whether one is run, for both


CASES = {
    "cuda": {
        "GRPO 512/128/8": Case(512, 128, 8, 4),
        "GRPO 512/128/8, one group": Case(512, 128, 8, 1),
        "GRPO 256/128/8": Case(256, 128, 8, 4),
        "GRPO 64/256/8": Case(64, 256, 8, 4),
        "GRPO ragged 512/<=1024/8": Case(512, 1024, 8, 2, True),
        "DPO 384/128": Case(384, 128, 2, 16),
        "DPO 128/128": Case(128, 128, 2, 16),
        "DPO 384/128, references known": Case(384, 128, 2, 16, reference=False),
        "reused once, 512/128/8": Case(512, 128, 8, 4, passes=2),
        "exact KL, 512/128/8": Case(512, 128, 8, 4, kl="exact"),
        "nothing shared 2/512/1": Case(2, 512, 1, 32),
    },
    "cpu": {
        "GRPO 512/128/8": Case(512, 128, 8, 1),
        "GRPO 256/128/8": Case(256, 128, 8, 1),
        "GRPO ragged 256/<=256/8": Case(256, 256, 8, 1, True),
        "GRPO 64/256/8": Case(64, 256, 8, 1),
        "GRPO 256/64/4": Case(256, 64, 4, 2),
        "DPO 384/128": Case(384, 128, 2, 4),
        "DPO 128/128": Case(128, 128, 2, 4),
        "DPO 384/128, references known": Case(384, 128, 2, 4, reference=False),
        "reused once, 256/64/4": Case(256, 64, 4, 2, passes=2),
        "exact KL, 256/64/4": Case(256, 64, 4, 2, kl="exact"),
        "k1 in the reward, 256/64/4": Case(256, 64, 4, 2, kl="reward"),
        "nothing shared 2/128/1": Case(2, 128, 1, 8),
    },
}


def build(dims: str, device: str, dtype: torch.dtype):
    """A model with TRL's head, and the same below LoRA."""
    layers, hidden, intermediate, heads, kv, vocabulary = DIMENSIONS[dims]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True, max_position_embeddings=8192,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        base = Qwen2ForCausalLM(config).to(dtype)
    trl.trainer.utils.add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return base, get_peft_model(base, lora).train()


def batch(case: Case, vocabulary: int, device: str, shrink: int = 1) -> dict[str, torch.Tensor]:
    prompt, completion = max(2, case.prompt // shrink), max(2, case.completion // shrink)
    r = random.Random(0)
    ids, mask = [], []
    for _ in range(case.prompts):
        start = [r.randrange(2, vocabulary) for _ in range(prompt)]
        for _ in range(case.rows):
            n = (
                max(1, min(completion, int(r.lognormvariate(0, 0.6) * 0.45 * completion)))
                if case.ragged
                else completion
            )
            ids.append(start + [r.randrange(2, vocabulary) for _ in range(n)] + [0] * (completion - n))
            mask.append([1] * (prompt + n) + [0] * (completion - n))
    input_ids, attention_mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def limit(case: Case, dims: str, shrink: int = 1, r: int = 16) -> tuple[float, float]:
    """FLOPs of TRL's padded k3 step, and of computing every distinct token in its context once."""
    layers, hidden, intermediate, heads, kv, vocabulary = DIMENSIONS[dims]
    keys = hidden // heads * kv
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), *[(hidden, intermediate)] * 3]
    linear = layers * sum(a * b for a, b in shapes)
    adapter = layers * r * sum(a + b for a, b in shapes)
    data = batch(case, 100, "cpu", shrink)
    lengths = (data["labels"] != -100).sum(1).view(case.prompts, case.rows).tolist()
    p, scored = max(2, case.prompt // shrink), sum(map(sum, lengths))
    rows, width = case.rows * case.prompts, data["input_ids"].size(1)

    def total(tokens: int, pairs: int, head: int) -> float:
        return (
            (6 * linear + 6 * adapter) * tokens
            + 18 * hidden * layers * pairs
            + head * 2 * vocabulary * hidden * scored
        )

    padded = total(rows * width, rows * (width * width if case.ragged else width * (width + 1) // 2), 4)
    pairs = sum(p * (p - 1) // 2 + sum(c * (p - 1) + c * (c + 1) // 2 for c in group) for group in lengths)
    return padded, total(case.prompts * (p - 1) + scored, pairs, 3)


def step(model, optimizer, data, weight, kl: str = "k3", shared=None, passes: int = 1, old: bool = False):
    """
    One micro-batch, `passes` times. `kl` "none": no reference is run; "exact": `shared` gives it. `old`: whether old
    log-probs have a pass of their own.
    """
    reference = torch.zeros(())
    with torch.no_grad(), model.disable_adapter():
        if kl == "exact":
            with shared.collecting() as states:
                reference = model(**data, fused_lm_head=True).log_probs
        elif kl != "none":
            reference = model(**data, fused_lm_head=True).log_probs
    if kl == "reward":
        with torch.no_grad():
            weight = weight - 0.04 * (model(**data, fused_lm_head=True).log_probs - reference)
    before = None
    if old:
        with torch.no_grad():
            before = model(**data, fused_lm_head=True).log_probs
    for _ in range(passes):
        if kl == "exact":
            with shared.exact_kl(torch.cat(states)[:, :-1]) as found:
                logps = model(**data, fused_lm_head=True).log_probs
            penalty = 0.04 * found[0]
        else:
            logps = model(**data, fused_lm_head=True).log_probs
            difference = reference - logps
            penalty = 0.04 * (difference.exp() - difference - 1) if kl == "k3" else 0.0
        before = logps.detach() if before is None else before
        loss = weight * (logps - before).exp() + penalty
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class Clock:
    """Seconds of a call: of the wall on a GPU, of the processor without one."""

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"

    def __call__(self, function: Callable) -> float:
        now = time.perf_counter if self.cuda else time.process_time
        self.wait()
        start = now()
        function()
        self.wait()
        return now() - start

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()


def in_turns(clock: Clock, functions: dict[str, Callable], steps: int, warmup: int = 2) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warmup + steps):
        for name, function in functions.items():
            seconds = clock(function)
            if i >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def peak(device: str, function: Callable) -> float | None:
    """MiB above what is allocated before."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def equality(dims: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Largest difference of a log-prob, and relative one of all gradients, from the padded float32 path."""
    base, model = build(dims, device, torch.float32)
    data = batch(Case(64, 32, 4, 2, True), DIMENSIONS[dims][-1], device)
    found, shared = {}, None
    for name, packed, used in (("truth", False, torch.float32), ("trl", False, dtype), ("ours", True, dtype)):
        shared = install(base) if packed else None
        model.zero_grad()
        with torch.autocast(torch.device(device).type, dtype=used, enabled=used != torch.float32):
            logps = model(**data, fused_lm_head=True).log_probs
        logps.float().square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[name] = logps.detach(), gradient
    if shared is None or shared.reason is not None:
        return {"reason": shared and shared.reason}
    logps, gradient = found.pop("truth")
    return {
        name: {
            "log_prob": (ours - logps).abs().max().item(),
            "gradient": ((theirs - gradient).norm() / gradient.norm()).item(),
        }
        for name, (ours, theirs) in found.items()
    }


def saved_bytes(model, data) -> int:
    """Bytes kept for the backward pass, each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(**data, fused_lm_head=True).log_probs.sum()
    del loss
    return sum(kept.values())


def heads(clock: Clock, dims: str, device: str, dtype: torch.dtype, tokens: int, steps: int) -> dict[str, Any]:
    """The LM head alone: TRL's, ours, and ours with the exact KL."""
    _, hidden, *_, vocabulary = DIMENSIONS[dims]
    h = torch.randn(tokens, hidden, device=device, dtype=dtype)
    ref = h + 0.1 * torch.randn_like(h)
    w = torch.randn(vocabulary, hidden, device=device, dtype=dtype) * hidden**-0.5
    y = torch.randint(vocabulary, (tokens,), device=device)

    def run(function: Callable, k3: bool) -> Callable:
        def once():
            x = h.clone().requires_grad_(True)
            if k3:
                with torch.no_grad():
                    function(ref)
            function(x).float().sum().backward()

        return once

    def exact():
        x = h.clone().requires_grad_(True)
        found = scores(x, w, y, 1.0, ("entropy",), ref)
        (found.log_probs + found.kl).sum().backward()

    def theirs(x):
        return ChunkedLogProbFunction.apply(x, w, None, y, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))[0]

    def own(x):
        return scores(x, w, y, 1.0, ("entropy",)).log_probs

    functions = {
        "one product": lambda: torch.mm(h, w.t()),
        "trl": run(theirs, False), "ours": run(own, False),
        "trl, k3": run(theirs, True), "ours, k3": run(own, True), "ours, exact": exact,
    }  # fmt: skip
    memory = {name: peak(device, function) for name, function in functions.items()}
    return {"seconds": in_turns(clock, functions, steps), "peak_mib": memory}


def sampled(model, prompts: torch.Tensor, mask: torch.Tensor, new: int, clock: Clock) -> dict[str, Any]:
    """Log-probs of `new` tokens per row: generation's minus those of TRL's forward on the finished rows, in nats."""
    kept: dict[str, Any] = {}

    def generation():
        kept["generated"] = model.generate(
            input_ids=prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, use_cache=True,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    def forward():
        ids = kept["generated"].sequences
        whole = torch.cat([mask, torch.ones_like(ids[:, -new:])], 1)
        labels = ids.masked_fill(whole == 0, -100)
        labels[:, :-new] = -100
        kept["logps"] = model(input_ids=ids, attention_mask=whole, labels=labels, fused_lm_head=True).log_probs

    seconds = {"generation": clock(generation), "forward": clock(forward)}
    logps = torch.stack(kept["generated"].logits, 1).float().log_softmax(-1)
    tokens = kept["generated"].sequences[:, -new:, None]
    difference = logps.gather(-1, tokens)[..., 0] - kept["logps"][:, -new:].float()
    return {
        "largest": difference.abs().max().item(), "of a token": difference.square().mean().sqrt().item(),
        "of a completion": difference.sum(1).square().mean().sqrt().item(), "seconds": seconds,
    }  # fmt: skip


def sampler(dims: str, device: str, clock: Clock, shrink: int = 1) -> dict[str, Any]:
    """[`sampled`] in float32 and under bf16 autocast: also the k1 to a reference that is the policy, which is 0."""
    base, model = build(dims, device, torch.float32)
    model.eval()
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(8)  # logits that spread as those of a language model do
    base.generation_config.update(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=None)
    prompts = batch(Case(64, 1, 4, 2), DIMENSIONS[dims][-1], device, shrink)["input_ids"][:, :-1]
    mask = torch.ones_like(prompts)
    for row in range(1, len(prompts), 2):  # as TRL pads
        mask[row, :row] = prompts[row, :row] = 0
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        autocast = torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), autocast:
            found[str(dtype)] = sampled(model, prompts, mask, max(2, 128 // shrink), clock)
    return found


class Steps:
    """Both forwards of one model."""

    def __init__(self, dims: str, device: str, dtype: torch.dtype):
        self.dims, self.device = dims, device
        self.base, self.model = build(dims, device, dtype)
        self.theirs = self.base.forward
        self.shared = install(self.base)
        self.ours = self.base.forward
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)

    def measured(self, case: Case, clock: Clock, steps: int, shrink: int) -> dict[str, Any]:
        data = batch(case, DIMENSIONS[self.dims][-1], self.device, shrink)
        weight = torch.randn(data["labels"][:, 1:].shape, device=self.device)

        def run(forward: Any, kl: str, old: bool = False) -> Callable:
            def once():
                self.base.forward = forward
                kind = kl if case.reference else "none"
                step(self.model, self.optimizer, data, weight, kind, self.shared, case.passes, old)

            return once

        self.shared.counts = dict.fromkeys(self.shared.counts, 0)
        functions = {"trl": run(self.theirs, "k3", old=case.passes > 1), "ours": run(self.ours, case.kl)}
        seconds = in_turns(clock, functions, steps)
        counts = dict(self.shared.counts)
        padded, least = limit(case, self.dims, shrink)
        plain = case.kl == "k3" and case.passes == 1 and case.reference  # what the formula is for
        result = {
            "ratio": seconds["trl"] / seconds["ours"], "limit": padded / least if plain else None,
            "seconds": seconds, "tflops": least / seconds["ours"] / 1e12,
            "tokens": counts["packed_tokens"] / max(1, counts["packed"]), "padded": data["input_ids"].numel(),
            "peak_mib": {name: peak(self.device, function) for name, function in functions.items()},
            "reason": self.shared.reason,
        }  # fmt: skip
        if not clock.cuda:
            kept = {}
            for name, forward in (("trl", self.theirs), ("ours", self.ours)):
                self.base.forward = forward
                kept[name] = saved_bytes(self.model, data)
            result["saved_bytes"] = kept["trl"] / kept["ours"]
        return result


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dims", default="1.5b" if gpu else "small", choices=DIMENSIONS)
    parser.add_argument("--steps", type=int, default=8, help="Steps of each kind, behind two that are not counted.")
    parser.add_argument("--budget", type=float, default=420, help="Seconds after which no part is begun.")
    parser.add_argument("--shrink", type=int, default=1, help="Divides all lengths, for a trial run.")
    parser.add_argument(
        "--like", choices=CASES, help="The cases of this device; for a trial run of the GPU's on a CPU."
    )
    parser.add_argument("--cases", default="", help="Only the cases whose name contains this.")
    parser.add_argument("--out", default="shared_prefix.json")
    return parser.parse_args()


def main() -> None:
    a = parsed()
    cuda = torch.device(a.device).type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
        trl.trainer.utils._use_triton = lambda device: True  # its choice of rows, not of kernels
    dtype, clock, started = torch.bfloat16 if cuda else torch.float32, Clock(a.device), time.perf_counter()
    results: dict[str, Any] = {
        "torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu", "dims": a.dims, "load before": os.getloadavg(),
    }  # fmt: skip

    def part(name: str, function: Callable) -> None:
        if time.perf_counter() - started > a.budget:
            results[name] = "no time left"
        else:
            try:
                results[name] = function()
            except Exception:  # a part that fails must not take the others with it
                results[name] = traceback.format_exc()[-1500:]
            if cuda:
                torch.cuda.empty_cache()
        print(name, json.dumps(results[name]), f"{time.perf_counter() - started:.0f} s", flush=True)
        with open(a.out, "w") as file:
            json.dump({**results, "load": os.getloadavg()}, file, indent=1)

    if not a.cases:
        part("equality float32", lambda: equality("tiny", a.device, torch.float32))
        part("equality bf16", lambda: equality("0.5b" if cuda else "tiny", a.device, torch.bfloat16))
    if a.cases in "the sampler's log-probs":
        part("the sampler's log-probs", lambda: sampler(a.dims, a.device, clock, a.shrink))
    steps = Steps(a.dims, a.device, dtype)
    for name, case in CASES[a.like or ("cuda" if cuda else "cpu")].items():
        if a.cases in name:
            part(name, lambda case=case: steps.measured(case, clock, a.steps, a.shrink))
    if not a.cases:
        part("heads", lambda: heads(clock, a.dims, a.device, dtype, 4096 if cuda else 512, a.steps))


if __name__ == "__main__":
    main()
