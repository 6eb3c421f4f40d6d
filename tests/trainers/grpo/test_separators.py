"""Cutting is linear in the tokens and says what the definition says, in every family of tokenizers."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steps import byte_fallback, byte_level, expected_steps, segment, word_level
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from trl_ext.trainers.grpo import separators
from trl_ext.trainers.grpo.separators import by_prefixes, decode, separator_ends

WORDS = [" fish", " bird", "s", " cat", ".", " of", "ing", " thing"]
WIDE = ["é", "一", "🙂"]
NEWLINE = "\n"


def metaspace():
    """As Llama 2 and Mistral: ▁ for a space, which is dropped at the start of a text; bytes for what is unknown."""
    vocabulary = [f"<0x{b:02X}>" for b in range(256)] + [word.replace(" ", "▁") for word in WORDS]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend), 256


def bytes_and_words():
    """As GPT-2, Llama 3 and Qwen."""
    return byte_level([*(bytes([b]) for b in range(256)), *(word.encode() for word in WORDS)]), 256


def word_pieces():
    """As BERT: a space before every token that is no continuation; here the first 256 stand for themselves."""
    vocabulary = [f"##{chr(b)}" for b in range(256)] + [word.strip() + "x" for word in WORDS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="##\x00"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend), 256


FAMILIES = [bytes_and_words, metaspace, word_pieces]


def lines(words, steps, length, wide):
    """Tokens of `steps` lines of that length; some hold characters of several bytes where `wide`."""
    draw, ids = random.Random(0), []
    for _ in range(steps):
        line = []
        while len(line) < length - 2:
            wide_now = wide and draw.random() < 0.2
            line += list(draw.choice(WIDE).encode()) if wide_now else [words + draw.randrange(len(WORDS))]
        ids += [*line, words, ord(NEWLINE)]
    return ids


@pytest.mark.parametrize("wide", [False, True], ids=["ASCII", "wide"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_grows_with_the_tokens_and_not_with_their_square(monkeypatch, family, wide):
    if family is word_pieces and wide:
        pytest.skip("has no bytes")
    tokenizer, words = family()
    monkeypatch.setattr(separators, "by_prefixes", lambda *args: pytest.fail("went through the prefixes"))
    calls, original = [], type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids, **o: calls.append(len(ids)) or original(self, ids, **o)
    )
    cost = {}
    for steps in (50, 200, 800):
        ids = lines(words, steps, 20, wide)
        calls.clear()
        assert len(segment(ids, None, tokenizer)) == steps
        cost[steps] = len(calls) / len(ids), sum(calls) / len(ids)
    for number, tokens in cost.values():
        assert number < 2.0 and tokens < 12.0, cost
    assert cost[800][1] < 1.2 * cost[200][1], cost


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from([10, 10, 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0xFF, 97, 256, 257, 258]), max_size=30))
@pytest.mark.parametrize(
    "tokenizer",
    [byte_fallback(), metaspace()[0], bytes_and_words()[0]],
    ids=["byte fallback", "metaspace", "byte level"],
)
def test_any_bytes_are_cut_as_the_definition_says(tokenizer, ids):
    assert segment(ids, None, tokenizer) == expected_steps(ids, None, tokenizer, NEWLINE)


def test_long_runs_of_broken_bytes_are_left_to_the_prefixes(monkeypatch):
    tokenizer, words = bytes_and_words()
    ids = [words, 10, *[0xFF] * 300, 10, words, 10]
    found, original = [], by_prefixes
    monkeypatch.setattr(separators, "by_prefixes", lambda *args: found.append(1) or original(*args))
    assert separator_ends(ids, tokenizer, NEWLINE) == [1, 302, 304] and found
    found.clear()
    assert separator_ends([words, 10, 0xFF, 0xE2, words, 10], tokenizer, NEWLINE) == [1, 5] and not found


def test_a_separator_that_looks_like_broken_bytes_is_left_to_the_prefixes():
    tokenizer, words = bytes_and_words()
    ids = [words, *"�".encode(), words, 0xFF, words]
    text = decode(tokenizer, ids)
    assert text.count("�") == 2
    # By the definition the first byte of the sign itself already reads as one.
    assert separator_ends(ids, tokenizer, "�") == by_prefixes(ids, tokenizer, text, [6, 12]) == [1, 5]


def test_several_separators_are_completed_in_the_tokens_between_two_whole_characters():
    tokenizer = byte_level([b"\n\xc3", b"\xa9\n", b"a"])
    assert separator_ends([0, 1, 2], tokenizer, NEWLINE) == [0, 1]


def test_a_tokenizer_whose_texts_depend_on_more_than_their_neighbours_is_cut_right():
    """The text of a token is its place in the completion: no window says what the whole says."""

    class Counting:
        def decode(self, ids, **options):
            return "".join(f"{i}\n" if token == 1 else f"{i}" for i, token in enumerate(ids))

    assert separator_ends([0, 0, 1, 0, 1], Counting(), NEWLINE) == [2, 4]


def test_the_words_of_the_word_level_tokenizer_are_found_in_a_long_text():
    tokenizer = word_level(["a", "b", "\n", "\n\n", "b\nb", "<eos>"])
    draw = random.Random(1)
    ids = [draw.randrange(6) for _ in range(400)]
    assert segment(ids, None, tokenizer) == expected_steps(ids, None, tokenizer, NEWLINE)
