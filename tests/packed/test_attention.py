"""All forms of attention over a packed row are attention with the mask that says who may see whom."""

import pytest
import torch

from trl_ext.packed.attention import Cascade, expanded
from trl_ext.packed.packing import Group, Layout
from trl_ext.packed.varlen import varlen_attention

FORMS = {"cascade": Cascade.apply, "expanded": expanded, "varlen, emulated": varlen_attention}
LAYOUTS = {
    "one group": [(4, (3, 2, 3))],
    "groups": [(4, (3, 3)), (2, (1, 5, 2)), (0, (4,))],
    "no prefix": [(0, (3,)), (0, (5,)), (0, (2, 2))],
    "one token": [(1, (1, 1)), (0, (1,))],
}


def layout(groups):
    made, at = [], 0
    for prefix, lengths in groups:
        made.append(Group(at, prefix, lengths))
        at += prefix + sum(lengths)
    return Layout(made, at, 0)


def mask(layout):
    """`(tokens, tokens)`: whether the row's token is seen."""
    seen = torch.zeros(layout.total, layout.total, dtype=torch.bool)
    for group in layout.groups:
        seen[group.shared, group.shared] = True
        start = group.suffixes.start
        for length in group.lengths:
            seen[start : start + length, group.shared] = seen[start : start + length, start : start + length] = True
            start += length
    return seen.tril()


def inputs(layout, heads, kv_heads, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    return [torch.randn(1, h, layout.total, 8, dtype=dtype).requires_grad_() for h in sizes]


def dense(q, k, v, layout, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(2, 3) * scale).masked_fill(~mask(layout), float("-inf"))
    return logits.softmax(-1) @ v


def results(form, tensors, layout):
    """Output and gradients of a sum with random weights."""
    out = form(*tensors, layout, 0.4)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), tensors)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("groups", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_dense_attention(form, groups, heads, kv_heads):
    packed = layout(LAYOUTS[groups])
    tensors = inputs(packed, heads, kv_heads)
    for ours, expected in zip(results(FORMS[form], tensors, packed), results(dense, tensors, packed), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("form", ["cascade", "varlen, emulated"])
def test_bf16_is_as_near_to_float64_as_sdpa_is(form):
    packed = layout([(32, (16, 9, 16)), (24, (12, 12))])
    tensors = inputs(packed, 2, 2, torch.bfloat16)
    exact = results(dense, [x.detach().double().requires_grad_() for x in tensors], packed)

    def sdpa(q, k, v, layout, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask(layout), scale=scale)

    for ours, theirs, truth in zip(
        results(FORMS[form], tensors, packed), results(sdpa, tensors, packed), exact, strict=True
    ):
        assert (ours - truth).norm() <= 1.25 * (theirs - truth).norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_suffix_does_not_reach_another(form):
    packed = layout([(3, (2, 4)), (2, (3, 3))])
    q, k, v = inputs(packed, 2, 2)
    start = packed.groups[0].suffixes.start
    own = slice(start, start + 2)
    for grad in torch.autograd.grad(FORMS[form](q, k, v, packed, 1.0)[:, :, own].sum(), (k, v)):
        reached = grad.abs().sum((0, 1, 3)) > 0
        assert reached.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("form", ["cascade", "varlen, emulated"])
def test_only_the_packed_row_is_kept_for_the_backward_pass(form):
    packed = layout([(8, (3, 5, 2))])
    tensors, kept = inputs(packed, 2, 2), {}

    def keep(x):
        kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        FORMS[form](*tensors, packed, 1.0)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept.values()}
    one = tensors[0].numel() * 8
    assert sum(storages.values()) == 4 * one + one // 8, "q, k, v, output; one log-sum-exp per token and head"


def test_outputs_are_laid_out_as_the_next_layer_reads_them():
    packed = layout([(4, (3, 2))])
    out = Cascade.apply(*inputs(packed, 2, 2), packed, 1.0)
    assert out.transpose(1, 2).is_contiguous(), "otherwise each layer keeps a second copy"
