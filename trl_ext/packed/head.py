r"""
Log-probs of tokens, and the KL to a reference, from hidden states and an LM head that is not trained.

With logits \\(z = s W h\\), s the scale by the temperature, and \\(\pi = \mathrm{softmax}(z)\\),

$$ \frac{\partial \log\pi(y)}{\partial h} = s\,\Big(W_y - \sum_v \pi(v) W_v\Big), \qquad
   \frac{\partial\,\mathrm{KL}}{\partial h}
   = s \sum_v \pi(v)\Big(\log\frac{\pi(v)}{\pi_{\mathrm{ref}}(v)} - \mathrm{KL}\Big) W_v . $$

Neither depends on the loss: both are computed while the logits are there and kept, `(N, H)` each, and the backward
pass multiplies each row by its incoming gradient. So the logits are not computed twice: two matrix products with the
vocabulary for log-probs, four with the KL, where TRL's head takes three for log-probs alone.
"""

from typing import Any, NamedTuple

import torch
from packaging.version import Version

TILE = 1 << 24  # logits alive at a time
MM_INTO_FLOAT32 = Version(torch.__version__) >= Version("2.8")  # of bfloat16 factors, on CUDA


class Scores(NamedTuple):
    """Per scored token, `(N,)`, nats; `None` where not asked for. Only `log_probs` and `kl` have a gradient."""

    log_probs: torch.Tensor
    kl: torch.Tensor | None
    entropy: torch.Tensor | None
    log_sum_sq_probs: torch.Tensor | None
    mean_logits: torch.Tensor | None
    is_top1: torch.Tensor | None


class FrozenHead(torch.autograd.Function):
    """See [`scores`]. `needs_grad`: whether the derivatives are wanted."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, outputs, ref_hidden, needs_grad):
        n, vocabulary, device = hidden.shape[0], weight.shape[0], hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            names = ["log_probs", *outputs, *(["kl"] if ref_hidden is not None else [])]
            found = {name: hidden.new_empty(n, dtype=torch.float32) for name in names}
            if "is_top1" in found:
                found["is_top1"] = found["is_top1"].bool()
            # Float32: rounded to bfloat16 here, gradients would be a third further from the truth than TRL's.
            jacobian = torch.empty_like(hidden, dtype=torch.float32) if needs_grad else None
            kl_jacobian = None if jacobian is None or ref_hidden is None else torch.empty_like(jacobian)
            weight, step = weight.to(dtype), max(1, TILE // vocabulary)
            for start in range(0, n, step):
                rows = slice(start, min(n, start + step))
                some, ref, j, kl_j = _at(rows, hidden, ref_hidden, jacobian, kl_jacobian)
                tile = _Tile(some, ref, weight, targets[rows], scale)
                tile.fill({name: x[rows] for name, x in found.items()}, j, kl_j)
        ctx.save_for_backward(jacobian, kl_jacobian)
        ctx.hidden_dtype = hidden.dtype
        scores = Scores(**dict.fromkeys(Scores._fields) | found)
        ctx.mark_non_differentiable(*(x for x in scores[2:] if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(scores)

    @staticmethod
    def backward(ctx, grad_log_probs, grad_kl, *_):
        grad = None
        for jacobian, incoming in zip(ctx.saved_tensors, (grad_log_probs, grad_kl), strict=True):
            if jacobian is not None and incoming is not None:
                part = jacobian * incoming[:, None]
                grad = part if grad is None else grad.add_(part)
        return None if grad is None else grad.to(ctx.hidden_dtype), *[None] * 6


def _at(rows: slice, *tensors: torch.Tensor | None) -> list[Any]:
    return [None if x is None else x[rows] for x in tensors]


class _Tile(NamedTuple):
    """Some tokens, whose logits are alive at the same time."""

    hidden: torch.Tensor  # (n, H)
    ref_hidden: torch.Tensor | None  # (n, H)
    weight: torch.Tensor  # (V, H), in the dtype of the products
    targets: torch.Tensor  # (n,)
    scale: float

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, V)`, float32."""
        z = torch.mm(hidden.to(self.weight.dtype), self.weight.t()).float()
        return z if self.scale == 1 else z.mul_(self.scale)

    def write(self, coefficients: torch.Tensor, scale: float, jacobian: torch.Tensor) -> None:
        """Σ_v scale · coefficients(v) W_v in float32, from factors in the dtype of the products."""
        factors, weight = coefficients.to(self.weight.dtype), self.weight
        if weight.is_cuda and weight.dtype != torch.float32 and MM_INTO_FLOAT32:
            jacobian.copy_(torch.mm(factors, weight, out_dtype=torch.float32))
        else:
            torch.mm(factors.float(), weight.float(), out=jacobian)
        jacobian.mul_(scale)

    def fill(self, found: dict[str, torch.Tensor], jacobian: Any, kl_jacobian: Any) -> None:
        """Writes the results into `found`, and the derivatives where there is room for them."""
        target, z = self.targets[:, None], self.logits(self.hidden)
        if "mean_logits" in found:
            found["mean_logits"].copy_(z.mean(1))
        if "is_top1" in found:
            found["is_top1"].copy_(z.argmax(1) == self.targets)
        log_p = z.sub_(z.logsumexp(1, keepdim=True))
        found["log_probs"].copy_(log_p.gather(1, target).squeeze(1))
        if found.keys() <= {"log_probs", "mean_logits", "is_top1"} and jacobian is None:
            return
        p = log_p.exp() if found.keys() & {"entropy", "kl"} else log_p.exp_()
        if "entropy" in found:
            found["entropy"].copy_(-torch.linalg.vecdot(p, log_p))
        if "log_sum_sq_probs" in found:
            found["log_sum_sq_probs"].copy_(torch.linalg.vecdot(p, p).log())
        if "kl" in found:
            self._fill_kl(found["kl"], kl_jacobian, p, log_p)
        if jacobian is not None:
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))  # π − 1 at the token
            self.write(p, -self.scale, jacobian)

    def _fill_kl(self, kl: torch.Tensor, kl_jacobian: Any, p: torch.Tensor, log_p: torch.Tensor) -> None:
        """Overwrites `log_p`."""
        log_q = self.logits(self.ref_hidden)  # type: ignore[arg-type]
        log_ratio = log_p.sub_(log_q.sub_(log_q.logsumexp(1, keepdim=True)))
        kl.copy_(torch.linalg.vecdot(p, log_ratio))
        if kl_jacobian is not None:
            self.write(log_ratio.sub_(kl[:, None]).mul_(p), self.scale, kl_jacobian)


def scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: float = 1.0,
    outputs: tuple[str, ...] = (),
    ref_hidden: torch.Tensor | None = None,
) -> Scores:
    """
    Log-probs of tokens, with what else is asked for, from a head without bias, softcap and gradient.

    Args:
        hidden, ref_hidden (`torch.Tensor` of shape `(N, H)`):
            States that predict the tokens, of the policy and, for the KL, of the reference.
        weight (`torch.Tensor` of shape `(V, H)`):
            LM head of both.
        targets (`torch.Tensor` of shape `(N,)`):
            The tokens.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits: the model's own, divided by the temperature.
        outputs (`tuple[str, ...]`, *optional*):
            Among `"entropy"`, `"log_sum_sq_probs"`, `"mean_logits"`, `"is_top1"`; other names are passed over.

    Returns:
        [`Scores`]: `kl` is KL(policy‖reference) over the whole vocabulary, and `None` without `ref_hidden`.
    """
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()
    named = tuple(name for name in outputs if name in Scores._fields[2:])
    return Scores(*FrozenHead.apply(hidden, weight, targets, scale, named, ref_hidden, needs_grad))
