"""Training of process-reward models: the loss of a window, what is measured, what is saved and read again."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from tiny import logged
from tiny.prm import CLASSIFIERS, KINDS, LABELS, PROMPTS, STEPS, base, build, outputs_of, rows
from transformers import AutoModelForTokenClassification

from trl_ext.functional import classification_metrics, classification_sums
from trl_ext.rewards import ProcessRewardModel
from trl_ext.trainers.prm import PRMConfig

FILE = "process_reward_model.json"
needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
WEIGHTS = ["full", "LoRA", pytest.param("4-bit", marks=needs_bitsandbytes)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: base(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def weights_as_they_are_on_a_gpu(monkeypatch):
    if importlib.util.find_spec("bitsandbytes"):  # see tests/matrix/test_matrix.py
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def gradients(trainer):
    """Of the first optimizer step, before any is taken."""
    seen = {}

    def keep(*args, **kwargs):
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return seen


# The loss


@pytest.mark.parametrize("kind", ["token_classifier", "good_bad"])
def test_one_batch_of_eight_and_eight_of_one_give_equal_gradients(bases, tmp_path, kind):
    """The rows have 1 to 3 labelled steps, so that a mean of means is another number."""
    options = {"kind": kind, "train_dataset": rows(8), "max_steps": 1, "max_grad_norm": 0.0}
    whole = gradients(build(bases[kind], tmp_path, per_device_train_batch_size=8, **options))
    parts = gradients(
        build(bases[kind], tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    )
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3


def test_the_loss_is_the_mean_over_the_labelled_steps(bases, tmp_path):
    trainer = build(bases["token_classifier"], tmp_path, max_steps=1)
    z, y = outputs_of(trainer), torch.tensor([label for row in LABELS for label in row if label is not None])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z, y.float()).item()
    trainer.train()
    assert logged(trainer, "loss") == [[pytest.approx(expected, abs=1e-5)]]


def test_what_is_logged_are_ratios_of_sums_over_the_window(bases, tmp_path):
    """Two micro-batches of unequal numbers of steps, and a learning rate of 0."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    trainer = build(bases["token_classifier"], tmp_path, max_steps=2, logging_steps=2, **options)
    z = outputs_of(trainer)
    trainer.train()
    labels = [[math.nan if label is None else label for label in row] + [math.nan] * (3 - len(row)) for row in LABELS]
    labels = torch.tensor(labels)
    labelled = ~labels.isnan()
    sums = classification_sums(torch.zeros(4, 3).masked_scatter(labelled, z), labels, labelled)
    expected = classification_metrics({name: value.sum().item() for name, value in sums.items()})
    (entry,) = logged(trainer)
    assert {name: entry[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert entry["num_tokens"] == 2 * sum(len(row["input_ids"]) for row in trainer.train_dataset)


def test_an_evaluation_is_over_all_its_steps_whatever_the_batch(bases, tmp_path):
    found = []
    for size in (1, 3, 4):
        sets = {"math": rows(4), "more": rows(3)}
        trainer = build(
            bases["token_classifier"], tmp_path, eval_dataset=sets, per_device_eval_batch_size=size, max_steps=1
        )
        found.append(trainer.evaluate())
    names = [f"eval_{name}_{metric}" for name in sets for metric in ("loss", "accuracy", "brier", "frac_bad")]
    for metrics in found:
        assert {name: metrics[name] for name in names} == pytest.approx({n: found[0][n] for n in names}, abs=1e-5)
    assert found[0]["eval_math_loss"] != found[0]["eval_more_loss"]
    assert trainer.evaluate(rows(4), metric_key_prefix="test")["test_loss"] == pytest.approx(
        found[0]["eval_math_loss"], abs=1e-5
    )


def test_a_function_of_the_users_measures_outputs_and_labels(bases, tmp_path):
    def measure(prediction):
        labelled = prediction.label_ids != -100
        return {"mean": prediction.predictions[labelled].mean(), "labels": prediction.label_ids[labelled].sum()}

    trainer = build(
        bases["token_classifier"], tmp_path, eval_dataset=rows(), compute_metrics=measure,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_labels"] == pytest.approx(4.0)
    assert metrics["eval_mean"] == pytest.approx(outputs_of(trainer).mean().item(), abs=1e-5)


# Saving, and reading again


def scores_before(trainer):
    """The scores of the labelled steps, as a row of scores for each text."""
    scores = iter(outputs_of(trainer, rows_with_all_labels()).sigmoid().tolist())
    return [[next(scores) for _ in steps] for steps in STEPS]


def rows_with_all_labels():
    dataset = rows().remove_columns("labels")
    return dataset.add_column("labels", [[1.0] * len(steps) for steps in STEPS])


def flat(scores):
    return [score for row in scores for score in row]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_scores_as_in_training_by_its_folder_alone(bases, tmp_path, kind, weights, precision):
    trainer = build(bases[kind], tmp_path / "run", weights, kind=kind, bf16=precision == "bfloat16")
    trainer.train()
    before = scores_before(trainer)
    trainer.save_model(tmp_path / "saved")
    after = ProcessRewardModel(str(tmp_path / "saved"))(prompts=PROMPTS, completion_steps=STEPS)
    assert flat(after) == pytest.approx(flat(before), abs=1e-6)
    assert max(flat(before)) - min(flat(before)) > 1e-3
    facts = json.loads((tmp_path / "saved" / FILE).read_text())
    assert facts["kind"] == kind and facts["precision"].get("autocast") == (
        "bfloat16" if precision == "bfloat16" else None
    )
    assert ("quantization" in facts["precision"]) == (weights == "4-bit")
    assert (Path(tmp_path / "saved" / "adapter_config.json").exists()) == (weights != "full")


@pytest.mark.parametrize("kind", ["token_classifier", "good_bad"])
@pytest.mark.parametrize("weights", ["full", "LoRA"])
def test_weights_of_half_precision_score_as_in_training(bases, tmp_path, weights, kind):
    trainer = build(bases[kind], tmp_path / "run", weights, kind=kind, model_init_kwargs={"dtype": "bfloat16"})
    trainer.train()
    before = scores_before(trainer)
    trainer.save_model(tmp_path / "saved")
    model = ProcessRewardModel(str(tmp_path / "saved"))
    assert flat(model(prompts=PROMPTS, completion_steps=STEPS)) == pytest.approx(flat(before), abs=1e-6)
    assert model.model.dtype == torch.bfloat16
    explicit = ProcessRewardModel(str(tmp_path / "saved"), dtype="float32")(prompts=PROMPTS, completion_steps=STEPS)
    assert flat(explicit) == pytest.approx(flat(before), abs=0.1) and explicit != before


@needs_bitsandbytes
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bit_weights_score_as_in_training_in_every_precision(bases, tmp_path, dtype, compute):
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, compute), bnb_4bit_use_double_quant=True
    )
    trainer = build(
        bases["token_classifier"], tmp_path / "run", "4-bit", quantization_config=quantization,
        model_init_kwargs={"dtype": dtype},
    )  # fmt: skip
    assert quantization.llm_int8_skip_modules is None, "the user's own is left alone"
    trainer.train()
    before = scores_before(trainer)
    trainer.save_model(tmp_path / "saved")
    model = ProcessRewardModel(str(tmp_path / "saved"))
    after = model(prompts=PROMPTS, completion_steps=STEPS)
    assert flat(after) == pytest.approx(flat(before), abs=1e-6)
    assert type(model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert next(model.head.parameters()).dtype == torch.float32, "small updates of the head are not rounded away"
    with pytest.raises(ValueError, match=r"was trained with load_in_4bit=True, got False. Leave it out, or train"):
        ProcessRewardModel(str(tmp_path / "saved"), load_in_4bit=False)


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("weights", ["full", "LoRA"])
def test_a_regression_is_read_as_the_value_itself(bases, tmp_path, kind, weights):
    labels = [[3.0, -7.5, -100.0], [12.0], [None, 0.0], [2.0, None, 5.0]]
    dataset = rows().remove_columns("labels").add_column("labels", labels)
    trainer = build(
        bases[kind], tmp_path / "run", weights, kind=kind, objective="regression", train_dataset=dataset,
        eval_dataset=dataset, max_steps=5,
    )  # fmt: skip
    z = outputs_of(trainer, dataset)
    y = torch.tensor([label for row in labels for label in row if label is not None])
    trainer.train()
    entry = logged(trainer)[0]
    assert entry["mse"] == pytest.approx((z - y).square().mean().item(), rel=1e-4), "-100 is a label"
    assert entry["loss"] == pytest.approx(entry["mse"])
    assert entry["label"] == pytest.approx(y.mean().item()) and "accuracy" not in entry
    assert trainer.evaluate()["eval_mse"] < entry["mse"]
    before = outputs_of(trainer, rows_with_all_labels()).tolist()
    trainer.save_model(tmp_path / "saved")
    model = ProcessRewardModel(str(tmp_path / "saved"))
    assert flat(model(prompts=PROMPTS, completion_steps=STEPS)) == pytest.approx(before, abs=1e-6)
    assert model.score == "value" and max(map(abs, before)) > 1.0
    with pytest.raises(ValueError, match=r"was trained with objective='regression', which score='probability' does"):
        ProcessRewardModel(str(tmp_path / "saved"), score="probability")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_checkpoint_is_a_model_and_a_run_goes_on_from_it(bases, tmp_path, weights):
    whole = build(bases["token_classifier"], tmp_path, weights, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    scores = ProcessRewardModel(str(tmp_path / "checkpoint-2"))(prompts=PROMPTS, completion_steps=STEPS)
    assert [len(row) for row in scores] == [3, 1, 2, 3]
    again = build(bases["token_classifier"], tmp_path, weights, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert logged(again, "loss", "accuracy", "brier") == logged(whole, "loss", "accuracy", "brier")


def test_the_defaults_train_and_the_card_says_with_what(bases, tmp_path):
    """TRL's defaults: bfloat16, gradient checkpointing."""
    trainer = build(
        bases["token_classifier"], tmp_path, bf16=None, gradient_checkpointing=True, save_strategy="steps",
        save_steps=3, train_on_last_step_only=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.args.bf16 and all(math.isfinite(loss) for (loss,) in logged(trainer, "loss"))
    card = (tmp_path / "README.md").read_text()
    assert "process-reward model (PRM)" in card and "https://huggingface.co/papers/2211.14275" in card
    assert "- `train_on_last_step_only`: `True`" in card and "trl-ext" in card
    assert "ProcessRewardModel" in card and "pipeline" not in card, "what the quick start shows is a PRM"


def test_training_goes_on_from_a_model_with_a_head(bases, tmp_path):
    first = build(bases["token_classifier"], tmp_path / "run", max_steps=1)
    first.train()
    first.save_model(tmp_path / "first")
    again = build(str(tmp_path / "first"), tmp_path / "run", max_steps=1)
    torch.testing.assert_close(outputs_of(again), outputs_of(first), atol=1e-6, rtol=0)
    instance = AutoModelForTokenClassification.from_pretrained(tmp_path / "first")
    given = build(instance, tmp_path / "run", max_steps=1)
    torch.testing.assert_close(outputs_of(given), outputs_of(first), atol=1e-6, rtol=0)
    assert instance.config.num_labels == 2 and instance.config.id2label == {0: "bad", 1: "good"}


def test_a_model_of_one_output_keeps_it(bases, tmp_path):
    model = AutoModelForTokenClassification.from_pretrained(bases["token_classifier"], num_labels=1)
    trainer = build(model, tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    after = ProcessRewardModel(str(tmp_path / "saved"))(prompts=PROMPTS, completion_steps=STEPS)
    assert flat(after) == pytest.approx(flat(scores_before(trainer)), abs=1e-6)
    assert trainer.model.config.num_labels == 1


def test_a_new_head_depends_on_the_seed_of_the_run_alone(bases, tmp_path):
    heads = []
    for seed, noise in ((5, 0), (5, 1), (6, 1)):
        torch.manual_seed(noise)
        heads.append(build(bases["token_classifier"], tmp_path, seed=seed).model.score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


def test_what_the_user_wrote_is_what_the_arguments_say_afterwards(bases, tmp_path):
    trainer = build(bases["token_classifier"], tmp_path, model_init_kwargs={"dtype": "float32"})
    assert trainer.args.model_init_kwargs == {"dtype": "float32"}
    assert PRMConfig("out", use_cpu=True, bf16=False).learning_rate == 1e-5
