"""
Attention over packed rows with the variable-length FlashAttention inside PyTorch: two calls per layer for any number
of groups.

1. causal, over all segments: every prefix and every suffix is a sequence of its own;
2. not causal: the suffixes of each group, as one sequence, against its prefix.

On the CPU the two calls are made segment by segment, so that the indices are tested without a GPU. No GPU has run it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .packing import Layout

_aten = torch.ops.aten


class _Sequences(NamedTuple):
    """What one call computes: sequence i of the queries, `cu_q[i]` to `cu_q[i + 1]`, against that of the keys."""

    cu_q: torch.Tensor  # (n + 1,) int32
    cu_k: torch.Tensor  # (n + 1,) int32
    longest_q: int
    longest_k: int
    causal: bool

    def bounds(self) -> Iterator[tuple[slice, slice]]:
        """Of each sequence: queries, keys."""
        q, k = self.cu_q.tolist(), self.cu_k.tolist()
        for i in range(len(q) - 1):
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _sequences(queries: list[int], keys: list[int], causal: bool, device: torch.device) -> _Sequences:
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (queries, keys))
    return _Sequences(cu_q, cu_k, max(queries), max(keys), causal)


class _Plan(NamedTuple):
    own: _Sequences  # all segments
    across: _Sequences | None  # suffixes against prefixes
    suffix: Any  # index of the tokens in suffixes of groups with a prefix
    prefix: Any  # index of the tokens in prefixes


def _plan(layout: Layout, device: torch.device) -> _Plan:
    key = f"varlen {device}"
    if key not in layout.cache:
        segments = [n for group in layout.groups for n in (group.prefix, *group.lengths) if n]
        own, shared = _sequences(segments, segments, True, device), [g for g in layout.groups if g.prefix]
        across = suffix = prefix = None
        if shared:
            across = _sequences([sum(g.lengths) for g in shared], [g.prefix for g in shared], False, device)
            suffix = torch.cat([torch.arange(g.suffixes.start, g.suffixes.stop) for g in shared]).to(device)
            prefix = torch.cat([torch.arange(g.shared.start, g.shared.stop) for g in shared]).to(device)
        layout.cache[key] = _Plan(own, across, suffix, prefix)
    return layout.cache[key]


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: _Sequences, scale: float):
    """`(tokens, heads, size)` → output of the same shape and log-sum-exp `(heads, tokens)`."""
    if q.is_cuda:
        out, lse, *_ = _aten._flash_attention_forward(
            q, k, v, s.cu_q, s.cu_k, s.longest_q, s.longest_k, 0.0, s.causal, False, scale=scale
        )
        return out, lse
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for Q, K in s.bounds():
        o, ls = _aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(0, 1)[None] for x in (q[Q], k[K], v[K])), 0.0, s.causal, scale=scale
        )
        out[Q], lse[:, Q] = o[0].transpose(0, 1), ls[0]
    return out, lse


def _backward(dout, q, k, v, out, lse, s: _Sequences, scale: float):
    """Gradients of q, k and v of one call, given output and log-sum-exp of the whole."""
    if q.is_cuda:
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is none of
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        return _aten._flash_attention_backward(
            dout, q, k, v, out, lse, s.cu_q, s.cu_k, s.longest_q, s.longest_k, 0.0, s.causal, state, unused,
            scale=scale,
        )  # fmt: skip
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for Q, K in s.bounds():
        parts = (x.transpose(0, 1)[None] for x in (dout[Q], q[Q], k[K], v[K], out[Q]))
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, lse[:, Q][None].contiguous(), 0.0, s.causal, scale=scale
        )
        for grad, part, where in zip(grads, found, (Q, K, K), strict=True):
            grad[where] = part[0].transpose(0, 1)
    return grads


class CascadeVarlen(torch.autograd.Function):
    """`(tokens, heads, size)`. Keeps q, k, v, output and log-sum-exp of the packed row only."""

    @staticmethod
    def forward(ctx, q, k, v, layout, scale):
        plan = _plan(layout, q.device)
        out, lse = _forward(q, k, v, plan.own, scale)
        if plan.across is not None:
            s, p = plan.suffix, plan.prefix
            across, l_across = _forward(q[s], k[p], v[p], plan.across, scale)
            l_own = lse[:, s]
            both = torch.logaddexp(l_own, l_across)
            w_own, w_across = (torch.exp(x - both).t()[..., None] for x in (l_own, l_across))
            out.index_copy_(0, s, (out[s] * w_own + across * w_across).to(out.dtype))
            lse.index_copy_(1, s, both)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        plan, dout = _plan(ctx.layout, q.device), dout.contiguous()
        dq, dk, dv = _backward(dout, q, k, v, out, lse, plan.own, ctx.scale)
        if plan.across is not None:
            s, p = plan.suffix, plan.prefix
            given = (dout[s], q[s], k[p], v[p], out[s], lse[:, s].contiguous())
            across = _backward(*given, plan.across, ctx.scale)
            for grad, where, part in zip((dq, dk, dv), (s, p, p), across, strict=True):
                grad.index_add_(0, where, part)
        return dq, dk, dv, None, None


def has_varlen(q: torch.Tensor) -> bool:
    """Whether device, dtype and size have the kernels."""
    if not q.is_cuda or torch.version.hip is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    kernels = hasattr(_aten, "_flash_attention_forward") and hasattr(_aten, "_flash_attention_backward")
    size = q.shape[-1]
    return kernels and size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """`(1, heads, tokens, size)` in and out."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    return CascadeVarlen.apply(q, k, v, layout, scale).transpose(0, 1)[None]
