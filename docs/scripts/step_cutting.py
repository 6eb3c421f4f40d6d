"""
Time to cut one completion into steps, by tokenizer family:

    python docs/scripts/step_cutting.py

Prints a Markdown table: CPU milliseconds of `segment` for one completion on one thread, the least of the rounds (other
work on the machine only adds to it). The tokenizers are trained here, on made-up words, so that nothing is downloaded.
"""

import argparse
import random
import time

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_ext.trainers.grpo.steps import segment

SIZES = [(1024, 50), (4096, 100), (4096, 200), (8192, 200), (16384, 400)]  # tokens, steps
SYLLABLES = ["ka", "to", "mi", "ren", "sul", "po", "xi", "ther", "an", "gle", "vo", "dir", "es", "um", "ba", "lin"]
WIDE = "一乙丁七乃九了二人儿入八几刀力十又三下大🙂🎲é"


def words(seed: int, count: int, wide: float = 0.0) -> list[str]:
    """Made-up words; each is one of wide characters with probability `wide`."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices(WIDE if draw.random() < wide else SYLLABLES, k=draw.randint(1, 4)))

    return [word() for _ in range(count)]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: what is not in the training text is spelt in bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [" ".join(words(0, 20_000))],
        trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma: ▁ for the space, bytes for what is unknown."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.train_from_iterator(
        [" ".join(words(0, 20_000))],
        trainers.BpeTrainer(vocab_size=4096, special_tokens=["<unk>", *fallback], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def completion(tokenizer: PreTrainedTokenizerFast, tokens: int, steps: int, wide: float, seed: int) -> list[int]:
    """Token ids of that many lines, each cut at its share of the tokens and ended by a letter and a line break."""
    ids: list[int] = []
    vocabulary = words(seed, 2000, wide)
    draw = random.Random(seed)
    end = tokenizer("a\n", add_special_tokens=False)["input_ids"][-2:]
    for step in range(steps):
        line: list[int] = []
        wanted = (step + 1) * tokens // steps - len(ids) - len(end)
        while len(line) < wanted:
            line += tokenizer(" " + " ".join(draw.choices(vocabulary, k=20)), add_special_tokens=False)["input_ids"]
        ids += line[:wanted] + end
    return ids


FAMILIES = {
    "byte-level BPE, ASCII": (byte_level, 0.0),
    "byte-level BPE, every tenth word CJK or emoji": (byte_level, 0.1),
    "SentencePiece-like, ASCII": (sentencepiece_like, 0.0),
    "SentencePiece-like, every tenth word CJK or emoji": (sentencepiece_like, 0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print("| tokenizer |", " | ".join(f"{tokens:,} / {steps}" for tokens, steps in SIZES), "|")
    print("|---|" + "---|" * len(SIZES))
    for name, (make, wide) in FAMILIES.items():
        row, tokenizer = [], make()
        for tokens, steps in SIZES:
            times, ids = [], completion(tokenizer, tokens, steps, wide, seed=1)
            for _ in range(rounds):
                start = time.process_time()
                found = segment(ids, None, tokenizer)
                times.append(1e3 * (time.process_time() - start))
                assert len(found) == steps, (len(found), steps)
            row.append(f"{min(times):.1f}")
        print(f"| {name} |", " | ".join(row), "|")


if __name__ == "__main__":
    main()
