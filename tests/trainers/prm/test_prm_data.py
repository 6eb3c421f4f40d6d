"""From labelled rows to tokens: the encoding of scoring, labels at its places, what is cut and what is dropped."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny.prm import KINDS, LABELS, PROMPTS, STEPS, base, build, outputs_of, rows
from transformers import AutoTokenizer

from trl_ext.rewards import ProcessRewardModel, StepFormat
from trl_ext.trainers.prm import PRMConfig
from trl_ext.trainers.prm.data import StepCollator, encoded

ARGUMENTS = {"dataset_num_proc": None, "max_length": None}


class Arguments:
    def __init__(self, **options):
        vars(self).update({**ARGUMENTS, **options})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: base(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def encode(model, dataset, kind="token_classifier", name="train", **options):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return encoded(dataset, name, tokenizer, StepFormat(kind), Arguments(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_encoded_for_training_as_it_is_for_scoring(bases, tmp_path, kind):
    """Seen where the two models are called."""
    trainer, seen = build(bases[kind], tmp_path, kind=kind, max_steps=1), []
    trainer.model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    outputs_of(trainer)
    trainer.save_model(tmp_path)
    scorer = ProcessRewardModel(str(tmp_path))
    scorer.load()
    scorer.model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    scorer(prompts=PROMPTS, completion_steps=STEPS)
    training, scoring = ({tuple(ids[mask.bool()].tolist()) for ids, mask in
                          zip(call["input_ids"], call["attention_mask"], strict=True)} for call in seen)  # fmt: skip
    assert training == scoring and len(training) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_labels_stand_at_the_places_that_scoring_reads(bases, kind):
    dataset, tokenizer = encode(bases[kind], rows(), kind), AutoTokenizer.from_pretrained(bases[kind])
    assert len(dataset) == 4 and dataset.column_names == ["input_ids", "places", "targets"]
    for row, prompt, steps, labels in zip(dataset, PROMPTS, STEPS, LABELS, strict=True):
        ids, places = StepFormat(kind).encode(tokenizer, prompt, steps)
        assert row["input_ids"] == ids
        assert row["places"] == [place for place, label in zip(places, labels, strict=True) if label is not None]
        assert row["targets"] == [float(label) for label in labels if label is not None]


def test_a_batch_is_padded_on_the_right_and_counts_its_labels(bases):
    tokenizer = AutoTokenizer.from_pretrained(bases["token_classifier"])
    dataset = encode(bases["token_classifier"], rows())
    batch = StepCollator(tokenizer, pad_to_multiple_of=16)(list(dataset))
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 32) and max(lengths) <= 32
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["attention_mask"].diff(dim=1).max() <= 0
    assert batch["labels"].dtype == torch.long and batch["labels"].ne(-100).sum(1).tolist() == [3, 1, 1, 2]
    assert batch["targets"].dtype == torch.float32
    assert batch["targets"][batch["labels"] != -100].tolist() == [1.0, 1.0, 0.0, 0.25, 1.0, 0.75, 0.0]


def test_labels_beyond_the_largest_length_are_lost_and_counted(bases):
    with pytest.warns(UserWarning, match=r"^train: 2 of 4 rows have no label and are left out; 5 labels lie beyond"):
        dataset = encode(bases["token_classifier"], rows(), max_length=17)
    whole = encode(bases["token_classifier"], rows())
    assert dataset["input_ids"] == [ids[:17] for ids in (whole["input_ids"][1], whole["input_ids"][2])]
    assert dataset["targets"] == [[0.25], [1.0]]


def test_a_row_of_missing_labels_is_left_out(bases):
    labels = [[None] * 3, [1.0], [None, None], [None, None, 0.0]]
    dataset = rows().remove_columns("labels").add_column("labels", labels)
    with pytest.warns(UserWarning, match=r"^train: 2 of 4 rows have no label and are left out\.$"):
        assert encode(bases["token_classifier"], dataset)["targets"] == [[1.0], [0.0]]


def test_nothing_left_is_an_error(bases, tmp_path):
    with pytest.raises(ValueError, match=r"^train has no labelled step within max_length=3 tokens\.$"):
        build(bases["token_classifier"], tmp_path, max_length=3)
    stream = rows().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^train has no labelled step within max_length=3 tokens\.$"):
        build(bases["token_classifier"], tmp_path, max_length=3, train_dataset=stream)


def test_the_last_step_only_is_trained_but_all_are_measured(bases, tmp_path):
    dataset = rows()
    options = {"train_on_last_step_only": True, "train_dataset": dataset, "eval_dataset": {"train": dataset}}
    trainer = build(bases["token_classifier"], tmp_path, **options)
    assert trainer.train_dataset["targets"] == [[0.0], [0.25], [1.0], [0.0]]
    assert sum(map(len, trainer.eval_dataset["train"]["targets"])) == 7
    last = [row["places"][-1] for row in encode(bases["token_classifier"], rows())]
    assert [places for (places,) in trainer.train_dataset["places"]] == last


def test_steps_after_a_bad_one_are_left_out_of_training(bases, tmp_path):
    labels = [[1.0, 0.0, 1.0], [0.5], [0.0, 1.0], [None, 0.25, 0.0]]
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completions": STEPS, "labels": labels})
    options = {"skip_after_bad_step": True, "train_dataset": dataset, "eval_dataset": {"train": dataset}}
    trainer = build(bases["token_classifier"], tmp_path, **options)
    assert trainer.train_dataset["targets"] == [[1.0, 0.0], [0.5], [0.0], [0.25]]
    assert trainer.eval_dataset["train"]["targets"] == [[1.0, 0.0, 1.0], [0.5], [0.0, 1.0], [0.25, 0.0]]
    with pytest.raises(ValueError, match="skip_after_bad_step tells good from bad, which objective='regression'"):
        PRMConfig(str(tmp_path), use_cpu=True, bf16=False, skip_after_bad_step=True, objective="regression")


def test_a_conversation_is_read_as_its_text(bases):
    chats = Dataset.from_dict(
        {**rows().to_dict(), "prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]}
    )
    for kind in KINDS:
        assert encode(bases[kind], chats, kind)["input_ids"] == encode(bases[kind], rows(), kind)["input_ids"]


def test_a_stream_trains(bases, tmp_path):
    stream = rows(8).to_iterable_dataset()
    trainer = build(bases["token_classifier"], tmp_path, train_dataset=stream, eval_dataset=rows())
    trainer.train()
    listed = build(bases["token_classifier"], tmp_path, train_dataset=rows(8), eval_dataset=rows())
    assert next(iter(trainer.train_dataset)) == listed.train_dataset[0]
    assert trainer.state.global_step == 3


def test_labels_of_trls_former_trainer_train_unchanged(bases, tmp_path):
    """Columns and types of `trl-lib/math_shepherd`: labels are booleans, further columns are not read."""
    labels = [[True, True, False], [True], [False, False], [True, True, True]]
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completions": STEPS, "labels": labels, "id": [1, 2, 3, 4]})
    trainer = build(
        bases["token_classifier"], tmp_path, train_dataset=dataset, step_separator="\n", max_length=1024,
        train_on_last_step_only=False, remove_unused_columns=False,
    )  # fmt: skip
    assert trainer.train_dataset["targets"] == [[float(label) for label in row] for row in labels]
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_users_collator_is_called(bases, tmp_path):
    called = []

    class Collator(StepCollator):
        def __call__(self, rows):
            called.append(len(rows))
            return super().__call__(rows)

    tokenizer = AutoTokenizer.from_pretrained(bases["token_classifier"])
    trainer = build(bases["token_classifier"], tmp_path)
    trainer.data_collator = Collator(tokenizer)
    trainer.train()
    assert called == [4, 4, 4]


def test_the_given_rows_are_left_alone(bases, tmp_path):
    dataset = rows()
    before = copy.deepcopy(dataset.to_dict())
    build(bases["token_classifier"], tmp_path, train_dataset=dataset)
    assert dataset.to_dict() == before
