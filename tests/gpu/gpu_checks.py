"""
What `tests/gpu` checks on a GPU, for any device and size, so that `test_gpu_checks.py` runs the same code on a CPU.
"""

import gc
import itertools
import math
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.kl import KL_ESTIMATORS, kl_in_loss
from trl_ext.functional.rewards import RewardBatch
from trl_ext.packed.attention import expanded, shared_prefix_attention
from trl_ext.packed.packing import Group, Layout
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.grpo.exact_kl import Head, exact_kl


class Size(NamedTuple):
    hidden: int
    layers: int
    vocabulary: int
    completion: int  # tokens
    batch: int  # completions, or half as many pairs
    prompt: int = 4  # tokens of the shortest


LARGE = Size(hidden=512, layers=4, vocabulary=32_000, completion=128, batch=16)
SMALL = Size(hidden=64, layers=1, vocabulary=50, completion=12, batch=8)
STEP_END = "w5"

CLASSES = {"grpo": (GRPOTrainer, GRPOConfig), "dpo": (DPOTrainer, DPOConfig)}
THEIRS = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}


def even(completion_ids, **kwargs) -> list[float]:
    """Reward: share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def even_by_step(completion_ids, completion_step_ends, **kwargs) -> list[list[float]]:
    """Step reward: whether the step's last token is even."""
    return [
        [float(ids[end] % 2 == 0) for end in ends]
        for ids, ends in zip(completion_ids, completion_step_ends, strict=True)
    ]


STEPS = {"advantage_estimator": "process_group_relative", "step_separator": STEP_END, "reward_funcs": even_by_step}
FEATURES = {
    "REINFORCE++": ("grpo", {"advantage_estimator": "reinforce_plus_plus"}),
    "REINFORCE++ baseline": ("grpo", {"advantage_estimator": "reinforce_plus_plus_baseline"}),
    "k1 in the reward": (
        "grpo",
        {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward", "beta": 0.1},
    ),
    "k1 in the loss": ("grpo", {"kl_estimator": "k1", "beta": 0.1}),
    "k2 in the loss": ("grpo", {"kl_estimator": "k2", "beta": 0.1, "kl_target": 0.05, "kl_horizon": 100.0}),
    "k3 in the loss": ("grpo", {"kl_estimator": "k3", "beta": 0.1}),
    "exact in the loss": ("grpo", {"kl_estimator": "exact", "beta": 0.1}),
    "process rewards": ("grpo", STEPS),
    "shared prefix": ("grpo", {"shared_prefix": True, "kl_estimator": "exact", "beta": 0.1}),
    "IPO": ("dpo", {"loss_type": ["psipo_identity"]}),
    "ΨPO, soft labels": ("dpo", {"loss_type": ["psipo_logit"], "preference_prob_column": "p"}),
    "SimPO": ("dpo", {"loss_type": ["simpo"]}),
}
# What must train as TRL does: kind, options of both, options of ours.
EQUAL = {
    "GRPO, nothing on": ("grpo", {"beta": 0.1}, {}),
    "DPO, nothing on": ("dpo", {}, {}),
    "k3": ("grpo", {"beta": 0.1}, {"kl_estimator": "k3"}),
    "group_relative": ("grpo", {}, {"advantage_estimator": "group_relative"}),
    "sigmoid": ("dpo", {}, {"loss_type": ["gpo_logistic"]}),
    "GRPO, shared prefix": ("grpo", {"beta": 0.1}, {"shared_prefix": True}),
    "DPO, shared prefix": ("dpo", {}, {"shared_prefix": True}),
}


def save_model(path, size: Size) -> str:
    """A random Qwen3 and a tokenizer of words `w0`, `w1`, … at `path`."""
    save_tokenizer(path, size)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        head_dim=32,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def save_tokenizer(path, size: Size) -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)


def words(seed: int, length: int, size: Size) -> str:
    return " ".join(f"w{2 + (7 * seed + 5 * t + seed * t) % (size.vocabulary - 2)}" for t in range(length))


def data(kind: str, size: Size) -> Dataset:
    rows = range(4 * size.batch)
    prompts = [words(i, size.prompt + i % 5, size) for i in rows]
    if kind == "grpo":
        return Dataset.from_dict({"prompt": prompts})
    half = size.completion // 2
    columns = {
        "chosen": [words(3 * i + 1, half + i % half, size) for i in rows],
        "rejected": [words(5 * i + 2, half + 3 * i % half, size) for i in rows],
        "p": [0.1 + 0.8 * (i % 5) / 5 for i in rows],
    }
    return Dataset.from_dict({"prompt": prompts, **columns})


def scripted(prompts, trainer) -> dict:
    """Completions that depend on the row alone, so that rounding in sampling cannot separate two runs."""
    size = trainer.size
    ids = [
        [2 + (3 * row + 7 * t + row * t) % (size.vocabulary - 2) for t in range(size.completion - row % 5)]
        for row in range(len(prompts))
    ]
    for row in ids:
        row[3::4] = [5] * len(row[3::4])  # STEP_END
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": ids,
        "logprobs": [[0.0] * len(row) for row in ids],
    }


def build(
    classes, kind, model: str, folder: Path, size: Size, device: str, four_bit: bool = False, lora=False, **options
):
    """A trainer on `device`: float32, or, with `four_bit`, an adapter in bfloat16 over 4-bit weights."""
    trainer_class, config_class = classes
    given = {"processing_class": PreTrainedTokenizerFast.from_pretrained(model)}  # not the one of the model's type
    if four_bit or lora:
        given["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if four_bit:
        compute = torch.float32 if device == "cpu" else torch.bfloat16
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    settings = {
        "output_dir": str(folder),
        "use_cpu": device == "cpu",
        "bf16": four_bit and device != "cpu",
        "tf32": None if device == "cpu" else False,
        "model_init_kwargs": {"dtype": "bfloat16" if four_bit and device != "cpu" else "float32"},
        "per_device_train_batch_size": size.batch if kind == "grpo" else size.batch // 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    if kind == "grpo":
        settings |= {"num_generations": 4, "max_completion_length": size.completion}
        given["reward_funcs"] = settings.pop("reward_funcs", even)
        given["rollout_func"] = scripted
    trainer = trainer_class(model=model, args=config_class(**settings), train_dataset=data(kind, size), **given)
    trainer.size = size
    return trainer


def base_weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}


def check_four_bit(feature: str, model: str, folder: Path, size: Size, device: str) -> None:
    """A feature trains an adapter over 4-bit weights and leaves these alone."""
    kind, options = FEATURES[feature]
    trainer = build(CLASSES[kind], kind, model, folder, size, device, four_bit=True, **options)
    before, start = (
        base_weights(trainer),
        {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
    )
    assert any(p.dtype == torch.uint8 for p in before.values()), "otherwise nothing is quantised"
    trainer.train()
    assert trainer.model.device.type == device
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and torch.tensor(losses).isfinite().all(), losses
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(trainer).items())
    after = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(p, start[name]) for name, p in after.items()), "nothing was trained"


def trained_weights(classes, kind, model, folder, size, device, **options) -> dict[str, torch.Tensor]:
    trainer = build(classes, kind, model, folder, size, device, max_steps=2, optim="sgd", learning_rate=0.1, **options)
    trainer.train()
    return {n: p.detach().cpu() for n, p in trainer.model.named_parameters()}


def difference(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def check_equal(case: str, model: str, folder: Path, size: Size, device: str) -> tuple[float, float, float]:
    """
    Largest difference of a weight after training in float32: ours from TRL's, TRL's from TRL's again, and TRL's from
    where it started.
    """
    kind, both, ours = EQUAL[case]
    start = dict(build(THEIRS[kind], kind, model, folder, size, device).model.named_parameters())
    start = {name: p.detach().cpu() for name, p in start.items()}
    theirs, again = (trained_weights(THEIRS[kind], kind, model, folder, size, device, **both) for _ in range(2))
    own = trained_weights(CLASSES[kind], kind, model, folder, size, device, **both, **ours)
    return difference(own, theirs), difference(again, theirs), difference(start, theirs)


def check_exact_kl(size: Size, device: str, dtype: torch.dtype) -> None:
    """`exact_kl` against the sum over the vocabulary of full float64 logits, with its gradient."""
    rng = torch.Generator().manual_seed(0)
    shape = (2, size.completion, size.hidden)

    def normal(*shape):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    policy, reference = normal(*shape), normal(*shape)
    heads = [Head(normal(size.vocabulary, size.hidden) / size.hidden**0.5, None, 1.0, None, False) for _ in range(2)]
    mask = (torch.arange(size.completion, device=device) % 5 != 3).long().repeat(2, 1)
    leaf = policy.clone().requires_grad_()
    kl = exact_kl(leaf, heads[0], reference, heads[1], mask, temperature=0.7)
    assert kl.device.type == device and kl.dtype == torch.float32 and not kl[mask == 0].any()
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)

    full = policy.double().requires_grad_()
    p = (full @ heads[0].weight.double().T / 0.7).log_softmax(-1)
    q = (reference.double() @ heads[1].weight.double().T / 0.7).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1) * mask
    (expected_gradient,) = torch.autograd.grad(expected.sum(), full)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for actual, wanted in ((kl, expected), (gradient, expected_gradient)):
        error = (actual.double() - wanted).norm() / wanted.norm()
        assert error < tolerance, error


def check_packed_attention(device: str, dtype: torch.dtype) -> None:
    """Output and gradients of attention over a packed row, against copied prefixes in float64 on the CPU."""
    groups = [Group(0, 96, (40, 64, 17)), Group(217, 33, (8, 8))]
    layout = Layout(groups, 266, 160)
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, layout.total, 64, dtype=dtype) for heads in (4, 2, 2)]
    upstream = torch.randn(1, 4, layout.total, 64, dtype=dtype)

    def results(form, device: str, dtype: torch.dtype):
        given = [x.to(device, dtype).requires_grad_() for x in tensors]
        out = form(*given, Layout(groups, layout.total, 160), 0.125)
        grads = torch.autograd.grad(out, given, upstream.to(device, dtype))
        return [x.detach().double().cpu() for x in (out, *grads)]

    exact = results(expanded, "cpu", torch.float64)
    ours, theirs = results(shared_prefix_attention, device, dtype), results(expanded, device, dtype)
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert (a - truth).norm() <= 1.5 * (b - truth).norm() + 1e-6 * truth.norm()


def _advantages(row, rewards, scored, mask, *_):
    steps = {"steps": rewards, "steps_scored": scored} if row.steps == "needed" else {}
    values = {"values": rewards.new_full((len(mask), mask.size(1) + 1), 0.3)} if row.values else {}
    greedy = {"baseline": rewards.new_full((len(mask),), 0.3)} if row.baseline else {}
    return row.function(RewardBatch(rewards, scored, mask, 4, **steps, **values, **greedy))


def _penalty(estimator, rewards, scored, mask, *logps):
    return kl_in_loss(estimator, *logps, mask)


def check_functional(device: str) -> None:
    """The estimators on `device` give what they give on the CPU, on `device` and in the dtype that came in."""
    rng = torch.Generator().manual_seed(0)
    rewards, mask = torch.randn(8, 20, generator=rng), (torch.rand(8, 20, generator=rng) < 0.8).long()
    scored = torch.rand(8, 20, generator=rng) < 0.3
    logps = [-torch.rand(8, 20, generator=rng) for _ in range(3)]
    functions: dict = {name: partial(_advantages, row) for name, row in ADVANTAGE_ESTIMATORS.items()}
    functions |= {f"kl {name}": partial(_penalty, estimator) for name, estimator in KL_ESTIMATORS.items()}
    for name, function in functions.items():
        inputs = [rewards.where(scored, 0.0), scored, mask, *logps]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, actual = function(*inputs), function(*(x.to(device) for x in inputs))
        assert actual.device.type == device and actual.dtype == torch.float32, name
        torch.testing.assert_close(actual.cpu(), expected, atol=1e-6, rtol=1e-5, msg=name)


PRICES = {  # what is compared: kind, options of TRL's trainer, options of ours
    "GRPO, nothing on": ("grpo", {"beta": 0.1}, {"beta": 0.1}),
    "REINFORCE++": ("grpo", {}, {"advantage_estimator": "reinforce_plus_plus"}),
    "k3 in the loss": ("grpo", {"beta": 0.1}, {"beta": 0.1, "kl_estimator": "k3"}),
    "exact in the loss": ("grpo", {"beta": 0.1}, {"beta": 0.1, "kl_estimator": "exact"}),
    "process rewards": ("grpo", {}, STEPS),
    "IPO": ("dpo", {"loss_type": ["ipo"]}, {"loss_type": ["psipo_identity"]}),
}


def price(case: str, model: str, folder: Path, size: Size, device: str, four_bit: bool, steps: int = 12) -> str:
    """A row of the table: seconds per step (median without the first two) and peak memory, TRL's and ours."""
    kind, theirs, ours = PRICES[case]
    (a, m), (b, n) = (
        cost(classes, kind, model, folder, size, device, steps, four_bit=four_bit, **options)
        for classes, options in ((THEIRS[kind], theirs), (CLASSES[kind], ours))
    )
    return f"| {case} | {a:.1f} | {b:.1f} | {b / a:.2f} | {m:.0f} | {n:.0f} |"


def cost(classes, kind, model, folder, size, device, steps, **options) -> tuple[float, float]:
    """Milliseconds of a step, the median without the first two, and peak memory in MiB, NaN on a CPU."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = build(classes, kind, model, folder, size, device, max_steps=steps, **options)
    times = _step_times(trainer, device)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert any(entry["grad_norm"] > 0 for entry in entries), "nothing was trained"
    peak = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else float("nan")
    return 1000 * statistics.median(times[2:]), peak


def _step_times(trainer, device: str) -> list[float]:
    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if device != "cpu":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    stamps = [time.perf_counter()]
    trainer.add_callback(Clock())
    trainer.train()
    return [b - a for a, b in itertools.pairwise(stamps)]


PRICE_HEAD = """\
| case | TRL, ms/step | trl_ext, ms/step | ratio | TRL, peak MiB | trl_ext, peak MiB |
|---|---|---|---|---|---|"""
