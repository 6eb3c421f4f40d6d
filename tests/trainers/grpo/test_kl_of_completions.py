"""`kl_placement: sequence` inside the trainer: the gradient of the KL of whole completions, by enumeration."""

import math
from contextlib import nullcontext

import pytest
import torch
from tiny import build, logged, scripted_rollout, weights
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

OURS = (GRPOTrainer, GRPOConfig)
BETA, EOS, LONGEST, TEMPERATURE = 0.3, 1, 3, 0.8
SEQUENCE = {"kl_placement": "sequence", "beta": BETA}


# Every completion of a model with three words, the second of which ends a completion


def every_completion(ends: bool, longest=LONGEST, prefix=()):
    if len(prefix) == longest or (ends and prefix and prefix[-1] == EOS):
        yield [*prefix]
        return
    for token in range(3):
        yield from every_completion(ends, longest, (*prefix, token))


def reward_of(completion):
    return (7 * sum((t + 1) * (token + 1) for t, token in enumerate(completion)) % 11) / 11


@pytest.fixture(scope="module")
def three_words(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("three_words"))
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen3Config(vocab_size=3, num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=EOS, **size)
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": EOS, "a": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(path)
    return path


def moved(trainer, noise=0.3):
    """The policy, away from the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn(p.shape, generator=generator))


def everything(model, folder, ends, longest=LONGEST, **options):
    """A trainer, its batch of all completions, given rewards as advantages, and their log-probs and exact KLs."""
    completions = [*every_completion(ends, longest)]
    rows = len(completions) + len(completions) % 2

    def rollout(prompts, trainer):
        ids = [*completions, completions[0]][: len(prompts)]
        return {"prompt_ids": [[2]] * len(ids), "completion_ids": ids, "logprobs": [[0.0] * len(i) for i in ids]}

    settings = {"per_device_train_batch_size": rows, "num_generations": 2, "max_completion_length": LONGEST}
    trainer = build(
        *OURS, model, folder, rollout_func=rollout, temperature=TEMPERATURE, **SEQUENCE, **settings, **options
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions([{"prompt": "a"}] * rows)
    output["advantages"] = torch.tensor([reward_of(completion) for completion in completions])
    moved(trainer)
    return trainer, output, completions


def distributions(model, completions):
    """Log-probs of all words before each token, after the temperature: one `(length, 3)` per completion."""
    for completion in completions:
        logits = model(input_ids=torch.tensor([[2, *completion]])).logits[0, :-1]
        yield (logits.double() / TEMPERATURE).log_softmax(-1)


def true_gradient(trainer, completions):
    """Of −E[reward] + β KL(completions), and the probability of each completion."""
    model = trainer.model
    peft = trainer.ref_model is None
    with torch.no_grad(), model.disable_adapter() if peft else nullcontext():
        reference = [*distributions(model if peft else trainer.ref_model, completions)]
    model.zero_grad()
    loss, probabilities = 0.0, []
    for completion, policy, ref in zip(completions, distributions(model, completions), reference, strict=True):
        chosen = range(len(completion)), completion
        logp = policy[chosen].sum()
        probabilities.append(logp.exp().item())
        loss = loss + logp.exp() * (BETA * (logp - ref[chosen].sum()) - reward_of(completion))
    loss.backward()
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
    return gradient_of(model), probabilities


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def loss_gradient(trainer, output, rows):
    """Of the trainer's loss of some rows alone."""
    whole = len(output["completion_ids"])
    rows = torch.tensor(rows)
    inputs = {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) >= whole - 1 else value
        for name, value in output.items()
    }
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    return gradient_of(trainer.model)


CASES = {
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo": {"loss_type": "luspo"},
    "dapo": {"loss_type": "dapo"},
    "LoRA": {"loss_type": "dr_grpo", "lora": True},
    "GSPO's ratio": {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"},
    "grpo, equal lengths": {"loss_type": "grpo"},
}


@pytest.mark.filterwarnings("ignore:The KL keeps the token-level ratio")
@pytest.mark.parametrize("case", CASES)
def test_the_expected_gradient_is_that_of_reward_and_kl_of_completions(three_words, tmp_path, case):
    options = CASES[case]
    trainer, output, completions = everything(three_words, tmp_path, ends="equal" not in case, **options)
    assert len(completions) == (27 if "equal" in case else 15)
    expected, probabilities = true_gradient(trainer, completions)
    found = sum(p * loss_gradient(trainer, output, [i]).double() for i, p in enumerate(probabilities))
    scale = {"luspo": 1.0, "dapo": 1 / output["num_items_in_batch"].item()}.get(options["loss_type"], 1 / LONGEST)
    assert (found - scale * expected).norm() < 1e-5 * (scale * expected).norm()


def test_with_a_baseline_over_pairs_of_completions_it_is_the_same_with_less_noise(three_words, tmp_path, monkeypatch):
    trainer, output, completions = everything(three_words, tmp_path, ends=True, longest=2, loss_type="luspo")
    output["advantages"] = torch.zeros(len(completions))
    monkeypatch.setattr("test_kl_of_completions.reward_of", lambda completion: 0.0)
    expected, p = true_gradient(trainer, completions)
    rows = range(len(completions))
    pairs = {(i, j): loss_gradient(trainer, output, [i, j]).double() for i in rows for j in rows}
    found = sum(p[i] * p[j] * gradient for (i, j), gradient in pairs.items())
    assert (found - expected).norm() < 1e-5 * expected.norm()
    single = [loss_gradient(trainer, output, [i]).double() for i in rows]
    noise_of_two = sum(p[i] * p[j] * (g - found).square().sum() for (i, j), g in pairs.items())
    noise_of_one = sum(p[i] * (g - found).square().sum() for i, g in enumerate(single))
    assert noise_of_two < 0.5 * noise_of_one, "less than two rows without a baseline"


# The formula, with holes of tool results, several lengths, and a policy that has moved since it sampled


def scored(trainer):
    """A scored batch of 8, with the policy away from reference and sampler."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions([{"prompt": p} for p in ["ab"] * 4 + ["cde"] * 4])
    moved(trainer, 1.0 if hasattr(trainer.model, "peft_config") else 0.1)
    if "old_per_token_logps" in output:
        output["old_per_token_logps"] += 0.3 * torch.randn(output["old_per_token_logps"].shape)
    return output


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), gradient_of(trainer.model)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("passes", [1, 2], ids=["on-policy", "reused"])
def test_the_loss_is_that_of_exact_and_its_gradient_has_the_price_of_later_tokens(tiny_model, tmp_path, lora, passes):
    given = {"lora": lora, "num_iterations": passes, "per_device_train_batch_size": 8, "loss_type": "dr_grpo"}
    trainer = build(*OURS, tiny_model, tmp_path, rollout_func=scripted_rollout, **SEQUENCE, **given)
    inputs = scored(trainer)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    assert (inputs["tool_mask"] == 0).any()
    ours = loss_and_gradient(trainer, inputs)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._penalty.of_completions = False
    exact = loss_and_gradient(trainer, inputs)
    assert torch.equal(ours[0], exact[0])
    assert metrics == {name: values[-1] for name, values in trainer._metrics["train"].items()}

    width = inputs["completion_ids"].size(1)
    ids, attention = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad(), trainer.model.disable_adapter() if lora else nullcontext():
        reference = (trainer.model if lora else trainer.ref_model)(input_ids=ids, attention_mask=attention).logits
    trainer.model.zero_grad()
    policy = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1].log_softmax(-1)
    reference = reference[:, -width - 1 : -1].log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum(-1).detach().masked_fill(~mask, 0.0)
    logps = policy.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    old = inputs.get("old_per_token_logps", logps.detach())
    later = torch.tensor([[sum(row[t + 1 :]) for t in range(width)] for row in kl.tolist()])
    others = torch.stack([torch.cat([later[:i], later[i + 1 :]]).mean(0) for i in range(8)])
    price = (logps.detach() - old).exp() * (later - others)
    (BETA * (price * logps)[mask].sum() / (8 * trainer.max_completion_length)).backward()
    expected = gradient_of(trainer.model)
    assert expected.norm() > 0.01 * exact[1].norm()
    assert (ours[1] - exact[1] - expected).norm() < 1e-4 * expected.norm()


def test_a_row_without_trainable_tokens_is_part_of_no_baseline(tiny_model, tmp_path):
    options = {"per_device_train_batch_size": 8, "loss_type": "dr_grpo", "rollout_func": scripted_rollout}
    trainer = build(*OURS, tiny_model, tmp_path, **SEQUENCE, **options)
    inputs = scored(trainer)
    of_all = loss_and_gradient(trainer, inputs)[1]
    without = {**inputs, "tool_mask": inputs["tool_mask"].clone()}
    without["tool_mask"][:4] = 0
    trainer.model.zero_grad()
    rows = slice(4, 8)
    four = {name: value[rows] if getattr(value, "ndim", 0) else value for name, value in inputs.items()}
    alone = loss_and_gradient(trainer, four)[1] / 2  # its normaliser has four rows, not eight
    torch.testing.assert_close(loss_and_gradient(trainer, without)[1], alone, atol=1e-6, rtol=1e-4)
    assert (of_all - alone).norm() > 0.1 * alone.norm()


# Runs


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_trains_in_trls_default_precision(train, lora):
    trainer = train(*OURS, lora=lora, bf16=True, gradient_checkpointing=True, max_steps=2, **SEQUENCE)
    assert trainer.args.bf16
    found = logged(trainer, "kl", "grad_norm")
    assert all(math.isfinite(x) for row in found for x in row) and found[1][0] > 0


def test_the_adaptive_beta_follows_the_exact_kl(train):
    options = {"kl_target": 1e-6, "kl_horizon": 100.0, "learning_rate": 0.05, "rollout_func": scripted_rollout}
    trainer = train(*OURS, **SEQUENCE, **options)
    betas = [beta for (beta,) in logged(trainer, "kl/beta")]
    assert betas[0] == BETA and betas[2] == pytest.approx(betas[1] * (1 + 0.2 * 4 / 100))


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "group_mean"])
def test_it_works_beside_every_advantage(train, estimator):
    options = {"advantage_estimator": estimator, "rollout_func": scripted_rollout, "max_steps": 2}
    with_kl, exact = train(*OURS, **SEQUENCE, **options), train(*OURS, kl_estimator="exact", beta=BETA, **options)
    assert logged(with_kl, "advantages/std")[0] == logged(exact, "advantages/std")[0]
    assert any(not torch.equal(w, weights(exact)[name]) for name, w in weights(with_kl).items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ppo_takes_it(train, lora):
    trainer = train(PPOTrainer, PPOConfig, lora=lora, num_iterations=2, max_steps=3, **SEQUENCE)
    assert all(math.isfinite(kl) for (kl,) in logged(trainer, "kl"))
    assert trainer._penalty.of_completions and logged(trainer, "kl")[-1][0] > 0
