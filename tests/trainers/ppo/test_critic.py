"""Both critics: what a value belongs to, what is trainable when, what is saved."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build, scripted_rollout
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl_ext.trainers.ppo import PPOConfig, PPOTrainer
from trl_ext.trainers.ppo.critic import AdapterCritic, ModelCritic

KINDS = {"model": False, "adapter": True}


@pytest.fixture(params=KINDS)
def trainer(request, tiny_model, tmp_path):
    torch.manual_seed(0)
    options = {"num_generations": 1, "rollout_func": scripted_rollout}
    trainer = build(PPOTrainer, PPOConfig, tiny_model, tmp_path, lora=KINDS[request.param], **options)
    torch.nn.init.normal_(trainer.critic.head.weight)
    for name, parameter in trainer.critic.named_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return trainer


@torch.no_grad()
def values(critic, prompts, completion, pad=0):
    ids = torch.tensor([[0] * pad + prompts + completion])
    mask = torch.tensor([[0] * pad + [1] * len(prompts + completion)])
    with critic.active():
        return critic.values(ids, mask, len(completion) + 1)[0]


def test_a_value_knows_the_tokens_before_it_and_no_other(trainer):
    prompt, completion = [3, 4], [5, 6, 7, 8]
    before = values(trainer.critic, prompt, completion)
    assert before.dtype == torch.float32 and before.shape == (5,)
    for t in range(4):
        after = values(trainer.critic, prompt, [*completion[:t], 12, *completion[t + 1 :]])
        assert torch.equal(after[: t + 1], before[: t + 1]) and not after[t + 1].isclose(before[t + 1])
    for pad in (1, 5):
        torch.testing.assert_close(values(trainer.critic, prompt, completion, pad), before, atol=1e-5, rtol=0)


def test_the_first_values_are_zero(tiny_model, tmp_path):
    for lora in (False, True):
        trainer = build(PPOTrainer, PPOConfig, tiny_model, tmp_path, lora=lora, num_generations=1)
        assert isinstance(trainer.critic, AdapterCritic if lora else ModelCritic)
        assert not values(trainer.critic, [3, 4], [5, 6]).any()


def test_outside_its_context_the_critic_is_frozen_and_inside_the_policy_is(tiny_model, tmp_path):
    trainer = build(PPOTrainer, PPOConfig, tiny_model, tmp_path, lora=True, num_generations=1)

    def trainable():
        return {name for name, p in trainer.model.named_parameters() if p.requires_grad}

    default = {name for name, _ in trainer.model.named_parameters() if ".default." in name}
    critic = {name for name, _ in trainer.model.named_parameters() if ".critic." in name}
    assert default and trainable() == default and {name.replace("critic", "default") for name in critic} == default
    with trainer.critic.active():
        assert trainable() == critic
    with pytest.raises(ZeroDivisionError), trainer.critic.active():
        _ = 1 / 0
    assert trainable() == default


def test_a_trained_adapter_gives_its_features_to_the_critic_and_stays_the_policy(tiny_model, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trainer = build(PPOTrainer, PPOConfig, policy, tmp_path, num_generations=1, rollout_func=scripted_rollout)
    own = dict(policy.named_parameters())
    for name in own:
        if ".critic." in name:
            theirs = own[name.replace(".critic.", ".default.")]
            assert torch.equal(own[name], theirs) and own[name].dtype == torch.float32
    assert policy.peft_config["critic"].lora_dropout == 0.0 and {*policy.peft_config} == {"default", "ref", "critic"}
    before = {name: p.detach().clone() for name, p in own.items()}
    trainer.train()
    moved = {name for name, p in own.items() if not torch.equal(p, before[name])}
    assert moved == {name for name in own if ".default." in name or ".critic." in name}


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_changes_it_once(tiny_model, kind):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=kind, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    AdapterCritic(model, torch.device("cpu"))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_a_reward_model_gives_its_head(tiny_model, tmp_path):
    torch.manual_seed(0)
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    reward_model.save_pretrained(tmp_path / "rm")
    trainer = build(
        PPOTrainer, PPOConfig, tiny_model, tmp_path, lora=True, num_generations=1, value_model=str(tmp_path / "rm")
    )
    head = trainer.critic.head
    assert torch.equal(head.weight, reward_model.score.weight) and not head.bias.any()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        states = reward_model.model(input_ids=ids).last_hidden_state
        expected = reward_model.score(states)[0, :, 0]
        found = trainer.critic.values(ids, torch.ones_like(ids), 3)[0]
    torch.testing.assert_close(found, expected)
    assert "critic" not in trainer.model.peft_config


def test_nothing_of_a_model_critic_is_random(tiny_model, tmp_path):
    trainer = build(PPOTrainer, PPOConfig, tiny_model, tmp_path, num_generations=1)
    dropout = [m.p for m in trainer.critic.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert trainer.critic.model.training and dropout and not any(dropout)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ModelCritic(tiny_model, trainer.accelerator, dtype=torch.float32)
    assert torch.equal(torch.rand(1), expected), "random numbers of the run are left alone"


def test_what_is_saved_is_loaded(trainer, tmp_path):
    critic = trainer.critic
    before = {name: p.detach().clone() for name, p in critic.named_parameters().items()}
    critic.save(tmp_path / "critic", is_writer=True)
    with torch.no_grad():
        for parameter in critic.named_parameters().values():
            parameter.add_(1.0)
    critic.load(tmp_path / "critic")
    after = critic.named_parameters()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_saved_model_critic_is_a_value_model(tiny_model, tmp_path):
    trainer = build(PPOTrainer, PPOConfig, tiny_model, tmp_path, num_generations=1, rollout_func=scripted_rollout)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = build(PPOTrainer, PPOConfig, tiny_model, tmp_path, value_model=str(tmp_path / "saved/critic"))
    ids = [3, 4], [5, 6, 7]
    assert values(trainer.critic, *ids).any()
    torch.testing.assert_close(values(again.critic, *ids), values(trainer.critic, *ids))


def test_another_critic_is_not_loaded(tiny_model, tmp_path):
    for name, r in (("a", 4), ("b", 2)):
        lora = LoraConfig(r=r, target_modules=["q_proj", "v_proj"][: r // 2], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
        critic = AdapterCritic(model, torch.device("cpu"))
        if name == "a":
            critic.save(tmp_path / "a", is_writer=True)
    with pytest.raises(ValueError, match="The saved critic is another model; these differ:"):
        critic.load(tmp_path / "a")
