"""The implicit process-reward model: its rewards, its update, and that the policy's training does not know it."""

import math

import pytest
import torch
from tiny import build, dataset, digits, logged, scripted_rollout, weights
from tiny.recorder import SEEN

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.grpo.implicit_prm import ImplicitPRMOptions

OURS = (GRPOTrainer, GRPOConfig)
PRM = {"beta": 0.5, "learning_rate": 0.05, "threshold": 0.3}
THIS = {"advantage_estimator": "prime", "implicit_prm": PRM}
ON = {**THIS, "lora": True, "rollout_func": scripted_rollout}
PROMPTS = [{"prompt": prompt} for prompt in ("ab", "cde") for _ in range(4)]


@pytest.fixture
def make(tiny_model, tmp_path):
    def make(**options):
        settings = {**ON, "per_device_train_batch_size": 8, **options}
        return build(*OURS, tiny_model, tmp_path / "out", **settings)

    return make


def log_ratios(trainer, output):
    """Of every token of the completions, with the model's whole logits, one row at a time, in float64."""
    rows = []
    for i in range(len(output["completion_ids"])):
        prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()]
        completion = output["completion_ids"][i][output["completion_mask"][i].bool()]
        ids = torch.cat([prompt, completion])[None]

        def logps(ids=ids, completion=completion):
            logits = trainer.model(input_ids=ids).logits[0, -len(completion) - 1 : -1]
            return logits.double().log_softmax(-1).gather(1, completion[:, None])[:, 0]

        trainer.model.set_adapter("implicit_prm")
        ours = logps()
        with trainer.model.disable_adapter(), torch.no_grad():
            reference = logps()
        rows.append(ours - reference)
        trainer.model.set_adapter("default")
    width = output["completion_ids"].size(1)
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])


def scored(trainer):
    """A scored batch, what the estimator was given, and the policy's mask."""
    seen = []
    original = trainer._scoring.advantages
    trainer._scoring.advantages = lambda batch: seen.append(batch) or original(batch)
    output = trainer._generate_and_score_completions(PROMPTS)
    return output, seen[-1]


# Rewards


def test_every_trainable_token_is_rewarded_with_its_log_ratio(make):
    trainer = make()
    output, batch = scored(trainer)
    expected = (PRM["beta"] * log_ratios(trainer, output)).where(batch.mask.bool(), 0.0)
    torch.testing.assert_close(batch.steps, expected.detach(), atol=1e-6, rtol=1e-5)
    assert torch.equal(batch.steps_scored, batch.mask.bool()) and (output["tool_mask"] == 0).any()
    assert expected.abs().max() > 1e-3, "updated before it scores"


def test_the_update_is_a_step_down_the_gradient_of_the_loss(make):
    one, other = make(), make()
    taken = []
    one._prm.optimizer.step = lambda: taken.append({n: p.grad.clone() for n, p in one._prm.parameters.items()})
    output, batch = scored(one)
    mask = batch.mask.bool()
    success = (batch.outcome.sum(1) > PRM["threshold"]).double()
    assert 0 < success.sum() < len(success)
    sums = PRM["beta"] * log_ratios_with_gradient(other, output).where(mask, 0.0).sum(1)
    loss = -(success * torch.sigmoid(sums).log() + (1 - success) * torch.sigmoid(-sums).log()).mean()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6), "it starts as the reference"
    gradients = torch.autograd.grad(loss, [*other._prm.parameters.values()], allow_unused=True)
    for (name, ours), expected in zip(taken[0].items(), gradients, strict=True):
        expected = torch.zeros_like(ours) if expected is None else expected.float()
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4, msg=name)
    assert any(gradient.any() for gradient in taken[0].values())


def log_ratios_with_gradient(trainer, output):
    """As `log_ratios`; `set_adapter` there lets the adapter's parameters have a gradient while it is active."""
    ratios = log_ratios(trainer, output)
    for parameter in trainer._prm.parameters.values():
        parameter.requires_grad_(True)
    return ratios


def test_on_one_batch_it_learns_to_tell_right_from_wrong(make):
    trainer = make(implicit_prm={**PRM, "beta": 3.0})
    for _ in range(60):
        scored(trainer)
    found = trainer._metrics["train"]
    assert found["implicit_prm/loss"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found["implicit_prm/loss"][-1] < 0.1 and found["implicit_prm/accuracy"][-1] == 1.0


def test_completions_without_a_reward_teach_it_nothing(make):
    trainer = make(reward_funcs=lambda completions, **_: [None] * len(completions))
    before = weights(trainer)
    _, batch = scored(trainer)
    assert not batch.steps.any() and not batch.outcome_scored.any()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    assert "implicit_prm/loss" not in trainer._metrics["train"]


def test_evaluation_scores_and_does_not_train(make):
    trainer = make()
    trainer.model.eval()
    before = weights(trainer)
    scored(trainer)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    assert "implicit_prm/accuracy" in trainer._metrics["eval"]


def test_a_model_that_is_certain_is_warned_of_once(make):
    trainer = make(implicit_prm={**PRM, "beta": 1000.0})
    with pytest.warns(UserWarning, match="is certain of [5-8] of 8 completions") as warned:
        for _ in range(3):
            scored(trainer)
    assert len([w for w in warned if "is certain of" in str(w.message)]) == 1
    assert trainer._metrics["train"]["implicit_prm/saturated"][-1] == 1.0


# Beside the policy


def test_the_policy_trains_as_without_it(make):
    """An estimator that adds step rewards, with rewards that are as good as 0."""
    options = {"advantage_estimator": "reinforce_plus_plus", "max_steps": 3}
    runs = []
    for prm in (None, {"beta": 1e-30, "learning_rate": 1e-30}):
        runs.append(make(**options, implicit_prm=prm))  # which seeds what training draws from
        runs[-1].train()
    without, silent = runs
    policy = {name: weight for name, weight in weights(silent).items() if ".implicit_prm." not in name}
    assert policy.keys() == weights(without).keys()
    assert all(torch.equal(weight, policy[name]) for name, weight in weights(without).items())
    names = {name for name in logged(without)[0] if name != "step_time"}
    assert [{n: e[n] for n in names} for e in logged(silent)] == [{n: e[n] for n in names} for e in logged(without)]


def test_it_changes_how_the_policy_trains(make):
    runs = [make(implicit_prm={**PRM, "beta": beta}) for beta in (0.5, 0.05)]
    for run in runs:
        run.train()
    different = [
        n for n, w in weights(runs[0]).items() if ".default." in n and not torch.equal(w, weights(runs[1])[n])
    ]
    assert different


@pytest.mark.parametrize("name", ["process_group_relative", "reinforce_plus_plus", "tiny.recorder.record"])
def test_other_estimators_take_its_rewards(make, name):
    SEEN.clear()
    trainer = make(advantage_estimator=name, max_steps=1)
    trainer.train()
    assert logged(trainer)[0]["implicit_prm/loss"] > 0
    if name.startswith("tiny"):
        assert torch.equal(SEEN["batch"].steps_scored, SEEN["batch"].mask.bool()) and SEEN["batch"].steps.any()


def test_rewards_of_functions_are_added(make):
    def by_step(completion_step_ends, **kwargs):
        return [[1.0] * len(ends) for ends in completion_step_ends]

    plain, both = make(), make(reward_funcs=[digits, by_step], step_separator="b")
    (_, one), (_, other) = scored(plain), scored(both)
    added = other.steps - one.steps
    assert added.max() == pytest.approx(1.0, abs=1e-6) and (added.abs() < 1e-6).any()


def test_trls_defaults_train(tiny_model, tmp_path):
    """bfloat16, gradient checkpointing, dropout in the policy's adapter, a KL in the loss, reused rollouts."""
    trainer = with_defaults(tiny_model, tmp_path)
    trainer.train()
    entries = logged(trainer)
    assert all(math.isfinite(entry["implicit_prm/loss"]) for entry in entries if "implicit_prm/loss" in entry)
    assert entries[0]["implicit_prm/grad_norm"] > 0
    assert all(parameter.dtype == torch.float32 for parameter in trainer._prm.parameters.values())


def with_defaults(model, folder):
    from peft import LoraConfig

    args = GRPOConfig(
        str(folder / "defaults"),
        advantage_estimator="prime",
        implicit_prm={},
        use_cpu=True,
        beta=0.05,
        kl_estimator="k3",
        num_iterations=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    assert args.bf16 and args.gradient_checkpointing
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    return GRPOTrainer(model, digits, args=args, train_dataset=dataset(), peft_config=lora)


# Interruptions


def test_a_run_continues_bit_for_bit(make, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = make(**saving), make(**saving)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert weights(whole).keys() == weights(resumed).keys()
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    assert not any(p.requires_grad for p in resumed._prm.parameters.values())


def test_without_its_optimizer_it_starts_anew_and_says_so(make, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make(**saving).train()
    (tmp_path / "out/checkpoint-2/implicit_prm.pt").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no implicit_prm\.pt: the optimizer"):
        make(**saving).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implicit_prm": {"rate": 1}}, r"implicit_prm must be a mapping with some of \['beta', 'learning_rate', "),
        ({"implicit_prm": "yes"}, "implicit_prm"),
        ({"implicit_prm": {"beta": 0}}, "beta of implicit_prm must be a positive number, got 0"),
        ({"implicit_prm": {"beta": math.nan}}, "beta of implicit_prm must be a positive number, got nan"),
        ({"implicit_prm": {"learning_rate": "x"}}, "learning_rate of implicit_prm must be a positive number, got 'x'"),
        ({"implicit_prm": {"threshold": True}}, "threshold of implicit_prm must be a number, got True"),
        (
            {"advantage_estimator": "group_relative"},
            "implicit_prm gives one reward per token, which advantage_estimator='group_relative' cannot use. Use",
        ),
        ({"advantage_estimator": None}, "implicit_prm gives one reward per token, which advantage_estimator=None"),
        (
            {"advantage_estimator": "remax"},
            "implicit_prm gives one reward per token, which advantage_estimator='remax'",
        ),
        (
            {"fsdp": True, "fsdp_config": {"version": 1}},
            r"implicit_prm trains a second adapter, which FSDP1 keeps .* Use FSDP2 \(fsdp_version: 2\), DDP",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, **{"advantage_estimator": "prime", "implicit_prm": PRM, **options}
        )


def test_a_policy_without_adapter_is_refused_before_it_loads(make):
    with pytest.raises(ValueError, match=r"implicit_prm trains a second adapter beside yours.*Pass a peft_config"):
        make(lora=False)


def test_prime_without_step_rewards_is_refused(make):
    with pytest.raises(ValueError, match="advantage_estimator='prime' needs a reward function that returns one list"):
        make(implicit_prm=None).train()


def test_the_options_have_their_defaults():
    assert ImplicitPRMOptions.of({}) == ImplicitPRMOptions(0.05, None, 10.0, 0.5)
