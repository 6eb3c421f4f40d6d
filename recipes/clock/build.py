"""
Build the clock task's tokenizer, base model and data from nothing, in less than a minute on one CPU core.

    python -m recipes.clock.build [--output DIR] [--base easy|hard] [--seed 0]

The base model is pre-trained on answers that contain mistakes, so that it is right only sometimes: the rest is for
reinforcement learning to do. The `easy` base is shipped in `model` and its data in `data`.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from recipes.clock.accuracy import accuracy, read_rows, write_completions
from recipes.clock.task import (
    LETTERS,
    correct_values,
    flawed_values,
    random_problem,
    step_rewards,
    write_answer,
    write_prompt,
)

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
CHARACTERS = "0123456789+-=:# \n" + LETTERS
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message.role + '|>' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}"
    "{%- else %}{{- message.content }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
NUM_TRAIN, NUM_TEST = 2000, 200
CURRICULUM = [(100, 2), (150, 4), (600, 8)]  # pre-training steps, largest number of moves
SECOND_CURRICULUM = [(300, 8)]  # of bases other than the easy one
BATCH_SIZE = 48


class Base(NamedTuple):
    """How often a base model is pre-trained to err (see `flawed_values`), and the moves of its data's problems."""

    miscarry: float
    slip: float
    num_moves: int


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with chat roles. Characters outside the task become `<unk>`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        padding_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained Qwen3 model of 86,528 parameters, in float32."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    # bitsandbytes quantises blocks of 64 weights, so the widths are multiples of 64 and the head has its own weights.
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,  # at the usual 0.02, with widths this small, learning to copy takes far longer
        tie_word_embeddings=False,
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def training_batch(tokenizer, rng: random.Random, base: Base, num_moves: int) -> dict[str, torch.Tensor]:
    """Flawed conversations of `num_moves` moves, `(B, T)`; the labels are the answers and their `<eos>`."""
    conversations = []
    for _ in range(BATCH_SIZE):
        problem = random_problem(rng, num_moves)
        answer = write_answer(problem, flawed_values(problem, rng, base.miscarry, base.slip))
        messages = [("user", write_prompt(problem)), ("assistant", answer)]
        conversations.append([{"role": role, "content": content} for role, content in messages])
    # Problems of as many moves have as many characters, so no padding is needed.
    input_ids = tokenizer.apply_chat_template(conversations, return_tensors="pt", return_dict=True)["input_ids"]
    (start,) = set((input_ids == tokenizer.convert_tokens_to_ids("<|assistant|>")).nonzero()[:, 1].tolist())
    labels = input_ids.clone()
    labels[:, : start + 1] = -100
    return {"input_ids": input_ids, "labels": labels}


def pretrain(model, tokenizer, base: Base, curriculum: list[tuple[int, int]], rng: random.Random, fewest=1) -> None:
    """Train `model` in place on flawed answers, over stages of so many steps on problems of up to so many moves."""
    steps = [max_moves for num_steps, max_moves in curriculum for _ in range(num_steps)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=len(steps), pct_start=0.1)
    model.train()
    for step, max_moves in enumerate(steps, start=1):
        batch = training_batch(tokenizer, rng, base, rng.randint(fewest, max_moves))
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f} nats per token, up to {max_moves} moves")
    model.eval()


def write_data(folder: Path, rng: random.Random, num_moves: int) -> None:
    """Write `train.jsonl` and `test.jsonl` to `folder`: distinct problems, conversational prompts, right answers."""
    problems = {}  # a dictionary, to keep the order
    while len(problems) < NUM_TRAIN + NUM_TEST:
        problems[random_problem(rng, num_moves)] = None
    rows = [
        {"prompt": [{"role": "user", "content": write_prompt(p)}], "answer": str(correct_values(p)[-1])}
        for p in problems
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": rows[:NUM_TRAIN], "test": rows[NUM_TRAIN:]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def step_accuracy(model, tokenizer, rows: list[dict]) -> float:
    """Fraction of the lines of sampled completions that are right given the lines before them."""
    completions = write_completions(model, tokenizer, rows, do_sample=True)
    rewards = [step_rewards(c, row["prompt"][-1]["content"]) for c, row in zip(completions, rows, strict=True)]
    return sum(map(sum, rewards)) / sum(map(len, rewards))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the clock task's tokenizer, base model and data.")
    parser.add_argument("--output", type=Path, help="folder to write model/ and data/ to (default: here; hard: hard/)")
    parser.add_argument("--base", choices=BASES, default="easy", help="how often the base model errs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, the weights and the pre-training")
    args = parser.parse_args()
    base = BASES[args.base]
    here = Path(__file__).parent
    output = args.output or (here if args.base == "easy" else here / args.base)

    torch.set_num_threads(1)  # sums depend on the number of threads, and the model is too small to gain by more
    torch.manual_seed(args.seed)
    write_data(output / "data", random.Random(f"data {args.seed}"), base.num_moves)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    rng = random.Random(f"pre-training {args.seed}")
    pretrain(model, tokenizer, BASES["easy"], CURRICULUM, rng)
    if args.base != "easy":  # arithmetic is hardly learnt from answers with many slips, so these come second
        pretrain(model, tokenizer, base, SECOND_CURRICULUM, rng)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")

    rows = read_rows(output / "data" / "test.jsonl")
    print(
        f"{model.num_parameters():,} parameters in {output / 'model'}; on {len(rows)} held-out prompts of "
        f"{base.num_moves} moves: greedy {accuracy(model, tokenizer, rows, do_sample=False):.2f}, "
        f"sampled {accuracy(model, tokenizer, rows, do_sample=True):.2f}, "
        f"steps {step_accuracy(model, tokenizer, rows):.2f}"
    )


BASES = {
    "easy": Base(miscarry=0.6, slip=0.05, num_moves=6),
    "hard": Base(miscarry=0.6, slip=0.36, num_moves=8),
}


if __name__ == "__main__":
    main()
