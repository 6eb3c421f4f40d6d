"""
Expected gradients of every KL term, summed over all tokens of a small distribution; nothing is sampled.

    python tests/functional/kl_enumeration.py    prints the table of docs/methods/kl.md and draws docs/methods/kl.png
"""

from pathlib import Path

import torch

from trl_ext.functional.kl import k1, k2, k3, kl_in_loss

POLICY, REFERENCE, SAMPLER = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3), (0.4, 0.4, 0.2)


def plain_k2(logps, ref):
    """k2 as a user would write it: a function that the package does not know."""
    return (logps - ref).square() / 2


def absolute(logps, ref):
    return (logps - ref).abs()


def in_loss(estimator, corrected):
    return lambda logps, ref, old: kl_in_loss(estimator, logps, ref, old, torch.ones_like(ref), corrected)


def in_reward(estimator):
    """The policy gradient of a constant penalty: ratio · penalty, whose gradient is ratio · penalty · ∇log-prob."""
    return lambda logps, ref, old: (logps - old).exp() * estimator(logps, ref).detach()


def detached_ratio(estimator):
    return lambda logps, ref, old: (logps - old).exp().detach() * estimator(logps, ref)


# Label in the docs, term of one sampled token, whether the package offers it, and the row's reading.
TERMS = {
    "k1 in the loss": (in_loss(k1, False), "refused"),
    "k2 in the loss": (in_loss(k2, False), "`use_bias_correction_kl: false`"),
    "k3 in the loss": (in_loss(k3, False), "`use_bias_correction_kl: false`"),
    "|d| in the loss": (in_loss(absolute, False), "not offered"),
    "ratio · k1 in the loss": (in_loss(k1, True), "`kl_estimator: k1`"),
    "ratio · k2 in the loss, ratio attached": (in_loss(plain_k2, True), "not offered"),
    "ratio · k2 in the loss, ratio detached": (in_loss(k2, True), "`kl_estimator: k2`"),
    "ratio · k3 in the loss": (in_loss(k3, True), "`kl_estimator: k3`, and TRL's default"),
    "ratio · k1 in the loss, ratio detached": (detached_ratio(k1), "not offered"),
    "ratio · k3 in the loss, ratio detached": (detached_ratio(k3), "not offered"),
    "k1 in the reward": (in_reward(k1), "`kl_placement: reward`"),
    "k2 in the reward": (in_reward(k2), "refused"),
    "k3 in the reward": (in_reward(k3), "refused"),
}


def tensor(probabilities):
    return torch.as_tensor(probabilities, dtype=torch.float64)


def gradients(term, policy, reference, sampler):
    """Gradient of `term` with respect to the logits for each token, `(tokens, tokens)`, and the sampler's weights."""
    logits = tensor(policy).log().requires_grad_()
    logps = logits.log_softmax(0)
    terms = term(logps, tensor(reference).log(), tensor(sampler).log())
    rows = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in terms]
    return torch.stack(rows), tensor(sampler)


def expected_gradient(term, policy=POLICY, reference=REFERENCE, sampler=POLICY):
    per_token, weights = gradients(term, policy, reference, sampler)
    return weights @ per_token


def gradient_variance(term, policy=POLICY, reference=REFERENCE, sampler=POLICY):
    per_token, weights = gradients(term, policy, reference, sampler)
    return (weights @ (per_token - weights @ per_token).square()).sum().item()


def kl(policy, reference):
    return (policy * (policy / reference).log()).sum()


def kl_gradient(policy=POLICY, reference=REFERENCE, forward=False):
    logits = tensor(policy).log().requires_grad_()
    pair = (logits.softmax(0), tensor(reference))
    return torch.autograd.grad(kl(*(reversed(pair) if forward else pair)), logits)[0]


def reading(on, off, atol=1e-9):
    """What an expected gradient is the gradient of, on- and off-policy."""
    known = {
        "KL(policy‖ref)": kl_gradient(),
        "KL(ref‖policy)": kl_gradient(forward=True),
        "nothing: zero": torch.zeros(3, dtype=torch.float64),
    }

    def name(gradient):
        return next((label for label, g in known.items() if torch.allclose(g, gradient, atol=atol)), "something else")

    return name(on), name(off)


def table():
    """The table of the documentation, in Markdown."""

    def numbers(gradient):
        return " ".join(f"{round(x, 4) + 0.0:+.4f}" for x in gradient.tolist())

    rows = [
        "| term | option | on-policy | is the gradient of | off-policy | is the gradient of |",
        "|---|---|---|---|---|---|",
    ]
    for label, (term, option) in TERMS.items():
        on, off = expected_gradient(term), expected_gradient(term, sampler=SAMPLER)
        on_is, off_is = reading(on, off)
        label = label.replace("|d|", "abs(d)")
        rows.append(f"| {label} | {option} | {numbers(on)} | {on_is} | {numbers(off)} | {off_is} |")
    return "\n".join(rows)


def draw(path):
    """Bias of value and gradient against the distance of the policy from the reference."""
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    direction = torch.randn(8, dtype=torch.float64)
    reference = torch.full((8,), 1 / 8, dtype=torch.float64)
    scales = torch.logspace(-2, 0.6, 60, dtype=torch.float64)
    policies = [(s * direction).softmax(0) for s in scales]
    distances = [kl(p, reference).item() for p in policies]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    value, gradient = figure.subplots(1, 2)
    for estimator in (k1, k2, k3):
        ratio = [
            (p * estimator(p.log(), reference.log())).sum().item() / d
            for p, d in zip(policies, distances, strict=True)
        ]
        value.plot(
            distances,
            ratio,
            label=estimator.__name__,
            linestyle={"k1": "-", "k2": "-.", "k3": "--"}[estimator.__name__],
        )
    value.set(xscale="log", xlabel="KL(policy‖ref), nats", ylabel="expected value / KL", title="Value")
    shown = {
        "k1 in the loss": "-", "k3 in the loss": "-", "ratio · k2 in the loss, ratio attached": "-",
        "k3 in the reward": "-", "k2 in the reward": "-", "k1 in the reward": "--", "ratio · k3 in the loss": ":",
    }  # fmt: skip
    for label, style in shown.items():
        error = []
        for p in policies:
            exact = kl_gradient(p, reference)
            error.append(((expected_gradient(TERMS[label][0], p, reference, p) - exact).norm() / exact.norm()).item())
        gradient.plot(distances, error, style, label=label, linewidth=3 if style == ":" else 1.5)
    gradient.set(
        xscale="log", xlabel="KL(policy‖ref), nats", ylabel="relative error", title="Expected gradient, on-policy"
    )
    gradient.set_ylim(-0.05, 1.6)
    for axes in (value, gradient):
        axes.legend(fontsize=7, loc="center left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    print(table())
    draw(Path(__file__).parents[2] / "docs/methods/kl.png")
