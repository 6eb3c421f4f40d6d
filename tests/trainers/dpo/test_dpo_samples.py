"""The implicit reward and the metrics of sampled completions."""

import math

import pytest
import torch
import trl
from tiny import build as build_grpo
from tiny import digits
from tiny.dpo import adapter, build, noisy, pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_ext.rewards.implicit_reward import ImplicitReward
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.dpo.samples import PolicySamples

BETA = 0.3


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


# Implicit reward


@pytest.mark.parametrize("kind", ["reference", "lora", "adapter"])
@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
def test_the_implicit_reward_is_what_trl_logs(tiny_model, tmp_path, kind, conversational):
    rows = pairs(6)
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model, tmp_path, kind=kind, beta=BETA, train_dataset=rows)
    tokenizer = trainer.processing_class
    if conversational:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
        )
        message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
        rows = rows.map(
            lambda row: {
                "prompt": message("user", row["prompt"]),
                "chosen": message("assistant", row["chosen"]),
                "rejected": message("assistant", row["rejected"]),
            }
        )
    prepared = trainer._prepare_dataset(rows, tokenizer, trainer.args, "test")
    with torch.no_grad():
        trainer.compute_loss(trainer.model, trainer.data_collator(list(prepared)))
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    modes = [module.training for module in trainer.model.modules()]
    score = ImplicitReward(trainer.model, tokenizer, BETA, ref_model=trainer.ref_model, batch_size=4)
    for name in ("chosen", "rejected"):
        rewards = score(prompts=rows["prompt"][:], completions=rows[name][:], other="ignored")
        assert sum(rewards) / 6 == pytest.approx(metrics[f"rewards/{name}"][-1], abs=1e-5)
        assert any(abs(reward) > 1e-3 for reward in rewards)
        per_token = score.per_token(rows["prompt"][:], rows[name][:])
        assert [len(tokens) for tokens in per_token] == [len(ids) for ids in prepared[f"{name}_ids"][:]]
        assert [tokens.sum().item() for tokens in per_token] == pytest.approx(rewards)
    assert [module.training for module in trainer.model.modules()] == modes


def test_the_implicit_reward_of_a_token_is_its_log_ratio(tiny_model):
    policy, reference, tokenizer = noisy(load(tiny_model)), load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    (rewards,) = ImplicitReward(policy, tokenizer, BETA, reference).per_token(["ab"], ["c1"])
    ids = torch.tensor([tokenizer("abc1")["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        ratio = policy(ids).logits.log_softmax(-1) - reference(ids).logits.log_softmax(-1)
    expected = [BETA * ratio[0, t, ids[0, t + 1]].item() for t in (1, 2, 3)]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5)


def test_given_tokens_are_scored_as_they_are(tiny_model):
    score = ImplicitReward(adapter(tiny_model), AutoTokenizer.from_pretrained(tiny_model), BETA)
    ids = score.processing_class(["c1", "ab2"])["input_ids"]
    (whole,) = score.per_token(["ab"], ["c1"])
    cut = score.per_token(["ab", "ab"], ["c1", "ab2"], completion_ids=ids)
    assert cut[0].tolist() == pytest.approx(whole[:2].tolist(), abs=1e-6)
    assert [len(tokens) for tokens in cut] == [2, 3]


def test_the_implicit_reward_trains_grpo(tiny_model, tmp_path):
    score = ImplicitReward(adapter(tiny_model), AutoTokenizer.from_pretrained(tiny_model), BETA)
    trainer = build_grpo(
        trl.GRPOTrainer, trl.GRPOConfig, tiny_model, tmp_path, reward_funcs=[digits, score], max_steps=1
    )
    trainer.train()
    assert any("rewards/implicit_reward/mean" in entry for entry in trainer.state.log_history)


def test_a_missing_reference_is_refused(tiny_model):
    with pytest.raises(ValueError, match="needs a reference: pass ref_model, or a PEFT model"):
        ImplicitReward(load(tiny_model), None, BETA)


# Sampled metrics


def exact(policy, reference, prompt_ids, eos):
    """KL of completions of at most two tokens, their mean length, by enumeration."""
    with torch.no_grad():
        first = [
            model(torch.tensor([prompt_ids])).logits[0, -1].double().log_softmax(0) for model in (policy, reference)
        ]
        kl = (first[0].exp() * (first[0] - first[1])).sum()
        for token in range(len(first[0])):
            if token != eos:
                ids = torch.tensor([[*prompt_ids, token]])
                p, r = (model(ids).logits[0, -1].double().log_softmax(0) for model in (policy, reference))
                kl += first[0][token].exp() * (p.exp() * (p - r)).sum()
    return kl.item(), 2 - first[0][eos].exp().item()


@pytest.mark.parametrize("kind", ["reference", "lora"])
def test_the_sampled_kl_and_length_are_those_of_the_policy(tiny_model, tmp_path, kind):
    rows = pairs(1)
    rows = rows.select([0] * 4096)
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, kind=kind, train_dataset=rows, loss_type=["gpo_logistic"],
        per_device_eval_batch_size=512, ld_alpha=0.0,
    )  # fmt: skip
    callback = PolicySamples(
        trainer,
        num_prompts=4096,
        max_new_tokens=2,
        reward_func=lambda completion_ids, **_: [len(ids) for ids in completion_ids],
    )
    trainer.model.train()
    state = torch.get_rng_state()
    metrics = callback.measure()
    assert torch.equal(torch.get_rng_state(), state) and trainer.model.training and trainer.ld_alpha == 0.0
    prompt_ids, eos = trainer.train_dataset[0]["prompt_ids"], trainer.processing_class.eos_token_id
    if kind == "lora":
        policy, reference = trainer.model.merge_and_unload(), load(tiny_model)
    else:
        policy, reference = trainer.model, trainer.ref_model
    kl, length = exact(policy.eval(), reference.eval(), prompt_ids, eos)
    assert kl > 5 * metrics["policy_samples/kl_stderr"], "otherwise 0 would pass"
    assert metrics["policy_samples/kl"] == pytest.approx(kl, abs=4 * metrics["policy_samples/kl_stderr"])
    assert metrics["policy_samples/length"] == pytest.approx(length, abs=0.02)
    assert metrics["policy_samples/kl_per_token"] == pytest.approx(
        metrics["policy_samples/kl"] / metrics["policy_samples/length"]
    )
    assert 0.8 < metrics["policy_samples/truncated"] < 1
    assert metrics["policy_samples/reward"] == metrics["policy_samples/length"]


def test_the_callback_by_its_name_logs_and_does_not_change_the_training(tiny_model, tmp_path):
    options = {"kind": "lora", "loss_type": ["gpo_logistic"], "logging_steps": 2}
    path = "test_dpo_samples.Often"
    with_callback = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, callback_paths=path, **options)
    without = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, **options)
    for trainer in (with_callback, without):
        trainer.train()
    sampled = [entry for entry in with_callback.state.log_history if "policy_samples/kl" in entry]
    assert [entry["step"] for entry in sampled] == [0, 3, 4]
    assert all(math.isfinite(value) for entry in sampled for value in entry.values())
    theirs = [entry for entry in without.state.log_history if "loss" in entry]
    ours = [entry for entry in with_callback.state.log_history if "loss" in entry]
    assert ours == theirs
    for a, b in zip(with_callback.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


LEAKS = {
    "repetition_penalty": 5.0,
    "num_beams": 3,
    "typical_p": 0.1,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 12,
    "suppress_tokens": [1],
    "forced_eos_token_id": 1,
    "epsilon_cutoff": 0.05,
    "num_return_sequences": 2,
    "stop_strings": ["a"],
    "top_k": 1,
}


@pytest.mark.parametrize("kind", ["reference", "lora", "adapter"])
def test_nothing_of_the_models_own_generation_config_reaches_the_samples(tiny_model, tmp_path, kind):
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, kind=kind, loss_type=["gpo_logistic"])
    callback = PolicySamples(trainer, num_prompts=8, max_new_tokens=16)
    expected = callback.measure()
    model = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    for name, value in LEAKS.items():
        config = model.generation_config = GenerationConfig()
        setattr(config, name, value)
        assert callback.measure() == expected, name
        assert model.generation_config is config and getattr(config, name) == value


def test_a_measurement_takes_no_row_of_the_training_metrics(tiny_model, tmp_path):
    options = {"loss_type": ["gpo_logistic"], "kind": "lora", "logging_steps": 1}
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, **options)
    trainer.add_callback(PolicySamples(trainer, steps=1, num_prompts=2, max_new_tokens=2))
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert all("rewards/margins" in entry and "grad_norm" in entry for entry in history if "loss" in entry)
    assert [entry["step"] for entry in history if "policy_samples/kl" in entry] == [0, 1, 2, 3, 4]


class Often(PolicySamples):
    def __init__(self):
        super().__init__(steps=3, num_prompts=5, max_new_tokens=4)


def test_the_callback_without_trainer_or_reference_is_refused(tiny_model, tmp_path):
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="PolicySamples needs its trainer"):
        PolicySamples().on_train_begin(trainer.args, trainer.state, None)
    with pytest.raises(ValueError, match="PolicySamples needs the reference during training"):
        PolicySamples(trainer).on_train_begin(trainer.args, trainer.state, None)
