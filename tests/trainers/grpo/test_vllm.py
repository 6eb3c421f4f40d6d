"""
Completions from vLLM, by a stand-in that samples with the weights it was sent: `server` and `colocate`, each option.

Without noise its log-probs are the policy's, so that training must be that on the same completions without vLLM. With
noise, as other kernels cause, the tokens stay and only the ratios of TRL's correction change.
"""

import math
import os
from functools import partial
from itertools import cycle, product
from unittest import mock

import pytest
import tiny.dpo as tiny_dpo
import torch
from peft import LoraConfig
from tiny import assert_same_weights, build, digits, logged, weights
from tiny.fake_vllm import Engine, install

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

MODES = ["server", "colocate"]
CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
DIFFERENCE = "sampling/sampling_logp_difference/max"
MOVED = 0.05  # learning rate: a policy that an engine with old weights would not fit after one step


class Kept:
    """Keeps what was generated, what was trained on, the losses, and greedy answers by transformers."""

    answers = False

    def _generate(self, prompts):
        result = super()._generate(prompts)
        self.__dict__.setdefault("generated", []).append([list(ids) for ids in result[1]])
        return result

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        kept = {name: x.clone() for name, x in output.items() if isinstance(x, torch.Tensor)}
        if self.answers:
            kept["answers"] = [self._answer(row["prompt"]) for row in inputs]
        self.__dict__.setdefault("outputs", []).append(kept)
        return output

    def _answer(self, prompt):
        ids = self.processing_class(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = self.accelerator.unwrap_model(self.model).generate(
                input_ids=ids, do_sample=False, max_new_tokens=8
            )
        return self.processing_class.decode(found[0, ids.size(1) :], skip_special_tokens=True)

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


class GRPO(Kept, GRPOTrainer):
    pass


class PPO(Kept, PPOTrainer):
    pass


def by_step(completions, completion_steps, **kwargs):
    """Step reward: share of digits in the step."""
    return [[digits([step])[0] for step in steps] for steps in completion_steps]


def replay(batches):
    """A rollout function that gives completions that were generated before."""
    left = iter(batches)

    def rollout(prompts, trainer):
        ids = next(left)
        prompt_ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * len(row) for row in ids]}

    return rollout


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    """`make(mode, **options)`: a trainer that has trained; `mode` `None` is without vLLM."""
    install(tiny_model, partial(monkeypatch.setattr, raising=False))

    def make(mode="colocate", classes=(GRPO, GRPOConfig), model=tiny_model, **options):
        vllm = {"use_vllm": True, "vllm_mode": mode} if mode else {}
        settings = {"optim": "sgd", "learning_rate": MOVED, "max_steps": 2, **vllm, **options}
        with mock.patch.dict(os.environ):  # into which `colocate` puts the rank of this process
            torch.manual_seed(0)  # of an adapter's first weights
            trainer = build(*classes, model, tmp_path, **settings)
        trainer.train()
        return trainer

    return make


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.setattr(Engine, "noise", 0.3)


def cells(quick, values):
    """Parameters of a test, of which plain `pytest` runs the `quick` ones."""
    return [pytest.param(*_row(value), marks=[] if value in quick else [pytest.mark.slow]) for value in values]


def _row(value):
    return value if isinstance(value, tuple) else (value,)


def of(name, **options):
    """Options that train with an estimator, with the KL where it may be."""
    row = ADVANTAGE_ESTIMATORS[name]
    needed = {"step_separator": "b", "reward_funcs": by_step} if row.steps == "needed" else {}
    placement = "reward" if row.per_token and row.steps != "needed" else "loss"
    classes = (PPO, PPOConfig) if row.values else (GRPO, GRPOConfig)
    return {
        "classes": classes, "advantage_estimator": name, "beta": 0.1, "kl_placement": placement, "num_iterations": 1,
        **needed, **options,
    }  # fmt: skip


def synchronised(trainer):
    """Whether the engine had the policy's weights whenever it was asked."""
    return max(entry[DIFFERENCE] for entry in logged(trainer) if DIFFERENCE in entry) < 1e-5


# Every estimator, with every correction

ESTIMATORS = [name for name, row in ADVANTAGE_ESTIMATORS.items() if not row.baseline]


DIAGONAL = [*zip(ESTIMATORS, cycle(MODES), cycle(CORRECTIONS), strict=False)]
QUICK = [
    row for row in DIAGONAL if row[0] in ("leave_one_out", "reinforce_plus_plus", "process_group_relative", "gae")
]


@pytest.mark.parametrize(("name", "mode", "correction"), cells(QUICK, DIAGONAL))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_estimator_trains_as_on_the_same_completions_without_vllm(make, name, mode, correction):
    ours = make(mode, **of(name, vllm_importance_sampling_mode=correction))
    assert synchronised(ours)
    theirs = make(None, **of(name), rollout_func=replay(ours.generated))
    assert_same_weights(ours, theirs, atol=1e-6, rtol=0)
    for a, b in zip(ours.outputs, theirs.outputs, strict=True):
        torch.testing.assert_close(a["advantages"], b["advantages"], atol=1e-5, rtol=0)
        assert a["advantages"].any()


def ratios(trainer, output, correction, low, high):
    """The correction of each token, `(B, T)`, in float64: trainer over engine, 1 where that said NaN."""
    mask = output["completion_mask"].double()
    difference = output["old_per_token_logps"].double() - output["sampling_per_token_logps"].double()
    difference = torch.where(difference.isnan(), 0.0, difference) * mask
    if correction.startswith("sequence"):
        difference = difference.sum(1, keepdim=True).expand_as(mask)
    ratio = difference.exp()
    if correction.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio * (ratio >= low) * (ratio <= high)


def check_loss(trainer, correction, low, high):
    """Each loss: minus advantage times correction, and the KL in the loss, which is not corrected."""
    cut = 0
    for output, loss in zip(trainer.outputs, trainer.losses, strict=True):
        mask, old = output["completion_mask"].double(), output["old_per_token_logps"].double()
        advantages = output["advantages"].double()
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        ratio = ratios(trainer, output, correction, low, high)
        cut += ((ratio == low) | (ratio == high) | (ratio == 0)).sum().item()
        per_token = -advantages * ratio
        if trainer.args.kl_placement == "loss":
            log_ratio = output["ref_per_token_logps"].double() - old
            per_token = per_token + trainer.args.beta * (log_ratio.expm1() - log_ratio)
        expected = ((per_token * mask).sum() / mask.sum()).item()
        assert loss == pytest.approx(expected, abs=2e-6)
    assert cut > 0, "otherwise no bound was tested"


BOUNDS = {"vllm_importance_sampling_clip_min": 0.9, "vllm_importance_sampling_clip_max": 1.1}
PAIRS = [*product([name for name in ESTIMATORS if name != "gae"], CORRECTIONS)]


@pytest.mark.parametrize(
    ("name", "correction"),
    cells([("leave_one_out", "sequence_mask"), ("reinforce_plus_plus", "token_truncate")], PAIRS),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_noise_changes_the_ratios_alone(make, monkeypatch, name, correction):
    options = {**of(name), "vllm_importance_sampling_mode": correction, **BOUNDS}
    exact = make(**{**options, "max_steps": 1})
    monkeypatch.setattr(Engine, "noise", 0.3)
    noisy = make(**options)
    assert noisy.generated[0] == exact.generated[0]
    for name in {"advantages", "old_per_token_logps", "ref_per_token_logps"} & exact.outputs[0].keys():
        assert torch.equal(noisy.outputs[0][name], exact.outputs[0][name]), name
    check_loss(noisy, correction, *BOUNDS.values())


# The KL


@pytest.mark.parametrize("correction", cells([True], [True, False]))
def test_the_kl_in_the_reward_is_that_of_the_trainers_log_probs(make, noise, correction):
    trainer = make(
        **of("reinforce_plus_plus", vllm_importance_sampling_correction=correction, num_iterations=2, max_steps=3)
    )
    assert len(trainer.outputs) == 2  # the rollouts are reused
    entries, output = logged(trainer), trainer.outputs[1]  # the policy has left the reference
    mask = output["completion_mask"].bool()
    log_ratio = (output["old_per_token_logps"] - output["ref_per_token_logps"])[mask].double()
    assert entries[2]["kl"] == pytest.approx(log_ratio.mean().item(), abs=1e-6) and abs(entries[2]["kl"]) > 1e-4
    engines = (output["sampling_per_token_logps"] - output["ref_per_token_logps"])[mask].double()
    assert abs(engines.mean() - log_ratio.mean()) > 1e-3, "otherwise they could not be told apart"


KLS = {
    "k1 in the loss": {"kl_estimator": "k1"},
    "k2": {"kl_estimator": "k2", "kl_target": 0.01, "kl_horizon": 100.0},
    "k3": {"kl_estimator": "k3"},
    "exact": {"kl_estimator": "exact"},
    "exact, LoRA": {"kl_estimator": "exact", "lora": True},
    "completions": {"kl_placement": "sequence"},
    "k1 in the reward, LoRA": {"kl_placement": "reward", "advantage_estimator": "reinforce", "lora": True},
    "a bound": {"policy_kl_stop": 1e-4, "num_iterations": 4},
    "shared prefix": {"kl_estimator": "k3", "shared_prefix": True},
    "shared prefix, exact, LoRA": {"kl_estimator": "exact", "shared_prefix": True, "lora": True},
    "one completion": {"advantage_estimator": "reinforce", "kl_placement": "reward", "num_generations": 1},
    "accumulated": {"kl_estimator": "k2", "gradient_accumulation_steps": 2},
    "reused": {"kl_estimator": "k2", "num_iterations": 2},
    "reused in parts": {"kl_estimator": "k2", "steps_per_generation": 2},
}


@pytest.mark.parametrize("case", cells(["exact, LoRA"], KLS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_kl_trains_as_on_the_same_completions_without_vllm(make, case):
    options = {"beta": 0.1, "max_steps": 3, "advantage_estimator": "leave_one_out", **KLS[case]}
    ours = make("server", **options)
    assert synchronised(ours)
    theirs = make(None, **options, rollout_func=replay(ours.generated))
    assert_same_weights(ours, theirs, atol=2e-6, rtol=0)
    names = {"kl", "kl/k1", "kl/k2", "kl/k3", "kl/beta"}
    for a, b in zip(logged(ours), logged(theirs), strict=True):
        for name in names & b.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-6), name


# Weights that reach the engine

POLICIES = {
    "full": {},
    "LoRA": {"lora": True},
    "adapter": {"adapter": True},
    "PPO, critic as an adapter": {"lora": True, **of("gae", num_generations=1)},
    "PPO, critic as a model": of("gae"),
    "PRIME": {"lora": True, **of("prime", implicit_prm={"beta": 0.5, "learning_rate": 0.05}, reward_funcs=digits)},
    "a reference that moves": {"lora": True, "ref_refresh_steps": 1, **of("reinforce_plus_plus")},
    "a reference that moves, full": {"ref_refresh_steps": 1, **of("reinforce_plus_plus")},
    "a reference beside an adapter": {"adapter": True, "ref_refresh_steps": 1, **of("reinforce")},
}
ALWAYS = [("full", "server"), ("LoRA", "colocate"), ("PPO, critic as an adapter", "server"), ("PRIME", "colocate")]


@pytest.mark.parametrize(("policy", "mode"), cells(ALWAYS, [*product(POLICIES, MODES)]))
def test_the_engine_has_the_policys_weights_at_every_step(make, tiny_model, policy, mode):
    options = {**of("reinforce_plus_plus"), **POLICIES[policy]}
    if options.pop("adapter", False):
        options["model"] = tiny_dpo.adapter(tiny_model)
        options["model"].name_or_path = tiny_model
    trainer = make(mode, **{**options, "optim": "adamw_torch", "max_steps": 3})
    assert synchronised(trainer)
    (engine,) = Engine.made
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    names = {name.replace(".base_layer", "") for name, _ in base.named_parameters() if "lora_" not in name}
    assert engine.synced == [names] * 3


def test_a_second_copy_of_modules_that_are_trained_whole_is_refused_before_a_model_loads(tmp_path):
    args = GRPOConfig(str(tmp_path), use_vllm=True, ref_refresh_steps=2, kl_estimator="k3", beta=0.1, bf16=False)
    adapter = LoraConfig(modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"whose copies of modules_to_save=\['norm'\] TRL would send to vLLM, which"):
        GRPOTrainer(model="no/such-model", reward_funcs=digits, args=args, peft_config=adapter)


def test_an_engine_with_the_weights_of_the_step_before_would_be_seen(make, monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration.sync_weights", lambda self: None)
    assert not synchronised(make(**of("reinforce_plus_plus"), optim="adamw_torch"))


# The two modes, sleep, and log-probs that are missing


@pytest.mark.parametrize("lora", cells([True], [False, True]))
def test_server_and_colocate_are_one_run(make, noise, lora):
    trained = [make(mode, **of("reinforce_plus_plus", lora=lora)) for mode in MODES]
    assert_same_weights(*trained)
    assert [engine.requests[0][0] for engine in Engine.made] == [1, 4]  # the server is asked for all of a prompt


@pytest.mark.parametrize("name", cells(["remax"], ["reinforce_plus_plus", "remax"]))
def test_an_engine_that_sleeps_between_its_calls_changes_nothing(make, noise, name):
    awake, asleep = (make(**of(name), vllm_enable_sleep_mode=sleeps) for sleeps in (False, True))
    assert_same_weights(asleep, awake)
    assert Engine.made[1].asleep and not Engine.made[0].asleep


@pytest.mark.parametrize("mode", cells(["colocate"], MODES))
def test_a_log_prob_that_is_missing_is_a_ratio_of_one(make, noise, monkeypatch, mode):
    monkeypatch.setattr(Engine, "nan_every", 2)
    trainer = make(mode, **of("reinforce_plus_plus", vllm_importance_sampling_mode="token_truncate", **BOUNDS))
    for output in trainer.outputs:
        missing = output["sampling_per_token_logps"].isnan()
        assert missing.any() and (output["importance_sampling_ratio"][missing] == 1).all()
    check_loss(trainer, "token_truncate", *BOUNDS.values())
    assert all(weight.isfinite().all() for weight in weights(trainer).values())


def test_ratios_are_below_one_where_top_p_cuts_the_engines_distribution(make):
    trainer = make(**of("reinforce_plus_plus", vllm_importance_sampling_mode="token_truncate", top_p=0.9))
    for (mean,) in logged(trainer, "sampling/importance_sampling_ratio/mean"):
        assert 0.8 < mean < 0.97
    for (largest,) in logged(trainer, "sampling/importance_sampling_ratio/max"):
        assert largest <= 1 + 1e-5


@pytest.mark.parametrize("lora", cells([True], [False, True]))
def test_with_trls_defaults_it_trains(make, noise, lora):
    trainer = make("server", **of("reinforce_plus_plus"), lora=lora, bf16=True, gradient_checkpointing=True)
    assert all(math.isfinite(loss) for loss in trainer.losses) and not synchronised(trainer)


# Greedy answers


WARPED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}


@pytest.mark.parametrize(
    ("mode", "warped"), cells([("server", True), ("colocate", False)], [*product(MODES, (True, False))])
)
def test_the_greedy_answers_of_remax_are_the_engines(make, monkeypatch, mode, warped):
    monkeypatch.setattr(Kept, "answers", True)
    options = WARPED if warped else {}
    options = {"num_generations": 2, "beta": 0.0, "learning_rate": 0.5, "max_steps": 3, **options}
    trainer = make(mode, advantage_estimator="remax", **options)
    (engine,) = Engine.made
    asked = [(prompts, params.n, params.temperature) for prompts, params in engine.requests]
    samples, temperature = (2, 2) if mode == "server" else (4, 1), options.get("temperature", 1.0)
    assert asked == [(*samples, temperature), (2, 1, 0.0)] * 3
    seen = set()
    for output in trainer.outputs:
        mask = output["completion_mask"]
        texts = [
            trainer.processing_class.decode(ids[m.bool()], skip_special_tokens=True)
            for ids, m in zip(output["completion_ids"], mask, strict=True)
        ]
        expected = torch.tensor(digits(texts)) - torch.tensor(digits(output["answers"]))
        torch.testing.assert_close(output["advantages"], expected[:, None] * mask)
        seen |= {*output["answers"]}
    assert len(seen) > 2


# The engine that transformers has

CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 64},
}


@pytest.mark.parametrize("name", cells(["remax"], ["remax", *ESTIMATORS]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_trains_with_continuous_batching(make, monkeypatch, name):
    monkeypatch.setattr(Kept, "answers", True)
    trainer = make(None, **of(name), **CONTINUOUS)
    assert len(trainer.outputs) == 2 and all(math.isfinite(loss) for loss in trainer.losses)
    if name == "remax":
        for entry, output in zip(logged(trainer), trainer.outputs, strict=True):
            expected = torch.tensor(digits(output["answers"])).mean().item()
            assert entry["remax/baseline"] == pytest.approx(expected)
