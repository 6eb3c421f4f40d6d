"""The reference that is refreshed from the policy: when, what it then is, what is logged, and how a run goes on."""

import json
import math
import warnings

import pytest
import tiny
import tiny.dpo as tiny_dpo
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl.trainer.utils import use_adapter

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

OURS, PPO = (GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig)
MOVED = 5e-2  # learning rate: a policy that has left its reference after one step
TARGETS = ["q_proj", "v_proj"]
LORA = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
POLICIES = {
    "full": None,
    "LoRA": LORA,
    "DoRA": {**LORA, "use_dora": True},
    "PiSSA": {**LORA, "init_lora_weights": "pissa"},
    "embeddings": {**LORA, "target_modules": ["q_proj", "embed_tokens"]},
    "trained whole": {**LORA, "modules_to_save": ["norm"]},
    "4-bit": LORA,
    "adapter": "given",
}


def make(policy, tiny_model, folder, classes=OURS, **options):
    """A trainer over the tiny task, with a refresh every second step unless `options` say otherwise."""
    given = {"model": tiny_dpo.adapter(tiny_model) if policy == "adapter" else tiny_model}
    if isinstance(POLICIES[policy], dict):
        given["peft_config"] = LoraConfig(**POLICIES[policy])
    if policy == "4-bit":
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    settings = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4,
        "num_generations": 4, "max_completion_length": 8, "max_steps": 4, "learning_rate": MOVED, "beta": 0.1,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "ref_refresh_steps": 2,
        "model_init_kwargs": None if policy == "adapter" else {"dtype": "float32"}, **options,
    }  # fmt: skip
    torch.manual_seed(0)  # of an adapter's first weights
    return classes[0](
        reward_funcs=settings.pop("reward_funcs", tiny.digits),
        eval_dataset=settings.pop("eval_dataset", None),
        args=classes[1](output_dir=str(folder), **settings),
        train_dataset=tiny.dataset(),
        **given,
    )


def train(*args, **options):
    trainer = make(*args, **options)
    trainer.train()
    return trainer


@pytest.fixture
def no_repacking(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)  # see tests/matrix/test_matrix.py


def column(trainer, name):
    return [entry[name] for entry in tiny.logged(trainer)]


def reference(trainer):
    return [r.detach().clone() for _, r in trainer._moving.reference.pairs()]


# When


@pytest.mark.parametrize("estimator", [None, "k3", "exact"])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_kl_is_zero_right_after_a_refresh_and_only_there(tiny_model, tmp_path, request, policy, estimator):
    if policy == "4-bit":
        request.getfixturevalue("no_repacking")
    trainer = train(policy, tiny_model, tmp_path, kl_estimator=estimator)
    kl = column(trainer, "kl")
    assert kl[0] == kl[2] == 0.0 and kl[1] > 1e-6 and kl[3] > 1e-6, kl
    assert column(trainer, "ref/refreshes") == [0, 0, 1, 1] and column(trainer, "ref/age") == [1, 2, 1, 2]


def test_k1_in_the_reward_is_zero_right_after_a_refresh(tiny_model, tmp_path):
    for classes, options in ((OURS, {"advantage_estimator": "reinforce_plus_plus"}), (PPO, {"num_iterations": 1})):
        for policy in ("full", "LoRA"):
            trainer = train(
                policy,
                tiny_model,
                tmp_path,
                classes,
                kl_placement="reward",
                ref_refresh_steps=2,
                max_steps=3,
                **options,
            )
            kl = column(trainer, "kl/k3")
            assert kl[0] == kl[2] == 0.0 < kl[1], (classes, policy)


@pytest.mark.parametrize(
    ("options", "refreshed"),
    [
        ({"steps_per_generation": 4}, [0, 0, 0, 0, 1, 1, 1, 1, 2]),
        ({"num_iterations": 2, "steps_per_generation": 1}, [0, 0, 0, 0, 1, 1, 1, 1, 2]),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 1}, [0, 0, 0, 1, 1, 1, 2]),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, [0, 0, 0, 1, 1, 1, 2]),
    ],
    ids=str,
)
def test_a_refresh_waits_for_a_generation_batch_at_the_start_of_a_step(tiny_model, tmp_path, options, refreshed):
    seen = []

    class Watched(GRPOTrainer):
        def training_step(self, *args, **kwargs):
            before, now = reference(self), None
            loss = super().training_step(*args, **kwargs)
            now = reference(self)
            if any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)):
                seen.append((self.state.global_step, self._step - 1))
            return loss

    trainer = train(
        "full", tiny_model, tmp_path, (Watched, GRPOConfig), ref_refresh_steps=3, max_steps=len(refreshed), **options
    )
    assert column(trainer, "ref/refreshes") == refreshed
    window = options.get("gradient_accumulation_steps", 1)
    reuse = trainer.args.steps_per_generation * trainer.num_iterations
    assert seen and all(micro % window == 0 and micro % reuse == 0 and micro == window * g for g, micro in seen)


def test_an_evaluation_refreshes_nothing(tiny_model, tmp_path):
    evaluations = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.dataset().select(range(4))}
    trainer = make("LoRA", tiny_model, tmp_path, ref_refresh_steps=1, **evaluations)
    counts = []
    evaluate = trainer.evaluate

    def watched(*args, **kwargs):
        counts.append((trainer._moving.refreshes, reference(trainer)))
        result = evaluate(*args, **kwargs)
        assert trainer._moving.refreshes == counts[-1][0]
        assert all(torch.equal(a, b) for a, b in zip(counts[-1][1], reference(trainer), strict=True))
        return result

    trainer.evaluate = watched
    trainer.train()
    assert [count for count, _ in counts] == [0, 1, 2, 3]


def test_a_refresh_at_a_kl_reads_the_mean_since_the_last_generation_batch(tiny_model, tmp_path):
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 12}
    still = column(train("LoRA", tiny_model, tmp_path, **{**options, "ref_refresh_steps": 1000}), "kl")
    means = [(still[i] + still[i + 1]) / 2 for i in range(0, 12, 2)]
    limit = (means[1] + max(means[:2])) / 2 if means[1] > means[0] else means[0] / 2
    first = next(i for i, mean in enumerate(means) if mean > limit)
    trainer = train("LoRA", tiny_model, tmp_path, **{**options, "ref_refresh_steps": None, "ref_refresh_kl": limit})
    kl, refreshes = column(trainer, "kl"), column(trainer, "ref/refreshes")
    step = 2 * (first + 1)
    assert kl[:step] == still[:step] and refreshes[:step] == [0] * step
    assert kl[step] == 0.0 and refreshes[step] == 1


def test_a_reference_that_is_never_due_changes_no_bit_of_the_training(tiny_model, tmp_path):
    for policy in ("full", "LoRA"):
        off = train(policy, tiny_model, tmp_path, ref_refresh_steps=None)
        on = train(policy, tiny_model, tmp_path, ref_refresh_steps=1000)
        expected = tiny.weights(off)
        assert all(torch.equal(tiny.weights(on)[name], value) for name, value in expected.items())
        assert column(on, "kl") == column(off, "kl")
        assert not any(p.requires_grad for _, p in on._moving.reference.pairs() if policy == "LoRA")


def test_a_second_call_of_train_counts_its_own_steps(tiny_model, tmp_path):
    trainer = train("LoRA", tiny_model, tmp_path, max_steps=3)
    trainer.train()
    assert column(trainer, "ref/refreshes") == [1, 1, 2] and column(trainer, "ref/age") == [1, 2, 1]


# What


def test_a_mixture_is_that_of_old_reference_and_policy(tiny_model, tmp_path):
    trainer = make("full", tiny_model, tmp_path, ref_refresh_alpha=0.25, max_steps=3)
    first = reference(trainer)
    policy = []
    trainer.add_callback(_AfterStep(2, lambda: policy.extend(tiny.weights(trainer).values())))
    trainer.train()
    for old, new, now in zip(first, policy, reference(trainer), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)


def _AfterStep(step, function):
    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                function()

    return Callback()


@pytest.mark.parametrize("policy", ["full", "LoRA"])
@pytest.mark.parametrize("shared", [None, True])
def test_scoring_reads_the_refreshed_reference(tiny_model, tmp_path, policy, shared):
    """Against the logits of the policy with the weights that it had at the refresh."""
    outputs, held = [], {}

    class Recorder(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            outputs.append(super()._generate_and_score_completions(inputs))
            return outputs[-1]

    trainer = make(policy, tiny_model, tmp_path, (Recorder, GRPOConfig), shared_prefix=shared)
    trainer.add_callback(_AfterStep(2, lambda: held.update(tiny.weights(trainer))))
    trainer.train()
    output, trained = outputs[3], tiny.weights(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(held[name])
    keep = output["completion_mask"].bool()
    expected = logps(trainer.model.eval(), output, trainer.temperature)[keep].float()
    torch.testing.assert_close(output["ref_per_token_logps"][keep], expected, atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(trained[name], held[name]) for name in held)


@torch.no_grad()
def logps(model, output, temperature):
    """Log-probs of the completions of a scored batch, `(B, T)` float64, from plain logits."""
    ids, mask = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    logits = model(input_ids=ids, attention_mask=mask).logits.double() / temperature
    width = output["completion_ids"].size(1)
    return logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]


def test_the_optimizer_is_emptied_and_its_schedule_goes_on(tiny_model, tmp_path):
    runs = {}
    for empties in (False, True):
        trainer = make(
            "LoRA", tiny_model, tmp_path, max_steps=3, ref_refresh_optimizer=empties, lr_scheduler_type="linear"
        )
        counts = []
        for step in (1, 2, 3):
            trainer.add_callback(
                _AfterStep(
                    step, lambda t=trainer, c=counts: c.append({int(s["step"]) for s in t.optimizer.state.values()})
                )
            )
        trainer.train()
        runs[empties] = counts, column(trainer, "learning_rate"), trainer.state.global_step
    assert runs[False][0] == [{1}, {2}, {3}] and runs[True][0] == [{1}, {2}, {1}]
    assert runs[False][1:] == runs[True][1:]


def test_the_critic_is_left_alone(tiny_model, tmp_path):
    """Where the KL weighs nothing, a refresh changes nothing of policy and critic."""
    runs = []
    for steps in (1, 1000):
        trainer = train(
            "LoRA", tiny_model, tmp_path, PPO, ref_refresh_steps=steps, beta=1e-30, num_iterations=1, num_generations=1
        )
        critic = trainer.critic.named_parameters()
        assert {*trainer.model.peft_config} == {"default", "ref", "critic"} and not any(".ref." in n for n in critic)
        runs.append({**tiny.weights(trainer), **critic})
        assert trainer._moving.refreshes == (3 if steps == 1 else 0)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]) != (".ref." in name), name


def test_dropout_of_an_adapter_keeps_the_kl_above_zero_but_not_the_reference_noisy(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(POLICIES, "dropout", {**LORA, "lora_dropout": 0.5})
    trainer = train("dropout", tiny_model, tmp_path, disable_dropout=False)
    assert column(trainer, "kl")[2] > 0.0
    trainer.model.train()
    ids = torch.arange(2, 10)[None]
    with use_adapter(trainer.model, "ref"), torch.no_grad():
        assert torch.equal(trainer.model(ids).logits, trainer.model(ids).logits)


@pytest.mark.parametrize("kind", ["full", "reference", "lora", "adapter"])
@pytest.mark.parametrize("loss", ["sigmoid", "psipo_identity"])
def test_dpo_refreshes_at_the_start_of_an_optimizer_step(tiny_model, tmp_path, kind, loss):
    seen = []

    class Watched(DPOTrainer):
        def training_step(self, *args, **kwargs):
            same = [torch.equal(policy, ref) for policy, ref in self._moving.reference.pairs()]
            seen.append((self.state.global_step, all(same)))
            return super().training_step(*args, **kwargs)

    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "ref_refresh_steps": 2}
    trainer = tiny_dpo.build(
        Watched, DPOConfig, tiny_model, tmp_path, kind=kind, max_steps=5, loss_type=[loss], **options
    )
    trainer.train()
    assert [same for step, same in seen if step] == [step in (2, 4) for step, _ in seen if step]
    margins = [entry["rewards/margins"] for entry in tiny.logged(trainer)]
    assert margins[2] == margins[4] == 0.0 and margins[1] and margins[3]
    assert column(trainer, "ref/refreshes") == [0, 0, 1, 1, 2] and "ref/total_kl" not in tiny.logged(trainer)[0]


# The KL to the first policy


@pytest.mark.parametrize("policy", ["full", "LoRA", "PiSSA", "4-bit", "adapter"])
def test_the_total_kl_is_the_mean_log_ratio_to_the_first_policy(tiny_model, tmp_path, request, policy):
    """Against the logits of a model that is read once more."""
    if policy == "4-bit":
        request.getfixturevalue("no_repacking")
    outputs, policies = [], []

    class Recorder(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            outputs.append(output)
            policies.append(logps(self.model, output, self.temperature))
            return output

    trainer = make(policy, tiny_model, tmp_path, (Recorder, GRPOConfig), ref_total_kl=True, steps_per_generation=1)
    trainer.train()
    # the first policy: of PiSSA, the adapter's first product is what was taken out of the base
    first = make(policy, tiny_model, tmp_path / "first", ref_refresh_steps=None).model.train()
    total = column(trainer, "ref/total_kl")
    for value, output, of_policy in zip(total, outputs, policies, strict=True):
        keep = output["completion_mask"].bool()
        expected = (of_policy - logps(first, output, trainer.temperature))[keep].mean().item()
        assert value == pytest.approx(expected, abs=2e-6)
    kl = column(trainer, "kl")
    assert total[0] == 0.0 and kl[2] == 0.0 and abs(total[2]) > 1e-4, "the KL to the reference does not show it"


def test_the_total_kl_costs_one_pass_more_per_log_and_is_off_for_a_full_model(tiny_model, tmp_path):
    assert "ref/total_kl" not in tiny.logged(train("full", tiny_model, tmp_path))[0]
    assert train("full", tiny_model, tmp_path, max_steps=1)._moving.reference._first is None
    passes = []

    class Counting(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            passes[-1] += not torch.is_grad_enabled()
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    reuse = {"num_iterations": 2, "max_steps": 8, "logging_steps": 4}
    for total in (False, None):
        passes.append(0)
        trainer = train("LoRA", tiny_model, tmp_path, (Counting, GRPOConfig), ref_total_kl=total, **reuse)
    assert passes[1] == passes[0] + 2, "two logs"
    assert len(column(trainer, "ref/total_kl")) == 2


def test_k1_has_the_smaller_variance_far_from_the_first_policy_and_k3_near_it():
    """The figures of docs/methods/reference.md, over all tokens."""

    def moments(policy, first):
        policy, first = (torch.tensor(x, dtype=torch.float64) for x in (policy, first))
        d = (policy / first).log()
        kl = (policy * d).sum()
        for k in (d, torch.expm1(-d) + d):
            assert (policy * k).sum().item() == pytest.approx(kl.item())
            yield kl.item(), (policy * (k - kl).square()).sum().sqrt().item()

    (kl, k1), (_, k3) = moments([0.99, 0.01], [0.5, 0.5])
    assert (round(kl, 3), round(k1, 2), round(k3, 2)) == (0.637, 0.46, 4.47)
    (kl, k1), (_, k3) = moments([0.52, 0.48], [0.5, 0.5])
    assert (round(kl, 5), round(k1, 3), round(k3, 5)) == (0.0008, 0.04, 0.00004)


# Resuming


@pytest.mark.parametrize(
    ("policy", "classes", "options"),
    [
        ("LoRA", OURS, {}),
        ("LoRA", OURS, {"ref_refresh_kl": 1e-3, "ref_refresh_steps": None, "ref_refresh_optimizer": True}),
        ("full", OURS, {"ref_refresh_alpha": 0.5, "ref_total_kl": True}),
        ("PiSSA", OURS, {"kl_estimator": "exact"}),
        ("4-bit", OURS, {}),
        ("adapter", OURS, {}),
        ("LoRA", PPO, {"num_iterations": 1}),
        ("full", PPO, {"num_iterations": 1}),
    ],
    ids=str,
)
def test_a_run_goes_on_bit_for_bit(tiny_model, tmp_path, request, policy, classes, options):
    if policy == "4-bit":
        request.getfixturevalue("no_repacking")
    options = {"ref_refresh_steps": 3, "max_steps": 8, "save_strategy": "steps", "save_steps": 1, **options}
    whole = train(policy, tiny_model, tmp_path, classes, **options)
    for step in (3, 5):
        resumed = make(policy, tiny_model, tmp_path, classes, **{**options, "save_strategy": "no"})
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*reference")
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        tiny.assert_same_weights(resumed, whole)
        assert all(a.dtype == b.dtype for a, b in zip(reference(resumed), reference(whole), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(reference(resumed), reference(whole), strict=True))
        for name in ("kl", "ref/refreshes", "ref/age", *(["ref/total_kl"] if resumed._moving.measures_total else [])):
            assert column(resumed, name) == column(whole, name), name
    assert whole._moving.refreshes > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_on_pairs_goes_on_bit_for_bit(tiny_model, tmp_path, kind):
    options = {"ref_refresh_steps": 3, "max_steps": 8, "save_strategy": "steps", "save_steps": 5, "kind": kind}
    run = (DPOTrainer, DPOConfig, tiny_model, tmp_path)
    whole, resumed = tiny_dpo.build(*run, **options), tiny_dpo.build(*run, **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    tiny.assert_same_weights(resumed, whole)
    assert all(torch.equal(a, b) for a, b in zip(reference(resumed), reference(whole), strict=True))
    assert column(resumed, "ref/age") == column(whole, "ref/age") == [1, 2, 3, 1, 2, 3, 1, 2]


def test_what_a_checkpoint_holds(tiny_model, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    adapter = train("LoRA", tiny_model, tmp_path / "lora", **save)
    full = train("full", tiny_model, tmp_path / "full", **save)
    folder = tmp_path / "lora/checkpoint-3"
    state = json.loads((folder / "reference.json").read_text())
    assert (state["last_step"], state["refreshes"]) == (2, 1) and state["kls"] == [0.0]
    assert not (folder / "reference.safetensors").exists() and (folder / "ref/adapter_config.json").exists()
    assert (tmp_path / "full/checkpoint-3/reference.safetensors").exists() and full._moving.refreshes == 1
    # PEFT alone reads the policy, and the reference beside it
    ids = torch.arange(2, 10)[None]
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert {*loaded.peft_config} == {"default"}
    adapter.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, adapter.model(ids).logits)
        beside = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), folder / "ref"
        )
        with use_adapter(adapter.model, "ref"):
            assert torch.equal(beside.eval()(ids).logits, adapter.model(ids).logits)


def test_a_checkpoint_without_a_moving_reference_is_said_to_have_none(tiny_model, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "kl_estimator": "k3"}
    for policy in ("LoRA", "full"):
        train(policy, tiny_model, tmp_path / policy, ref_refresh_steps=None, **save)
        trainer = make(policy, tiny_model, tmp_path / policy, ref_refresh_steps=2, **save)
        with pytest.warns(UserWarning, match=r"checkpoint-3 has no reference\.json, as it was written without"):
            trainer.train(resume_from_checkpoint=str(tmp_path / policy / "checkpoint-3"))
        assert [entry["ref/age"] for entry in tiny.logged(trainer) if "ref/age" in entry] == [1, 2, 1]
        kl = column(trainer, "kl")
        assert kl[5] == 0.0 and math.isfinite(sum(kl)) and kl[3] > 0.0


# In mixed precision, and subclasses


def test_trls_defaults_run(tiny_model, tmp_path):
    """bfloat16 autocast and gradient checkpointing."""
    for policy in ("full", "LoRA"):
        options = {"bf16": True, "gradient_checkpointing": True, "model_init_kwargs": None}
        trainer = train(policy, tiny_model, tmp_path, kl_estimator="k3", **options)
        kl = column(trainer, "kl")
        assert kl[2] == 0.0 and kl[3] > 0.0 and trainer._moving.refreshes == 1


def test_a_subclass_that_cuts_the_refresh_off_is_refused(tiny_model, tmp_path):
    class Whole(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super(GRPOTrainer, self)._compute_nothing(inputs)

    class Silent(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            self._metrics["train"].pop("kl")
            return loss

    with pytest.raises(ValueError, match=r"Whole overrides _generate_and_score_completions without calling"):
        train("LoRA", tiny_model, tmp_path, (Whole, GRPOConfig))
    with pytest.raises(ValueError, match=r"reads the metric 'kl', which Silent does not log. Use ref_refresh_steps"):
        train("LoRA", tiny_model, tmp_path, (Silent, GRPOConfig), ref_refresh_kl=0.1)
