"""Where TRL has an estimator, ours gives its numbers: TRL's own code runs on rewards that the test has chosen."""

import math

import pytest
import torch
import trl
from theorems import proves
from tiny import PROMPTS, build, dataset, scripted_rollout

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.rewards import RewardBatch, reward_at_end

BATCHES = {
    "all scored": [1.0, 0.0, 0.0, 0.25, 0.9, 1.0, 1.0, 0.8],
    "some not scored": [1.0, None, 0.0, 0.25, None, None, 0.5, -2.0],
    "one scored in a group": [None, 3.0, None, None, 1.0, 0.0, 0.0, 1.0],
    "none scored in a group": [None, None, None, None, 1.0, 0.0, 0.0, 1.0],
    "equal in a group": [0.7, 0.7, 0.7, 0.7, 8.5, 8.2, 8.0, -1.0],
    "a near tie": [1.0, 1.0, 1.0, 1.0 + 1e-5, 0.0, 1e3, -1e3, 0.0],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trl")


def inputs():
    return [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)]


def grpo(model, folder, returns, **options):
    """TRL's advantages of eight completions for two prompts."""
    trainer = build(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        model,
        folder,
        reward_funcs=lambda completions, **_: returns,
        rollout_func=scripted_rollout,
        per_device_train_batch_size=8,
        **options,
    )
    assert type(trainer).__module__ == "trl.trainer.grpo_trainer"
    return trainer._generate_and_score_completions(inputs())


def rloo(model, folder, returns, **options):
    trainer = trl.RLOOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: returns,
        args=trl.RLOOConfig(
            output_dir=str(folder),
            **{
                "bf16": False,
                "use_cpu": True,
                "gradient_checkpointing": False,
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 4,
                "beta": 0.0,
                "report_to": "none",
                **options,
            },
        ),
        train_dataset=dataset(),
    )
    return trainer._generate_and_score_completions(inputs())


def ours(name, returns, output, **options):
    """The same in our words, from TRL's mask."""
    mask = output["completion_mask"] * output.get("tool_mask", 1)
    returns = torch.tensor([math.nan if x is None else x for x in returns], dtype=torch.float64)
    batch = RewardBatch(*reward_at_end(returns, mask), mask, num_generations=4)
    return ADVANTAGE_ESTIMATORS[name].function(batch, **options).float()


def close(actual, expected, label):
    """TRL computes in float32, which keeps four digits of a near tie beside 1."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4 if label == "a near tie" else 1e-6)


@pytest.mark.theorem(
    "Side by side with TRL",
    "`group_relative` and `group_mean` are the advantages of TRL's GRPO, with unscored, equal and nearly "
    "equal rewards (float32)",
    paper="deepseekmath",
    at_most=0.0001,
)
@pytest.mark.parametrize("label", BATCHES)
@pytest.mark.parametrize(("name", "scale"), [("group_relative", "group"), ("group_mean", "none")])
def test_advantages_relative_to_the_group_are_those_of_grpo(tiny_model, folder, name, scale, label):
    output = grpo(tiny_model, folder, BATCHES[label], scale_rewards=scale)
    close(ours(name, BATCHES[label], output), output["advantages"], label)
    proves(ours(name, BATCHES[label], output), output["advantages"])


@pytest.mark.theorem(
    "Side by side with TRL",
    "`leave_one_out` gives the advantages of TRL's RLOO (float32)",
    paper="rloo",
    at_most=0.0001,
)
@pytest.mark.parametrize("label", BATCHES)
def test_leave_one_out_advantages_are_those_of_rloo(tiny_model, folder, label):
    output = rloo(tiny_model, folder, BATCHES[label])
    close(ours("leave_one_out", BATCHES[label], output), output["advantages"], label)
    proves(ours("leave_one_out", BATCHES[label], output), output["advantages"])


def test_reinforce_plus_plus_with_baseline_is_rloo_with_normalised_advantages(tiny_model, folder):
    returns = BATCHES["all scored"]
    output = rloo(tiny_model, folder, returns, normalize_advantages=True)
    # Leaving one out multiplies by G / (G - 1), which the division by the standard deviation takes away again.
    advantages = ours("reinforce_plus_plus_baseline", returns, output, weighting="sequence", correction=1)
    torch.testing.assert_close(advantages[:, 0], output["advantages"], rtol=1e-3, atol=1e-6)


def test_dividing_by_the_deviation_of_the_batch_is_not_reinforce_plus_plus(tiny_model, folder):
    returns = [1.0, 0.0, 0.0, 0.0, 0.9, 1.0, 1.0, 0.8]
    output = grpo(tiny_model, folder, returns, scale_rewards="batch")
    theirs = torch.tensor([1.5266, -0.5089, -0.5089, -0.5089, -0.0509, 0.1527, 0.1527, -0.2544])
    torch.testing.assert_close(output["advantages"], theirs, rtol=0, atol=1e-4)
    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        assert not torch.allclose(ours(name, returns, output)[:, 0], theirs, atol=0.1)
