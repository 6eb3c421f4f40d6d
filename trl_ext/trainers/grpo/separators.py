"""
Where the occurrences of a separator end among sampled tokens, by decoding alone, in time linear in the tokens.

The end of an occurrence is the smallest k for which the text of the first k + 1 tokens starts with the whole text up
to there. Decoding every such prefix is exact and quadratic ([`by_prefixes`]). Decoders are local, though: what a few
tokens add to a text needs the token before them and not all of it ([`Walk`]). Each window of the walk is compared with
the whole text, and where the two do not fit together, the prefixes decide.
"""

import bisect
import itertools
import weakref
from typing import Any

# The decoder's sign for bytes that are no character, also for one that the next token would complete.
_BROKEN = "�"
_LONGEST_HOP, _LONGEST_WINDOW, _LONGEST_CONTEXT = 64, 256, 16
# For each tokenizer and token: its text alone, and the number of characters that it adds after another one. What is
# made of them is compared with the whole text.
_OWN: "weakref.WeakKeyDictionary[Any, dict[int, tuple[str, int]]]" = weakref.WeakKeyDictionary()


def decode(tokenizer: Any, token_ids: list[int], skip_special_tokens: bool = False) -> str:
    """Text of tokens as they are."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def separator_ends(token_ids: list[int], tokenizer: Any, separator: str) -> list[int]:
    """
    Index of the token in which each occurrence of `separator` is completed.

    Args:
        token_ids (`list[int]`):
            Sampled tokens of one turn.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        separator (`str`):
            Text that ends a step.

    Returns:
        `list[int]`: Increasing token indices; occurrences that end in one token count once.
    """
    text = decode(tokenizer, token_ids)
    boundaries, start = [], text.find(separator)
    while start >= 0:
        boundaries.append(start + len(separator))
        start = text.find(separator, boundaries[-1])
    if not boundaries:
        return []
    ends = None if _BROKEN in separator else Walk(token_ids, tokenizer, text).ends(boundaries)
    ends = by_prefixes(token_ids, tokenizer, text, boundaries) if ends is None else ends
    return sorted(set(ends))


class Walk:
    """
    Goes through the tokens once. `text[: self.length]` is what the first `self.base` tokens say, and no character is
    cut there.

    Args:
        token_ids (`list[int]`):
            Sampled tokens of one turn.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        text (`str`):
            All of them decoded.
    """

    def __init__(self, token_ids: list[int], tokenizer: Any, text: str):
        self.token_ids, self.tokenizer, self.text = token_ids, tokenizer, text
        self.base, self.length = 0, 0
        self._context: tuple[int, str] | None = (0, "")  # first token of the context of the base, and its text
        self._own = own = _OWN.setdefault(tokenizer, {})
        for token in set(token_ids) - own.keys():  # twice: some decoders drop the space at the start of a text
            alone = decode(tokenizer, [token])
            own[token] = alone, len(decode(tokenizer, [token] * 2)) - len(alone)
        self._length_to = [0, *itertools.accumulate(own[token][1] for token in token_ids)]

    def ends(self, boundaries: list[int]) -> list[int] | None:
        """Index of the token that completes each of these prefixes of the text; `None` where windows do not fit."""
        ends: list[int] = []
        while self.base < len(self.token_ids):
            if len(ends) < len(boundaries):
                self._hop(boundaries[len(ends)])
            else:
                self._hop(len(self.text) + 1)  # the rest has to fit as well
            before = self.base
            ends += self._step(boundaries, len(ends))
            if self.base == before:
                return None
        return ends if self.length == len(self.text) and len(ends) == len(boundaries) else None

    def _hop(self, boundary: int) -> None:
        """Moves the base over tokens that end before `boundary`, many at once, as long as that succeeds."""
        while True:
            before = self._length_to[self.base]
            guess = bisect.bisect_left(self._length_to, before + boundary - self.length, self.base) - 1
            furthest = min(guess, self.base + _LONGEST_HOP, len(self.token_ids))
            # A place inside a character is missed by a token or two; further off, the lengths were wrong.
            for place in (furthest, furthest - 1, furthest - 2, (self.base + furthest) // 2):
                if place - self.base > 1 and self._moves_to(place, boundary):
                    break
            else:
                return

    def _moves_to(self, place: int, boundary: int) -> bool:
        added = self._added(place)
        if added is None or self.length + len(added) >= boundary or not self._fits(added, place):
            return False
        self._move(place, added)
        return True

    def _step(self, boundaries: list[int], first: int) -> list[int]:
        """Moves the base over the next few tokens that end a character; those that complete a boundary on the way."""
        ends: list[int] = []
        for place in range(self.base + 1, min(len(self.token_ids), self.base + _LONGEST_WINDOW) + 1):
            added = self._added(place)
            if added is None:
                continue
            for boundary in itertools.islice(boundaries, first + len(ends), None):
                if not added.startswith(self.text[self.length : boundary]):
                    break
                ends.append(place - 1)
            if self._fits(added, place):
                self._move(place, added)
                return ends
        return []

    def _fits(self, added: str, place: int) -> bool:
        """Whether the text goes on like this, without a character that may be cut."""
        if place == len(self.token_ids):
            return self.text[self.length :] == added
        return not added.endswith(_BROKEN) and self.text.startswith(added, self.length)

    def _move(self, place: int, added: str) -> None:
        self.base, self.length, self._context = place, self.length + len(added), None

    def _added(self, place: int) -> str | None:
        """What the tokens from the base up to `place` add to the text before them."""
        if self._context is None:
            first = self.base - 1
            context = self._own[self.token_ids[first]][0]
            while first and (not context or _BROKEN in context) and self.base - first < _LONGEST_CONTEXT:
                first -= 1
                context = decode(self.tokenizer, self.token_ids[first : self.base])
            self._context = first, context
        first, context = self._context
        both = decode(self.tokenizer, self.token_ids[first:place])
        return both[len(context) :] if both.startswith(context) else None


def by_prefixes(token_ids: list[int], tokenizer: Any, text: str, boundaries: list[int]) -> list[int]:
    """
    The definition. A prefix that stops inside a multi-byte character has a text of its own, so the search goes over
    the prefixes whose text begins the whole text and scans only between two of these.
    """
    prefixes = {-1: ""}

    def prefix(k: int) -> str:
        if k not in prefixes:
            prefixes[k] = decode(tokenizer, token_ids[: k + 1])
        return prefixes[k]

    def whole(k: int) -> int:
        """The last prefix up to k that stops between characters."""
        return next(j for j in range(k, -2, -1) if text.startswith(prefix(j)))

    def search(boundary: int) -> int:
        places = range(len(token_ids))
        past = bisect.bisect_left(places, True, key=lambda k: len(prefix(whole(k))) >= boundary)
        return next(k for k in places[whole(past - 1) + 1 :] if prefix(k).startswith(text[:boundary]))

    return [search(boundary) for boundary in boundaries]
