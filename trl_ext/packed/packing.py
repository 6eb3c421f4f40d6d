"""
Rows of a batch as one packed row: the prompt of each group once, then its completions, without padding.

Two rows of one prompt `a b c`; `.` is padding:

    . a b c x y z .      labels at x y z
    . a b c u v . .      labels at u v

    packed     a b | c x y | c u        prefix, and one suffix per row
    position   0 1 | 2 3 4 | 2 3
    predicts   - - | x y z | u v

The last prompt token is in every suffix, because it predicts another token in each; the last token of a row is in
none, because it predicts nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Group:
    """Rows of one prompt; positions are those of the packed row."""

    start: int  # of the prefix
    prefix: int  # its length, may be 0
    lengths: tuple[int, ...]  # of the suffixes, which follow it one after another

    @property
    def shared(self) -> slice:
        """The prefix."""
        return slice(self.start, self.start + self.prefix)

    @property
    def suffixes(self) -> slice:
        """All suffixes."""
        first = self.start + self.prefix
        return slice(first, first + sum(self.lengths))


@dataclass
class Layout:
    """What attention must know of a packed row."""

    groups: list[Group]
    total: int  # tokens of the packed row
    longest: int  # tokens of the longest row: what a sliding window is compared with
    cache: dict[Any, Any] = field(default_factory=dict)  # index tensors, by the form of attention and device
    calls: list[dict[str, Any]] | None = None  # arguments of the attention function, while a model is looked at


@dataclass
class Packed:
    """A packed row, and where its results belong."""

    input_ids: torch.Tensor  # (1, total)
    position_ids: torch.Tensor  # (1, total)
    source: torch.Tensor  # (scored,): place in the packed row of the state that predicts each scored token
    targets: torch.Tensor  # (scored,): that token
    rows: torch.Tensor  # (scored,): its place in the (B, T - 1) log-probs
    columns: torch.Tensor  # (scored,)
    layout: Layout


class _Row(NamedTuple):
    """Columns of a row, and facts about it."""

    start: int  # first attended token
    first: int  # first scored token
    last: int  # last scored token
    scored: int  # number of scored tokens
    regular: int  # attended without holes, and each scored token is attended and behind another one
    number: int  # hash of the prompt


class _Segment(NamedTuple):
    """A prefix or suffix: tokens of a row that stay next to each other."""

    row: int
    column: int
    position: int
    length: int


@torch.no_grad()
def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Packed | str:
    """
    Packs padded rows. Reads results from the device twice, whatever the number of rows.

    Rows whose tokens before the first label are equal form a group, wherever they stand in the batch. Rows without a
    label are left out.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Tokens, padded anywhere but inside a row.
        attention_mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero for tokens that are not padding.
        labels (`torch.Tensor` of shape `(B, T)`):
            The tokens to be scored, -100 elsewhere.

    Returns:
        [`Packed`], or why these rows cannot be packed, as the end of a sentence: nothing is scored, a scored row has
        holes in its mask, or a label that no token of the row comes before.
    """
    device = input_ids.device
    facts, prompts = _facts(input_ids, attention_mask.bool(), labels)
    rows = [_Row(*fact) for fact in facts.tolist()]
    if not all(row.regular for row in rows):
        return "a row has holes in its attention mask, or a label that no token comes before"
    members: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        if row.scored:
            members.setdefault((row.number, row.first - row.start), []).append(i)
    if not members:
        return "nothing is scored in it"
    leaders = torch.tensor([group[0] for group in members.values() for _ in group], device=device)
    followers = torch.tensor([i for group in members.values() for i in group], device=device)
    if not bool((prompts[leaders] == prompts[followers]).all()):
        return "two of its prompts have the same hash"
    segments: list[_Segment] = []
    layout = Layout(
        [*_groups(rows, [*members.values()], segments)],
        total=sum(segment.length for segment in segments),
        longest=max(row.last - row.start for row in rows if row.scored),
    )
    return _packed(input_ids, labels, segments, layout, sum(row.scored for row in rows))


def _facts(input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fields of [`_Row`], `(B, 6)`, and the prompts at the left edge, `(B, T)`, filled with -1."""
    width = input_ids.size(1)
    column = torch.arange(width, device=input_ids.device)
    scored = labels != -100
    scored[:, 0] = False  # TRL's shift drops it
    start, first = mask.int().argmax(1), scored.int().argmax(1)
    end, last = (width - x.flip(1).int().argmax(1) for x in (mask, scored))  # past the last one
    whole = ((column >= start[:, None]) & (column < end[:, None])) == mask
    regular = ~scored.any(1) | (whole.all(1) & (mask | ~scored).all(1) & (first > start))
    length = first - start
    prompts = input_ids.gather(1, (column + start[:, None]).clamp(max=width - 1)).where(column < length[:, None], -1)
    return torch.stack([start, first, last - 1, scored.sum(1), regular.long(), _hash(prompts)], 1), prompts


def _hash(prompts: torch.Tensor) -> torch.Tensor:
    """One 64-bit number per row, `(B,)`: a sum of products with random odd numbers, modulo 2^64."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(1, 2**62, (prompts.size(1),), generator=generator) | 1
    return (prompts * odd.to(prompts.device)).sum(1)


def _groups(rows: list[_Row], members: list[list[int]], segments: list[_Segment]) -> Iterator[Group]:
    """The groups one after another; puts their segments into the list."""
    at = 0
    for group in members:
        leader = rows[group[0]]
        prefix = leader.first - leader.start - 1 if len(group) > 1 else 0  # alone, a prompt is in its suffix
        if prefix:
            segments.append(_Segment(group[0], leader.start, 0, prefix))
        suffixes = [_Segment(i, rows[i].start + prefix, prefix, rows[i].last - rows[i].start - prefix) for i in group]
        segments += suffixes
        yield Group(at, prefix, tuple(suffix.length for suffix in suffixes))
        at += prefix + sum(suffix.length for suffix in suffixes)


def _packed(input_ids: torch.Tensor, labels: torch.Tensor, segments: list[_Segment], layout: Layout, scored: int):
    """Gathers the tokens of the segments. `scored`: number of labels."""
    device = input_ids.device
    table = torch.tensor(segments, device=device)
    lengths = table[:, 3]
    which = torch.repeat_interleave(lengths, output_size=layout.total)
    offset = torch.arange(layout.total, device=device) - (lengths.cumsum(0) - lengths)[which]
    rows, columns, positions = table[which, 0], table[which, 1] + offset, table[which, 2] + offset
    targets = labels[rows, columns + 1]
    # The scored ones first: their number is known, so that the device need not be asked for it.
    source = (targets == -100).to(torch.int8).argsort(stable=True)[:scored]
    return Packed(
        input_ids[rows, columns][None],
        positions[None],
        source,
        targets[source],
        rows[source],
        columns[source],
        layout,
    )
