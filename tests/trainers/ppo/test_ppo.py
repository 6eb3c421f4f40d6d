"""PPO as a whole: what the critic changes in the policy's training (nothing), and what it learns from."""

import math
import warnings

import pytest
import torch
import trl
from theorems import proves
from tiny import assert_same_weights, build, digits, logged, scripted_rollout, weights

from trl_ext.functional.reductions import aggregated
from trl_ext.functional.values import explained_variance
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

PPO = (PPOTrainer, PPOConfig)
SCRIPTED = {"num_generations": 1, "rollout_func": scripted_rollout}


def critic_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.critic.named_parameters().items()}


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"atol": 0, "rtol": 0}), msg=name)


# The policy's training is GRPO's


class Given:
    """Advantages of the tokens alone, whatever an estimator says."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = (output["completion_ids"] % 5 - 2.0) * output["completion_mask"]
        return output


class GivenPPO(Given, PPOTrainer):
    pass


class GivenGRPO(Given, GRPOTrainer):
    pass


@pytest.mark.theorem(
    "Rewards-to-go and critics",
    "Given the advantages, the policy of PPO trains to the weights of GRPO: the critic does not touch it",
    paper="ppo",
    at_most=0,
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_grad_norm": 0.01, "weight_decay": 0.1}],
    ids=["plain", "reused, accumulated, clipped"],
)
def test_with_given_advantages_the_policy_is_grpos_bit_for_bit(train, lora, options):
    given = {**SCRIPTED, "num_iterations": 1, "beta": 0.1, "lora": lora, "max_steps": 4, **options}
    ppo = train(GivenPPO, PPOConfig, critic_learning_rate=0.5, **given)
    grpo = train(GivenGRPO, GRPOConfig, advantage_estimator="reinforce", kl_placement="reward", **given)
    ours = {name: weight for name, weight in weights(ppo).items() if ".critic." not in name}
    same(ours, weights(grpo))
    proves(ours, weights(grpo))
    for mine, theirs in zip(logged(ppo), logged(grpo), strict=True):
        names = {name for name in theirs if "advantages" not in name and name != "step_time"}
        assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}
    assert any(value["value/grad_norm"] > 0 for value in logged(ppo))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_gradient_checkpointing_changes_nothing(train, lora):
    options = {**SCRIPTED, "lora": lora, "optim": "sgd", "learning_rate": 0.1, "num_iterations": 2}
    off = train(*PPO, **options)
    for reentrant in (False, True):
        on = train(
            *PPO, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, **options
        )
        assert_same_weights(on, off, atol=1e-6, rtol=0)
        same(critic_of(on), critic_of(off), atol=1e-6, rtol=0)
    start = build(*PPO, off.model.config._name_or_path, off.args.output_dir, lora=lora, **SCRIPTED)
    moved = [not torch.equal(a, b) for a, b in zip(critic_of(start).values(), critic_of(off).values(), strict=True)]
    assert all(moved), "every tensor of the critic has a gradient"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_trls_defaults_train(tiny_model, tmp_path, lora):
    """bfloat16 autocast, gradient checkpointing, the default batch of TRL's config."""
    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 2, "lora": lora}
    trainer = build(*PPO, tiny_model, tmp_path, **SCRIPTED, **options)
    before = critic_of(trainer)
    trainer.train()
    assert all(math.isfinite(entry["value/loss"]) for entry in logged(trainer))
    assert {p.dtype for p in trainer.critic.named_parameters().values()} == {torch.float32}
    assert not all(torch.equal(before[name], p) for name, p in critic_of(trainer).items())


def test_dropout_of_an_adapter_is_the_policys_alone(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    trainer = build(*PPO, policy, tmp_path, disable_dropout=False, beta=0.0, max_steps=1, **SCRIPTED)
    torch.nn.init.normal_(trainer.critic.head.weight)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 3).long()
    policy.train()
    with torch.no_grad(), trainer.critic.active():
        assert torch.equal(*(trainer.critic.values(ids, mask, 3) for _ in range(2)))
    assert not torch.equal(*(policy(input_ids=ids).logits for _ in range(2)))


def test_in_the_warm_up_the_critic_learns_alone(tiny_model, tmp_path):
    options = {**SCRIPTED, "weight_decay": 0.1, "critic_warmup_steps": 2, "max_steps": 3}
    for lora in (False, True):
        trainer = build(*PPO, tiny_model, tmp_path, lora=lora, **options)
        start, critic, seen = weights(trainer), critic_of(trainer), []
        step = trainer.training_step

        def recorded(*args, trainer=trainer, step=step, seen=seen):
            seen.append((weights(trainer), critic_of(trainer)))
            return step(*args)

        trainer.training_step = recorded
        trainer.train()
        seen.append((weights(trainer), critic_of(trainer)))
        policy = [name for name in start if ".critic." not in name]
        for moved, (policy_now, critic_now) in zip((False, False, False, True), seen, strict=True):
            assert moved != all(torch.equal(policy_now[name], start[name]) for name in policy)
            assert (critic_now is seen[0][1]) == all(torch.equal(critic_now[n], critic[n]) for n in critic)


def test_evaluation_trains_nothing(tiny_model, tmp_path):
    from tiny import dataset

    trainer = build(*PPO, tiny_model, tmp_path, eval_dataset=dataset().select(range(8)), **SCRIPTED)
    trainer.train()
    before, state = critic_of(trainer), trainer._training.optimizer.state_dict()["state"][0]["step"].clone()
    metrics = trainer.evaluate()
    same(critic_of(trainer), before)
    assert all(p.grad is None for p in trainer.critic.named_parameters().values())
    assert trainer._training.optimizer.state_dict()["state"][0]["step"] == state
    assert {"eval_value/loss", "eval_value/mean", "eval_value/explained_variance"} <= metrics.keys()
    assert "eval_value/grad_norm" not in metrics


def test_a_second_call_of_train_goes_on_with_the_optimizer_and_a_new_schedule(train):
    trainer = train(*PPO, **SCRIPTED)
    optimizer = trainer._training.optimizer
    trainer.train()
    assert trainer._training.optimizer is optimizer and len(logged(trainer)) == 3
    rates = [entry["value/lr"] for entry in logged(trainer)]
    assert rates == pytest.approx([10 * entry["learning_rate"] for entry in logged(trainer)])


# The critic's loss is aggregated as the policy's


@pytest.fixture(scope="module")
def scored(tiny_model, tmp_path_factory):
    """A GRPO trainer of TRL's and a batch it has scored; ratios are 1, two columns of which are tools'."""
    trainer = build(
        trl.GRPOTrainer, trl.GRPOConfig, tiny_model, tmp_path_factory.mktemp("out"), rollout_func=scripted_rollout,
        gradient_accumulation_steps=3, steps_per_generation=6, num_generations=2,
    )  # fmt: skip
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in ["ab", "cde"] * 4])
    return trainer, {name: value for name, value in output.items() if name != "old_per_token_logps"}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "cispo", "vespo"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("window", [3, 2])
def test_aggregation_is_that_of_trls_loss(scored, monkeypatch, loss_type, training, window):
    trainer, output = scored
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    trainer.current_gradient_accumulation_steps = window  # the last window of an epoch is shorter
    trainer.model.train(training)
    mask = output["completion_mask"] * output["tool_mask"]
    torch.manual_seed(0)
    x = torch.rand(mask.shape)
    if loss_type == "vespo":  # one advantage per completion
        x = x[:, :1].expand_as(x)
    logps = []
    original = trl.GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: logps.append(original(trainer, *a, **k)) or logps[-1],
        raising=False,
    )
    with torch.no_grad():
        expected = trainer._compute_loss(trainer.model, {**output, "advantages": -x})
    # At ratio 1 the loss of a token is minus its advantage, times what the type multiplies it with there.
    logps = logps[0][0].detach()
    factor = {
        "sapo": 2 / trainer.args.sapo_temperature_neg,
        "cispo": min(1.0, trainer.epsilon_high) * logps,
        "vespo": logps,
    }.get(loss_type, 1.0)
    per_token = x * factor
    found = aggregated(
        per_token, mask, loss_type, num_items=output["num_items_in_batch"],
        max_completion_length=trainer.max_completion_length, accumulation=window if training else 1,
        steps_per_generation=trainer.args.steps_per_generation if training else 1,
    )  # fmt: skip
    trainer.model.train()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


# What the critic sees and learns


class Spy(PPOTrainer):
    """Keeps each generation batch, and what is handed to the loss."""

    def _replace_advantages(self, scoring, rollout, output):
        super()._replace_advantages(scoring, rollout, output)
        self.__dict__.setdefault("seen", []).append((rollout.batch, dict(output)))


def one_batch(tiny_model, tmp_path, **options):
    settings = {**SCRIPTED, "max_steps": 1, "per_device_train_batch_size": 8, "beta": 0.0, **options}
    trainer = build(Spy, PPOConfig, tiny_model, tmp_path, **settings)
    torch.nn.init.normal_(trainer.critic.head.weight)
    trainer.train()
    return trainer, *trainer.seen[0]


def ends_with_eos(prompts, trainer):
    """Completions 0, 2, … end; completion 6 is cut off right after a tool result."""
    rollout = scripted_rollout(prompts, trainer)
    for i, ids in enumerate(rollout["completion_ids"]):
        if i % 2 == 0 and i != 6:
            ids[-1] = trainer.processing_class.eos_token_id
            rollout["env_mask"][i][-1] = 1
    rollout["env_mask"][6] = [1] * (len(rollout["env_mask"][6]) - 1) + [0]
    return rollout


def some_fail(completions, **kwargs):
    return [None if i == 3 else x for i, x in enumerate(digits(completions))]


def test_old_values_belong_to_the_states_before_the_tokens(tiny_model, tmp_path):
    trainer, batch, output = one_batch(tiny_model, tmp_path, learning_rate=1e-12, num_iterations=1)
    for i, length in enumerate(output["completion_mask"].sum(1).tolist()):
        prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()]
        ids = torch.cat([prompt, output["completion_ids"][i, :length]])[None]
        with torch.no_grad(), trainer.critic.active():
            alone = trainer.critic.values(ids, torch.ones_like(ids), length + 1)[0]
        torch.testing.assert_close(output["old_values"][i, :length], alone[:-1], atol=1e-5, rtol=0)
        assert batch.values[i, -1] == 0.0


def test_a_completion_that_was_cut_off_goes_on_with_its_value(tiny_model, tmp_path):
    _, plain_batch, _ = one_batch(tiny_model, tmp_path, rollout_func=ends_with_eos)
    options = {"rollout_func": ends_with_eos, "bootstrap_truncated": True, "learning_rate": 1e-12, "num_iterations": 1}
    trainer, batch, output = one_batch(tiny_model, tmp_path, **options)
    assert not plain_batch.values[:, -1].any()
    cut_off = torch.tensor([False, True] * 3 + [True, True])
    assert torch.equal(batch.values[:, -1] != 0, cut_off)
    length = output["completion_mask"].sum(1).tolist()
    # That of the state after the tool result, which stands behind the last trainable token.
    assert length[6] > batch.mask[6].sum()
    prompt = output["prompt_ids"][6][output["prompt_mask"][6].bool()]
    ids = torch.cat([prompt, output["completion_ids"][6, : length[6]]])[None]
    with torch.no_grad():
        after = trainer.critic.values(ids, torch.ones_like(ids), 1)[0, 0]
    torch.testing.assert_close(batch.values[6, -1], after, atol=1e-5, rtol=0)


def test_cut_off_completions_pay_a_penalty_that_unscored_ones_do_not(tiny_model, tmp_path):
    options = {"rollout_func": ends_with_eos, "reward_funcs": some_fail, "reward_clip_range": [0.0, 0.5]}
    _, before, _ = one_batch(tiny_model, tmp_path, **options)
    _, after, _ = one_batch(tiny_model, tmp_path, missing_eos_penalty=2.0, **options)
    difference = before.outcome.sum(1) - after.outcome.sum(1)
    assert difference.tolist() == pytest.approx([0, 2, 0, 0, 0, 2, 2, 2])
    assert not after.outcome[after.mask == 0].any() and not after.trainable[3].any()


def by_token(completion_steps, completion_step_ends, **kwargs):
    return [[0.5] * len(ends) for ends in completion_step_ends]


def test_the_penalty_reaches_completions_that_are_scored_by_steps_alone(tiny_model, tmp_path):
    options = {"rollout_func": ends_with_eos, "reward_funcs": by_token, "step_separator": "b"}
    _, batch, _ = one_batch(tiny_model, tmp_path, missing_eos_penalty=2.0, **options)
    assert batch.outcome.sum(1).tolist() == pytest.approx([0, -2, 0, -2, 0, -2, -2, -2])
    assert batch.steps.sum(1).ge(0.5).all() and batch.scorable.all()


def test_what_is_handed_to_the_loss(tiny_model, tmp_path):
    _, batch, output = one_batch(tiny_model, tmp_path, reward_funcs=some_fail, critic_lam=1.0)
    assert torch.equal(output["value_mask"], batch.trainable) and not output["value_mask"][3].any()
    to_go = batch.rewards.sum(1, keepdim=True).expand_as(batch.mask).where(batch.trainable, 0.0)
    torch.testing.assert_close(output["returns"].double(), to_go, atol=1e-6, rtol=0)
    assert output["old_values"].dtype == output["returns"].dtype == torch.float32
    assert not output["advantages"][batch.trainable == 0].any()


def test_the_logged_value_loss_is_the_mean_over_the_tokens(tiny_model, tmp_path):
    trainer, batch, output = one_batch(tiny_model, tmp_path, num_iterations=1, cliprange_value=None)
    error = (output["old_values"] - output["returns"])[batch.trainable]
    (entry,) = logged(trainer)
    assert entry["value/loss"] == pytest.approx((error.square() / 2).mean().item(), rel=1e-5)
    assert "value/clipped" not in entry
    assert {"value/grad_norm", "value/lr", "value/mean", "value/return_mean"} <= entry.keys()
    assert entry["value/mean"] == pytest.approx(output["old_values"][batch.trainable].mean().item(), rel=1e-5)


def test_with_the_first_values_and_lambda_one_it_is_reinforce_plus_plus(train):
    options = {**SCRIPTED, "max_steps": 1, "beta": 0.1, "num_iterations": 1}
    ppo = train(*PPO, lam=1.0, **options)
    other = train(GRPOTrainer, GRPOConfig, advantage_estimator="reinforce_plus_plus", kl_placement="reward", **options)
    assert_same_weights(ppo, other, atol=1e-6, rtol=0)
    assert logged(ppo)[0]["kl/effective_beta"] == pytest.approx(logged(other)[0]["kl/effective_beta"])


def test_the_loss_type_is_the_critics_too(train):
    by_type = {
        loss_type: critic_of(train(*PPO, loss_type=loss_type, optim="sgd", max_steps=1, **SCRIPTED))
        for loss_type in ("grpo", "dr_grpo", "dapo")
    }
    first = by_type.pop("grpo")
    for other in by_type.values():
        assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("lora", "rate"), [(False, 3e-3), (True, 1e-2)], ids=["full", "adapter"])
def test_the_critic_learns_a_fixed_batch(tiny_model, tmp_path, lora, rate):
    """512 random completions; the reward is the share of digits. Plain regression on the reward-to-go."""
    trainer = build(*PPO, tiny_model, tmp_path, num_generations=1, lora=False)
    critic = trainer.critic
    if lora:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from trl_ext.trainers.ppo.critic import AdapterCritic

        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        critic = AdapterCritic(
            get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config), torch.device("cpu")
        )
    torch.manual_seed(1)
    ids = torch.randint(2, 21, (256, 10))
    returns = (ids[:, 2:] >= 11).float().mean(1, keepdim=True).expand(256, 8)
    optimizer = torch.optim.Adam(critic.named_parameters().values(), lr=rate)
    with critic.active():
        for step in range(400):
            rows = torch.arange(64) + 64 * (step % 4)
            found = critic.values(ids[rows], torch.ones_like(ids[rows]), 9)[:, :-1]
            optimizer.zero_grad()
            (found - returns[rows]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            found = critic.values(ids, torch.ones_like(ids), 9)[:, :-1]
    assert explained_variance(returns, found, torch.ones_like(returns)) >= 0.4


# Other people's subclasses, the model card


def test_a_loss_that_leaves_the_critic_out_is_named(tiny_model, tmp_path):
    class Theirs(PPOTrainer):
        per_token_advantages = True

        def _compute_loss(self, model, inputs):
            return trl.GRPOTrainer._compute_loss(self, model, inputs)

    trainer = build(Theirs, PPOConfig, tiny_model, tmp_path, beta=0.0, **SCRIPTED)
    with pytest.raises(ValueError, match=r"Theirs overrides _compute_loss .* so that the critic of PPOTrainer has no"):
        trainer.train()


def test_a_loss_that_adds_something_works(train):
    class Theirs(PPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 1.0

    same(critic_of(train(Theirs, PPOConfig, **SCRIPTED)), critic_of(train(*PPO, **SCRIPTED)))


def test_the_model_card_names_ppo(tiny_model, tmp_path):
    trainer = build(*PPO, tiny_model, tmp_path, critic_lam=1.0, **SCRIPTED)
    trainer.create_model_card(model_name="mine")
    text = (tmp_path / "README.md").read_text()
    assert "trained with PPO, a method introduced in [Proximal Policy Optimization Algorithms]" in text
    assert "- `critic_lam`: `1.0`\n" in text and "- `beta`: `0.05`\n" in text


def test_equal_rewards_are_told(tiny_model, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one_batch(tiny_model, tmp_path, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    assert any("All rewards of the batch are equal" in str(w.message) for w in caught)
