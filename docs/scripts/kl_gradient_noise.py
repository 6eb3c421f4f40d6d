"""
Noise and bias of the gradient of the KL, form by form, on the embedded tasks: trains a policy for some steps, samples
batches of completions from it, and takes each form's gradient of each batch.

    python docs/scripts/kl_gradient_noise.py [quickstart|hard] [--batches 64]

Prints variance and squared bias of the gradient of a batch of 64 completions, relative to the squared gradient of the
KL of completions. That gradient is the mean over all batches of the unbiased form with the least noise.
"""

import argparse
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.functional.kl import k1, k3, kl_in_loss, kl_of_completions

ROOT = Path(__file__).parents[2]
TASKS = {"quickstart": ("quickstart.yaml", 30), "hard": ("process_grpo_quickstart.yaml", 40)}
PROMPTS, COMPLETIONS = 8, 8


def trained(task: str):
    """The policy after some steps of the recipe, its tokenizer, its reference and the prompts."""
    name, steps = TASKS[task]
    options = yaml.safe_load((ROOT / "recipes" / name).read_text(encoding="utf-8"))
    model, data, rewards = (options.pop(key) for key in ("model_name_or_path", "dataset_name", "reward_funcs"))
    changes = {"callback_paths": None, "max_steps": steps, "use_cpu": True, "disable_tqdm": True, "seed": 1}
    from trl_ext.lookup import import_path

    functions = [import_path(path) for path in rewards]
    dataset = load_dataset(str(ROOT / data), split="train")
    args = GRPOConfig(**options | changes)
    trainer = GRPOTrainer(str(ROOT / model), functions, args, train_dataset=dataset)
    trainer.train()
    reference = AutoModelForCausalLM.from_pretrained(ROOT / model, dtype=torch.float32).requires_grad_(False)
    return trainer.model.eval(), trainer.processing_class, reference, dataset


@torch.no_grad()
def sampled(model, tokenizer, rows):
    """Prompts and completions as token ids, `(B, prompt)` and `(B, T)`, and masks of both."""
    prompts = [row["prompt"] for row in rows for _ in range(COMPLETIONS)]
    texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    config = GenerationConfig(max_new_tokens=64, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                              eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].size(1) :]
    ended = (ids == tokenizer.eos_token_id).long().cumsum(1)
    mask = (ended - (ids == tokenizer.eos_token_id).long()) == 0
    return inputs["input_ids"], inputs["attention_mask"], ids, mask


def to_go(x):
    return x.flip(1).cumsum(1).flip(1)


def without_own_group(returns):
    groups = returns.reshape(-1, COMPLETIONS)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (COMPLETIONS - 1)).flatten()


def forms(logps, ref, kl, mask):
    """Each form's term of the loss, `(B, T)`, whose gradient is that of the KL."""
    cost = torch.where(mask, k1(logps, ref).detach(), 0.0)
    centred = torch.where(mask, to_go(cost) - to_go(cost)[mask].mean(), 0.0)
    sums = without_own_group(cost.sum(1))[:, None].expand_as(cost)
    single = torch.cat([kl_of_completions(*rows) for rows in zip(*(
        x.split(1) for x in (kl, logps, logps.detach(), mask)), strict=True)])  # fmt: skip
    return {
        "exact in the loss": kl,
        "k3 in the loss": kl_in_loss(k3, logps, ref, logps.detach(), mask),
        "k1 in the reward, to go, centred over the batch": logps * centred,
        "k1 in the reward, sum of the completion, leave-one-out": logps * torch.where(mask, sums, 0.0),
        "sequence without baseline": single,
        "**sequence**": kl_of_completions(kl, logps, logps.detach(), mask),
    }


def gradients(model, reference, batch):
    """Of the mean over the completions: `{form: (parameters,)}`; and the KL of a completion, in nats."""
    prompts, prompt_mask, ids, mask = batch
    inputs = {"input_ids": torch.cat([prompts, ids], 1), "attention_mask": torch.cat([prompt_mask, mask.long()], 1)}
    width = ids.size(1)
    policy = model(**inputs).logits[:, -width - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        other = reference(**inputs).logits[:, -width - 1 : -1].log_softmax(-1)
    kl = torch.where(mask, (policy.exp() * (policy - other)).sum(-1), 0.0)
    logps, ref = (torch.where(mask, x.gather(-1, ids[..., None])[..., 0], 0.0) for x in (policy, other))
    parameters, found = [*model.parameters()], {}
    for name, term in forms(logps, ref, kl, mask).items():
        parts = torch.autograd.grad(term.sum() / len(ids), parameters, retain_graph=True)
        found[name] = torch.cat([part.flatten() for part in parts]).double()
    return found, kl.sum(1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Noise and bias of the gradient of the KL on the embedded tasks.")
    parser.add_argument("task", choices=TASKS, nargs="?", default="quickstart")
    parser.add_argument("--batches", type=int, default=64, help="batches of 64 completions")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, reference, dataset = trained(args.task)
    generator, count = torch.Generator().manual_seed(0), args.batches
    first, second, lengths, nats = {}, {}, {}, 0.0
    torch.manual_seed(0)
    for _ in range(count):
        rows = [dataset[i] for i in torch.randperm(len(dataset), generator=generator)[:PROMPTS].tolist()]
        found, kl = gradients(model, reference, sampled(model, tokenizer, rows))
        nats += kl / count
        for name, gradient in found.items():
            apart = gradient - found["**sequence**"]  # paired: the noise of the sequence form cancels in part
            first[name] = first.get(name, 0) + gradient / count
            second[name] = second.get(name, 0) + apart / count
            lengths.setdefault(name, []).append((gradient.square().sum().item(), apart.square().sum().item()))
    noise = {name: unbiased_variance([x for x, _ in lengths[name]], first[name]) for name in first}
    scale = first["**sequence**"].square().sum().item() - noise["**sequence**"] / count
    print(f"KL of a completion: {nats:.2f} nats; {count} batches of {PROMPTS * COMPLETIONS} completions")
    print("| form | variance | squared bias, square root |\n|---|---|---|")
    for name in first:
        spread = unbiased_variance([x for _, x in lengths[name]], second[name])
        bias = second[name].square().sum().item() - spread / count
        root = (max(bias, 0.0) / scale) ** 0.5
        error = (spread / count / scale) ** 0.5
        print(f"| {name} | {noise[name] / scale:.2f} | {root:.2f} (noise of this figure {error:.2f}) |")
    cosine = torch.nn.functional.cosine_similarity(first["exact in the loss"], first["**sequence**"], dim=0).item()
    print(f"cosine of exact in the loss and sequence: {cosine:.3f}")


def unbiased_variance(squares: list[float], mean: torch.Tensor) -> float:
    """Total variance of the vectors with these squared lengths and this mean."""
    count = len(squares)
    return (sum(squares) / count - mean.square().sum().item()) * count / (count - 1)


if __name__ == "__main__":
    main()
