"""The DPO trainer: off means upstream, on-but-equal equals TRL bit for bit, and what the losses receive is right."""

import pytest
import torch
import trl
from tiny import logged, weights
from tiny.dpo import build, pairs, save_moe

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.dpo.losses import TRL_LOSSES

OURS = (DPOTrainer, DPOConfig)
TRLS = (trl.DPOTrainer, trl.DPOConfig)
NOT_COMPARED = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "step_time"}


@pytest.fixture(scope="module")
def moe_model(tiny_model, tmp_path_factory):
    return save_moe(tiny_model, tmp_path_factory.mktemp("moe") / "model")


def counted(trainer):
    """The trainer, which counts the forward passes of its models from now on in `trainer.forwards`."""
    trainer.forwards = 0

    def count(*_):
        trainer.forwards += 1

    models = {id(m): m for m in (trainer.model, trainer.ref_model) if m is not None}
    for model in models.values():
        model.register_forward_pre_hook(count)
    return trainer


def trained(classes, model, folder, **options):
    trainer = counted(build(*classes, model, folder, **options))
    trainer.train()
    return trainer


def assert_equal_runs(ours, theirs):
    """Weights bit for bit, every metric of TRL, and as many forward passes."""
    ours_weights, their_weights = weights(ours), weights(theirs)
    assert ours_weights.keys() == their_weights.keys()
    for name in their_weights:
        torch.testing.assert_close(ours_weights[name], their_weights[name], atol=0, rtol=0, msg=name)
    for our_entry, their_entry in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in their_entry.keys() - NOT_COMPARED - {"train_runtime"}:
            if not name.startswith("train_s"):
                assert our_entry[name] == their_entry[name], name
    assert ours.forwards == theirs.forwards > 0


# Off means upstream


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_trls_own_names_train_as_trl_does_bit_for_bit(tiny_model, tmp_path, loss_type):
    options = {"loss_type": [loss_type], "kind": "reference", "max_steps": 2}
    if loss_type == "exo_pair":
        options["label_smoothing"] = 0.1
    ours, theirs = (trained(classes, tiny_model, tmp_path, **options) for classes in (OURS, TRLS))
    assert_equal_runs(ours, theirs)
    for our_entry, their_entry in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert our_entry.keys() == their_entry.keys()


def test_the_trainer_accepts_trls_own_config(tiny_model, tmp_path):
    ours = trained((DPOTrainer, trl.DPOConfig), tiny_model, tmp_path)
    assert_equal_runs(ours, trained(TRLS, tiny_model, tmp_path))
    assert not object.__new__(DPOTrainer)._is_ours  # as TRL's own tests build trainers


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precompute"])
def test_with_nothing_of_ours_set_trl_gets_what_the_user_gave(tiny_model, tmp_path, monkeypatch, precompute):
    """The same objects arrive as in TRL, and no collator, cache key or check is ours."""
    arrived = {}

    def watched(name):
        original = getattr(trl.DPOTrainer, name)

        def method(self, *args, **kwargs):
            arrived.setdefault(name, []).append((args, self._precompute_model_hash if "_precompute" in name else None))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(trl.DPOTrainer, name, method)

    names = ["_prepare_dataset", "compute_ref_log_probs", "_compute_loss"]
    names += ["_precompute_ref_logps"] if precompute else []
    for name in names:
        watched(name)
    refuse = lambda *args, **kwargs: pytest.fail("ours was asked")  # noqa: E731
    for name in ("require_texts", "require_columns", "require_eos", "pair_batch", "Needed"):
        monkeypatch.setattr(f"trl_ext.trainers.dpo.trainer.{name}", refuse)
    monkeypatch.setattr("trl_ext.trainers.dpo.trainer.CollatorWithColumns", refuse)
    rows = pairs(4)
    options = {"kind": "full", "train_dataset": rows, "max_steps": 1, "precompute_ref_log_probs": precompute}
    trainer = build(*OURS, tiny_model, tmp_path, **options)
    assert type(trainer.data_collator).__module__.startswith("trl.")
    (args, _), *_ = arrived["_prepare_dataset"]
    assert args[0] is rows and args[2] is trainer.args
    if precompute:
        assert [key for _, key in arrived["_precompute_ref_logps"]] == [trainer._precompute_model_hash]
    arrived.clear()
    batch, model = trainer.data_collator(list(trainer.train_dataset)), trainer.model
    trainer.compute_loss(model, batch)
    ((args, _),) = arrived["_compute_loss"]
    assert args[0] is model and args[1] is batch
    trainer.compute_ref_log_probs(model, batch)
    assert all(args[1] is batch for args, _ in arrived["compute_ref_log_probs"])
    trainer.train()


def test_without_losses_trl_returns_zero_and_every_metric(tiny_model, tmp_path):
    # What our losses are added to.
    trainer = build(*TRLS, tiny_model, tmp_path, kind="reference")
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model, batch)
    metrics = {name: values[:] for name, values in trainer._metrics["eval"].items()}
    trainer._metrics["eval"].clear()
    trainer.loss_types, trainer.loss_weights = [], []
    assert trainer.compute_loss(trainer.model, batch) == 0.0
    assert trainer._metrics["eval"] == metrics and len(metrics) >= 10


# On, but equal

SIGMOID = {"loss_type": ["sigmoid"]}, {"loss_type": ["gpo_logistic"]}
CASES = {
    "full": {},
    "a given reference": {"kind": "reference"},
    "beta 2.5": {"kind": "reference", "beta": 2.5},
    "precompute": {"precompute_ref_log_probs": True},
    "precompute with a given reference": {"kind": "reference", "precompute_ref_log_probs": True},
    **{f"ld_alpha {alpha}": {"kind": "reference", "ld_alpha": alpha} for alpha in (0.0, 0.3, 1.0)},
    "ld_alpha and precompute": {"kind": "reference", "ld_alpha": 0.3, "precompute_ref_log_probs": True},
    "LoRA": {"kind": "lora"},
    "LoRA and ld_alpha": {"kind": "lora", "ld_alpha": 0.3},
    "LoRA and precompute": {"kind": "lora", "precompute_ref_log_probs": True},
    "LoRA and checkpointing": {"kind": "lora", "gradient_checkpointing": True},
    "LoRA and bf16": {"kind": "lora", "bf16": True},
    "an adapter": {"kind": "adapter"},
    "an adapter and checkpointing": {"kind": "adapter", "gradient_checkpointing": True},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "use_weighting": {"kind": "reference", "use_weighting": True},
    "cut at the end": {"kind": "reference", "max_length": 9},
    "cut at the start": {"kind": "reference", "max_length": 9, "truncation_mode": "keep_end"},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "accumulation and evaluation": {
        "kind": "reference",
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": pairs(6),
    },
}


@pytest.mark.filterwarnings("ignore:The `'keep_end'`")
@pytest.mark.parametrize("case", CASES)
def test_gpo_logistic_trains_as_sigmoid_does_bit_for_bit(tiny_model, tmp_path, case):
    theirs = trained(TRLS, tiny_model, tmp_path, **SIGMOID[0], **CASES[case])
    assert_equal_runs(trained(OURS, tiny_model, tmp_path, **SIGMOID[1], **CASES[case]), theirs)


@pytest.mark.parametrize("case", [{}, {"use_weighting": True}], ids=["", "use_weighting"])
def test_gpo_logistic_keeps_the_auxiliary_loss_of_a_mixture_of_experts(moe_model, tmp_path, case):
    options = {"kind": "reference", **case}
    theirs = trained(TRLS, moe_model, tmp_path, **SIGMOID[0], **options)
    assert_equal_runs(trained(OURS, moe_model, tmp_path, **SIGMOID[1], **options), theirs)
    assert all(entry["aux_loss"] > 0 for entry in logged(theirs))


PAIRS = {
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": ["gpo_hinge"]}),
    "ipo": (
        {"loss_type": ["ipo"], "beta": 0.3},
        {"loss_type": ["psipo_identity"], "logp_reduction": "mean", "beta": 0.3},
    ),
    "psi": ({"loss_type": ["ipo"]}, {"loss_type": ["psipo"], "psi": "identity", "logp_reduction": "mean"}),
    "mean": ({"loss_type": ["sigmoid_norm"]}, {"loss_type": ["gpo_logistic"], "logp_reduction": "mean"}),
    "sppo": ({"loss_type": ["sppo_hard"], "beta": 0.3}, {"loss_type": ["sppo"], "beta": 0.3}),
    "with sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2]},
        {"loss_type": ["gpo_logistic", "sft"], "loss_weights": [0.7, 0.2]},
    ),
    "sum of ours": (
        {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.2]},
        {"loss_type": ["gpo_logistic", "gpo_hinge"], "loss_weights": [0.7, 0.2]},
    ),
}
# Names of TRL that ours take over because of an option.
PAIRS |= {
    f"{name}, {what}": ({"loss_type": [name], "label_smoothing": 0.0}, {"loss_type": [name], **options})
    for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm")
    for what, options in {
        "probability of one": {"preference_prob_column": "one"},
        "weight of one": {"pair_weight_column": "one"},
    }.items()
}


@pytest.mark.parametrize("case", PAIRS)
def test_other_names_that_mean_the_same_train_the_same_bit_for_bit(tiny_model, tmp_path, case):
    theirs, ours = PAIRS[case]
    shared = {
        "kind": "lora" if case in ("ipo", "with sft") else "reference",
        "train_dataset": pairs(one=lambda i: 1.0),
    }
    theirs = trained(TRLS, tiny_model, tmp_path, **theirs, **shared)
    assert_equal_runs(trained(OURS, tiny_model, tmp_path, **ours, **shared), theirs)


def test_the_mean_with_ld_alpha_agrees_up_to_rounding(tiny_model, tmp_path):
    shared = {"kind": "reference", "ld_alpha": 0.3, "optim": "sgd", "learning_rate": 0.1}
    theirs = trained(TRLS, tiny_model, tmp_path, loss_type=["ipo"], **shared)
    ours = trained(OURS, tiny_model, tmp_path, loss_type=["psipo_identity"], logp_reduction="mean", **shared)
    for name, weight in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], weight, atol=1e-5, rtol=0, msg=name)


def test_a_checkpoint_records_what_the_user_wrote(tiny_model, tmp_path):
    options = {"loss_type": ["gpo_hinge", "sigmoid"], "loss_weights": [0.5, 2.0], "save_strategy": "steps"}
    build(*OURS, tiny_model, tmp_path, save_steps=4, **options).train()
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert (saved.loss_type, saved.loss_weights) == (["gpo_hinge", "sigmoid"], [0.5, 2.0])
    resumed = build(*OURS, tiny_model, tmp_path, max_steps=5, **{**options, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 5


def test_the_equality_tests_would_see_a_difference(tiny_model, tmp_path):
    theirs = trained(TRLS, tiny_model, tmp_path, loss_type=["ipo"], kind="reference")
    ours = trained(OURS, tiny_model, tmp_path, loss_type=["psipo_identity"], kind="reference")  # the sum
    with pytest.raises(AssertionError):
        assert_equal_runs(ours, theirs)
