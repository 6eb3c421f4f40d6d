"""The KL penalty inside the GRPO trainer: TRL's where TRL has it, exact where it says so, adaptive on request."""

import json
import math

import pytest
import torch
import trl
from theorems import proves
from tiny import build, digits, logged, scripted_rollout, weights
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ext.functional.kl import k1, k2, k3, next_beta
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.grpo.exact_kl import Head, exact_kl
from trl_ext.trainers.grpo.kl import BetaController, BetaProxy

OURS = (GRPOTrainer, GRPOConfig)
TRLS = (trl.GRPOTrainer, trl.GRPOConfig)
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
BETA = 0.3


def scored(trainer, seed=0):
    """
    What the loss gets from a scored batch, with the policy moved away from reference and sampler by some noise.
    """
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions([{"prompt": p} for p in ["ab"] * 4 + ["cde"] * 4])
    torch.manual_seed(seed)
    noise = 0.3 if hasattr(trainer.model, "peft_config") else 0.1
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn_like(p))
    if "old_per_token_logps" in output:
        output["old_per_token_logps"] += 0.3 * torch.randn(output["old_per_token_logps"].shape)
    return output


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def assert_close(ours, theirs, loss=1e-6, gradient=1e-6):
    torch.testing.assert_close(ours[0], theirs[0], atol=loss, rtol=loss)
    assert (ours[1] - theirs[1]).norm() <= gradient * theirs[1].norm()


@pytest.fixture(scope="module")
def pairs(tiny_model, tmp_path_factory):
    """`pairs(lora, reused, **ours)`: our trainer and TRL's on one scored batch, the policy away from the reference."""
    cache = {}

    def make(trainer_class, config_class, lora, reused, **options):
        key = (trainer_class, lora, reused, *sorted(options.items()))
        if key not in cache:
            trainer = build(
                trainer_class,
                config_class,
                tiny_model,
                tmp_path_factory.mktemp("out"),
                lora=lora,
                beta=BETA,
                per_device_train_batch_size=8,
                num_iterations=2 if reused else 1,
                rollout_func=scripted_rollout,
                **options,
            )
            cache[key] = trainer, scored(trainer)
        return cache[key]

    return make


# On, but equal


@pytest.mark.theorem(
    "Side by side with TRL",
    "`kl_estimator: k3` has TRL's loss and gradient, for eight loss types, on-policy and reused, with "
    "and without tools (loss, and relative gradient, float32)",
    paper="deepseekmath",
    at_most=1e-06,
)
@pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "plain"])
@pytest.mark.parametrize("reused", [False, True], ids=["on-policy", "reused"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:kl_estimator='k3' with use_bias")
def test_k3_in_the_loss_is_trls_kl_in_loss_and_gradient(pairs, monkeypatch, lora, reused, corrected):
    (ours, our_inputs), (theirs, their_inputs) = (
        pairs(*OURS, lora, reused, kl_estimator="k3"),
        pairs(*TRLS, lora, reused),
    )
    for trainer in (ours, theirs):
        monkeypatch.setattr(trainer.args, "use_bias_correction_kl", corrected)
    for loss_type in LOSS_TYPES:
        for drop in ((), ("tool_mask",)):
            results = []
            for trainer, inputs in ((ours, our_inputs), (theirs, their_inputs)):
                monkeypatch.setattr(trainer, "loss_type", loss_type)
                inputs = {name: value for name, value in inputs.items() if name not in drop}
                results.append(loss_and_gradient(trainer, inputs))
            assert_close(*results)
            proves(*(loss for loss, _ in results))
            proves((results[0][1] - results[1][1]).norm() / results[1][1].norm())
            kls = [trainer._metrics["train"]["kl"][-1] for trainer in (ours, theirs)]
            assert kls[0] == pytest.approx(kls[1], rel=1e-5) and kls[0] > 1e-3


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_with_k3_in_the_loss_is_trls(train, lora, num_iterations):
    options = {
        "beta": BETA,
        "lora": lora,
        "num_iterations": num_iterations,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 4,
    }
    ours, theirs = train(*OURS, kl_placement="loss", **options), train(*TRLS, **options)
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, weights(theirs)[name], atol=2e-6, rtol=1e-5, msg=name)
    for a, b in zip(logged(ours, "loss", "kl"), logged(theirs, "loss", "kl"), strict=True):
        assert a == pytest.approx(b, abs=2e-6)


# One meaning of beta: the loss with beta = 0 plus the aggregated KL, for every loss type


def aggregated(kl, mask, loss_type, max_completion_length):
    """The normaliser of each loss type, written from the documentation, for one process and one micro-batch."""
    per_row = (kl * mask).sum(1)
    if loss_type in ("grpo", "sapo"):
        return (per_row / mask.sum(1)).mean()
    if loss_type == "dr_grpo":
        return per_row.sum() / (len(mask) * max_completion_length)
    if loss_type == "luspo":
        return per_row.mean()
    return per_row.sum() / mask.sum()


def log_probs(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width = inputs["completion_ids"].size(1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, width)[0]


def squared(logps, ref):
    return (logps - ref).square()


PENALTIES = {  # written from the table of the specification, with plain autograd
    "k1": lambda logps, ref, w: w * (logps - ref),
    "k2": lambda logps, ref, w: w.detach() * (logps - ref).square() / 2,
    "test_grpo_kl.squared": lambda logps, ref, w: w * (logps - ref).square(),
}


@pytest.mark.parametrize("reused", [False, True], ids=["on-policy", "reused"])
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.filterwarnings("ignore:kl_estimator='k1' in the loss is unbiased")
def test_the_loss_is_trls_without_kl_plus_beta_times_the_aggregated_kl(pairs, monkeypatch, name, reused):
    trainer, inputs = pairs(*OURS, False, reused, kl_estimator=name)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).float()
    for loss_type in LOSS_TYPES:
        monkeypatch.setattr(trainer, "loss_type", loss_type)
        ours = loss_and_gradient(trainer, inputs)
        trainer.model.zero_grad()
        with monkeypatch.context() as without:
            without.setattr(trainer, "_penalty", None)
            without.setattr(trainer, "beta", 0.0)
            loss = trainer._compute_loss(trainer.model, inputs)
        logps = log_probs(trainer, inputs)
        ratio = (logps - inputs.get("old_per_token_logps", logps.detach())).exp()
        penalty = PENALTIES[name](logps, inputs["ref_per_token_logps"], ratio)
        loss = loss + BETA * aggregated(penalty, mask, loss_type, trainer.max_completion_length)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        assert_close(ours, (loss.detach(), gradient), gradient=2e-6)


# Where TRL's own form breaks


def test_extreme_log_ratios_neither_overflow_nor_lose_their_gradient(pairs):
    trainer, inputs = pairs(*OURS, False, True, kl_estimator="k3")
    logps = log_probs(trainer, inputs).detach()
    inputs = {**inputs, "ref_per_token_logps": inputs["ref_per_token_logps"].clone(), "old_per_token_logps": logps}
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    inputs["ref_per_token_logps"][:4] = logps[:4] + 100  # log-ratio −100
    inputs["ref_per_token_logps"][4:] = logps[4:] - 50
    loss, gradient = loss_and_gradient(trainer, inputs)
    assert loss.isfinite() and gradient.isfinite().all()
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    trainer.model.zero_grad()
    d = torch.where(torch.arange(8)[:, None] < 4, -100.0, 50.0)
    (BETA * (d * log_probs(trainer, inputs) * mask).sum() / mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    assert trainer._metrics["train"]["kl/saturated"][-1] == 1.0


def test_nan_under_the_mask_does_not_poison_the_loss(pairs):
    trainer, inputs = pairs(*OURS, False, True, kl_estimator="k3")
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    clean = loss_and_gradient(trainer, inputs)
    dirty = {**inputs, "ref_per_token_logps": inputs["ref_per_token_logps"].masked_fill(~mask, math.nan)}
    for a, b in zip(loss_and_gradient(trainer, dirty), clean, strict=True):
        assert torch.equal(a, b)


# Exact


@pytest.mark.theorem(
    "KL",
    "`kl_estimator: exact` has the gradient of the sum over the vocabulary (relative, float32 against float64)",
    at_most=1e-05,
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_is_the_sum_over_the_vocabulary(pairs, monkeypatch, lora, loss_type, temperature):
    trainer, inputs = pairs(*OURS, lora, True, kl_estimator="exact", temperature=temperature)
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    inputs = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
    ours = loss_and_gradient(trainer, inputs)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).float()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width = inputs["completion_ids"].size(1)

    def distribution(model):
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
        return (logits.double() / temperature).log_softmax(-1)

    with torch.no_grad():
        if lora:
            with trainer.model.disable_adapter():
                reference = distribution(trainer.model)
        else:
            reference = distribution(trainer.ref_model)
    policy = distribution(trainer.model)
    kl = (policy.exp() * (policy - reference)).sum(-1)
    trainer.model.zero_grad()
    loss = BETA * aggregated(kl, mask.double(), loss_type, trainer.max_completion_length)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert loss > 1e-3
    assert_close(ours, (loss.detach().float(), gradient), loss=1e-5, gradient=1e-5)
    proves((ours[1] - gradient).norm() / gradient.norm())
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(((kl * mask).sum() / mask.sum()).item(), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_exact_trains_through_shuffled_micro_batches(train, lora):
    trainer = train(*OURS, kl_estimator="exact", beta=BETA, lora=lora, steps_per_generation=2, num_iterations=2)
    kls = [entry["kl"] for entry in logged(trainer)]
    assert kls[0] == pytest.approx(0.0, abs=1e-6) and kls[-1] > 1e-5


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_exact_under_autocast(train, lora):
    """TRL's default precision: accelerate wraps the forward in which the head's scale is found."""
    trainer = train(*OURS, kl_estimator="exact", beta=BETA, lora=lora, bf16=True, max_steps=2)
    assert [math.isfinite(kl) for (kl,) in logged(trainer, "kl")] == [True] * 2


def test_exact_with_a_batch_of_masked_tokens_only(train):
    with pytest.warns(UserWarning, match="No completion of the batch"):
        trainer = train(
            *OURS,
            advantage_estimator="group_relative",
            kl_estimator="exact",
            beta=BETA,
            mask_truncated_completions=True,
            rollout_func=scripted_rollout,
            max_steps=1,
        )
    assert logged(trainer, "loss", "kl") == [[0.0, 0.0]]


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_of_exact_grows_with_the_vocabulary():
    # The peak memory itself is measured by docs/scripts/exact_kl_memory.py.
    def largest(vocabulary):
        hidden = torch.randn(1, 64, 8, requires_grad=True)
        heads = [Head(torch.randn(vocabulary, 8), None, 1.0, None, False) for _ in range(2)]
        with Largest() as mode:
            kl = exact_kl(hidden, heads[0], torch.randn(1, 64, 8), heads[1], torch.ones(1, 64), 1.0)
            kl.mean().backward()
        return mode.elements

    assert largest(40_000) == largest(160_000) < 64 * 40_000


def test_exact_refuses_an_adapter_with_its_own_head(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    with pytest.raises(ValueError, match="this adapter trains its own copy"):
        build(*OURS, model, tmp_path, kl_estimator="exact", beta=BETA)


# The seam checks itself


def test_a_loss_that_does_not_ask_for_the_product_is_an_error(pairs, monkeypatch):
    trainer, inputs = pairs(*OURS, False, True, kl_estimator="k3")
    original = trl.GRPOTrainer._compute_loss

    def without_kl(self, model, inputs):
        beta, self.beta = self.beta, 0.0
        try:
            return original(self, model, inputs)
        finally:
            self.beta = beta

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", without_kl)
    with pytest.raises(
        RuntimeError, match=r"TRL .* is not laid out .*: _compute_loss does not multiply beta by the KL"
    ):
        trainer._compute_loss(trainer.model, inputs)
    assert trainer.beta == BETA and type(trainer.beta) is float, "beta is restored whatever happens"


def test_the_product_of_beta_is_answered_in_every_notation():
    kl, theirs = torch.full((2, 3), 5.0), torch.ones(2, 3)
    beta = BetaProxy(0.5, lambda: kl)
    products = [beta * theirs, theirs * beta, torch.mul(beta, theirs), torch.mul(theirs, beta), theirs.mul(beta)]
    for product in products:
        assert torch.equal(product, torch.full((2, 3), 2.5))
    assert len(beta.penalties) == len(products)
    assert torch.equal(theirs + beta, theirs + 0.5) and beta * 2 == 1.0 and beta != 0.0
    with pytest.raises(RuntimeError, match=r"beta is multiplied by a tensor of shape \(2,\)"):
        _ = beta * torch.ones(2)


# Metrics


def test_metrics_of_all_estimators_are_logged(pairs):
    trainer, inputs = pairs(*OURS, False, True, kl_estimator="k2")
    trainer._metrics["train"].clear()
    trainer._compute_loss(trainer.model, inputs)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    logps = log_probs(trainer, inputs)[mask].detach().double()
    ref, old = inputs["ref_per_token_logps"][mask].double(), inputs["old_per_token_logps"][mask].double()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for k in (k1, k2, k3):
        expected = ((logps - old).exp() * k(logps, ref)).mean().item()
        assert metrics[f"kl/{k.__name__}"] == pytest.approx(expected, rel=1e-5)
    assert metrics["kl"] == metrics["kl/k2"]
    assert len(trainer._metrics["train"]["kl"]) == 1, "TRL's own is replaced, not averaged with ours"
    assert metrics["kl/saturated"] == 0.0 and "kl/beta" not in metrics


def test_the_effective_beta_is_beta_over_sigma(train):
    options = {"advantage_estimator": "reinforce_plus_plus", "rollout_func": scripted_rollout, "max_steps": 1}
    trainer = train(*OURS, kl_placement="reward", beta=BETA, **options)
    # In the first batch the KL is 0, so that σ is that of the rewards of the trainable tokens.
    rollout = scripted_rollout(list(trainer._logs["prompt"]), _at_start(trainer))
    rewards = digits(list(trainer._logs["completion"]))
    per_token = torch.tensor([r for r, m in zip(rewards, rollout["env_mask"], strict=True) for _ in range(sum(m))])
    sigma = per_token.double().std(correction=0).item()
    assert logged(trainer, "kl/effective_beta")[0][0] == pytest.approx(BETA / sigma, rel=1e-4)
    centred = train(*OURS, kl_placement="reward", beta=BETA, advantage_kwargs={"norm": "center"}, **options)
    assert logged(centred, "kl/effective_beta")[0][0] == pytest.approx(BETA)
    assert "kl/effective_beta" not in logged(train(*OURS, advantage_estimator="reinforce_plus_plus", max_steps=1))[0]


def _at_start(trainer):
    trainer.state.global_step = 0
    return trainer


# The adaptive beta

ADAPTIVE = {"beta": 0.1, "kl_target": 0.01, "kl_horizon": 100.0, "rollout_func": scripted_rollout, "max_steps": 4}


def test_beta_moves_once_per_optimizer_step_by_the_kl_of_the_whole_window(train):
    trainer = train(*OURS, kl_estimator="k2", gradient_accumulation_steps=2, learning_rate=0.05, **ADAPTIVE)
    betas, kls = (([row[0] for row in logged(trainer, name)]) for name in ("kl/beta", "kl"))
    assert betas[0] == 0.1
    # Both micro-batches of a step log the same beta, so that its mean is a value that was in force.
    for step in range(3):
        change = betas[step + 1] / betas[step] - 1
        assert abs(change) <= 0.2 * 8 / 100 + 1e-9
        if abs(kls[step] / 0.01 - 1) > 0.5:  # far from the target, the clip decides
            assert change == pytest.approx(math.copysign(0.2 * 8 / 100, kls[step] - 0.01), rel=1e-6)
    assert trainer.args.beta == 0.1 and trainer.beta != betas[-1]


def test_beta_follows_the_formula_with_the_kl_in_the_reward(train):
    trainer = train(
        *OURS, advantage_estimator="reinforce_plus_plus", kl_placement="reward", learning_rate=0.05, **ADAPTIVE
    )
    beta = 0.1
    for measured, in_force in logged(trainer, "kl", "kl/beta"):
        assert in_force == pytest.approx(beta, rel=1e-6)
        beta = next_beta(beta, measured, 0.01, 4, 100.0)
    assert trainer.beta == pytest.approx(beta, rel=1e-6)


def test_the_unit_of_the_target_is_the_token_or_the_sequence(train):
    options = {**ADAPTIVE, "kl_target": 1e-9, "kl_horizon": 1e4, "max_steps": 2, "learning_rate": 1e-5}
    per_token = train(*OURS, kl_estimator="k1", **{**options, "kl_target": 1.0})
    per_sequence = train(*OURS, kl_estimator="k1", kl_target_unit="sequence", **{**options, "kl_target": 1.0})
    assert per_token.beta < 0.1 and per_sequence.beta < 0.1  # both far below a target of one nat
    window = per_token.state.log_history[0]["kl"]
    assert window == per_sequence.state.log_history[0]["kl"]


def test_the_controller_sums_until_the_end_of_a_step_and_reads_its_unit():
    moved = 0.1 * (1 + 0.1 * 5 / 1e4)
    of_sequences = BetaController(1.0, unit="sequence")  # 1.1 nats per completion that has a token
    assert of_sequences.after(0.1, torch.tensor([4.4, 100.0, 4.0, 5.0])) == pytest.approx(moved)
    of_tokens = BetaController(1.0)
    assert of_tokens.after(0.1, torch.tensor([50.0, 40.0, 2.0, 2.0]), end_of_step=False) == 0.1
    assert of_tokens.after(0.1, torch.tensor([60.0, 60.0, 2.0, 3.0])) == pytest.approx(moved)
    assert of_tokens.after(0.1, torch.tensor([0.0, 0.0, 0.0, 4.0])) == 0.1, "nothing was measured, nor is it kept"


def test_evaluation_leaves_beta_alone(train):
    trainer = train(*OURS, kl_estimator="k2", per_device_eval_batch_size=4, **ADAPTIVE)
    before = trainer.beta
    metrics = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert metrics["eval_kl/beta"] == before == trainer.beta


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_an_interrupted_run_continues_with_its_beta(train, tmp_path, placement):
    options = {
        **ADAPTIVE,
        "kl_placement": placement,
        "advantage_estimator": "reinforce_plus_plus",
        "learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = train(*OURS, **options)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = json.loads((checkpoint / "trl_ext_state.json").read_text())
    assert saved["beta"] == pytest.approx(logged(whole, "kl/beta")[2][0])
    resumed = build(*OURS, whole.model.name_or_path, tmp_path / "out", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.beta == whole.beta
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_a_checkpoint_without_beta_is_said_to_have_none(train, tmp_path):
    plain = {"beta": 0.1, "rollout_func": scripted_rollout, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = train(*TRLS, **plain)
    resumed = build(*OURS, trainer.model.name_or_path, tmp_path / "out", kl_estimator="k2", **ADAPTIVE)
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no trl_ext_state\.json; these start anew: \['beta'\]"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
