"""Log-probs and KL from a frozen head: TRL's numbers and gradients, with fewer products."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_ext.packed import head
from trl_ext.packed.head import scores

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
N, H, V, SCALE = 13, 16, 31, 0.7


@pytest.fixture(params=[1 << 24, 4 * V], ids=["one tile", "tiles"])
def states(request, monkeypatch):
    monkeypatch.setattr(head, "TILE", request.param)
    torch.manual_seed(0)
    hidden, ref = torch.randn(N, H, requires_grad=True), torch.randn(N, H)
    return hidden, ref, torch.randn(V, H), torch.randint(V, (N,))


def theirs(hidden, weight, targets, outputs=OUTPUTS, dtype=None):
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, SCALE, outputs)


def gradient(loss, hidden):
    return torch.autograd.grad(loss, hidden, retain_graph=True)[0]


def test_every_output_is_trls(states):
    hidden, _, weight, targets = states
    ours = scores(hidden, weight, targets, SCALE, OUTPUTS)
    for name, expected in zip(OUTPUTS, theirs(hidden, weight, targets), strict=True):
        torch.testing.assert_close(getattr(ours, name), expected, atol=1e-5, rtol=1e-5)
    assert ours.kl is None and scores(hidden, weight, targets).entropy is None


def test_the_gradient_is_trls(states):
    hidden, _, weight, targets = states
    loss = torch.randn(N)
    ours = gradient((loss * scores(hidden, weight, targets, SCALE, ("entropy",)).log_probs).sum(), hidden)
    torch.testing.assert_close(
        ours, gradient((loss * theirs(hidden, weight, targets)[0]).sum(), hidden), atol=1e-5, rtol=1e-5
    )


def test_the_kl_is_the_sum_over_the_vocabulary(states):
    hidden, ref, weight, targets = states
    found = scores(hidden, weight, targets, SCALE, (), ref)
    policy, reference = ((x @ weight.T * SCALE).log_softmax(1) for x in (hidden, ref))
    expected = (policy.exp() * (policy - reference)).sum(1)
    torch.testing.assert_close(found.kl, expected, atol=1e-5, rtol=1e-5)
    both = (found.kl.square() + 3 * found.log_probs).sum()
    truth = (expected.square() + 3 * policy.gather(1, targets[:, None])[:, 0]).sum()
    torch.testing.assert_close(gradient(both, hidden), gradient(truth, hidden), atol=1e-4, rtol=1e-5)
    kernel, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, ref, weight, None, 1.0, 1.0, SCALE, None, SCALE, None
    )
    torch.testing.assert_close(found.kl, kernel, atol=1e-5, rtol=1e-5)


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1] / (N * H * V)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kl", "grad", "expected"), [(0, 0, 1), (0, 1, 2), (1, 1, 4)])
def test_products_with_the_vocabulary(states, kl, grad, expected):
    hidden, ref, weight, targets = states
    with Products() as products, torch.set_grad_enabled(bool(grad)):
        found = scores(hidden, weight, targets, SCALE, ("entropy",), ref if kl else None)
        if grad:
            (found.log_probs + (found.kl if kl else 0)).sum().backward()
    assert products.count == pytest.approx(expected)


def test_trls_head_takes_three(states):
    hidden, _, weight, targets = states
    with Products() as products:
        theirs(hidden, weight, targets)[0].sum().backward()
    assert products.count == pytest.approx(3)


def test_only_log_probs_and_kl_have_a_gradient(states):
    hidden, ref, weight, targets = states
    found = scores(hidden, weight, targets, SCALE, OUTPUTS, ref)
    assert found.log_probs.requires_grad and found.kl.requires_grad
    assert not any(x.requires_grad for x in found[2:])
    assert gradient(found.kl.sum(), hidden).abs().sum() > 0, "one of the two alone"


def test_under_autocast_it_is_not_further_from_float32_than_trls():
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 64, requires_grad=True), torch.randn(500, 64) / 8
    targets, upstream = torch.randint(500, (200,)), torch.randn(200)

    def both(function):
        found = function()
        return found.detach(), gradient((upstream * found).sum(), hidden)

    truth = both(lambda: theirs(hidden, weight, targets)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = both(lambda: scores(hidden, weight, targets, SCALE).log_probs)
        trls = both(lambda: theirs(hidden, weight, targets)[0])
    for a, b, exact in zip(ours, trls, truth, strict=True):
        assert a.dtype == torch.float32 and (a - exact).norm() <= 1.25 * (b - exact).norm()
