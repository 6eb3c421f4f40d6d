"""From padded rows to packed rows and back."""

import pytest
import torch

from trl_ext.packed import packing
from trl_ext.packed.order import keep_groups
from trl_ext.packed.packing import Group, Packed, pack


def padded(*rows, left=0, width=None):
    """`(ids, mask, labels)` from pairs of prompt and completion; prompts end in one column, as in GRPO."""
    longest = max(len(prompt) for prompt, _ in rows)
    width = width or longest + max(len(completion) for _, completion in rows)
    ids = torch.zeros(len(rows), left + width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (prompt, completion) in enumerate(rows):
        start = left + longest - len(prompt)
        ids[i, start : start + len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        labels[i, left + longest : left + longest + len(completion)] = torch.tensor(completion)
    return ids, (ids != 0).long(), labels


ABC = [1, 2, 3]


def test_the_example_of_the_docstring():
    packed = pack(*padded((ABC, [7, 8, 9]), (ABC, [5, 6]), left=1, width=7))
    assert packed.input_ids.tolist() == [[1, 2, 3, 7, 8, 3, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert packed.source.tolist() == [2, 3, 4, 5, 6] and packed.targets.tolist() == [7, 8, 9, 5, 6]
    assert list(zip(packed.rows.tolist(), packed.columns.tolist(), strict=True)) == [
        (0, 3), (0, 4), (0, 5), (1, 3), (1, 4),
    ]  # fmt: skip
    assert packed.layout.groups == [Group(start=0, prefix=2, lengths=(3, 2))]
    assert (packed.layout.total, packed.layout.longest) == (7, 5)


CASES = {
    "one group": [(ABC, [7, 8]), (ABC, [9]), (ABC, [4, 5, 6])],
    "groups apart, as in DPO": [(ABC, [7]), ([4, 5], [6]), (ABC, [8, 9]), ([4, 5], [7, 7])],
    "a group torn off": [(ABC, [7]), (ABC, [8]), ([9, 1, 2], [4])],
    "prompts of one token": [([1], [7, 8]), ([1], [9])],
    "completions of one token": [(ABC, [7]), (ABC, [8]), (ABC, [9])],
    "no group": [(ABC, [7, 8]), ([3, 2, 1], [9])],
    "the same completion twice": [(ABC, [7, 8]), (ABC, [7, 8])],
    "prompts of which one begins the other": [(ABC, [7]), ([1, 2], [3, 7]), (ABC, [8]), ([1, 2], [3])],
}


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_tokens_and_every_scored_token(case):
    rows = CASES[case]
    ids, mask, labels = padded(*rows)
    packed = pack(ids, mask, labels)
    groups = {}
    for prompt, completion in rows:
        groups.setdefault(tuple(prompt), []).append(len(completion))
    expected = sum(len(prompt) - 1 + sum(lengths) if len(lengths) > 1 else len(prompt) - 1 + lengths[0]
                   for prompt, lengths in groups.items())  # fmt: skip
    assert packed.layout.total == packed.input_ids.numel() == expected
    labels_back = torch.full_like(labels[:, 1:], -100).index_put((packed.rows, packed.columns), packed.targets)
    assert torch.equal(labels_back, labels[:, 1:])
    # What a suffix token may attend to is its row, up to itself.
    for place, row, column in zip(packed.source.tolist(), packed.rows.tolist(), packed.columns.tolist(), strict=True):
        assert visible(packed, place) == ids[row][mask[row].bool()].tolist()[: position(packed, place) + 1]
        assert packed.input_ids[0, place] == ids[row, column]


def position(packed, place):
    return int(packed.position_ids[0, place])


def visible(packed, place):
    """Tokens that a place of the packed row attends to."""
    for group in packed.layout.groups:
        start = group.suffixes.start
        for length in group.lengths:
            if start <= place < start + length:
                tokens = packed.input_ids[0]
                return tokens[group.shared].tolist() + tokens[start : place + 1].tolist()
            start += length
    raise AssertionError("no suffix")


def test_rows_without_label_are_left_out():
    ids, mask, labels = padded((ABC, [7, 8]), (ABC, [9]), (ABC, [4, 5]))
    labels[1] = -100
    packed = pack(ids, mask, labels)
    assert 1 not in packed.rows and packed.layout.groups == [Group(0, 2, (2, 2))]
    assert pack(ids, mask, torch.full_like(labels, -100)) == "nothing is scored in it"


def test_a_row_is_cut_behind_its_last_label_and_holes_between_labels_are_kept():
    ids, mask, labels = padded((ABC, [7, 8, 9, 4]), (ABC, [5, 6]))
    labels[0, [4, 6]] = -100
    packed = pack(ids, mask, labels)
    assert packed.input_ids.tolist() == [[1, 2, 3, 7, 8, 3, 5]] and packed.targets.tolist() == [7, 9, 5, 6]


def holes(ids, mask, labels):
    mask[0, 1] = 0


def label_first(ids, mask, labels):
    mask[0, :3] = 0  # of a row whose first token is scored, behind padding


def label_on_padding(ids, mask, labels):
    mask[0, 4] = 0


@pytest.mark.parametrize("change", [holes, label_first, label_on_padding])
def test_rows_that_cannot_be_packed_are_said(change):
    batch = padded((ABC, [7, 8]), (ABC, [9]))
    change(*batch)
    assert "a row has holes in its attention mask, or a label that no token comes before" in pack(*batch)


def test_holes_in_a_row_that_is_left_out_do_not_matter():
    ids, mask, labels = padded((ABC, [7, 8]), (ABC, [9]))
    mask[1, 1], labels[1] = 0, -100
    assert pack(ids, mask, labels).layout.total == 4


def test_a_forged_hash_does_not_join_two_prompts(monkeypatch):
    monkeypatch.setattr(packing, "_hash", lambda prompts: torch.zeros(len(prompts), dtype=torch.long))
    assert pack(*padded((ABC, [7]), ([3, 2, 1], [8]))) == "two of its prompts have the same hash"
    assert isinstance(pack(*padded((ABC, [7]), (ABC, [8]))), Packed)


def test_the_device_is_read_twice(monkeypatch):
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, f=original, n=name: reads.append(n) or f(self, *a))
    assert isinstance(pack(*padded((ABC, [7]), (ABC, [8]), ([4], [5]))), Packed)
    assert sorted(reads) == ["__bool__", "tolist"]


# Order of rows


def batch(prompts, **columns):
    ids = torch.tensor([[0, p] for p in prompts])
    return {"prompt_ids": ids, "prompt_mask": ids.ne(0).long(), "note": list(prompts), "n": torch.tensor(8), "x": None,
            "a": 10 * torch.tensor(prompts), **columns}  # fmt: skip


def test_groups_come_together_within_a_step_in_order_of_appearance():
    micro = [batch([3, 1]), batch([1, 3]), batch([5, 4]), batch([4, 5])]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    ordered = keep_groups(micro, 2)
    assert [b["note"] for b in ordered] == [[3, 3], [1, 1], [5, 5], [4, 4]]
    assert [b["a"].tolist() for b in ordered] == [[30, 30], [10, 10], [50, 50], [40, 40]]
    assert all(b["n"] == 8 and b["x"] is None for b in ordered) and torch.equal(state, torch.get_rng_state())
    assert [*ordered[0]] == [*micro[0]], "prompt_ids stay first: TRL takes the number of rows from them"


@pytest.mark.parametrize(("accumulation", "windows"), [(1, [1] * 4), (2, [2, 2]), (4, [4]), (8, [4]), (6, [2, 2])])
def test_no_row_goes_to_another_step(accumulation, windows):
    micro = [batch([i, 9 - i]) for i in range(4)]
    ordered, start = keep_groups(micro, accumulation), 0
    for window in windows:
        part = slice(start, start + window)
        rows = [sorted(row for b in batches[part] for row in b["note"]) for batches in (ordered, micro)]
        assert rows[0] == rows[1]
        start += window


def test_padding_is_no_part_of_a_prompt_and_images_stay_where_they_are():
    micro = [batch([3, 1]), batch([1, 3])]
    micro[0]["prompt_ids"][0, 0] = 7  # under the mask
    assert [b["note"] for b in keep_groups(micro, 2)] == [[3, 3], [1, 1]]
    images = [{**b, "pixel_values": torch.ones(2)} for b in micro]
    assert keep_groups(images, 2) is images
