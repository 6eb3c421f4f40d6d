r"""
Estimators of the KL divergence of the policy from the reference, per token.

Symbols: \\(\ell_t\\) `per_token_logps`, \\(d_t = \ell_t - \ell^{\mathrm{ref}}_t\\) the log-ratio, policy over
reference (always this sign), \\(w_t = \exp(\ell_t - \ell^{\mathrm{old}}_t)\\) the ratio of the policy to the
sampler. Tokens are sampled from the policy (`old`, where it is given); the unit is nats.

An unbiased *value* says nothing about the *gradient*; each docstring states both. Values saturate at |d| = 20, far
beyond any useful policy, so that none overflows; gradients do so only where the docstring says it. The result is
float32 or wider.
"""

from collections.abc import Callable

import torch

from .reductions import SATURATION


def _with_gradient(value: torch.Tensor, slope: torch.Tensor, per_token_logps: torch.Tensor) -> torch.Tensor:
    """`value`, with the gradient `slope · ∇ per_token_logps`."""
    return value.detach() + _finite(slope.detach()) * (per_token_logps - per_token_logps.detach())


def _finite(values: torch.Tensor) -> torch.Tensor:
    """The largest number of the dtype instead of an infinity, whose product with 0 is NaN."""
    limits = torch.finfo(values.dtype)
    return values.clamp(limits.min, limits.max)


def _widened(values: torch.Tensor) -> torch.Tensor:
    """In float32 or wider: half precision holds no e²⁰."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def k1(per_token_logps: torch.Tensor, ref_per_token_logps: torch.Tensor) -> torch.Tensor:
    r"""
    The log-ratio.

    $$ k_1 = d $$

    Schulman, 2020 (http://joschu.net/blog/kl-approx.html). Expectation over tokens of the policy: the KL; any sign,
    large spread. Gradient as a loss: 0 in expectation, no penalty at all. As a constant in the reward: that of the KL.

    Args:
        per_token_logps, ref_per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the sampled tokens under the policy and the reference, in nats.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Estimate of each token, in nats.

    Example:

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return _widened(per_token_logps) - _widened(ref_per_token_logps)


def k2(per_token_logps: torch.Tensor, ref_per_token_logps: torch.Tensor) -> torch.Tensor:
    r"""
    Half the squared log-ratio.

    $$ k_2 = \tfrac12 d^2 $$

    Schulman, 2020 (http://joschu.net/blog/kl-approx.html). Expectation over tokens of the policy:
    \\(\tfrac12\mathbb E[d^2]\\), the KL to second order in \\(d\\); never negative. Gradient as a loss, on-policy:
    that of the KL, for any \\(d\\).

    Args:
        per_token_logps, ref_per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the sampled tokens under the policy and the reference, in nats.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Estimate of each token, in nats; 200 from |d| = 20 on, with gradient d.

    Example:

    >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    log_ratio = k1(per_token_logps, ref_per_token_logps)
    value = log_ratio.clamp(-SATURATION, SATURATION).square() / 2
    return _with_gradient(value, log_ratio, _widened(per_token_logps))


def k3(per_token_logps: torch.Tensor, ref_per_token_logps: torch.Tensor) -> torch.Tensor:
    r"""
    The log-ratio with a control variate of expectation 0.

    $$ k_3 = e^{-d} - 1 + d,\qquad e^{-d} = \pi_{\mathrm{ref}}/\pi $$

    Schulman, 2020 (http://joschu.net/blog/kl-approx.html); Shao et al., 2024, Eq. 4
    (https://huggingface.co/papers/2402.03300). Expectation over tokens of the policy: the KL; never negative, small
    spread near the reference. Gradient as a loss, on-policy: that of the *forward* KL(ref‖policy); see [`kl_in_loss`].

    Args:
        per_token_logps, ref_per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the sampled tokens under the policy and the reference, in nats.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Estimate of each token, in nats. Value and slope \\(1-e^{-d}\\) are those at
        |d| = 20 beyond it.

    Example:

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    """
    log_ratio = k1(per_token_logps, ref_per_token_logps).clamp(-SATURATION, SATURATION)
    # expm1 keeps the value near d = 0, where exp(-d) - 1 + d would round to 0.
    value, slope = torch.expm1(-log_ratio) + log_ratio, -torch.expm1(-log_ratio)
    return _with_gradient(value, slope, _widened(per_token_logps))


def kl_in_loss(
    estimator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    per_token_logps: torch.Tensor,
    ref_per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    mask: torch.Tensor,
    bias_correction: bool = True,
) -> torch.Tensor:
    r"""
    Penalty of each token as a term of the loss, weighted by the ratio so that its gradient is that of the KL.

    | estimator | value | gradient |
    |---|---|---|
    | `k2`, `k3` | \\(w\,k\\) | \\(w\,d\,\nabla\ell\\): unbiased for KL(policy‖ref), on- and off-policy |
    | other \\(f\\), `k1` too | \\(w f\\) | \\(\nabla[w f]\\), \\(w\\) attached: unbiased for \\(\mathbb E_\pi[f]\\) |

    For `k3` this is \\(\nabla[w\,k_3]\\) with \\(w\\) attached, because \\(k_3 + 1 - e^{-d} = d\\), but without the
    cancellation that loses it in float32 below d = −16 (DeepSeek-V3.2, https://huggingface.co/papers/2512.02556). The
    ratio corrects the choice of the token given its state, not the distribution of states.

    Args:
        estimator (`Callable`):
            Entry of `KL_ESTIMATORS`, or a function of the same signature.
        per_token_logps, ref_per_token_logps, old_per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the sampled tokens under the policy (with graph), the reference and the sampler, in
            nats. Anything, NaN included, where `mask` is 0.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero for trainable tokens.
        bias_correction (`bool`, *optional*, defaults to `True`):
            Whether to weight by the ratio. `False` gives the plain estimator.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32 or wider: Penalty in nats, 0 where `mask` is 0. The log of the ratio
        is clamped to ±20.
    """
    mask = mask.bool()
    # Before any exp: a gradient through an unselected infinity is 0 · inf = NaN.
    logps, ref, old = (
        torch.where(mask, _widened(logps), 0.0)
        for logps in (per_token_logps, ref_per_token_logps, old_per_token_logps)
    )
    penalty = estimator(logps, ref)
    if bias_correction:
        weight = (logps - old).detach().clamp(-SATURATION, SATURATION).exp()
        penalty = _finite(weight * penalty)
        if estimator in (k2, k3):
            penalty = _with_gradient(penalty, weight * (logps - ref), logps)
        else:
            penalty = penalty + penalty.detach() * (logps - logps.detach())
    return torch.where(mask, penalty, 0.0)


def later_kl(per_token_kl: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    The KL of the later tokens of each row, a constant.

    $$ L_t = \sum_{u>t} m_u K_u $$

    Args:
        per_token_kl (`torch.Tensor` of shape `(B, T)`):
            KL of the next-token distributions, in nats. Anything, NaN included, where `mask` is 0.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero for trainable tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Nats, without graph.

    Example:

    >>> later_kl(torch.tensor([[0.25, 0.5, 1.0]]), torch.ones(1, 3))
    tensor([[1.5000, 1.0000, 0.0000]])
    """
    kl = torch.where(mask.bool(), per_token_kl.detach(), 0.0)
    return torch.nn.functional.pad(kl[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))


def kl_of_completions(
    per_token_kl: torch.Tensor,
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    mask: torch.Tensor,
    later_of_all: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The KL of each token as a term of the loss, with the gradient of the KL of whole completions.

    $$ \nabla K_t + w_t\,\nabla\ell_t\,(L_t - b_t),\qquad L_t = \sum_{u>t} m_u K_u $$

    The second part is what a KL per token leaves out: a token decides which states come next. Amini et al., 2025
    (https://huggingface.co/papers/2504.10637), a Rao-Blackwellised estimator. \\(L_t\\) is a constant; the token's own
    \\(K_t\\) does not depend on its choice and would only add variance. The baseline \\(b_t\\) is ours: the mean of
    \\(L_t\\) over the other rows at the same place, which depends on no choice of this row and changes no expectation.

    Expectation of the gradient: over completions sampled from the policy, the sum over the tokens is
    \\(\nabla\mathrm{KL}\\) of the completions. Off-policy the ratio corrects the choice of the token, not the
    distribution of states.

    Args:
        per_token_kl (`torch.Tensor` of shape `(B, T)`):
            KL(policy‖reference) of the next-token distributions over the whole vocabulary (with graph), in nats, 0
            where `mask` is 0.
        per_token_logps, old_per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the sampled tokens under the policy (with graph) and the sampler, in nats. Anything,
            NaN included, where `mask` is 0.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero for trainable tokens.
        later_of_all (`torch.Tensor` of shape `(N, T)`, *optional*):
            [`later_kl`] of all rows that have a trainable token, these among them, in nats. `None`: these are all.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The values of `per_token_kl`. The log of the ratio is clamped to ±20; a
        single row has no baseline.
    """
    mask = mask.bool()
    logps, old = (torch.where(mask, _widened(x), 0.0) for x in (per_token_logps, old_per_token_logps))
    later = later_kl(per_token_kl, mask)
    rows = later[mask.any(1)] if later_of_all is None else later_of_all
    baseline = (rows.sum(0) - later) / max(len(rows) - 1, 1)
    weight = (logps - old).detach().clamp(-SATURATION, SATURATION).exp()
    slope = torch.where(mask, weight * (later - baseline), 0.0)
    return per_token_kl + _finite(slope) * (logps - logps.detach())


def next_beta(beta: float, kl: float, target: float, num_completions: int, horizon: float = 10_000.0) -> float:
    r"""
    Coefficient of the KL after some completions, moved towards the one at which the KL is `target`:

    $$ \beta\,\Big(1 + \mathrm{clip}\big(\mathrm{kl}/\mathrm{target} - 1,\ -0.2,\ 0.2\big)\cdot n/H\Big) $$

    Ziegler et al., 2019, §2.2 (https://huggingface.co/papers/1909.08593).

    Args:
        beta (`float`):
            Coefficient up to now, positive.
        kl (`float`):
            Measured KL, in the unit of `target`. Sampled estimates may be negative.
        target (`float`):
            KL to keep, in nats, positive.
        num_completions (`int`):
            Completions since the last update, \\(n\\).
        horizon (`float`, *optional*, defaults to `10000.0`):
            Completions \\(H\\) over which `beta` changes by at most a factor of about \\(e^{\pm0.2}\\).

    Returns:
        `float`: Coefficient from now on.

    Example:

    >>> round(next_beta(0.1, kl=0.2, target=0.1, num_completions=256), 6)
    0.100512
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * num_completions / horizon)


KL_ESTIMATORS = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
}
