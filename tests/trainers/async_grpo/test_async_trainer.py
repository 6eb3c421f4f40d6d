"""The trainer on given conversations: off, in the loss, in the reward, over a step."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assert_same_weights, logged
from tiny.engine import build, group, lengths, outcome
from trl.experimental.async_grpo.packing import TREE_ATTENTION, TreeRow

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.kl import KL_ESTIMATORS, kl_in_loss
from trl_ext.functional.rewards import RewardBatch
from trl_ext.trainers.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl_ext.upstream import trl_class

TRL, TRL_CONFIG = trl_class(AsyncGRPOTrainer), trl_class(AsyncGRPOConfig)


@pytest.fixture
def make(tiny_model, tmp_path):
    def make(trainer=AsyncGRPOTrainer, config=AsyncGRPOConfig, **options):
        return build(trainer, config, tiny_model, tmp_path / "out", **options)

    return make


def moved_adapter(trainer, seed=0):
    """An adapter that does something, so that the policy is not its reference."""
    torch.manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return trainer


def first_step(trainer):
    """The micro-batches of the first optimizer step, as the loss gets them."""
    trainer.rollout_worker.start()
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 2
    return batches


def test_nothing_on_is_trls_bit_for_bit(make):
    theirs, ours = make(TRL, TRL_CONFIG, max_steps=3), make(max_steps=3)
    start = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    stacks = []
    ours.model.register_forward_pre_hook(lambda *args: stacks.append(_ours_on_the_stack()))
    for trainer in (theirs, ours):
        trainer.train()
    assert_same_weights(ours, theirs)
    assert any(not torch.equal(start[name], p) for name, p in ours.model.named_parameters())
    thin = {"train", "training_step", "compute_loss", "get_batch_samples"}
    assert stacks and {name for stack in stacks for name in stack} <= thin
    assert all(sample.old_log_probs.ndim == 1 for sample in ours.rollout_worker.samples)
    assert type(ours.rollout_worker.loop) is type(theirs.rollout_worker.loop)
    keys = [{key for entry in logged(trainer) for key in entry} for trainer in (ours, theirs)]
    assert keys[0] == keys[1]


def _ours_on_the_stack():
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "trl_ext":
            found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


def test_the_numbers_of_trls_samples_are_its_own(make):
    """Mask, log-probs and metrics are TRL's; the advantage that its traces show is ours."""
    given = [group(0, unscored=False)]
    theirs, ours = make(TRL, TRL_CONFIG, groups=given), make(groups=given, advantage_estimator="group_mean")
    for trainer in (theirs, ours):
        trainer.rollout_worker.start()
    rewards = np.array([c[-1]["reward"] for c in given[0].completions])
    for a, b in zip(theirs.rollout_worker.samples, ours.rollout_worker.samples, strict=True):
        np.testing.assert_array_equal(a.old_log_probs, b.old_log_probs[:, 0])
        np.testing.assert_array_equal(a.completion_mask, b.completion_mask)
        assert {key: b.metrics[key] for key in a.metrics} == a.metrics
        assert b.advantage == pytest.approx(a.advantage * rewards.std(), abs=1e-6), "TRL's is biased: / std"


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_a_step_has_mean_0_and_std_1(make, estimator):
    trainer = make(advantage_estimator=estimator)
    trainer.train()
    for mean, std in logged(trainer, "advantages/mean", "advantages/std"):
        assert mean == pytest.approx(0.0, abs=1e-6) and std == pytest.approx(1.0, abs=1e-4)
    batches = first_step(make(advantage_estimator=estimator))
    per_batch = [b["advantages"][b["token_index"] >= 0].double().std(correction=0).item() for b in batches]
    assert any(abs(std - 1.0) > 0.01 for std in per_batch), "normalised over the step, not over a micro-batch"


def test_rewards_of_steps_train_and_are_logged(make):
    trainer = make(advantage_estimator="process_group_relative", functions=[outcome, lengths], step_separator="b")
    trainer.train()
    names = ("process/steps_mean", "process/step_reward_mean", "process/advantage_share", "advantages/std")
    for values in logged(trainer, *names):
        assert all(np.isfinite(values)) and values[0] > 2 and 0 < values[2] < 1


# The reference


def dense_log_probs(model, sample):
    ids = torch.tensor(sample.input_ids)[None]
    found = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return found[torch.tensor(sample.completion_mask[1:]) == 1]


@pytest.mark.parametrize(("name", "checkpointing"), [("k1", False), ("k2", False), ("k3", False), ("k3", True)])
def test_the_kl_in_the_loss_is_that_of_one_sample_at_a_time(make, name, checkpointing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make(lora=True, beta=0.5, kl_estimator=name, gradient_checkpointing=checkpointing)
    batches = first_step(moved_adapter(trainer))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batches[0]))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.base_model.model.set_attn_implementation("eager")
    model.eval()
    total, tokens, kls = 0.0, 0, []
    for sample in trainer.rollout_worker.samples[:8]:
        logps = dense_log_probs(model, sample)
        with torch.no_grad(), model.disable_adapter():
            ref = dense_log_probs(model, sample)
        old = torch.tensor(sample.old_log_probs[sample.completion_mask == 1])
        ratio = (logps - old).exp()
        gain = torch.min(ratio * sample.advantage, ratio.clamp(0.8, 1.2) * sample.advantage)
        kl = kl_in_loss(KL_ESTIMATORS[name], logps, ref, old, torch.ones_like(ref))
        total, tokens = total + (0.5 * kl - gain).sum(), tokens + len(ref)
        kls.append(kl.detach())
    expected = total / tokens / 2
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    parameters = dict(trainer.model.named_parameters())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, parameters[key].grad, rtol=1e-3, atol=1e-5)
    numerator, denominator = trainer._metrics["train"]["kl/reference"][0]
    assert numerator / denominator == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert len(trainer._metrics["train"]["kl"]) == 1, "TRL's, the mismatch of sampler and trainer, is as it was"
    assert torch.cat(kls).abs().max() > 0.01 and len(gradients) > 2


@pytest.mark.parametrize("estimator", ["reinforce", "reinforce_plus_plus"])
def test_the_kl_in_the_reward_is_that_of_the_sampler(make, estimator):
    trainer = moved_adapter(make(lora=True, beta=0.2, kl_placement="reward", advantage_estimator=estimator))
    batches = first_step(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.base_model.model.set_attn_implementation("eager")
    found, width = {}, 0
    for sample in trainer.rollout_worker.samples[:16]:
        with torch.no_grad(), model.disable_adapter():
            ref = dense_log_probs(model, sample)
        old, value = torch.tensor(sample.old_log_probs[sample.completion_mask == 1]).unbind(1)
        found[tuple(old.tolist())] = torch.stack([value, 0.2 * (old - ref), torch.ones_like(ref)])
        width = max(width, len(ref))
    got, rows = [], []
    for batch in batches:  # the planner has its own order
        for position in range(int(batch["segment_id"].max()) + 1):
            own = (batch["token_index"] >= 0) & (batch["segment_id"] == position)
            numbers = found[tuple(batch["old_log_probs"][own].tolist())]
            rows.append(torch.nn.functional.pad(numbers, (0, width - numbers.size(1))))
            got.append(batch["advantages"][own])
    assert len(rows) == len(found) == 16
    value, penalty, mask = torch.stack(rows).double().unbind(1)
    batch = RewardBatch(value.nan_to_num(), mask.bool() & ~value.isnan(), mask.long(), 1, kl_penalty=penalty)
    expected = ADVANTAGE_ESTIMATORS[estimator].function(batch)[mask.bool()].float()
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-3, atol=1e-5)
    metrics = trainer._metrics["train"]
    assert penalty.abs().max() > 0.01 and len(metrics["kl/k1"]) == len(metrics["perf/reference_s"]) == 1
    if estimator == "reinforce_plus_plus":
        assert metrics["kl/effective_beta"][0] > 0 and metrics["kl/effective_beta"][0] != 0.2
    numerator, denominator = metrics["kl/k1"][0]
    assert numerator / denominator == pytest.approx((penalty.sum() / 0.2 / mask.sum()).item(), rel=1e-4)


def test_the_reference_is_the_policy_without_its_adapter_and_without_dropout(make, monkeypatch):
    trainer = moved_adapter(make(lora=True, beta=0.1))
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, *a: seen.append((m.training, torch.is_grad_enabled())))
    trainer.model.train()
    batches = first_step(trainer)
    assert seen == [(False, False)] * 2 and trainer.model.training
    base = make(beta=0.0)
    for batch in batches:
        theirs = []
        base.current_gradient_accumulation_steps = 1
        base.compute_loss(lambda **kwargs: theirs.append(base.model(**kwargs)) or theirs[-1], dict(batch))  # noqa: B023
        expected = theirs[0].log_probs.flatten().detach()[batch["token_index"]]
        torch.testing.assert_close(batch["ref_log_probs"], expected, rtol=1e-5, atol=1e-6)


def test_beta_is_kept_at_a_target_and_goes_on_after_an_interruption(make, tiny_model, tmp_path):
    options = {
        "lora": True, "beta": 0.1, "kl_target": 1e-6, "kl_horizon": 50.0, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    trainer = moved_adapter(make(**options))
    trainer.train()
    betas = [beta for (beta,) in logged(trainer, "kl/beta")]
    assert betas[0] == pytest.approx(0.1) and betas[1] > 0.1 and trainer.beta > betas[1]
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    assert json.loads((folder / "trl_ext_state.json").read_text())["beta"] == pytest.approx(betas[1])
    assert (folder / "rollout_state.json").exists()
    again = make(**options)
    again.train(resume_from_checkpoint=str(folder))
    assert [beta for (beta,) in logged(again, "kl/beta")][-1] == pytest.approx(betas[1])


# What stands in the way


def test_a_subclass_that_cuts_an_option_off_is_named(make):
    class Loss(AsyncGRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"][:, :2], shift_labels=inputs["shift_labels"][:, :2])
            return outputs.loss

    class Step(AsyncGRPOTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return [next(epoch_iterator) for _ in range(num_batches)], None

    with pytest.raises(ValueError, match=r"Loss overrides compute_loss without calling that of AsyncGRPOTrainer"):
        make(Loss, lora=True, beta=0.1).train()
    with pytest.raises(ValueError, match=r"Step overrides get_batch_samples without calling that"):
        make(Step, advantage_estimator="leave_one_out").train()


def test_samples_without_our_numbers_are_refused(make):
    trainer = make(advantage_estimator="leave_one_out")
    trainer.rollout_worker._loop_cls = type(trainer.rollout_worker)._loop_cls  # somebody has put TRL's back
    with pytest.raises(ValueError, match="the samples came without our numbers"):
        trainer.train()


def test_a_step_of_few_rows_is_warned_about_once(make):
    options = {"advantage_estimator": "reinforce_plus_plus", "gradient_accumulation_steps": 1, "token_budget": 24}
    trainer = make(**options)
    with pytest.warns(
        UserWarning, match="rows of this optimizer step, fewer than two groups of 4. With token_budget=24"
    ) as caught:
        trainer.train()
    assert len([w for w in caught if "fewer than two groups" in str(w.message)]) == 1


def test_trls_defaults_train(make):
    """bf16, gradient checkpointing, adapter, everything on."""
    options = {"bf16": True, "gradient_checkpointing": True, "lora": True, "reward_weights": [1.0, 0.5], "beta": 0.1}
    functions = [outcome, lengths]
    trainer = make(**options, functions=functions, advantage_estimator="process_group_relative", step_separator="b")
    trainer.train()
    assert all(np.isfinite(values).all() for values in logged(trainer, "loss", "kl/reference", "kl", "advantages/std"))


def test_the_model_card_names_the_method(make):
    trainer = make(lora=True, advantage_estimator="leave_one_out", beta=0.1)
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    trainer.create_model_card(model_name="mine")
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "RLOO" in text and "- `beta`: `0.1`" in text and "- `num_generations`: `4`" in text


# The attention of the example


@pytest.mark.parametrize("window", [None, 3])
def test_tree_attention_on_a_cpu_is_eager_attention(window):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    config = Qwen3Config(
        vocab_size=33, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **sliding,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    rows = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11, 12], [5, 6, 7, 8], [9, 6, 7, 8, 9, 10]]
    row = TreeRow()
    for ids in rows:
        mask = np.array([0] * 3 + [1] * (len(ids) - 3))
        row.add(
            {
                "input_ids": np.array(ids),
                "completion_mask": mask,
                "old_log_probs": np.zeros(len(ids)),
                "advantage": 0.0,
                "group_id": 0,
            }
        )
    packed = row.pack()
    assert len(row.tokens) < sum(map(len, rows))
    tree = {key: packed[key] for key in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    model.set_attn_implementation(TREE_ATTENTION)
    logits = model(packed["input_ids"][None], position_ids=packed["position_ids"][None], **tree).logits[0]
    model.set_attn_implementation("eager")
    expected = torch.cat([model(torch.tensor(ids)[None]).logits[0, 2:-1] for ids in rows])
    torch.testing.assert_close(logits[packed["token_index"]], expected, rtol=1e-4, atol=1e-5)
