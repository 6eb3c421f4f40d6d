"""`shared_prefix` in the DPO trainer: one prompt per pair, and TRL's losses, gradients and updates."""

import pytest
import torch
import trl
from datasets import Dataset
from tiny import weights
from tiny.dpo import build, pairs, save_moe, words
from tiny.packed import save
from transformers import AutoModelForCausalLM

from trl_ext.functional.preference import PREFERENCE_LOSSES
from trl_ext.packed.forward import shared_prefix_of
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.dpo.losses import TRL_LOSSES

OURS, TRLS = (DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)
LIMIT = 1e-5  # relative error of an update, float32
COLUMNS = {
    "p": lambda i: 0.1 + 0.8 * (i % 5) / 5,
    "good": lambda i: i % 4,
    "bad": lambda i: 1,
    "w": lambda i: 1 + i % 3,
}
REWARDS = {"chosen_reward_column": "good", "rejected_reward_column": "bad"}


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return save(tiny_model, tmp_path_factory.mktemp("packed") / "model")


def long_prompts(rows=16) -> Dataset:
    data = pairs(rows, **COLUMNS).to_dict()
    return Dataset.from_dict({**data, "prompt": [words(3 * i + 7, 8) * 2 for i in range(rows)]})


@pytest.fixture
def made(model, tmp_path):
    def make(classes, **options):
        settings = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 1e9, "max_steps": 1, **options}
        return build(*classes, model, tmp_path / "out", **{"train_dataset": long_prompts(), **settings})

    return make


def trained(trainer) -> torch.Tensor:
    before = weights(trainer)
    trainer.train()
    return torch.cat([(w - before[name]).flatten() for name, w in weights(trainer).items()])


def assert_same_update(ours, theirs):
    ours_update, their_update = trained(ours), trained(theirs)
    assert their_update.norm() > 0 and (ours_update - their_update).norm() <= LIMIT * their_update.norm()
    our_log, their_log = ours.state.log_history[0], theirs.state.log_history[0]
    for name in {"loss", "logps/chosen", "rewards/margins", "entropy", "mean_token_accuracy"} & their_log.keys():
        assert our_log[name] == pytest.approx(their_log[name], rel=1e-4, abs=1e-5), name
    for counts in ours.shared_prefix_counts.values():
        assert counts["packed"] > 0 == counts["padded"] and counts["packed_tokens"] < 0.8 * counts["padded_tokens"]


@pytest.mark.parametrize("kind", ["reference", "lora"])
def test_sigmoid_is_trls(made, kind):
    assert_same_update(made(OURS, shared_prefix=True, kind=kind), made(TRLS, kind=kind))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_every_loss_of_trl(made, loss_type):
    options = {"loss_type": [loss_type], "kind": "reference"}
    options |= {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    assert_same_update(made(OURS, shared_prefix=True, **options), made(TRLS, **options))


def needed(name) -> dict:
    row = PREFERENCE_LOSSES[name]
    options = {"loss_type": ["psipo" if row.psi else name], "kind": "reference" if row.reference else "full"}
    options |= {"psi": "identity"} if row.psi else {}
    options |= {"preference_prob_column": "p"} if name == "psipo_logit" else {}
    return options | (REWARDS if row.scores else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_of_ours(made, name):
    assert_same_update(made(OURS, shared_prefix=True, **needed(name)), made(OURS, **needed(name)))


TRLS_OPTIONS = {
    "ipo and sft with ld_alpha": {"loss_type": ["ipo", "sft"], "ld_alpha": 0.3, "kind": "reference"},
    "weighting": {"use_weighting": True, "kind": "reference"},
    "LoRA and checkpointing": {"kind": "lora", "gradient_checkpointing": True},
    "a given adapter": {"kind": "adapter"},
    "accumulation": {"kind": "reference", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}
OUR_OPTIONS = {
    "a probability per pair": {"loss_type": ["psipo"], "psi": "logit", "preference_prob_column": "p", "kind": "lora"},
    "SimPO": {"loss_type": ["simpo"]},
    "β-DPO": {"loss_type": ["beta_dpo"], "kind": "reference"},
    "scores and weights": {"loss_type": ["rpo_bwd_kl"], **REWARDS, "pair_weight_column": "w", "kind": "reference"},
}


@pytest.mark.parametrize("case", TRLS_OPTIONS)
def test_an_update_is_trls(made, case):
    options = TRLS_OPTIONS[case]
    assert_same_update(made(OURS, shared_prefix=True, **options), made(TRLS, **options))


@pytest.mark.parametrize("case", OUR_OPTIONS)
def test_an_update_with_our_losses_is_that_of_padded_rows(made, case):
    options = OUR_OPTIONS[case]
    assert_same_update(made(OURS, shared_prefix=True, **options), made(OURS, **options))


def test_precomputed_references_are_padded(made):
    """TRL computes them in its constructor, before anything of ours is installed."""
    options = {"precompute_ref_log_probs": True, "kind": "lora"}
    ours, theirs = made(OURS, shared_prefix=True, **options), made(TRLS, **options)
    assert_same_update(ours, theirs)
    assert ours.shared_prefix_counts.keys() == {"policy"}


def test_with_precomputed_references_a_step_is_one_pass_of_the_backbone(made):
    """Chosen and rejected in one row, the prompt once; TRL has both in one batch, and the prompt twice."""

    def counted(classes, **options):
        trainer = made(classes, precompute_ref_log_probs=True, per_device_train_batch_size=16, **options)
        calls = []
        trainer.model.base_model.register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        return trainer, len(calls)

    (ours, our_calls), (_, their_calls) = counted(OURS, shared_prefix=True), counted(TRLS)
    looked_at = 2  # one packed pass of two rows, and TRL's of the same rows
    assert their_calls == 1 and our_calls == their_calls + looked_at
    rows, counts = list(ours.train_dataset), ours.shared_prefix_counts
    tokens = sum(len(row["prompt_ids"]) - 1 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert counts.keys() == {"policy"} and counts["policy"]["packed"] == 1
    assert counts["policy"]["packed_tokens"] == tokens


@pytest.mark.parametrize("kind", ["reference", "lora"])
def test_bf16_autocast(made, kind):
    """TRL's default: not further from float32 than TRL is, with accelerate's wrapper around the reference too."""
    truth = trained(made(TRLS, kind=kind))
    errors = []
    for classes, options in ((TRLS, {}), (OURS, {"shared_prefix": True})):
        trainer = made(classes, kind=kind, bf16=True, **options)
        errors.append((trained(trainer) - truth).norm() / truth.norm())
    assert errors[1] <= 1.25 * errors[0]
    assert {counts["padded"] for counts in trainer.shared_prefix_counts.values()} == {0}


def test_samples_of_the_policy_are_measured_alike(made):
    options = {"callback_paths": ["trl_ext.trainers.dpo.samples.PolicySamples"], "kind": "lora"}
    ours, theirs = made(OURS, shared_prefix=True, **options), made(OURS, **options)
    for trainer in (ours, theirs):
        trainer.train()
    for our, their in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in [name for name in their if name.startswith("policy_samples/")]:
            assert our[name] == pytest.approx(their[name], rel=1e-4, abs=1e-5), name


def test_evaluation(made):
    options = {"kind": "reference", "eval_dataset": long_prompts(8)}
    ours, theirs = made(OURS, shared_prefix=True, **options).evaluate(), made(TRLS, **options).evaluate()
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert ours["eval_rewards/margins"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-5)


# Off, refused, or said


def test_off_installs_nothing(made, monkeypatch):
    monkeypatch.setattr("trl_ext.trainers.shared_prefix.install", lambda *args: pytest.fail("ours was asked"))
    trainer, theirs = made(OURS, kind="reference"), made(TRLS, kind="reference")
    assert not trainer._is_ours and shared_prefix_of(trainer.model) is None
    assert trainer.model.config._attn_implementation == "sdpa"
    assert torch.equal(trained(trainer), trained(theirs))


def test_on_it_counts_as_ours(made, tmp_path):
    trainer = made(OURS, shared_prefix=True)
    assert trainer._is_ours and shared_prefix_of(trainer.model) is not None
    trainer.create_model_card()
    assert "- `shared_prefix`: `True`" in (tmp_path / "out" / "README.md").read_text()


def test_a_mixture_of_experts_with_a_router_loss_takes_trls_forward(tiny_model, tmp_path):
    moe = save_moe(tiny_model, tmp_path / "moe")
    options = {"train_dataset": long_prompts(), "max_steps": 1, "optim": "sgd"}
    with pytest.warns(UserWarning, match="the loss of its routers reads every padded row"):
        ours = build(*OURS, moe, tmp_path, shared_prefix=True, **options)
        ours.train()
    theirs = build(*TRLS, moe, tmp_path, **options)
    theirs.train()
    for name, weight in weights(ours).items():
        assert torch.equal(weight, weights(theirs)[name]), name
    assert ours.shared_prefix_counts["policy"]["packed"] == 0


def test_a_reference_with_another_attention_is_refused(model, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    with pytest.raises(ValueError, match="this Qwen3ForCausalLM has 'eager'"):
        DPOTrainer(
            model=model, ref_model=reference, train_dataset=long_prompts(),
            args=DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", shared_prefix=True),
        )  # fmt: skip


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(ValueError, match="shared_prefix is not available with torch_compile"):
        DPOConfig("out", bf16=False, use_cpu=True, report_to="none", shared_prefix=True, torch_compile=True)
