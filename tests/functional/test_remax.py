"""ReMax: numbers worked by hand, what is not scored, and the exact expectation of its policy gradient."""

import dataclasses
import itertools
import math

import pytest
import torch
from theorems import proves

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.rewards import RewardBatch, reward_at_end
from trl_ext.functional.token_advantages import remax

F64, NAN = torch.float64, math.nan


def batch_of(returns, mask, size, **fields):
    return RewardBatch(*reward_at_end(torch.tensor(returns, dtype=F64), mask), mask, size, **fields)


@pytest.mark.parametrize("size", [1, 2])
def test_the_greedy_return_is_subtracted_from_every_reward_to_go(size):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    kl = torch.tensor([[0.1, -0.5, 0.1, 1.2], [0.2, 0.3, 9.9, -0.1]], dtype=F64)
    batch = batch_of([1.0, 0.0], mask, size, kl_penalty=0.1 * kl * mask, baseline=torch.full((2,), 0.4, dtype=F64))
    expected = torch.tensor([[0.51, 0.52, 0.47, 0.48], [-0.44, -0.42, 0, -0.39]], dtype=F64)
    torch.testing.assert_close(remax(batch), expected, atol=1e-12, rtol=0)


def test_a_prompt_whose_greedy_answer_was_not_scored_teaches_nothing():
    metrics = ADVANTAGE_ESTIMATORS["remax"].metrics
    batch = batch_of([1, 0, 1, 0], torch.ones(4, 2), 2, baseline=torch.tensor([0.25, 0.25, NAN, NAN]))
    assert remax(batch).tolist() == [[0.75] * 2, [-0.25] * 2, [0.0] * 2, [0.0] * 2]
    assert metrics(batch, remax(batch)) == {
        "remax/baseline": 0.25, "remax/frac_baseline_unscored": 0.5, "remax/advantage_positive": 0.5
    }  # fmt: skip
    nothing = dataclasses.replace(batch, baseline=torch.full((4,), NAN))
    assert not remax(nothing).any()
    found = metrics(nothing, remax(nothing))
    assert found.pop("remax/frac_baseline_unscored") == 1.0 and all(math.isnan(x) for x in found.values())


def test_the_kl_decides_whether_a_completion_is_better_and_one_without_reward_is_not_counted():
    penalty = torch.tensor([[0.0, 0.0], [0.2, 0.4], [0.0, 0.0], [0.0, 0.0]], dtype=F64)
    batch = batch_of([1, 1, 0, NAN], torch.ones(4, 2), 2, kl_penalty=penalty, baseline=torch.full((4,), 0.5))
    found = ADVANTAGE_ESTIMATORS["remax"].metrics(batch, remax(batch))
    assert found["remax/advantage_positive"] == pytest.approx(1 / 3)


def test_without_greedy_answers_it_is_an_error():
    with pytest.raises(ValueError, match=r"^remax needs the returns of greedy answers; set baseline of the batch\.$"):
        remax(batch_of([1, 0], torch.ones(2, 2), 2))


# Every outcome of a policy of two tokens among three


VOCABULARY, BETA = 3, 0.3
TEXTS = list(itertools.product(range(VOCABULARY), repeat=2))


def token_logps(logits, text):
    """Of both tokens; row 0 of the logits is for the first, row 1 + a for the second after a."""
    logps = logits.log_softmax(-1)
    return torch.stack([logps[0, text[0]], logps[1 + text[0], text[1]]])


def greedy(logits):
    first = int(logits[0].argmax())
    return first, int(logits[1 + first].argmax())


@pytest.mark.theorem(
    "Advantages",
    "The expected policy gradient of `remax`, whose greedy answer is that of the policy, is the true one, with and "
    "without a KL in the reward (enumeration of two tokens, G = 1 and 2)",
    paper="remax",
    at_most=1e-12,
)
@pytest.mark.parametrize("in_reward", [False, True], ids=["no KL", "KL in the reward"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_expected_policy_gradient_is_the_true_one(size, in_reward):
    rng = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(1 + VOCABULARY, VOCABULARY, generator=rng, dtype=F64) for _ in range(2))
    reward = dict(zip(TEXTS, torch.randn(len(TEXTS), generator=rng, dtype=F64).tolist(), strict=True))
    logits.requires_grad_()
    logps = {text: token_logps(logits, text) for text in TEXTS}
    kl = {text: logps[text] - token_logps(ref, text) for text in TEXTS}
    goal = sum(logps[y].sum().exp() * (reward[y] - (BETA * kl[y].sum() if in_reward else 0)) for y in TEXTS)
    (exact,) = torch.autograd.grad(goal, logits, retain_graph=True)

    baseline = torch.full((size,), reward[greedy(logits)], dtype=F64)
    expected = 0.0
    for group in itertools.product(TEXTS, repeat=size):
        probability = torch.stack([logps[y].sum() for y in group]).sum().exp().detach()
        penalty = BETA * torch.stack([kl[y] for y in group]).detach() if in_reward else None
        given = {"kl_penalty": penalty, "baseline": baseline}
        advantages = remax(batch_of([reward[y] for y in group], torch.ones(size, 2), size, **given))
        expected = expected + probability * (advantages * torch.stack([logps[y] for y in group])).sum() / size
    (gradient,) = torch.autograd.grad(expected, logits)
    assert exact.abs().max() > 0.05
    proves(gradient, exact)
