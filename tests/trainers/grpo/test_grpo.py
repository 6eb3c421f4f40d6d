"""The GRPO trainer: off means upstream, on-but-equal equals TRL, and what the estimators receive is right."""

import math

import pytest
import torch
import trl
from theorems import proves
from tiny import assert_same_weights, digits, logged, scripted_rollout, weights
from tiny.recorder import SEEN

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS = (GRPOTrainer, GRPOConfig)
TRLS = (trl.GRPOTrainer, trl.GRPOConfig)
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]


# Off means upstream


@pytest.mark.theorem(
    "Side by side with TRL",
    "With none of our options set, three updates leave the weights of TRL's GRPO, for eight loss types, full and LoRA",
    at_most=0,
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_with_nothing_switched_on_the_weights_are_those_of_trl_bit_for_bit(train, loss_type, lora):
    options = {"loss_type": loss_type, "lora": lora, "beta": 0.1, "steps_per_generation": 2}
    ours, theirs = train(*OURS, **options), train(*TRLS, **options)
    assert_same_weights(ours, theirs)
    proves(weights(ours), weights(theirs))
    timing = {"step_time"}
    for our_entry, their_entry in zip(logged(ours), logged(theirs), strict=True):
        assert our_entry.keys() == their_entry.keys()
        for name in our_entry.keys() - timing:
            assert our_entry[name] == their_entry[name], name


def test_the_trainer_accepts_trls_own_config(train):
    assert_same_weights(train(GRPOTrainer, trl.GRPOConfig), train(*TRLS))
    assert not object.__new__(GRPOTrainer)._is_ours  # as TRL's own tests build trainers


# On, but equal


@pytest.mark.theorem(
    "Side by side with TRL",
    "`group_relative` trains as TRL's GRPO does, for eight loss types, full and LoRA (weights, float32)",
    paper="deepseekmath",
    at_most=1e-05,
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_group_relative_trains_as_trl_does(train, loss_type, lora):
    # Plain SGD: Adam turns a rounding error in a gradient near 0 into a step of full size.
    options = {"loss_type": loss_type, "lora": lora, "per_device_train_batch_size": 8, "optim": "sgd"}
    options["learning_rate"] = 0.1
    ours = train(*OURS, advantage_estimator="group_relative", **options)
    theirs = train(*TRLS, **options)
    assert_same_weights(ours, theirs, atol=2e-6, rtol=1e-5)
    proves(weights(ours), weights(theirs))
    for a, b in zip(ours._logs["advantages"], theirs._logs["advantages"], strict=True):
        assert a == pytest.approx(b, abs=1e-6)


# What the estimators receive


def test_a_function_by_dotted_path_gets_the_token_rewards_and_its_options(train):
    trainer = train(
        *OURS,
        advantage_estimator="tiny.recorder.record",
        advantage_kwargs={"flavour": "any"},
        rollout_func=scripted_rollout,
        max_steps=1,
    )
    assert SEEN["options"] == {"flavour": "any"}
    batch = SEEN["batch"]
    assert batch.num_generations == 4
    returns = digits(list(trainer._logs["completion"]))
    for row, (rewards, scored, mask) in enumerate(zip(batch.rewards, batch.outcome_scored, batch.mask, strict=True)):
        last = max(t for t in range(len(mask)) if mask[t])
        assert scored.nonzero().flatten().tolist() == [last], "the outcome is on the last trainable token"
        assert rewards[last].item() == pytest.approx(returns[row], abs=1e-6)
        assert rewards.count_nonzero() <= 1
    assert (batch.mask == 0).any()


def token_logps(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1 :]


@pytest.mark.parametrize("aligned", [True, False], ids=["old log-probs left out", "old log-probs from TRL"])
def test_the_kl_in_the_reward_is_that_of_the_sampling_policy(train, tiny_model, aligned):
    options = {
        "advantage_estimator": "tiny.recorder.record",
        "kl_placement": "reward",
        "beta": 0.3,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "rollout_func": scripted_rollout,
        "num_iterations": 1 if aligned else 2,
    }
    steps = 1 if aligned else 2  # of the first rollout
    sampler = train(*OURS, **options, max_steps=steps).model
    trainer = train(*OURS, **options, max_steps=steps + 1)
    reference = type(sampler).from_pretrained(tiny_model)

    trainer.state.global_step = steps
    rollout = scripted_rollout(list(trainer._logs["prompt"]), trainer)
    outcomes = digits(list(trainer._logs["completion"]))
    kls = []
    for row, (prompt, completion, mask) in enumerate(
        zip(rollout["prompt_ids"], rollout["completion_ids"], rollout["env_mask"], strict=True)
    ):
        trainable = torch.tensor(mask).bool()
        kl = token_logps(sampler, prompt, completion) - token_logps(reference, prompt, completion)
        expected = torch.where(trainable, -0.3 * kl, 0.0)
        expected[trainable.nonzero().max()] += outcomes[row]
        rewards = SEEN["batch"].rewards[row]
        torch.testing.assert_close(rewards[: len(mask)], expected, atol=1e-5, rtol=0)
        assert not rewards[len(mask) :].any()
        kls.append(kl[trainable])
    assert not torch.cat(kls).isclose(torch.tensor(0.0, dtype=torch.float64), atol=1e-3).all()
    assert logged(trainer)[-1]["kl"] == pytest.approx(torch.cat(kls).mean().item(), abs=1e-5)


def test_the_kl_in_the_reward_is_not_counted_again_in_the_loss(train):
    # With no KL left in the rewards (k1 of a policy that has not moved), the first step is that of beta = 0.
    options = {"advantage_estimator": "reinforce_plus_plus", "rollout_func": scripted_rollout, "max_steps": 1}
    with_kl = train(*OURS, kl_placement="reward", beta=10.0, **options)
    assert_same_weights(with_kl, train(*OURS, **options), atol=1e-6, rtol=0)
    assert with_kl.beta == 10.0


# Logged values


@pytest.mark.parametrize(
    "name",
    sorted(n for n, r in ADVANTAGE_ESTIMATORS.items() if r.steps != "needed" and not r.values and not r.baseline),
)
def test_logged_advantages_are_those_that_were_used(train, name):
    used = {}

    class Spy(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            used.update(output)
            return output

    trainer = train(Spy, GRPOConfig, advantage_estimator=name, rollout_func=scripted_rollout, max_steps=1)
    mask = (used["completion_mask"] * used["tool_mask"]).double()
    advantages = used["advantages"].double()
    assert advantages.shape == (mask.shape if ADVANTAGE_ESTIMATORS[name].per_token else mask.shape[:1])
    tokens = advantages if advantages.dim() == 2 else advantages[:, None] * mask
    per_row = tokens.sum(1) / mask.sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(per_row.tolist(), abs=1e-6)
    mean = tokens.sum() / mask.sum()
    std = ((tokens - mean).square() * mask).sum().div(mask.sum()).sqrt()
    assert logged(trainer, "advantages/mean", "advantages/std")[0] == pytest.approx(
        [mean.item(), std.item()], abs=1e-6
    )
    if name.startswith("reinforce_plus_plus"):
        assert [mean.item(), std.item()] == pytest.approx([0.0, 1.0], abs=1e-5)


def some_fail(completions, **kwargs):
    return [None if i == 1 else float(i // 4) for i in range(len(completions))]


def test_zero_variance_groups_are_counted_over_the_scored_completions(train):
    options = {"advantage_estimator": "group_mean", "per_device_train_batch_size": 8, "max_steps": 1}
    same = train(*OURS, reward_funcs=some_fail, **options)
    assert logged(same, "advantages/frac_groups_zero_std") == [[1.0]]
    mixed = train(*OURS, rollout_func=scripted_rollout, **options)
    assert logged(mixed, "advantages/frac_groups_zero_std") == [[0.0]]


# One completion per prompt, unscored and clipped rewards, evaluation


@pytest.mark.parametrize(
    "name", sorted(n for n, row in ADVANTAGE_ESTIMATORS.items() if not row.siblings and not row.values)
)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_completion_per_prompt_trains(train, name, batch):
    trainer = train(*OURS, advantage_estimator=name, num_generations=1, per_device_train_batch_size=batch)
    assert type(trainer.args.num_generations) is int and trainer.args.num_generations == 1
    assert all("advantages/frac_groups_zero_std" not in entry for entry in logged(trainer))
    assert all(math.isfinite(entry["loss"]) for entry in logged(trainer))


def test_unscored_completions_get_no_advantage(train):
    trainer = train(
        *OURS, advantage_estimator="reinforce_plus_plus", reward_funcs=some_fail, per_device_train_batch_size=8
    )
    assert [a == 0.0 for a in trainer._logs["advantages"]] == [False, True] + [False] * 6


def test_rewards_are_weighted_and_clipped_before_the_estimator(train):
    def hundred(completions, **kwargs):
        return [100.0 * i for i in range(len(completions))]

    train(
        *OURS,
        advantage_estimator="tiny.recorder.record",
        reward_funcs=[hundred, some_fail],
        reward_weights=[0.01, 0.5],
        reward_clip_range=[0.5, 2.0],
        max_steps=1,
    )
    assert SEEN["batch"].rewards.sum(1).tolist() == pytest.approx([0.5, 1.0, 2.0, 2.0])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_an_infinite_reward_is_refused_by_name(train, value):
    def broken(completions, **kwargs):
        return [0.0, 0.0, value, 0.0]

    with pytest.raises(ValueError, match=f"Reward function 'broken' returned {value} for completion 2; a reward is"):
        train(*OURS, advantage_estimator="group_relative", reward_funcs=broken)


def wrong_shape(batch):
    return batch.rewards[:2]


def not_finite(batch):
    return batch.rewards / 0


def per_token(batch):
    return batch.rewards.masked_fill(batch.mask == 0, torch.nan)  # whatever it says about masked tokens is ignored


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wrong_shape", {}, r"returned \(2, 6\); it must return a tensor of shape \(N,\) or \(N, T\), here \(4,\) or"),
        ("not_finite", {}, "returned a NaN or infinite advantage"),
        ("per_token", {"importance_sampling_level": "sequence"}, "gives one advantage per token, but"),
        ("per_token", {"loss_type": "vespo"}, "loss_type='vespo' reads the sign of one advantage per completion"),
    ],
)
def test_a_function_by_dotted_path_is_checked_by_its_result(train, name, options, message):
    options = {"rollout_func": scripted_rollout, **options}
    with pytest.raises(ValueError, match=message):
        train(*OURS, advantage_estimator=f"test_grpo.{name}", **options)


def test_garbage_at_masked_tokens_is_ignored(train):
    trainer = train(*OURS, advantage_estimator="test_grpo.per_token", rollout_func=scripted_rollout)
    assert all(math.isfinite(entry["loss"]) for entry in logged(trainer))


def test_evaluation_uses_its_own_number_of_generations(train):
    trainer = train(
        *OURS,
        advantage_estimator="leave_one_out",
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        max_steps=1,
    )
    metrics = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert math.isfinite(metrics["eval_advantages/std"])


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "group_relative"])
def test_a_batch_of_truncated_completions_does_nothing(train, name):
    with pytest.warns(UserWarning, match="No completion of the batch has both a reward and a trainable token"):
        trainer = train(
            *OURS,
            advantage_estimator=name,
            mask_truncated_completions=True,
            rollout_func=scripted_rollout,  # never ends with <eos>
            max_steps=1,
        )
    assert list(trainer._logs["advantages"]) == [0.0] * 4


def test_results_do_not_depend_on_how_the_batch_is_cut(train):
    def run(**options):
        trainer = train(
            *OURS, advantage_estimator="reinforce_plus_plus", rollout_func=scripted_rollout, max_steps=1, **options
        )
        return sorted(trainer._logs["advantages"])

    whole = run(per_device_train_batch_size=8)
    assert run(per_device_train_batch_size=4, gradient_accumulation_steps=2) == pytest.approx(whole, abs=1e-6)
    assert run(per_device_train_batch_size=2, steps_per_generation=4) == pytest.approx(whole, abs=1e-6)


def test_a_moved_seam_is_an_error_that_names_it(train, monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", lambda self, *batch: torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"TRL .* is not laid out as trl_ext expects: _calculate_rewards"):
        train(*OURS, advantage_estimator="group_relative")


class Callback(trl.trainer.callbacks.TrainerCallback):
    steps = 0

    def on_step_end(self, *args, **kwargs):
        Callback.steps += 1


def test_callbacks_are_added_by_dotted_path(train):
    train(*OURS, callback_paths=["test_grpo.Callback"])
    assert Callback.steps == 3
