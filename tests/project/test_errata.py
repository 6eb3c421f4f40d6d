"""The errata page: every test that it names exists, and the numbers that no other test has."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trl

from trl_ext.functional.advantages import group_relative
from trl_ext.functional.reductions import aggregated
from trl_ext.functional.rewards import RewardBatch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/errata.md").read_text()


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./([\w/.]+)\)", PAGE)
    assert len(named) > 25
    for test, file in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), test
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "often printed" not in line]
    assert all("`test_" in row for row in rows), "every row is proven"


# Ratio and clipping


def test_a_product_of_ratios_explodes():
    assert pytest.approx(146.6, abs=0.05) == 1.005**1000
    assert pytest.approx(1.005) == (1.005**1000) ** (1 / 1000)


def clipped(ratio, advantage, epsilon=0.2):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [(1.5, 0.5, 0.6, 0.0), (0.4, -0.8, -0.64, 0.0), (0.4, 0.5, 0.2, 0.5), (1.5, -0.8, -1.2, -0.8)],
)
def test_the_clip_acts_in_two_of_four_regions(ratio, advantage, value, slope):
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    objective = clipped(ratio, advantage)
    (found,) = torch.autograd.grad(objective, ratio)
    assert (objective.item(), found.item()) == pytest.approx((value, slope))


@pytest.mark.parametrize(
    ("optimizer", "steps", "ratio"),
    [(lambda p: torch.optim.SGD([p], lr=5.0), 1, 1.987), (lambda p: torch.optim.Adam([p], lr=0.1), 8, 1.543)],
)
def test_the_clip_does_not_bound_an_update(optimizer, steps, ratio):
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer(logits)
    for _ in range(steps):
        optimizer.zero_grad()
        (-clipped(logits.softmax(0)[0] / 0.5, 1.0)).backward()
        optimizer.step()
    assert (logits.softmax(0)[0] / 0.5).item() == pytest.approx(ratio, abs=5e-4)


# GRPO


def test_the_defaults_of_trls_grpo_are_not_the_papers():
    fields = trl.GRPOConfig.__dataclass_fields__
    found = {name: fields[name].default for name in ("loss_type", "beta", "use_bias_correction_kl", "scale_rewards")}
    assert found == {"loss_type": "dapo", "beta": 0.0, "use_bias_correction_kl": True, "scale_rewards": "group"}


def test_the_deviation_of_a_group_hides_how_large_the_gap_is():
    ones = torch.ones(2, 1)
    for reward, expected in ((1.0, 0.7070), (0.1, 0.7061)):
        batch = RewardBatch(torch.tensor([[reward], [0.0]]), ones.bool(), ones, 2)
        assert group_relative(batch).flatten().tolist() == pytest.approx([expected, -expected], abs=5e-5)


def test_a_mean_over_each_completion_makes_tokens_of_long_bad_answers_cheap():
    mask = torch.tensor([[1.0] * 2 + [0.0] * 8, [1.0] * 10])
    for loss_type, dearer in (("grpo", 5.0), ("dr_grpo", 1.0)):
        tokens = torch.full((2, 10), -1.0, requires_grad=True)  # both answers are bad
        aggregated(tokens, mask, loss_type, num_items=torch.tensor(12), max_completion_length=10).backward()
        assert (tokens.grad[0, 0] / tokens.grad[1, 0]).item() == pytest.approx(dearer)


# Preferences


def test_a_monotone_function_of_the_reward_is_another_optimum():
    reward = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    policies = [((f(reward)) / 0.2).softmax(0) for f in (lambda r: r, lambda r: 2 * r, lambda r: r + 7)]
    assert policies[0].tolist() == pytest.approx([0.0259, 0.1161, 0.8580], abs=5e-5)
    assert policies[1].tolist() == pytest.approx([0.0009, 0.0180, 0.9811], abs=5e-5)
    assert policies[2].tolist() == pytest.approx(policies[0].tolist())


def test_the_log_of_a_sigmoid_is_not_logsigmoid():
    for loss, value, slope in (
        (lambda x: -torch.log(torch.sigmoid(x)), math.inf, math.nan),
        (lambda x: -F.logsigmoid(x), 100.0, -1.0),
    ):
        x = torch.tensor(-100.0, requires_grad=True)
        found = loss(x)
        (gradient,) = torch.autograd.grad(found, x)
        assert (found.item(), gradient.item()) == pytest.approx((value, slope), nan_ok=True)


def test_the_implicit_reward_lacks_a_constant_of_the_prompt():
    rewards = torch.tensor([[0.2, 0.5, 0.9], [0.9, 0.5, 3.0]], dtype=torch.float64)  # of two prompts
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    policy = (reference + rewards / 0.5).log_softmax(1)  # the optimum for β = .5
    missing = rewards - 0.5 * (policy - reference)
    assert missing[0].tolist() == pytest.approx([missing[0, 0].item()] * 3)
    assert missing[1].tolist() == pytest.approx([missing[1, 0].item()] * 3)
    assert abs(missing[0, 0] - missing[1, 0]) > 1
