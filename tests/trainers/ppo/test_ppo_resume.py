"""Interrupted runs of PPO continue bit for bit; with 4-bit weights the base is what it was."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
KINDS = ["full", "LoRA", pytest.param("4-bit", marks=needs_bitsandbytes)]


def build(model, folder, kind, **options):
    settings = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 5,
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "max_completion_length": 8, "num_iterations": 1, "save_strategy": "no", **options,
    }  # fmt: skip
    given, quantised = {}, kind == "4-bit"
    if kind != "full":
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if quantised:
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    torch.manual_seed(0)
    return PPOTrainer(
        model=model, reward_funcs=tiny.digits, args=PPOConfig(**settings), train_dataset=tiny.dataset(), **given
    )


@pytest.fixture(autouse=True)
def weights_as_they_are_on_a_gpu(monkeypatch):
    if importlib.util.find_spec("bitsandbytes"):  # see tests/matrix/test_matrix.py
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def state(trainer):
    return {**dict(trainer.model.named_parameters()), **trainer.critic.named_parameters()}


def rows(trainer):
    return [
        sorted((name, repr(value)) for name, value in entry.items() if name != "step_time")  # NaN is no number
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_bit_for_bit(tiny_model, tmp_path, kind):
    whole = build(tiny_model, tmp_path, kind, save_strategy="steps", save_steps=2)
    whole.train()
    again = build(tiny_model, tmp_path, kind)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = state(again), state(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert rows(again) == rows(whole) and len(rows(whole)) == 5
    assert ("value/lr", "0.1") in rows(whole)[0]
    for one, other in zip(
        again._training.optimizer.state.values(), whole._training.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_base_of_two_adapters_stays_bit_for_bit_what_it_was(tiny_model, tmp_path, kind, checkpointing):
    trainer = build(tiny_model, tmp_path, kind, gradient_checkpointing=checkpointing)
    before = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    lora = {name for name in before if "lora_" in name}
    assert {name.split(".")[-2] for name in lora} == {"default", "critic"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - lora)
    assert not any(torch.equal(after[name], before[name]) for name in lora)
    policy = {p.dtype for name, p in trainer.model.named_parameters() if ".default." in name}
    critic = {p.dtype for p in trainer.critic.named_parameters().values()}
    assert policy == {torch.bfloat16 if kind == "4-bit" else torch.float32} and critic == {torch.float32}


def test_a_checkpoint_without_a_critic_is_refused(tiny_model, tmp_path):
    tiny.train(GRPOTrainer, GRPOConfig, tiny_model, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer = build(tiny_model, tmp_path, "full")
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert str(error.value) == (
        f"{tmp_path / 'checkpoint-2'} holds no critic: PPOTrainer did not write it. To start from its policy, give it "
        "as the model."
    )


def test_without_the_critics_optimizer_it_starts_anew_and_says_so(tiny_model, tmp_path):
    build(tiny_model, tmp_path, "full", save_strategy="steps", save_steps=2, max_steps=2).train()
    (tmp_path / "checkpoint-2/critic/critic_training.pt").unlink()
    with pytest.warns(UserWarning, match=r"critic_training.pt does not exist; the critic's optimizer starts anew"):
        build(tiny_model, tmp_path, "full").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_with_weights_alone_the_critic_is_saved_without_its_optimizer(tiny_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": True}
    build(tiny_model, tmp_path, "LoRA", **options).train()
    names = {path.name for path in Path(tmp_path, "checkpoint-2", "critic").iterdir()}
    assert "critic.safetensors" in names and "critic_training.pt" not in names


def test_what_is_the_critics_is_written_before_what_makes_a_checkpoint_whole(tiny_model, tmp_path, monkeypatch):
    trainer = build(tiny_model, tmp_path, "full", save_strategy="steps", save_steps=1)
    monkeypatch.setattr(trainer._training or PPOTrainer, "_save_scaler", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / "critic/critic_training.pt").exists() and not (folder / "trainer_state.json").exists()
