"""What is refused of a reference that moves: one sentence, before a model loads."""

import re
import warnings

import pytest
import tiny
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny.dpo import adapter, pairs
from transformers import AutoModelForCausalLM

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo import PPOConfig

QUIET = {"bf16": False, "use_cpu": True, "report_to": "none"}
STEPS = {"ref_refresh_steps": 5, "beta": 0.1}
NEEDS_ONE = "is read only with ref_refresh_steps or ref_refresh_kl; set one of them, or remove it."


@pytest.mark.parametrize("config_class", [GRPOConfig, PPOConfig, DPOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_refresh_steps": 0}, "ref_refresh_steps must be a whole number >= 1, got 0."),
        ({"ref_refresh_steps": 2.5}, "ref_refresh_steps must be a whole number >= 1, got 2.5."),
        ({"ref_refresh_steps": True}, "ref_refresh_steps is no switch, got True."),
        ({**STEPS, "ref_refresh_alpha": 0.0}, "ref_refresh_alpha must be a number in (0, 1], got 0.0."),
        ({**STEPS, "ref_refresh_alpha": 1.5}, "ref_refresh_alpha must be a number in (0, 1], got 1.5."),
        ({**STEPS, "ref_refresh_alpha": float("nan")}, "ref_refresh_alpha must be a number in (0, 1], got nan."),
        ({**STEPS, "ref_refresh_optimizer": "yes"}, "ref_refresh_optimizer must be true or false, got 'yes'."),
        ({"ref_refresh_alpha": 0.5}, f"ref_refresh_alpha {NEEDS_ONE}"),
        ({"ref_refresh_optimizer": True}, f"ref_refresh_optimizer {NEEDS_ONE}"),
        (
            {**STEPS, "sync_ref_model": True},
            "ref_refresh_* and sync_ref_model both move the reference. Remove one.",
        ),
    ],
    ids=str,
)
def test_bad_options_are_refused(config_class, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class("out", **QUIET, **options)


@pytest.mark.parametrize("config_class", [GRPOConfig, PPOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_refresh_kl": 0.0}, "ref_refresh_kl must be a positive number, in nats per token, got 0.0."),
        ({"ref_refresh_kl": -1}, "ref_refresh_kl must be a positive number, in nats per token, got -1."),
        ({"ref_refresh_kl": float("inf")}, "ref_refresh_kl must be a positive number, in nats per token, got inf."),
        (
            {**STEPS, "beta": 0.0},
            "beta=0.0 uses no reference, so there is none to refresh. Set beta, or remove ref_refresh_*.",
        ),
        ({"ref_total_kl": True, "beta": 0.1}, f"ref_total_kl {NEEDS_ONE}"),
        ({**STEPS, "ref_total_kl": 3}, "ref_total_kl must be true or false, got 3."),
    ],
    ids=str,
)
def test_bad_options_on_samples_are_refused(config_class, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class("out", **QUIET, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ref_refresh_kl": 0.1},
            "ref_refresh_kl needs a KL, and the log-ratios of pairs are none: the completions were not sampled from "
            "the policy. Use ref_refresh_steps.",
        ),
        (
            {**STEPS, "precompute_ref_log_probs": True},
            "precompute_ref_log_probs asks the first reference once and for all, and ref_refresh_* moves it. Remove "
            "one.",
        ),
        (
            {**STEPS, "loss_type": ["simpo"]},
            "ref_refresh_steps has no effect: loss_type ['simpo'] reads no reference model.",
        ),
        (
            {**STEPS, "loss_type": ["sft"]},
            "ref_refresh_steps has no effect: loss_type ['sft'] reads no reference model.",
        ),
    ],
    ids=str,
)
def test_bad_options_on_pairs_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DPOConfig("out", **QUIET, **options)


@pytest.mark.parametrize("config_class", [GRPOConfig, DPOConfig])
def test_optimizers_that_cannot_be_emptied_are_refused(config_class):
    with pytest.raises(
        ValueError, match=r"of torch's kind, and optim='schedule_free_adamw' keeps its own elsewhere\."
    ):
        config_class("out", **QUIET, **STEPS, ref_refresh_optimizer=True, optim="schedule_free_adamw")


@pytest.mark.parametrize("config_class", [GRPOConfig, DPOConfig])
def test_one_flat_row_of_weights_is_refused(monkeypatch, config_class):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^ref_refresh_\* copies weights one by one, and FSDP1 .* Use FSDP2 \("):
        config_class("out", **QUIET, **STEPS)
    monkeypatch.setenv("FSDP_VERSION", "2")
    config_class("out", **QUIET, **STEPS)


def test_good_options_are_taken_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for config_class in (GRPOConfig, DPOConfig):
            config_class("out", **QUIET, **STEPS, ref_refresh_alpha=0.5, ref_refresh_optimizer=True)
        GRPOConfig("out", **QUIET, **STEPS, ref_refresh_kl=0.1, ref_total_kl=False)
        PPOConfig("out", **QUIET, ref_refresh_kl=0.1, ref_total_kl=True)


LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def named(model, name):
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**LORA), adapter_name=name)


def with_ref(model):
    peft_model = adapter(model)
    peft_model.add_adapter("ref", LoraConfig(**LORA))
    return peft_model


PROMPTS = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
GIVEN = {
    "a user's own ref": (with_ref, None, {}, "The policy has an adapter 'ref' already, which is the name of the"),
    "another name": (
        lambda model: named(model, "mine"), None, {},
        "The policy's adapter must be called 'default', as TRL wants it; it has 'mine'. Load it without adapter_name.",
    ),
    "biases": (
        None, LoraConfig(**LORA, bias="all"), {},
        "ref_refresh_* keeps the reference as a second adapter, and bias='all' trains biases of the base model, which",
    ),
    "prompts": (None, PROMPTS, {}, "ref_refresh_* keeps the reference as a second adapter, which PromptTuningConfig"),
    "a mixture": (
        None, LoraConfig(**LORA), {"ref_refresh_alpha": 0.5},
        "ref_refresh_alpha=0.5 needs a policy without an adapter: a mixture of the factors of two adapters is no",
    ),
    "a mixture, an adapter given": (adapter, None, {"ref_refresh_alpha": 0.5}, "ref_refresh_alpha=0.5 needs a policy"),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("kind", ["GRPO", "DPO"])
def test_policies_that_cannot_be_copied_are_refused(tiny_model, tmp_path, kind, case):
    make, peft_config, options, message = GIVEN[case]
    # a path that does not exist: nothing is loaded before the sentence
    given = {"model": make(tiny_model) if make else "no/such/model", "peft_config": peft_config}
    with pytest.raises(ValueError, match=re.escape(message)):
        if kind == "GRPO":
            config = GRPOConfig(str(tmp_path), **QUIET, **STEPS, **options)
            GRPOTrainer(reward_funcs=tiny.digits, args=config, train_dataset=tiny.dataset(), **given)
        else:
            config = DPOConfig(str(tmp_path), **QUIET, **STEPS, **options)
            DPOTrainer(args=config, train_dataset=pairs(), **given)


def test_a_reference_beside_an_adapter_is_refused(tiny_model, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"a policy with an adapter cannot be copied into ref_model\. Do not pass"):
        DPOTrainer(
            model=adapter(tiny_model), ref_model=reference, args=DPOConfig(str(tmp_path), **QUIET, **STEPS),
            train_dataset=pairs(),
        )  # fmt: skip


def test_a_reference_of_another_architecture_is_refused(tiny_model, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.intermediate_size = 48
    reference = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"ref_model has other parameters than the policy\. Pass a model of"):
        DPOTrainer(
            model=tiny_model, ref_model=reference, args=DPOConfig(str(tmp_path), **QUIET, **STEPS),
            train_dataset=pairs(),
        )  # fmt: skip


def test_adapters_of_other_kinds_are_copied(tiny_model, tmp_path):
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    trainer = GRPOTrainer(
        model=tiny_model,
        peft_config=config,
        reward_funcs=tiny.digits,
        args=GRPOConfig(
            str(tmp_path), **QUIET, **{**STEPS, "ref_refresh_steps": 2}, max_steps=3, learning_rate=0.1,
            num_generations=4, per_device_train_batch_size=4, max_completion_length=8, logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=tiny.dataset(),
    )  # fmt: skip
    trainer.train()
    kl = [kl for (kl,) in tiny.logged(trainer, "kl")]
    assert kl[0] == kl[2] == 0.0 < kl[1]


def test_the_class_of_somebody_else_keeps_its_field(tiny_model, tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Theirs(GRPOConfig):
        ref_refresh_steps: int | None = 7

    with pytest.warns(UserWarning, match=r"Theirs\.ref_refresh_steps: declared by that class"):
        config = Theirs(str(tmp_path), **QUIET, beta=0.1)
    trainer = GRPOTrainer(model=tiny_model, reward_funcs=tiny.digits, args=config, train_dataset=tiny.dataset())
    assert trainer._moving is None and not trainer._is_ours
