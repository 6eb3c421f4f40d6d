"""Other people's subclasses of our DPO classes, and our config in other people's trainers."""

import pickle
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
import trl
from tiny import weights
from tiny.dpo import build, pairs
from trl.trainer.dpo_trainer import DPOTrainer as TRLTrainer

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.foreign import foreign_fields, option

ROWS = pairs(8, p=lambda i: 0.7, w=lambda i: 1 + i % 3, good=lambda i: float(i), bad=lambda i: 2.0)
SCORES = {"chosen_reward_column": "good", "rejected_reward_column": "bad"}
OPTIONS = {
    "a loss": {"loss_type": ["psipo_identity"]},
    "with TRL's": {"loss_type": ["gpo_hinge", "sigmoid"]},
    "a state": {"loss_type": ["beta_dpo"]},
    "no reference": {"loss_type": ["simpo"]},
    "taken over": {"loss_type": ["sigmoid"], "logp_reduction": "mean"},
    "probabilities": {"loss_type": ["sigmoid"], "preference_prob_column": "p"},
    "weights": {"loss_type": ["gpo_logistic"], "pair_weight_column": "w"},
    "scores": {"loss_type": ["rpo_sq"], **SCORES},
}


class CopiedInnerLoss(DPOTrainer):
    """The commonest shape: a whole method of TRL's, copied."""

    def _compute_loss(self, model, inputs, return_outputs):
        return TRLTrainer.__dict__["_compute_loss"](self, model, inputs, return_outputs)


class OwnInnerLoss(DPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        loss = -model(**known).logits.log_softmax(-1)[..., 2].mean()
        return (loss, None) if return_outputs else loss


class OwnLoss(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = -model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)[..., 2].mean()
        return (loss, None) if return_outputs else loss


class OnTop(OwnLoss):
    """Inherits the method."""


WHOLE = {
    CopiedInnerLoss: (CopiedInnerLoss, "_compute_loss"),
    OwnInnerLoss: (OwnInnerLoss, "_compute_loss"),
    OwnLoss: (OwnLoss, "compute_loss"),
    OnTop: (OwnLoss, "compute_loss"),
}


def built(trainer_class, model, folder, **options):
    options = {"train_dataset": ROWS, "max_steps": 2, "per_device_train_batch_size": 2, **options}
    return build(trainer_class, DPOConfig, model, folder, **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("trainer_class", WHOLE)
def test_a_loss_overridden_whole_is_named_after_the_first_step(tiny_model, tmp_path, trainer_class, option):
    trainer = built(trainer_class, tiny_model, tmp_path, **OPTIONS[option])
    before, (cls, method) = weights(trainer), WHOLE[trainer_class]
    sentence = (
        f"test_dpo_foreign.{cls.__name__} overrides {method} without calling that of DPOTrainer, so that loss_type="
        f"{OPTIONS[option]['loss_type']} has no effect with it. Call super().{method}(...) there and change its "
        "result, or remove the option."
    )
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert str(error.value) == sentence
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items()), "no step was made"


class DoubledInner(DPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        result = super()._compute_loss(model, inputs, return_outputs)
        return (2 * result[0], result[1]) if return_outputs else 2 * result


class Doubled(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (2 * result[0], result[1]) if return_outputs else 2 * result


class DoubledByName(DPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        return 2 * DPOTrainer._compute_loss(self, model, inputs, return_outputs)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("trainer_class", [DoubledInner, Doubled, DoubledByName])
def test_a_loss_overridden_with_super_trains_with_the_changed_result(tiny_model, tmp_path, trainer_class, option):
    shared = {**OPTIONS[option], "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0}
    shared |= {} if option == "no reference" else {"kind": "reference"}
    plain = built(DPOTrainer, tiny_model, tmp_path, **{**shared, "learning_rate": 2e-2})
    changed = built(trainer_class, tiny_model, tmp_path, **shared)
    for trainer in (plain, changed):
        trainer.train()
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(changed)[name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_somebody_elses_error_before_super_is_left_alone(tiny_model, tmp_path):
    class Broken(DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            inputs["no such key"]
            return super()._compute_loss(model, inputs, return_outputs)

    with pytest.raises(KeyError, match="no such key"):
        built(Broken, tiny_model, tmp_path, loss_type=["dpop"]).train()


@pytest.mark.parametrize("trainer_class", WHOLE)
def test_with_nothing_of_ours_set_a_whole_override_trains_as_it_would_without_us(tiny_model, tmp_path, trainer_class):
    built(trainer_class, tiny_model, tmp_path).train()


# Fields


@dataclass
class TheirConfig(DPOConfig):
    """Another project's: the names are its own."""

    psi: float = 0.5
    loss_kwargs: str = "none"
    callback_paths: str = "their.registry"
    reward_margin_scale: str = "large"


def test_fields_of_others_are_theirs_with_one_warning(tiny_model, tmp_path):
    with pytest.warns(UserWarning, match="declared by that class") as caught:
        trainer = build(DPOTrainer, TheirConfig, tiny_model, tmp_path, max_steps=1)
    (message,) = [str(w.message) for w in caught if "declared by that class" in str(w.message)]
    for name in ("psi", "loss_kwargs", "callback_paths", "reward_margin_scale"):
        assert f"TheirConfig.{name}" in message
    trainer.train()
    assert (trainer.args.psi, trainer.args.callback_paths) == (0.5, "their.registry")
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model, tmp_path, max_steps=1)
    theirs.train()
    assert all(torch.equal(weight, weights(trainer)[name]) for name, weight in weights(theirs).items())


def test_a_column_of_others_is_not_read(tiny_model, tmp_path):
    @dataclass
    class WithColumn(DPOConfig):
        pair_weight_column: str = "importance"

    with pytest.warns(UserWarning, match="WithColumn.pair_weight_column: declared"):
        build(DPOTrainer, WithColumn, tiny_model, tmp_path, loss_type=["gpo_logistic"], max_steps=1).train()


def test_a_subclass_that_means_our_option_says_so(tiny_model, tmp_path):
    @dataclass
    class Weighted(DPOConfig):
        trl_ext_fields = ("pair_weight_column",)
        pair_weight_column: str | None = "w"

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*declared by that class")
        config = Weighted("out", bf16=False, use_cpu=True, report_to="none", loss_type=["gpo_logistic"])
    assert option(config, "pair_weight_column") == "w" and foreign_fields(config) == {}


# Our config in another trainer


@pytest.mark.parametrize("name", OPTIONS)
def test_trls_trainer_refuses_our_options(tiny_model, tmp_path, name):
    config = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", **OPTIONS[name])
    sentence = (
        r"DPOTrainer does not know the options of trl_ext that are set \(.*\) and would ignore them. Use the DPO"
    )
    for args in (config, pickle.loads(pickle.dumps(config))):
        with pytest.raises(ValueError, match=sentence):
            TRLTrainer(tiny_model, args=args, train_dataset=ROWS)


@pytest.mark.parametrize("options", [{}, {"loss_type": ["sigmoid", "sft"]}])
def test_trls_trainer_takes_our_config_with_nothing_of_ours_set(tiny_model, tmp_path, options):
    ours = build(trl.DPOTrainer, DPOConfig, tiny_model, tmp_path, max_steps=1, **options)
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model, tmp_path, max_steps=1, **options)
    for trainer in (ours, theirs):
        trainer.train()
    assert all(torch.equal(weight, weights(ours)[name]) for name, weight in weights(theirs).items())


def test_a_class_reached_before_register_refuses_our_options(tiny_model, tmp_path):
    class Early(TRLTrainer):
        pass

    config = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", callback_paths="tiny.digits")
    with pytest.raises(ValueError, match=re.escape("(callback_paths='tiny.digits')")):
        Early(tiny_model, args=config, train_dataset=ROWS)
