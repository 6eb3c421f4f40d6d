"""
Expected gradients of every KL term, summed over all tokens of a small distribution; nothing is sampled.

    python tests/functional/kl_enumeration.py    prints the tables of docs/methods/kl.md and draws docs/methods/kl.png
"""

import itertools
from pathlib import Path

import torch

from trl_ext.functional.kl import k1, k2, k3, kl_in_loss, kl_of_completions

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


# Whole completions: TOKENS tokens of a vocabulary of VOCABULARY, a table of logits for every state

TOKENS, VOCABULARY = 3, 3
COMPLETIONS = list(itertools.product(range(VOCABULARY), repeat=TOKENS))


def states(completion):
    """The number of the state before each token, in which it is chosen."""
    return [
        sum(VOCABULARY**u for u in range(t)) + sum(VOCABULARY**u * v for u, v in enumerate(completion[:t]))
        for t in range(TOKENS)
    ]


class Chain:
    """Random policy and reference over all completions; `scale` is that of the logits."""

    def __init__(self, scale, seed=0):
        generator, count = torch.Generator().manual_seed(seed), sum(VOCABULARY**t for t in range(TOKENS))
        draw = lambda: scale * torch.randn(count, VOCABULARY, dtype=torch.float64, generator=generator)  # noqa: E731
        self.logits, self.reference = draw().requires_grad_(), draw().log_softmax(1)

    def rows(self, completions):
        """Of sampled tokens: log-probs, the reference's, and the exact KL of the states, `(B, T)` each."""
        at = torch.tensor([states(completion) for completion in completions])
        tokens = torch.tensor(completions)[..., None]
        policy, reference = self.logits[at].log_softmax(2), self.reference[at]
        kl = (policy.exp() * (policy - reference)).sum(2)
        return policy.gather(2, tokens)[..., 0], reference.gather(2, tokens)[..., 0], kl

    def probabilities(self):
        """Of every completion."""
        return self.rows(COMPLETIONS)[0].sum(1).exp()

    def kl(self):
        """KL(policy‖reference) of whole completions."""
        logps, ref, _ = self.rows(COMPLETIONS)
        return (logps.sum(1).exp() * (logps - ref).sum(1)).sum()

    def kl_from(self, logits):
        """KL of these completions from those of a policy with other logits."""
        logps, logits = self.rows(COMPLETIONS)[0], logits.log_softmax(1)
        other = torch.stack([logits[states(y), list(y)].sum() for y in COMPLETIONS])
        return (logps.sum(1).exp() * (logps.sum(1) - other)).sum()

    def gradient(self, value):
        return torch.autograd.grad(value, self.logits)[0].flatten()

    def gradients(self, form, rows=1):
        """Gradient of the mean over `rows` completions for every combination of them, and its probability."""
        p = self.probabilities().detach()
        batches = list(itertools.product(range(len(COMPLETIONS)), repeat=rows))
        found = [self.gradient(form(*self.rows([COMPLETIONS[i] for i in batch])).sum() / rows) for batch in batches]
        return torch.stack(found), torch.stack([p[list(batch)].prod() for batch in batches])


def everywhere(x):
    return torch.ones_like(x)


def to_go(x):
    return x.flip(1).cumsum(1).flip(1)


FORMS = {
    "exact in the loss": lambda logps, ref, kl: kl,
    "ratio · k3 in the loss": lambda logps, ref, kl: kl_in_loss(k3, logps, ref, logps.detach(), everywhere(ref)),
    "k1 in the reward, to go": lambda logps, ref, kl: logps * to_go(k1(logps, ref).detach()),
    "k1 in the reward, sum of the completion": lambda logps, ref, kl: (
        logps * k1(logps, ref).detach().sum(1, keepdim=True)
    ),
    "sequence, one completion (no baseline)": lambda logps, ref, kl: kl_of_completions(
        kl, logps, logps.detach(), everywhere(ref)
    ),
}


def bias_and_variance(chain, form, rows=1):
    """Relative to the gradient of the KL of completions: distance of the mean, and variance per completion."""
    exact, (found, p) = chain.gradient(chain.kl()), chain.gradients(form, rows)
    mean = p @ found
    variance = rows * (p @ (found - mean).square().sum(1))
    return ((mean - exact).norm() / exact.norm()).item(), (variance / exact.square().sum()).item()


def table_of_completions():
    """The table of whole completions in the documentation, in Markdown."""
    chains = {scale: Chain(scale) for scale in (1.0, 0.3)}
    rows = ["| form | bias, logits of scale 1 | variance | bias, scale 0.3 | variance |", "|---|---|---|---|---|"]
    sequence = FORMS["sequence, one completion (no baseline)"]
    forms = {**{label: (form, 1) for label, form in FORMS.items()}, "sequence, two completions": (sequence, 2)}
    for label, (form, count) in forms.items():
        cells = [number for chain in chains.values() for number in bias_and_variance(chain, form, count)]
        rows.append(f"| {label} | " + " | ".join("0" if x < 1e-12 else f"{x:.3f}" for x in cells) + " |")
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
    figure = Figure(figsize=(9, 4.4), layout="constrained")
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
    for axes in (value, gradient):  # below the axes, where no curve is
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3 if axes is value else 2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    print(table(), table_of_completions(), sep="\n\n")
    draw(Path(__file__).parents[2] / "docs/methods/kl.png")
