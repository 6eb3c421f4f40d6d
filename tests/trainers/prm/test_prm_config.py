"""What PRM training refuses, each in a sentence, and what is refused before a model loads."""

import json

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from tiny.prm import KINDS, base, build, lora, rows
from transformers import AutoModelForTokenClassification

from trl_ext.rewards import ProcessRewardModel
from trl_ext.trainers.prm import PRMConfig, PRMTrainer


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: base(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "typo"}, "kind must be one of ['chat', 'good_bad', 'marker', 'token_classifier'], got 'typo'."),
        ({"objective": "ranking"}, "objective must be one of ['classification', 'regression'], got 'ranking'."),
        ({"step_separator": ""}, "separator must be a text for 'token_classifier'."),
        ({"step_separator": "\\n"}, "separator holds a backslash and a letter where a control character is meant"),
        ({"kind": "chat", "step_separator": "\n"}, "separator must be left out for 'chat'."),
        ({"good": "+"}, "good and bad are answers of ('good_bad', 'chat'); kind='token_classifier' has outputs of"),
        ({"system_prompt": "Be strict."}, "system_prompt is read by 'marker' and 'chat', whose text is a chat, not"),
        ({"kind": "good_bad", "objective": "regression"}, "objective='regression' needs an output of its own;"),
        (
            {"center_rewards_coefficient": 0.01},
            "center_rewards_coefficient belongs to pairs of answers and is not read by PRMTrainer. Remove it.",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not read by PRMTrainer; write soft labels into"),
        ({"chat_template_path": "x.jinja"}, "chat_template_path is read by kind='marker' and 'chat', not by"),
        ({"max_length": 0}, "max_length must be a positive whole number, or None, got 0."),
        ({"label_threshold": 0.0}, "label_threshold must be a number above 0 and at most 1, got 0.0."),
        ({"label_threshold": 1.5}, "label_threshold must be a number above 0 and at most 1, got 1.5."),
        ({"objective": "regression", "label_threshold": 0.7}, "label_threshold tells good from bad, which"),
        (
            {"objective": "regression", "metric_for_best_model": "eval_accuracy"},
            "metric_for_best_model='eval_accuracy' is not measured with objective='regression', which has ['mse',",
        ),
        ({"metric_for_best_model": "mae"}, "metric_for_best_model='mae' is not measured with objective="),
    ],
)
def test_options_are_checked_in_the_config(options, message):
    with pytest.raises(ValueError) as error:
        PRMConfig("out", bf16=False, use_cpu=True, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[True], [1.0]], "Row 0 of train_dataset has 2 completions and 1 labels; each step needs one, or None."),
        (
            [[0.5, None], [1.5]],
            "Label 1.5 of row 1 of train_dataset is no probability; a label is True, False, a number from 0 to 1, or "
            "None.",
        ),
        ([[0.5, None], [float("nan")]], "Label nan of row 1 of train_dataset is no probability; a label is True,"),
        ([["+", "-"], ["+"]], "Label '+' of row 0 of train_dataset is no probability; a label is True, False,"),
    ],
)
def test_rows_are_checked_before_a_model_loads(tmp_path, labels, message):
    data = Dataset.from_dict({"prompt": ["1", "2"], "completions": [["a", "b"], ["c"]], "labels": labels})
    with pytest.raises(ValueError) as error:
        build("none/such", tmp_path, train_dataset=data)
    assert str(error.value).startswith(message)


def test_a_label_of_a_regression_is_finite(tmp_path):
    data = Dataset.from_dict({"prompt": ["1"], "completions": [["a"]], "labels": [[float("inf")]]})
    with pytest.raises(ValueError, match=r"^Label inf of row 0 of train_dataset is no finite number; with objective="):
        build("none/such", tmp_path, train_dataset=data, objective="regression")


def test_rows_of_a_stream_are_checked_when_they_are_read(bases, tmp_path):
    data = Dataset.from_dict({"prompt": ["1"] * 2, "completions": [["a"]] * 2, "labels": [[1.0], [2.0]]})
    trainer = build(bases["token_classifier"], tmp_path, train_dataset=data.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"^Label 2\.0 of row 1 of train is no probability"):
        trainer.train()


def test_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^train_dataset has no column 'labels'; it has \['completions', 'prompt'\]"):
        build("none/such", tmp_path, train_dataset=rows().remove_columns("labels"))
    with pytest.raises(ValueError, match=r"^eval_dataset has no column 'completions'"):
        build("none/such", tmp_path, eval_dataset={"math": rows().remove_columns("completions")})


def test_an_adapter_that_leaves_a_new_head_out_is_refused(bases, tmp_path):
    wrong = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    message = (
        r"^peft_config does not train the new score head, which is random. Use task_type='TOKEN_CLS' "
        r"\(--lora_task_type TOKEN_CLS\), or modules_to_save=\['score'\].$"
    )
    for kind in KINDS[:2]:
        with pytest.raises(ValueError, match=message):
            build(bases[kind], tmp_path, kind=kind, peft_config=wrong)
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"])
    trainer = build(bases["token_classifier"], tmp_path, peft_config=saved)
    assert any("score" in name and p.requires_grad for name, p in trainer.model.named_parameters())
    trained = build(bases["token_classifier"], tmp_path / "full")
    trained.save_model(tmp_path / "with_a_head")
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    build(str(tmp_path / "with_a_head"), tmp_path, peft_config=plain)  # the head is not new


@pytest.mark.parametrize(("kind", "other"), [("token_classifier", "SEQ_CLS"), ("good_bad", "TOKEN_CLS")])
def test_an_adapter_for_another_task_is_refused(bases, tmp_path, kind, other):
    message = f"^task_type='{other}' does not fit kind='{kind}'; use '"
    with pytest.raises(ValueError, match=message):
        build(bases[kind], tmp_path, kind=kind, peft_config=lora(kind, task_type=other, modules_to_save=["score"]))


def test_tokens_of_an_adapter_would_move_the_steps(bases, tmp_path):
    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"^PromptTuningConfig puts tokens of its own before the text"):
        build(bases["good_bad"], tmp_path, kind="good_bad", peft_config=soft)


def test_the_folder_of_an_adapter_is_no_base(bases, tmp_path):
    trainer = build(bases["token_classifier"], tmp_path / "run", "LoRA", peft_config=lora("token_classifier"))
    trainer.save_model(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter, which would be loaded frozen\. Merge it into its base, or"):
        build(str(tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize(("good", "bad"), [("+", "+"), ("1+", "2+"), ("+", "")])
def test_answers_must_differ_in_their_last_token(bases, tmp_path, good, bad):
    with pytest.raises(ValueError, match=r"end in the same token of this tokenizer; choose two that differ\.$"):
        build(bases["good_bad"], tmp_path, kind="good_bad", good=good, bad=bad)


def test_a_head_of_another_size_is_refused(bases, tmp_path):
    three = AutoModelForTokenClassification.from_pretrained(bases["token_classifier"], num_labels=3)
    message = r"^A token classifier for steps has 2 outputs \(bad, good\), or 1; this one has 3\.$"
    with pytest.raises(ValueError, match=message):
        build(three, tmp_path)
    two = AutoModelForTokenClassification.from_pretrained(bases["token_classifier"], num_labels=2)
    with pytest.raises(ValueError, match=r"^A model trained with objective='regression' has 1 output; this one has 2"):
        build(two, tmp_path, objective="regression")


def test_a_quantisation_is_given_once(bases, tmp_path):
    twice = {"quantization_config": "b", "model_init_kwargs": {"quantization_config": "a"}}
    with pytest.raises(ValueError, match=r"^quantization_config is given twice"):
        build(bases["token_classifier"], tmp_path, **twice)


def test_how_to_load_a_model_that_is_loaded_is_not_asked(bases, tmp_path):
    model = AutoModelForTokenClassification.from_pretrained(bases["token_classifier"])
    with pytest.raises(ValueError, match=r"^model_init_kwargs and quantization_config say how a model is loaded, and"):
        build(model, tmp_path, model_init_kwargs={"dtype": "bfloat16"})


def test_a_config_of_trl_is_refused_and_ours_in_trls_trainer(bases, tmp_path):
    theirs = trl.RewardConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=r"^PRMTrainer needs a PRMConfig, got RewardConfig\.$"):
        PRMTrainer(bases["token_classifier"], theirs, train_dataset=rows())
    ours = PRMConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    pairs = Dataset.from_dict({"chosen": ["12"], "rejected": ["1"]})
    with pytest.raises(ValueError, match="does not know the options of trl_ext that are set"):
        trl.RewardTrainer(bases["token_classifier"], ours, train_dataset=pairs)


# The file beside a model


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer = build(bases["good_bad"], folder, kind="good_bad", step_separator=" ки\n", good="1", bad="0")
    trainer.save_model(folder)
    return folder


@pytest.mark.parametrize(
    ("option", "ours", "theirs"),
    [("kind", "marker", "good_bad"), ("separator", "\n", " ки\n"), ("good", "+", "1"), ("bad", "-", "0")],
)
def test_what_contradicts_the_file_is_refused(saved, option, ours, theirs):
    with pytest.raises(ValueError) as error:
        ProcessRewardModel(str(saved), **{option: ours})
    assert str(error.value) == (
        f"{str(saved)!r} was trained with {option}={theirs!r}, got {ours!r}. Leave it out, or train again."
    )
    agreed = ProcessRewardModel(str(saved), **{option: theirs})
    assert agreed.format == ProcessRewardModel(str(saved)).format


def test_the_file_says_what_scoring_needs(saved):
    assert json.loads((saved / "process_reward_model.json").read_text()) == {
        "kind": "good_bad", "separator": " ки\n", "good": "1", "bad": "0", "objective": "classification",
        "precision": {"weights": "float32", "head": "float32"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"is no JSON: .* Write it again, or remove it and give kind\."), ("[]", "must hold a")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "process_reward_model.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ProcessRewardModel(str(tmp_path), "marker")


def test_the_options_of_grpo_need_no_kind(saved):
    from trl_ext.trainers.grpo import GRPOConfig

    options = {"advantage_estimator": "process_group_relative", "process_reward_model": {"model": str(saved)}}
    GRPOConfig("out", bf16=False, use_cpu=True, report_to="none", **options)
