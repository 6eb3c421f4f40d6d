"""
Noise and bias of the gradient of the KL, form by form, on the embedded tasks: trains a policy for some steps, samples
batches of completions from it, and takes each form's gradient of each batch.

    python docs/scripts/kl_gradient_noise.py [quickstart|hard] [--pairs 32]

Prints variance and bias of the gradient of a batch of 64 completions, relative to the squared gradient, and to the
gradient, of the KL of completions; that gradient is the mean over all batches of the unbiased form with the least
noise. The variance is given twice: of completions of the same 8 prompts, and of prompts and completions.
"""

import argparse
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.functional.kl import k1, k3, kl_in_loss, kl_of_completions
from trl_ext.lookup import import_path

ROOT = Path(__file__).parents[2]
TASKS = {"quickstart": ("quickstart.yaml", 30), "hard": ("process_grpo_quickstart.yaml", 40)}
PROMPTS, COMPLETIONS = 8, 8


def trained(task: str):
    """The policy after some steps of the recipe, its tokenizer, its reference and the prompts."""
    name, steps = TASKS[task]
    options = yaml.safe_load((ROOT / "recipes" / name).read_text(encoding="utf-8"))
    model, data, rewards = (options.pop(key) for key in ("model_name_or_path", "dataset_name", "reward_funcs"))
    changes = {"callback_paths": None, "max_steps": steps, "use_cpu": True, "disable_tqdm": True, "seed": 1}
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
    parser.add_argument("--pairs", type=int, default=32, help="draws of prompts, two batches of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, reference, dataset = trained(args.task)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    pairs, nats = [], 0.0  # two batches of the same prompts each: what their difference is, is noise of sampling
    for _ in range(args.pairs):
        rows = [dataset[i] for i in torch.randperm(len(dataset), generator=generator)[:PROMPTS].tolist()]
        both = [gradients(model, reference, sampled(model, tokenizer, rows)) for _ in range(2)]
        nats += sum(kl for _, kl in both) / (2 * args.pairs)
        pairs.append([found for found, _ in both])
    print(f"KL of a completion: {nats:.2f} nats; {2 * args.pairs} batches of {PROMPTS * COMPLETIONS} completions")
    report(pairs)


def report(pairs: list) -> None:
    """Prints the table. `pairs`: for each draw of prompts, two times `{form: gradient}`."""
    batches, count = [found for pair in pairs for found in pair], 2 * len(pairs)
    mean = {name: sum(found[name] for found in batches) / count for name in batches[0]}
    best = "**sequence**"

    def variance(name):
        """Of the samples of given prompts."""
        return sum((first[name] - second[name]).square().sum().item() / 2 for first, second in pairs) / len(pairs)

    def variance_with_prompts(name):
        first = [one[name] for one, _ in pairs]
        center = sum(first) / len(first)
        return sum((x - center).square().sum().item() for x in first) / (len(first) - 1)

    def apart(name):
        """Squared distance of the mean from that of the sequence form, and its error; what they share cancels."""
        found = [(first[name] - first[best] + second[name] - second[best]) / 2 for first, second in pairs]
        center = sum(found) / len(found)
        spread = sum((x - center).square().sum().item() for x in found) / (len(found) - 1) / len(found)
        return center.square().sum().item() - spread, spread

    centers = [(first[best] + second[best]) / 2 for first, second in pairs]
    between = sum((x - mean[best]).square().sum().item() for x in centers) / (len(centers) - 1)
    scale = mean[best].square().sum().item() - between / len(centers)
    print("| form | variance | with prompts | bias | error of the bias |\n|---|---|---|---|---|")
    for name in mean:
        bias, spread = apart(name)
        cells = [variance(name) / scale, variance_with_prompts(name) / scale]
        cells += [(max(bias, 0.0) / scale) ** 0.5, (spread / scale) ** 0.5]
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    cosine = torch.nn.functional.cosine_similarity(mean["exact in the loss"], mean[best], dim=0).item()
    print(f"cosine of exact in the loss and sequence: {cosine:.3f}")


if __name__ == "__main__":
    main()
