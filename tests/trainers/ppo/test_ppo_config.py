"""Defaults and refusals of PPO, each in the sentence that the user reads."""

import dataclasses
import re
import warnings

import pytest
import trl
from tiny import build
from trl import TrlParser

import trl_ext
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer


def config(cls=PPOConfig, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls("out", **{"bf16": False, "use_cpu": True, "report_to": "none", **options})


def refusal(cls=PPOConfig, **options):
    with pytest.raises(ValueError) as error:
        config(cls, **options)
    return str(error.value)


def test_defaults():
    args = config()
    assert (args.advantage_estimator, args.num_generations, args.beta, args.kl_placement) == ("gae", 1, 0.05, "reward")
    assert (args.num_iterations, args.disable_dropout, args.lam, args.gamma) == (4, True, 0.95, 1.0)
    assert config(num_generations=4).num_generations == 4


def test_without_a_kl_its_placement_is_nobodys_mistake():
    assert config(beta=0.0).kl_placement is None
    assert "no effect with beta=0.0" in refusal(beta=0.0, kl_estimator="k1")
    assert config(kl_placement="loss").kl_placement == "loss"


LAM, POSITIVE = "must be a number in [0, 1], got", "must be a positive number, got"
REFUSED = {
    "PPOTrainer estimates advantages with its critic: advantage_estimator must be 'gae', got 'group_mean'. Use "
    "GRPOTrainer for the others.": {"advantage_estimator": "group_mean"},
    "PPOTrainer estimates advantages with its critic: advantage_estimator must be 'gae', got None. Use GRPOTrainer "
    "for the others.": {"advantage_estimator": None},
    "advantage_kwargs is not read by 'gae'; set gamma, lam and whiten_advantages.": {"advantage_kwargs": {"lam": 1.0}},
    f"lam {LAM} 1.5.": {"lam": 1.5},
    f"lam {LAM} None.": {"lam": None},
    f"critic_lam {LAM} -0.1.": {"critic_lam": -0.1},
    f"critic_lam {LAM} 'one'.": {"critic_lam": "one"},
    "gamma must be a number in (0, 1], got 0.0.": {"gamma": 0.0},
    "gamma must be a number in (0, 1], got 1.1.": {"gamma": 1.1},
    f"cliprange_value {POSITIVE} 0.": {"cliprange_value": 0},
    f"cliprange_value {POSITIVE} inf.": {"cliprange_value": float("inf")},
    f"critic_learning_rate {POSITIVE} -1.0.": {"critic_learning_rate": -1.0},
    f"critic_learning_rate {POSITIVE} nan.": {"critic_learning_rate": float("nan")},
    "critic_warmup_steps must be a whole number >= 0, got -1.": {"critic_warmup_steps": -1},
    "critic_warmup_steps must be a whole number >= 0, got 0.1.": {"critic_warmup_steps": 0.1},
    "missing_eos_penalty must be a finite number >= 0, got -1.0.": {"missing_eos_penalty": -1.0},
    "bootstrap_truncated trains on cut-off completions, mask_truncated_completions drops them. Use one of the two.": {
        "bootstrap_truncated": True, "mask_truncated_completions": True,
    },
    "The critic has no gradient scaler; use bf16=True or full precision.": {"fp16": True},
    "optim='galore_adamw' cannot be used for the critic; use a plain optimiser such as 'adamw_torch' or "
    "'paged_adamw_8bit'.": {"optim": "galore_adamw"},
    "optim='lomo' cannot be used for the critic; use a plain optimiser such as 'adamw_torch' or "
    "'paged_adamw_8bit'.": {"optim": "lomo"},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused(message):
    assert refusal(**REFUSED[message]) == message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance_sampling_level": "sequence"}, "one ratio per completion"),
        ({"loss_type": "vespo"}, "reads the sign of one advantage per completion"),
        ({"off_policy_mask_threshold": 0.5}, "reads the sign of one advantage per completion"),
        ({"scale_rewards": "none"}, "scale_rewards='none' is not read"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "works on the weighted sum"),
        ({"kl_estimator": "k3"}, "Only 'k1' is right in the reward"),
        ({"process_weight": 0.5}, "process_weight is read only with"),
    ],
)
def test_what_grpo_refuses_with_one_advantage_per_token_is_refused(options, words):
    assert words in refusal(**options)


def test_gae_outside_of_ppo_is_refused(tiny_model, tmp_path):
    message = "advantage_estimator='gae' needs a critic. Use trl_ext.PPOConfig and PPOTrainer."
    assert refusal(GRPOConfig, advantage_estimator="gae") == message
    assert refusal(GRPOConfig, advantage_estimator="gae", num_generations=1) == message
    with pytest.raises(ValueError, match=re.escape(message)):
        build(GRPOTrainer, PPOConfig, tiny_model, tmp_path)


def test_a_config_of_ppo_in_trls_own_trainer_is_refused(tiny_model, tmp_path):
    with pytest.raises(
        ValueError, match=r"does not know the options of trl_ext that are set \(advantage_estimator='gae"
    ):
        build(trl.GRPOTrainer, PPOConfig, tiny_model, tmp_path)


def test_another_config_is_refused_and_none_is_a_default_one(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^PPOTrainer needs a PPOConfig, got GRPOConfig\.$"):
        build(PPOTrainer, GRPOConfig, tiny_model, tmp_path)
    monkeypatch.setattr("trl_ext.trainers.ppo.trainer.PPOConfig", lambda name: ("a PPOConfig", name))
    assert PPOTrainer._default_args("somewhere/model") == ("a PPOConfig", "model-PPO")


def test_the_names_are_public_and_not_put_into_trl():
    assert trl_ext.PPOConfig is PPOConfig and trl_ext.PPOTrainer is PPOTrainer
    with trl_ext.register():
        assert not hasattr(trl, "PPOTrainer") and not hasattr(trl, "PPOConfig")


def test_every_field_can_be_set_on_the_command_line():
    words = "--lam 1.0 --critic_lam 0.9 --gamma 0.99 --cliprange_value 0.5 --critic_learning_rate 1e-3 --value_model x"
    words += " --critic_warmup_steps 3 --whiten_advantages false --whiten_rewards true --missing_eos_penalty 1"
    words += " --bootstrap_truncated true --output_dir out --bf16 false --use_cpu true --report_to none"
    (args,) = TrlParser((PPOConfig,)).parse_args_into_dataclasses(words.split())
    new = {name for name in PPOConfig.__annotations__ if not name.startswith("_")} - {*GRPOConfig.__dataclass_fields__}
    defaults = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    assert len(new) == 11 and all(getattr(args, name) != defaults[name] for name in new)


def test_a_field_that_another_class_declares_again_is_theirs():
    @dataclasses.dataclass
    class Theirs(PPOConfig):
        gamma: float = 7.0

    with pytest.warns(UserWarning, match=r"Theirs\.gamma: declared by that class"):
        args = Theirs("out", bf16=False, use_cpu=True, report_to="none")
    assert args.gamma == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "prompt learning",
            "The critic is a second adapter of the kind of yours, which PromptTuningConfig cannot have.",
        ),
        ("no default", "which a PEFT model without the adapter 'default' cannot have. Pass value_model, or use LoRA."),
        ("critic", "The policy has an adapter 'critic' already, which is the name of the critic's; rename it"),
    ],
)
def test_a_policy_that_cannot_have_a_second_adapter_is_refused(tiny_model, change, message):
    import torch
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trl_ext.trainers.ppo.critic import AdapterCritic

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if change == "prompt learning":
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    else:
        model = get_peft_model(base, lora, adapter_name="mine" if change == "no default" else "default")
    if change == "critic":
        model.add_adapter("critic", lora)
    with pytest.raises(ValueError, match=re.escape(message)):
        AdapterCritic(model, torch.device("cpu"))


def test_a_value_model_of_other_tokens_is_refused(tiny_model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    other = AutoConfig.from_pretrained(tiny_model)
    other.vocab_size = 33
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    path = str(tmp_path / "other")
    with pytest.raises(ValueError, match=re.escape(f"value_model {path!r} has 33 tokens, the policy 21: the critic")):
        build(PPOTrainer, PPOConfig, tiny_model, tmp_path, num_generations=1, value_model=path)


def test_images_and_fsdp1_are_refused(tiny_model, tmp_path, monkeypatch):
    from types import SimpleNamespace

    trainer = build(PPOTrainer, PPOConfig, tiny_model, tmp_path, num_generations=1)
    with monkeypatch.context() as patch:
        patch.setattr("trl_ext.trainers.ppo.trainer.ProcessorMixin", type(trainer.processing_class))
        with pytest.raises(ValueError, match="The critic reads text only; use GRPOTrainer with a group or batch"):
            trainer._refuse_engines_and_images()
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match="The critic is sharded by FSDP2 only; set fsdp_version: 2, or use DDP"):
        trainer._refuse_engines_and_images()
