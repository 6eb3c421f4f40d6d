"""Each row of docs/migration.md: the other project's formula, written out in float64, against ours."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from trl_ext.functional import ADVANTAGE_ESTIMATORS, RewardBatch, k2, k3, kl_in_loss, next_beta, reward_at_end
from trl_ext.functional.reductions import aggregated

PAGE = Path(__file__).parents[2] / "docs/migration.md"
N, G, T, M = 12, 4, 7, 54  # completions, of a prompt, tokens at most, tokens
BETA = 0.3

generator = torch.Generator().manual_seed(7)
lengths = torch.tensor([7, 3, 5, 4, 2, 6, 7, 1, 5, 7, 4, 3])
mask = (torch.arange(T) < lengths[:, None]).double()
score = torch.randint(0, 4, (N,), generator=generator).double() / 2
kl, values = (torch.randn(N, T, generator=generator, dtype=torch.float64) * mask for _ in range(2))
greedy = torch.rand(N // G, generator=generator, dtype=torch.float64).repeat_interleave(G)
logps, ref = (torch.randn(N, T, generator=generator, dtype=torch.float64) / 2 - 2 for _ in range(2))
groups = [range(start, start + G) for start in range(0, N, G)]
last = lengths - 1


def ours(name, with_kl=False, tokens=mask, **options):
    """Advantages of our estimator as `(N, T)`, 0 where nothing is trained."""
    row = ADVANTAGE_ESTIMATORS[name]
    ends = torch.cat([values, torch.zeros(N, 1, dtype=torch.float64)], 1) if row.values else None
    batch = RewardBatch(
        *reward_at_end(score, tokens),
        tokens,
        G,
        kl_penalty=BETA * kl * tokens if with_kl else None,
        baseline=greedy if row.baseline else None,
        values=ends,
    )
    found = row.function(batch, **options)
    return (found if found.dim() == 2 else found[:, None]) * tokens


# Their formulas


def token_rewards(with_kl=False, outcome=score):
    rewards = torch.zeros(N, T, dtype=torch.float64)
    rewards[torch.arange(N), last] = outcome
    return rewards - BETA * kl if with_kl else rewards


def of_groups(function, returns=score):
    """A function of the list of returns of a prompt that gives a list, on all tokens of each completion."""
    found = [x for rows in groups for x in function([returns[i].item() for i in rows])]
    return torch.tensor(found, dtype=torch.float64)[:, None] * mask


def deviation(xs, eps=0.0):
    mean = sum(xs) / len(xs)
    return (sum((x - mean) ** 2 for x in xs) / (len(xs) - 1)) ** 0.5 + eps


def centred(xs):
    return [x - sum(xs) / len(xs) for x in xs]


def without_self(xs):
    return [x - (sum(xs) - x) / (len(xs) - 1) for x in xs]


def scaled(xs, eps):
    return [x / deviation(xs, eps) for x in centred(xs)]


def to_go(rewards, gamma=1.0):
    out, running = torch.zeros_like(rewards), torch.zeros(N, dtype=torch.float64)
    for t in reversed(range(T)):
        running = rewards[:, t] + gamma * running
        out[:, t] = running
    return out


def whitened(x, tokens=mask, degrees=1, std=True):
    mean = (x * tokens).sum() / tokens.sum()
    variance = ((x - mean) ** 2 * tokens).sum() / (tokens.sum() - degrees)
    return (x - mean) / ((variance + 1e-8).sqrt() if std else 1.0) * tokens


def lambda_advantages(gamma, lam):
    rewards, out, running, after = token_rewards(), torch.zeros_like(values), 0.0, torch.zeros(N)
    for t in reversed(range(T)):
        running = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * running
        after, out[:, t] = values[:, t], running
    return out * mask


def opo():
    found = []
    for rows in groups:
        baseline = sum(lengths[i] * score[i] for i in rows) / sum(lengths[i] for i in rows)
        found += [score[i] - baseline for i in rows]
    return torch.stack(found)[:, None] * mask


def best(xs, eps=1e-6):
    ranked = sorted(xs, reverse=True)
    top = xs.index(ranked[0])
    return [(ranked[0] - ranked[1]) / deviation(xs, eps) if i == top else 0.0 for i in range(len(xs))]


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(expected).double(), atol=atol, rtol=0)


def same(found, expected, atol=1e-9):
    assert found().abs().max() > 0.1
    close(found(), expected(), atol)


def rescaled(name, their_eps, our_eps):
    """Group by group, ours times our divisor is theirs times theirs."""
    theirs, found = of_groups(partial(scaled, eps=their_eps)), ours(name)
    for rows in groups:
        std = deviation([score[i].item() for i in rows])
        close(found[rows.start : rows.stop] * (std + our_eps), theirs[rows.start : rows.stop] * (std + their_eps))


def best_up_to_eps():
    theirs, found = of_groups(best), ours("best_of_group", scale=True)
    for rows in groups:
        std = deviation([score[i].item() for i in rows])
        close(found[rows.start : rows.stop] * std, theirs[rows.start : rows.stop] * (std + 1e-6))


def gpg():
    return of_groups(lambda xs: [x * N / torch.count_nonzero(score).item() for x in centred(xs)])


def with_tools():
    """A tool result in the middle of a completion: their return begins anew there, ours goes on."""
    tokens = mask.clone()
    tokens[0, 3] = 0
    rewards = token_rewards()
    out, running = torch.zeros_like(rewards), torch.zeros(N, dtype=torch.float64)
    for t in reversed(range(T)):
        out[:, t] = running = rewards[:, t] + running
        running = running * tokens[:, t]
    theirs, found = whitened(out, tokens), ours("reinforce_plus_plus", tokens=tokens, correction=1)
    assert found[0, 0] == found[0, 6] and (theirs[0, 0] == theirs[0, 6]) == (score[0] == 0)
    theirs = whitened(to_go(rewards), tokens)
    close(found, theirs)


def reinforce_plus_plus_of_verl():
    same(lambda: ours("reinforce_plus_plus", with_kl=True, correction=1), lambda: whitened(to_go(token_rewards(True))))
    close(ours("reinforce_plus_plus", True), ours("reinforce_plus_plus", True, correction=1) * (M / (M - 1)) ** 0.5)
    with_tools()


def baseline_of_verl():
    def theirs(with_kl):
        return whitened(of_groups(centred, token_rewards(with_kl).sum(1)))

    name = "reinforce_plus_plus_baseline"
    same(lambda: ours(name, correction=1), lambda: theirs(False))
    assert (theirs(True)[0, :7] == theirs(True)[0, 0]).all() and ours(name, True, correction=1)[
        0, :7
    ].unique().numel() > 1


def lambda_of_verl(whiten_degrees):
    factor = (M / (M - 1)) ** 0.5 if whiten_degrees else 1.0
    same(
        lambda: ours("gae", gamma=0.9, lam=0.8),
        lambda: whitened(lambda_advantages(0.9, 0.8), degrees=whiten_degrees) * factor,
        1e-7,
    )


def kl_in_the_reward():
    same(
        lambda: ours("reinforce_plus_plus", True, norm="center"),
        lambda: whitened(to_go(token_rewards() - BETA * kl), std=False),
    )


def adaptive():
    for measured in (0.05, 0.1, 0.11, 0.5):
        error = min(max(measured / 0.1 - 1, -0.2), 0.2)
        close(next_beta(0.3, measured, 0.1, 64, 1000.0), 0.3 * (1 + error * 64 / 1000))


def loss_and_slope(function, policy=logps):
    leaf = policy.clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def plain_kl(estimator, theirs):
    """Value and gradient of a KL in the loss without the ratio, at the distances of the batch."""
    everywhere = torch.ones_like(mask)
    found = loss_and_slope(lambda x: kl_in_loss(estimator, x, ref, logps, everywhere, bias_correction=False))
    for a, b in zip(found, loss_and_slope(theirs), strict=True):
        close(a, b, 1e-9)


def k3_of_verl():
    def theirs(x):
        d = (ref - x).clamp(-20, 20)
        return (d.exp() - d - 1).clamp(-10, 10)

    assert (ref - logps).max() < 2.5  # below the value of 10
    plain_kl(k3, theirs)
    far = loss_and_slope(lambda x: (ref - x).exp().sub(ref - x + 1).clamp(-10, 10), ref - 4.0)
    assert far[0].max() == 10 and (far[1] == 0).all()
    far = loss_and_slope(lambda x: kl_in_loss(k3, x, ref, ref - 4.0, torch.ones_like(mask), False), ref - 4.0)
    close(far[1], torch.full_like(ref, 1 - torch.tensor(4.0).double().exp().item()), 1e-6)


def aggregate(loss_type):
    return aggregated(kl, mask, loss_type, num_items=mask.sum(), max_completion_length=T).item()


def losses(loss_type, theirs, factor=1.0):
    of_rows = [[kl[i, t].item() for t in range(lengths[i])] for i in range(N)]
    close(aggregate(loss_type) / factor, theirs(of_rows))


def token_mean(rows):
    return sum(map(sum, rows)) / M


def to_bnpo_or_dapo():
    losses("bnpo", token_mean)
    losses("dapo", token_mean)  # one micro-batch


def rloo_of_openrlhf():
    close(ours("leave_one_out"), of_groups(without_self))
    theirs = to_go(token_rewards(True, of_groups(without_self)[:, 0])) * mask
    found = ours("leave_one_out", with_kl=True)
    close(found, of_groups(without_self, token_rewards(True).sum(1)))
    assert (found - theirs).abs().max() > 0.1


def clipped():
    """Theirs clips what its baseline has left."""
    rewards, at = score.clamp(0.25, 1.0), reward_at_end(score.clamp(0.25, 1.0), mask)
    found = ADVANTAGE_ESTIMATORS["reinforce_plus_plus"].function(RewardBatch(*at, mask, G))
    close(found, whitened(to_go(token_rewards(outcome=rewards)), degrees=0))
    before, after = of_groups(without_self, rewards), of_groups(without_self).clamp(0.25, 1.0)
    assert not torch.allclose(before, after)


def clipped_before_the_kl():
    rewards = score.clamp(0.25, 1.0)
    batch = RewardBatch(*reward_at_end(rewards, mask), mask, G, kl_penalty=BETA * kl)
    found = ADVANTAGE_ESTIMATORS["leave_one_out"].function(batch)[:, None] * mask
    close(found, of_groups(without_self, rewards - BETA * kl.sum(1)))
    assert not torch.allclose(found, of_groups(without_self, (score - BETA * kl.sum(1)).clamp(0.25, 1.0)))


def sequence_whitening(theirs, bessel_of=1.0):
    """`theirs(std)` divides completions' advantages by their own deviation plus 1e-4."""
    found = ours("reinforce_plus_plus_baseline", weighting="sequence", correction=1)
    std = deviation(of_groups(centred)[:, 0].tolist())
    close(found * (std**2 + 1e-8) ** 0.5, theirs() * (std + 1e-4 / bessel_of))


def plus_plus_of_swift():
    def theirs():
        return of_groups(centred) / deviation(of_groups(centred)[:, 0].tolist(), 1e-4)

    sequence_whitening(theirs)


def normalized_rloo():
    def theirs():
        advantages = of_groups(without_self)[:, 0].tolist()
        return torch.tensor(centred(advantages), dtype=torch.float64)[:, None] / deviation(advantages, 1e-4) * mask

    sequence_whitening(theirs, bessel_of=G / (G - 1))


def whole_completion_kl_of_swift():
    theirs = of_groups(centred, token_rewards(True).sum(1))
    theirs = theirs / deviation(theirs[:, 0].tolist(), 1e-4)
    assert (ours("reinforce_plus_plus_baseline", True, weighting="sequence", correction=1) - theirs).abs().max() > 0.1


def gradient_of_rloo():
    advantages = of_groups(without_self)[:, 0]

    def theirs(x):
        return -(advantages * ((x - logps) * mask).sum(1).exp()).mean()

    def here(x):
        per_token = -(x - logps).exp() * ours("leave_one_out")
        return aggregated(per_token, mask, "dr_grpo", num_items=M, max_completion_length=T)

    close(loss_and_slope(here)[1] * T, loss_and_slope(theirs)[1])


def whitened_rewards():
    """Both shift back to the mean; the sizes of the deviations differ by Bessel's factor."""
    rewards = token_rewards()
    mean = (rewards * mask).sum() / M
    ours_, theirs = ((whitened(rewards, degrees=d) + mean) * mask for d in (0, 1))
    found = ADVANTAGE_ESTIMATORS["gae"].function(
        RewardBatch(*reward_at_end(score, mask), mask, G, values=torch.zeros(N, T + 1, dtype=torch.float64)),
        lam=1.0,
        whiten_rewards=True,
        whiten_advantages=False,
    )
    close(found, to_go(ours_) * mask, 1e-7)
    close((ours_ - mean * mask) * ((M - 1) / M) ** 0.5, theirs - mean * mask, 1e-6)


GROUP = "group_relative"
CASES = {
    "verl": [
        lambda: rescaled(GROUP, 1e-6, 1e-4),
        lambda: same(lambda: ours("group_mean"), lambda: of_groups(centred)),
        lambda: same(lambda: ours("leave_one_out"), lambda: of_groups(without_self)),
        lambda: same(lambda: ours("length_weighted"), opo),
        lambda: same(lambda: ours("gpg", correction="nonzero"), gpg),
        best_up_to_eps,
        lambda: same(lambda: ours("remax"), lambda: (to_go(token_rewards()) - greedy[:, None]) * mask),
        reinforce_plus_plus_of_verl,
        baseline_of_verl,
        lambda: lambda_of_verl(1),
        kl_in_the_reward,
        None,
        adaptive,
        k3_of_verl,
        lambda: plain_kl(k2, lambda x: 0.5 * (x - ref) ** 2),
        None,
        to_bnpo_or_dapo,
        lambda: losses("grpo", lambda rows: sum(sum(row) / len(row) for row in rows) / N),
        lambda: losses("dr_grpo", lambda rows: sum(map(sum, rows)) / N, 1 / T),
        lambda: losses("dr_grpo", lambda rows: sum(map(sum, rows)) / T, 1 / N),
    ],
    "OpenRLHF": [
        lambda: same(
            lambda: ours("reinforce_plus_plus", True), lambda: whitened(to_go(token_rewards(True)), degrees=0)
        ),
        lambda: same(
            lambda: ours("reinforce_plus_plus", True, gamma=0.9, discount="all"),
            lambda: whitened(to_go(token_rewards(True), 0.9), degrees=0),
        ),
        lambda: same(
            lambda: ours("reinforce_plus_plus_baseline", True),
            lambda: whitened(to_go(token_rewards(True, of_groups(centred)[:, 0])), degrees=0),
        ),
        lambda: same(
            lambda: ours("reinforce_plus_plus", True, norm="center"),
            lambda: whitened(to_go(token_rewards(True)), std=False),
        ),
        rloo_of_openrlhf,
        lambda: rescaled(GROUP, 1e-9, 1e-4),
        lambda: same(lambda: ours("group_mean"), lambda: of_groups(centred)),
        lambda: lambda_of_verl(0),
        kl_in_the_reward,
        None,
        lambda: plain_kl(k2, lambda x: (x - ref) ** 2 / 2),
        lambda: plain_kl(k3, lambda x: (ref - x).exp() - 1 - (ref - x)),
        adaptive,
        clipped,
    ],
    "ms-swift": [
        lambda: rescaled(GROUP, 1e-4, 1e-4),
        lambda: same(lambda: ours("group_mean"), lambda: of_groups(centred)),
        lambda: same(lambda: ours("leave_one_out"), lambda: of_groups(without_self)),
        lambda: same(lambda: ours("leave_one_out", True), lambda: of_groups(without_self, token_rewards(True).sum(1))),
        plus_plus_of_swift,
        whole_completion_kl_of_swift,
        None,
    ],
    "TRL's RLOOTrainer": [
        lambda: same(lambda: ours("leave_one_out", True), lambda: of_groups(without_self, score - BETA * kl.sum(1))),
        gradient_of_rloo,
        None,
        normalized_rloo,
        clipped_before_the_kl,
    ],
    "TRL's old PPO": [lambda: lambda_of_verl(1), kl_in_the_reward, whitened_rewards],
}


def rows():
    """Section, number and cells of each row of the tables whose last column is `numbers`."""
    _, *sections = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        if "| numbers |" in text:
            for number, line in enumerate(re.findall(r"^\| (.+) \|$", text, re.MULTILINE)[1:]):
                yield title, number, [cell.strip() for cell in line.split(" | ")]


ROWS = [*rows()]


def test_every_row_has_a_case():
    assert [title for title, *_ in ROWS] == [title for title, cases in CASES.items() for _ in cases]


@pytest.mark.parametrize(("section", "number", "cells"), ROWS, ids=lambda x: None if isinstance(x, int) else str(x))
def test_a_row_is_true(section, number, cells):
    case = CASES[section][number]
    assert (case is None) == (cells[1] == "not available"), cells
    names = re.findall(r"advantage_estimator: (\w+)", cells[1])
    assert {*names} <= {*ADVANTAGE_ESTIMATORS}
    if case is not None:
        case()
