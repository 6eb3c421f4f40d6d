"""Steps on the sampled token ids: positions by hand, and laws over random vocabularies and random samples."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ext.trainers.grpo.steps import segment, step_texts

MAX = settings(max_examples=300, deadline=None)


def word_level(vocabulary):
    """Token texts are joined as they are; the last entry is `<eos>`, a special token."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def byte_level(pieces):
    """Tokens are byte strings, as in GPT-2's tokenizer: a character may be spread over several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letter = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    assert sorted(letter.values()) == letters
    vocabulary = {"".join(letter[b] for b in piece): i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": len(vocabulary)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def byte_fallback():
    """Llama 2's decoder: a run of byte tokens is text only as a whole."""
    vocabulary = [f"<0x{b:02X}>" for b in range(256)] + ["a", "▁b", "<eos>"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="a"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def ends(token_ids, tokenizer, trainable=None, **options):
    return [step[-1] for step in segment(token_ids, trainable, tokenizer, **options)]


# Numbers worked by hand

WORDS = word_level(["a", "b", "ab", "\n", "b\n", "\n\n", "\na", "<eos>"])


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([0, 1, 3, 2, 6, 4], [2, 4, 5]),  # `\na` straddles; the step it starts in keeps it
        ([0, 1, 3, 2, 6, 4, 7], [2, 4, 6]),  # <eos> belongs to the last step
        ([0, 5, 3, 1], [2, 3]),  # several separators cut once
        ([3, 0], [1]),  # nothing before the first separator
        ([3, 7], [1]),
        ([7], [0]),  # an immediate <eos> is one step
        ([], []),
        ([0, 3, 7, 3], [3]),
        ([2, 3, 2], [1, 2]),  # no separator at the end
    ],
)
def test_steps_of_a_vocabulary_with_separators_inside_tokens(token_ids, expected):
    assert ends(token_ids, WORDS) == expected


def test_text_that_would_be_encoded_otherwise_keeps_its_own_tokens():
    sampled = [0, 1, 3, 2]  # `a`, `b` where one token `ab` would do
    assert WORDS.decode(sampled, clean_up_tokenization_spaces=False) == "ab\nab"
    assert step_texts(sampled, segment(sampled, None, WORDS), WORDS) == ["ab\n", "ab"]


def test_the_end_of_a_turn_ends_a_step_and_tool_output_belongs_to_none():
    token_ids, mask = [0, 3, 1, 3, 2], [1, 1, 0, 0, 1]
    assert segment(token_ids, mask, WORDS) == [[0, 1], [4]]
    assert segment([0, 1, 2, 0], [1, 0, 0, 1], WORDS) == [[0], [3]]  # without any separator
    assert segment([0, 3], [0, 0], WORDS) == []
    assert segment([3, 0, 3, 1], [0, 1, 0, 1], WORDS) == [[1], [3]]


@pytest.mark.parametrize("separator", ["<eos>", "ab", "b\n"])
def test_other_separators(separator):
    token_ids = [2, 4, 7, 0, 7, 7, 2]
    expected = {"<eos>": [2, 5, 6], "ab": [6], "b\n": [1, 6]}  # a lone `ab` is empty
    assert ends(token_ids, WORDS, separator=separator) == expected[separator]


def test_a_newline_before_a_character_of_several_byte_tokens_is_found():
    tokenizer = byte_fallback()
    # The decoder reads the newline and the first bytes of `€` together as invalid bytes, until `€` is complete.
    token_ids = [256, 0x0A, 0xE2, 0x82, 0xAC, 0x0A, 256, 258]
    assert ends(token_ids, tokenizer) == [1, 5, 7]
    assert step_texts(token_ids, segment(token_ids, None, tokenizer), tokenizer) == ["a\n", "€\n", "a"]
    assert ends([257, 0x0A, 257], tokenizer) == [1, 2]  # the space that is dropped at the start alone


def test_a_character_split_over_tokens_with_the_separator_inside():
    tokenizer = byte_level([b"a", b"\n\xc3", b"\xa9", b"\n"])
    assert ends([0, 1, 2, 3], tokenizer) == [1, 3]  # `a\né\n`: the first half of `é` stays with the first step


def test_a_step_ends_function_cuts_where_it_says():
    def every_second(token_ids, tokenizer):
        return list(range(1, len(token_ids), 2))

    assert ends([0, 1, 2, 0, 1], WORDS, step_ends_function=every_second) == [1, 3, 4]
    assert ends([0, 1, 2, 0, 7], WORDS, step_ends_function=every_second) == [1, 4]
    assert ends([0, 1, 2, 0, 1], WORDS, [1, 1, 1, 0, 1], step_ends_function=every_second) == [1, 2, 4]


@pytest.mark.parametrize("value", [[1, 1], [2, 1], [3], [-1], [0.0], None, "01", (0, 1)])
def test_a_step_ends_function_that_returns_anything_else_is_refused(value):
    with pytest.raises(ValueError) as error:
        segment([0, 1, 2], None, WORDS, step_ends_function=lambda ids, tokenizer: value)
    assert str(error.value) == (
        f"step_ends_function returned {value!r} for 3 tokens; it must return increasing token indices below 3."
    )


# Laws

TEXT = st.text("ab\n é€🙂", max_size=12)


@st.composite
def samples(draw):
    """A tokenizer over random pieces, random tokens of it, and which of them are trainable."""
    separator = draw(st.sampled_from(["\n", "\n\n", "b", "é", "\n b"]))
    kind = draw(st.sampled_from([byte_level, word_level]))
    pieces = draw(st.lists(st.text("ab\n é€🙂", min_size=1, max_size=4), min_size=1, max_size=8, unique=True))
    if kind is word_level:
        tokenizer = word_level([*pieces, "<eos>"])
        count = len(pieces) + 1
    else:
        raw = "".join(pieces).encode()
        cuts = sorted(draw(st.sets(st.integers(1, len(raw)), max_size=10)) | {len(raw)})
        parts = {raw[a:b] for a, b in zip([0, *cuts], cuts, strict=False)} | {b"\n", b"a"}
        tokenizer = byte_level(sorted(parts))
        count = len(parts) + 1
    token_ids = draw(st.lists(st.integers(0, count - 1), max_size=20))
    mask = draw(st.none() | st.lists(st.integers(0, 1), min_size=len(token_ids), max_size=len(token_ids)))
    return tokenizer, token_ids, mask, separator


def turns(token_ids, mask):
    runs, run = [], []
    for t in range(len(token_ids) + 1):
        if t < len(token_ids) and (mask is None or mask[t]):
            run.append(t)
        elif run:
            runs.append(run)
            run = []
    return runs


def expected_steps(token_ids, mask, tokenizer, separator):
    """The definition, prefix by prefix: for each occurrence the first prefix that contains it."""

    def decode(ids, **options):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options)

    steps = []
    for turn in turns(token_ids, mask):
        ids = [token_ids[t] for t in turn]
        text = decode(ids)
        last = set()
        for boundary in range(1, len(text) + 1):
            at_end = text[:boundary].endswith(separator)
            overlaps = text[:boundary].count(separator) == text[: boundary - 1].count(separator)
            if at_end and not overlaps:
                last.add(next(k for k in range(len(ids)) if decode(ids[: k + 1]).startswith(text[:boundary])))
        pieces, piece = [], []
        for k, t in enumerate(turn):
            piece.append(t)
            if k in last or k == len(turn) - 1:
                pieces.append(piece)
                piece = []
        merged = []
        for piece in pieces:
            bare = decode([token_ids[t] for t in piece], skip_special_tokens=True).replace(separator, "")
            merged.append((piece, not bare.strip()))
        full = [i for i, (_, empty) in enumerate(merged) if not empty]
        for n, i in enumerate(full):
            start = 0 if n == 0 else i
            stop = full[n + 1] if n + 1 < len(full) else len(merged)
            steps.append([t for piece, _ in merged[start:stop] for t in piece])
        if not full:
            steps.append(turn)
    return steps


@MAX
@given(sample=samples())
def test_steps_are_those_of_the_definition(sample):
    tokenizer, token_ids, mask, separator = sample
    assert segment(token_ids, mask, tokenizer, separator) == expected_steps(token_ids, mask, tokenizer, separator)


@MAX
@given(sample=samples())
def test_steps_cover_every_trainable_token_once_and_none_is_empty(sample):
    tokenizer, token_ids, mask, separator = sample
    steps = segment(token_ids, mask, tokenizer, separator)
    assert [t for step in steps for t in step] == [t for turn in turns(token_ids, mask) for t in turn]
    for step in steps:
        assert step == list(range(step[0], step[-1] + 1)), "a step lies in one turn"
    last_of_turn = {turn[-1] for turn in turns(token_ids, mask)}
    assert last_of_turn <= {step[-1] for step in steps}


@MAX
@given(data=st.data())
def test_a_separator_at_the_end_of_its_token_cuts_exactly_there(data):
    """Lines cut into byte tokens at random, so that characters are split: the tokens of each step are its line."""
    line = st.text("ab é€🙂", min_size=1, max_size=6).filter(str.strip)
    lines = [text.encode() + b"\n" for text in data.draw(st.lists(line, min_size=1, max_size=6))]
    parts = []
    for raw in lines:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(raw)), max_size=6)) | {len(raw)})
        parts += [raw[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    vocabulary = sorted(set(parts))
    tokenizer = byte_level(vocabulary)
    token_ids = [vocabulary.index(part) for part in parts]
    steps = segment(token_ids, None, tokenizer)
    assert [b"".join(parts[t] for t in step) for step in steps] == lines
    assert step_texts(token_ids, steps, tokenizer) == [raw.decode() for raw in lines]
