"""
Exact attention over packed rows, as an attention function of transformers.

A suffix token attends to the prefix of its group and to its own suffix up to itself. These are two attentions; their
outputs o₁, o₂ and log-sum-exps ℓ₁, ℓ₂ make the whole:

    ℓ = log(exp ℓ₁ + exp ℓ₂),    o = exp(ℓ₁ − ℓ) o₁ + exp(ℓ₂ − ℓ) o₂

No key or value of a prefix is copied, and there is no mask. The backward pass of each part is that of the part alone,
given the whole's o and ℓ: with them its weights exp(q·k − ℓ) are those of the whole row.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .packing import Group, Layout
from .varlen import has_varlen, varlen_attention

NAME = "trl_ext_shared_prefix"
# Keyword arguments that change attention in ways that a packed row does not honour.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "alibi", "head_mask")
_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _rows(packed: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Suffixes `(heads, tokens, …)` as rows `(n, heads, longest, …)`, padded at the end with zeros."""
    longest, n = max(lengths), len(lengths)
    if min(lengths) == longest:
        return packed.unflatten(1, (n, longest)).transpose(0, 1)
    rows = packed.new_zeros(n, packed.shape[0], longest, *packed.shape[2:])
    for i, part in enumerate(packed.split(list(lengths), 1)):
        rows[i, :, : part.shape[1]] = part
    return rows


def _packed(rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The inverse of [`_rows`]."""
    if min(lengths) == max(lengths):
        return rows.transpose(0, 1).flatten(1, 2)
    return torch.cat([row[:, :length] for row, length in zip(rows, lengths, strict=True)], 1)


def _batches(layout: Layout) -> list[Group]:
    """Groups without prefix that follow each other as one: their rows are batched in one call."""
    merged: list[Group] = []
    for group in layout.groups:
        if merged and not group.prefix and not merged[-1].prefix:
            merged[-1] = Group(merged[-1].start, 0, merged[-1].lengths + group.lengths)
        else:
            merged.append(group)
    return merged


class Cascade(torch.autograd.Function):
    """`(1, heads, tokens, size)` on the CPU, group by group. Keeps q, k, v, o and ℓ of the packed row only."""

    @staticmethod
    def forward(ctx, q, k, v, layout, scale):
        # Laid out as the next layer reads it, so that this is the only copy that is kept.
        out = q.new_empty((1, q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
        lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        groups = layout.cache.setdefault("cpu", _batches(layout))
        for group in groups:
            P, S, lengths = group.shared, group.suffixes, group.lengths
            own, l_own = _flash(*(_rows(x[0, :, S], lengths) for x in (q, k, v)), 0.0, True, scale=scale)
            own, l_own = _packed(own, lengths)[None], _packed(l_own, lengths)[None]
            if group.prefix:
                out[:, :, P], lse[:, :, P] = _flash(q[:, :, P], k[:, :, P], v[:, :, P], 0.0, True, scale=scale)
                across, l_across = _flash(q[:, :, S], k[:, :, P], v[:, :, P], 0.0, False, scale=scale)
                both = torch.logaddexp(l_own, l_across)
                w_own, w_across = (torch.exp(x - both)[..., None].to(own.dtype) for x in (l_own, l_across))
                own, l_own = own * w_own + across * w_across, both
            out[:, :, S], lse[:, :, S] = own, l_own
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        def part(Q, K, causal):
            given = (dout[:, :, Q], q[:, :, Q], k[:, :, K], v[:, :, K], out[:, :, Q], lse[:, :, Q])
            return _flash_backward(*given, 0.0, causal, scale=ctx.scale)

        for group in ctx.groups:
            P, S, lengths = group.shared, group.suffixes, group.lengths
            given = [_rows(x[0, :, S], lengths) for x in (dout, q, k, v, out, lse)]
            own = _flash_backward(*given, 0.0, True, scale=ctx.scale)
            dq[:, :, S], dk[:, :, S], dv[:, :, S] = (_packed(x, lengths)[None] for x in own)
            if group.prefix:
                across, shared = part(S, P, False), part(P, P, True)
                dq[:, :, S] += across[0]
                dq[:, :, P], dk[:, :, P], dv[:, :, P] = shared[0], shared[1] + across[1], shared[2] + across[2]
        return dq, dk, dv, None, None


def expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """The same by plain autograd, with the prefix's keys and values copied to each row: for what has no flash."""
    outs, gqa = [], q.shape[1] != k.shape[1]
    for group in layout.groups:
        P, S, lengths = group.shared, group.suffixes, group.lengths
        queries, keys, values = (_rows(x[0, :, S], lengths) for x in (q, k, v))
        mask = torch.ones(max(lengths), group.prefix + max(lengths), dtype=torch.bool, device=q.device)
        if group.prefix:
            own = F.scaled_dot_product_attention(
                q[:, :, P], k[:, :, P], v[:, :, P], is_causal=True, scale=scale, enable_gqa=gqa
            )
            outs.append(own)
            copies = (len(lengths), -1, -1, -1)
            keys, values = (torch.cat([x[:, :, P].expand(copies), y], 2) for x, y in ((k, keys), (v, values)))
        mask = mask.tril(group.prefix)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=gqa)
        outs.append(_packed(out, lengths)[None])
    return torch.cat(outs, 2)


def shared_prefix_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> torch.Tensor:
    """
    Attention of a packed row in the form that device and dtype have.

    Args:
        q, k, v (`torch.Tensor` of shape `(1, heads, tokens, size)`):
            Of the packed row; `k` and `v` may have fewer heads.
        layout ([`~trl_ext.packed.packing.Layout`]):
            Where its prefixes and suffixes are.
        scale (`float`):
            Factor on q·k.

    Returns:
        `torch.Tensor` of shape `(1, heads, tokens, size)`.
    """
    same_size = q.shape[-1] == v.shape[-1]
    if q.device.type == "cpu" and same_size and _flash is not None and _flash_backward is not None:
        return Cascade.apply(q, k, v, layout, scale)
    if same_size and has_varlen(q):
        return varlen_attention(q, k, v, layout, scale)
    return expanded(q, k, v, layout, scale)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_prefix: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    What transformers calls as attention: sdpa, or with `shared_prefix` the attention of a packed row.

    The layout comes as a keyword argument through the model, because gradient checkpointing computes a layer again in
    the backward pass, when anything else that was set around the forward pass is gone.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if shared_prefix.calls is not None:
        shared_prefix.calls.append({"dropout": dropout, "is_causal": getattr(module, "is_causal", True), **kwargs})
    device = query.device.type
    if torch.is_autocast_enabled(device):  # sdpa is cast by autocast, a function of ours is not
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = shared_prefix_attention(query, key, value, shared_prefix, scale)
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Makes [`NAME`] known to transformers. Done on installation, so that importing changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
