"""What users may get wrong: each fault ends in one sentence, before anything is lost. See docs/faults.md."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import tiny.dpo as tiny_dpo
import torch
import trl
from datasets import Dataset
from tiny import build, digits, logged, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_ext.rewards import ProcessRewardModel
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS = (GRPOTrainer, GRPOConfig)
THEIRS = (trl.GRPOTrainer, trl.GRPOConfig)
ON = {"advantage_estimator": "group_relative", "max_steps": 1}
BY_STEP = {"advantage_estimator": "process_group_relative", "step_separator": " ", "max_steps": 1}
NUMBERS = [0.0, 1.0, 0.5, 0.25]


def returns(value):
    def broken(completions, **kwargs):
        return value() if callable(value) else value

    return broken


def later(function):
    """The same function, async."""

    async def broken(**kwargs):
        await asyncio.sleep(0)
        return function(**kwargs)

    return broken


# What a reward function may return

ACCEPTED = {
    "a tuple": lambda: tuple(NUMBERS),
    "a generator": lambda: (number for number in NUMBERS),
    "a tensor": lambda: torch.tensor(NUMBERS),
    "a tensor of bfloat16": lambda: torch.tensor(NUMBERS, dtype=torch.bfloat16),
    "a tensor with gradient": lambda: torch.tensor(NUMBERS, requires_grad=True),
    "a tensor of shape (N, 1)": lambda: torch.tensor(NUMBERS)[:, None],
    "an array": lambda: np.array(NUMBERS),
    "a series": lambda: pd.Series(NUMBERS),
    "numpy numbers": lambda: [np.float32(number) for number in NUMBERS],
    "tensors of one number": lambda: [torch.tensor(number) for number in NUMBERS],
    "decimals and fractions": lambda: [Decimal(0), Fraction(1), Decimal("0.5"), Fraction(1, 4)],
}


@pytest.fixture(scope="module")
def with_trl(tiny_model, tmp_path_factory):
    """Weights after one step of TRL's trainer on the rewards."""
    folder = tmp_path_factory.mktemp("trl")
    return weights(tiny.train(*THEIRS, tiny_model, folder, reward_funcs=returns(NUMBERS), max_steps=1))


@pytest.mark.parametrize("options", [{}, ON], ids=["off", "on"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_whatever_trl_reads_as_numbers_is_read_as_the_same_numbers(train, with_trl, case, options):
    trainer = train(*OURS, reward_funcs=returns(ACCEPTED[case]), **{"max_steps": 1, **options})
    for name, weight in weights(trainer).items():
        if options:
            torch.testing.assert_close(weight, with_trl[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(weight, with_trl[name]), name


def test_booleans_are_one_and_zero_and_not_a_number_is_none(train):
    trainer = train(*OURS, reward_funcs=returns([True, False, np.True_, True]), **ON)
    assert logged(trainer, "reward") == [[0.75]]
    options = {**ON, "advantage_estimator": "test_faults.remember"}
    for missing in (None, float("nan"), np.nan, torch.tensor(float("nan"))):
        train(*OURS, reward_funcs=returns([0.0, missing, 0.5, 1.0]), **options)
        assert SCORED[-1].any(1).tolist() == [True, False, True, True]


SCORED: list = []


def remember(batch):
    SCORED.append(batch.outcome_scored)
    return batch.rewards.sum(1)


# What it must not return

A_LIST = "Reward function 'broken' returned {}; it must return a list, one reward per completion."
A_COUNT = "The reward function 'broken' returned {} rewards, but 4 were expected (one per completion)."
A_NUMBER = (
    "Reward function 'broken' returned {} for completion {}; a reward is a finite number, or None for a completion "
    "that cannot be scored."
)
REFUSED = {
    "one number": (0.5, A_LIST.format("0.5")),
    "a tensor of one number": (torch.tensor(0.5), A_LIST.format("tensor(0.5000)")),
    "nothing": (None, A_LIST.format("None")),
    "a text": ("good", A_LIST.format("'good'")),
    "a dictionary": ({"a": 1.0}, A_LIST.format("{'a': 1.0}")),
    "too few": ([0.5], "The reward function 'broken' returned 1 rewards, but 4 were expected (one per completion)."),
    "too many": (
        [0.5] * 5,
        "The reward function 'broken' returned 5 rewards, but 4 were expected (one per completion).",
    ),
    "texts": ([0.5, "0.5", 0.5, 0.5], A_NUMBER.format("'0.5'", 1)),
    "an infinity": ([0.5, 0.5, float("inf"), 0.5], A_NUMBER.format("inf", 2)),
    "more than float32 holds": ([0.5, 0.5, 0.5, -1e39], A_NUMBER.format("-1e+39", 3)),
    "more than float64 holds": ([10**400, 0, 0, 0], A_NUMBER.format(10**400, 0)),
    "a complex number": ([0.5, 1j, 0.5, 0.5], A_NUMBER.format("1j", 1)),
    "an object": ([0.5, 0.5, 0.5, {}], A_NUMBER.format("{}", 3)),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_list_of_numbers_is_refused_by_name_and_row(train, case, asynchronous):
    value, message = REFUSED[case]
    function = later(returns(lambda: value)) if asynchronous else returns(lambda: value)
    for options in (ON, BY_STEP):
        with pytest.raises(ValueError) as error:
            train(*OURS, reward_funcs=[digits, function], **options)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0.5"], "returned '0.5' for step 0 of completion 1; a step reward is a finite number or None."),
        ([1e39], "returned 1e+39 for step 0 of completion 1; a step reward is a finite number or None."),
        ([0.5] * 99, "returned 99 step rewards for completion 1, which has"),
        ("ab", "returned 'ab' for completion 1; a reward is a finite number"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_wrong_rewards_of_steps_are_refused_by_name_row_and_step(train, row, message, asynchronous):
    def broken(completions, completion_steps, **kwargs):
        rows = [[0.5] * len(steps) for steps in completion_steps]
        rows[1] = row * len(completion_steps[1]) if isinstance(row, list) and len(row) == 1 else row
        return rows

    with pytest.raises(ValueError) as error:
        train(*OURS, reward_funcs=later(broken) if asynchronous else broken, **BY_STEP)
    assert f"Reward function 'broken' {message}" in str(error.value)


class Own(Exception):
    pass


def raises(completions, **kwargs):
    raise Own("no judge at port 80")


def lacks_a_column(completions, answer, **kwargs):
    return [0.5] * len(completions)


def fails_while_read(completions, **kwargs):
    yield 0.5
    raise Own("no judge at port 80")


@pytest.mark.parametrize(
    ("function", "message", "cause"),
    [
        (raises, "'raises' raised Own: no judge at port 80", Own),
        (later(raises), "'broken' raised Own: no judge at port 80", Own),
        (fails_while_read, "'fails_while_read' raised Own: no judge at port 80", Own),
        (
            lacks_a_column,
            "'lacks_a_column' raised TypeError: lacks_a_column() missing 1 required positional",
            TypeError,
        ),
    ],
)
def test_what_a_function_raises_is_the_cause_of_one_sentence(train, function, message, cause):
    for options in (ON, BY_STEP):
        with pytest.raises(RuntimeError) as error:
            train(*OURS, reward_funcs=function, **options)
        assert str(error.value).startswith(f"Reward function {message}")
        assert isinstance(error.value.__cause__, cause)


def test_a_reward_model_that_raises_is_named(tiny_model, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    trainer = tiny.train(*OURS, tiny_model, tmp_path, reward_funcs=[model], **ON)
    rewards = torch.tensor(trainer._logs["rewards"]["model"])
    assert rewards.std() > 0 and trainer.reward_funcs == [model]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model.score.register_forward_pre_hook(lambda *args: 1 / 0)
    trainer = tiny.build(*OURS, tiny_model, tmp_path, reward_funcs=[model], **ON)
    with pytest.raises(
        RuntimeError, match=r"^Reward model 'model' raised ZeroDivisionError: division by zero$"
    ) as error:
        trainer.train()
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_with_nothing_switched_on_errors_are_those_of_trl(train):
    wrong = [raises, later(raises), lacks_a_column, *(returns(lambda v=value: v) for value, _ in REFUSED.values())]
    for function in wrong:
        outcomes = []
        for classes in (THEIRS, OURS):
            try:
                trainer = train(*classes, reward_funcs=function, max_steps=1)
                outcomes.append(weights(trainer))
            except Exception as error:
                outcomes.append((type(error), str(error), error.__cause__))
        theirs, ours = outcomes
        if isinstance(theirs, dict):
            assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        else:
            assert ours == theirs


def test_a_callable_without_signature_is_called_as_trl_does(train):
    class Compiled:
        __signature__ = "unknown"

        def __call__(self, **kwargs):
            seen.append(set(kwargs))
            return NUMBERS

    seen = []
    train(*THEIRS, reward_funcs=Compiled(), max_steps=1)
    train(*OURS, reward_funcs=Compiled(), max_steps=1)
    train(*OURS, reward_funcs=Compiled(), **ON)
    assert seen[0] == seen[1] == seen[2]


def test_a_process_reward_model_that_gives_other_steps_is_refused(train):
    def shorter(completions, completion_steps, **kwargs):
        return [[0.5] * (len(steps) - (i == 2)) for i, steps in enumerate(completion_steps)]

    with pytest.raises(ValueError, match=r"'shorter' returned \d+ step rewards for completion 2, which has \d+ steps"):
        train(*OURS, reward_funcs=shorter, **BY_STEP)


def test_a_process_reward_model_whose_tokenizer_drops_the_ends_of_steps_is_refused(train):
    class Encoded(dict):
        def char_to_token(self, character):
            return None if character > 30 else 0

    class Tokenizer:
        name_or_path, chat_template = "some/prm", None

        def __call__(self, text, **kwargs):
            return Encoded(input_ids=[1])

    model = ProcessRewardModel("some/prm", "good_bad")
    model.tokenizer, model.model = Tokenizer(), torch.nn.Identity()
    with pytest.raises(ValueError, match="The tokenizer of 'prm' writes no token where step 1 ends"):
        model(["a"], [["short", "a step of some thirty characters"]])
    with pytest.raises(
        RuntimeError, match="Reward function 'prm' raised ValueError: The tokenizer of 'prm' writes no"
    ):
        train(*OURS, reward_funcs=model, **BY_STEP, rollout_func=long_rollout)


def long_rollout(prompts, trainer):
    result = tiny.scripted_rollout(prompts, trainer)
    ids = [[3] * 40 for _ in prompts]
    return {**result, "completion_ids": ids, "logprobs": [[0.0] * 40] * len(ids), "env_mask": [[1] * 40] * len(ids)}


# Nothing is lost


def test_a_fault_leaves_the_checkpoints_before_it_and_training_goes_on_from_there(tiny_model, tmp_path):
    def fails_at(call):
        def reward(completions, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise Own("the judge went away")
            return digits(completions)

        calls = []
        return reward

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "kl_estimator": "k3", "beta": 0.1}
    options |= {"advantage_estimator": "group_relative", "kl_target": 0.1, "kl_horizon": 100.0}
    whole = tiny.train(*OURS, tiny_model, tmp_path / "whole", **options)
    broken = build(*OURS, tiny_model, tmp_path / "out", reward_funcs=fails_at(3), **options)
    with pytest.raises(RuntimeError, match="'reward' raised Own: the judge went away"):
        broken.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    names = {path.name for path in (tmp_path / "whole/checkpoint-2").iterdir()}
    assert {path.name for path in (tmp_path / "out/checkpoint-2").iterdir()} == names
    mended = build(*OURS, tiny_model, tmp_path / "out", **options)
    mended.train(resume_from_checkpoint=True)
    assert mended.beta == whole.beta
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(mended).items())


@pytest.mark.parametrize("kind", [pytest.param("sync", marks=pytest.mark.slow), "async"])
def test_a_function_that_hangs_can_be_interrupted_and_leaves_whole_checkpoints(tiny_model, tmp_path, kind):
    script = Path(__file__).parent / "hanging.py"
    command = [sys.executable, str(script), tiny_model, str(tmp_path), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert any(line.strip() == "hanging" for line in process.stdout), process.stderr.read()[-2000:]
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert time.monotonic() - start < 30
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-1"]


def test_an_async_function_can_limit_its_own_time(train):
    async def judge(completions, **kwargs):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(3600)

    with pytest.raises(RuntimeError, match="Reward function 'judge' raised TimeoutError"):
        train(*OURS, reward_funcs=judge, **ON)


# Data


def trains(monkeypatch, train, prompts, classes=OURS, **options):
    monkeypatch.setattr(tiny, "dataset", lambda: prompts)
    return train(*classes, **options)


KL = {"kl_estimator": "k3", "beta": 0.1, "max_steps": 1}


@pytest.mark.parametrize("options", [ON, KL], ids=["advantages", "kl"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"prompt": ["ab", "", "c", "d"]},
            "Column 'prompt' must hold texts of at least one token, got '' in row 1",
        ),
        ({"prompt": ["ab", "c", None, "d"]}, "Column 'prompt' must hold texts or conversations, got None in row 2 of"),
        ({"prompt": [1, 2, 3, 4]}, "Column 'prompt' must hold texts or conversations, got 1 in row 0 of"),
        ({"prompt": [[], []]}, r"Column 'prompt' must hold texts or conversations, got \[\] in row 0 of"),
        (
            {"question": ["a"] * 4, "b": ["a"] * 4},
            r"train_dataset has no column 'prompt'; it has \['b', 'question'\]. Rename one: "
            r"dataset.rename_column\('question', 'prompt'\).",
        ),
        ({"promt": ["a"] * 4}, r"Rename one: dataset.rename_column\('promt', 'prompt'\)."),
        ({"b": ["a"] * 4}, r"it has \['b'\]. Rename a column to 'prompt', or make it with dataset.map."),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_by_row(train, monkeypatch, column, message, options):
    rows = Dataset.from_dict(column)
    with pytest.raises(ValueError, match=message):
        trains(monkeypatch, train, rows, **options)
    if "question" in column:
        with pytest.raises(ValueError, match=message):
            trains(monkeypatch, train, rows.to_iterable_dataset(), **options)
    for classes in (THEIRS, OURS):  # TRL's own errors, from deep inside
        with pytest.raises((IndexError, ValueError, KeyError)) as error:
            trains(monkeypatch, train, rows, classes, max_steps=4)  # each prompt once
        assert "row" not in str(error.value)


def test_an_empty_prompt_is_fine_where_the_tokenizer_begins_every_text(tiny_model, tmp_path, train, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", 2)])
    rows = Dataset.from_dict({"prompt": ["", "b"] * 4})
    assert tokenizer("")["input_ids"] == [2]
    trainer = OURS[0](
        model=tiny_model, processing_class=tokenizer, reward_funcs=digits, train_dataset=rows,
        args=GRPOConfig(
            str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=4, report_to="none", save_strategy="no", gradient_checkpointing=False, **ON,
        ),
    )  # fmt: skip
    trainer.train()


def test_rows_that_are_made_when_they_are_read_are_not_checked(train, monkeypatch):
    rows = Dataset.from_dict({"text": ["a", "b"] * 4, "prompt": [""] * 8})
    rows.set_transform(lambda batch: {"prompt": batch["text"]}, columns=["text"], output_all_columns=False)
    trains(monkeypatch, train, rows, **ON)


def without(model, folder, **tokens):
    """The tiny model, its tokenizer without some of its special tokens."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in tokens:
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_padding_pads_with_its_end(tiny_model, tmp_path):
    model = without(tiny_model, tmp_path / "model", pad_token=None)
    ours, theirs = (tiny.train(*classes, model, tmp_path / "out", max_steps=2) for classes in (OURS, THEIRS))
    assert all(torch.equal(weight, weights(theirs)[name]) for name, weight in weights(ours).items())
    trainer = tiny.train(*OURS, model, tmp_path / "out", **ON)
    assert trainer.processing_class.pad_token == "<eos>"
    tiny_dpo.build(DPOTrainer, DPOConfig, model, tmp_path / "dpo", loss_type=["psipo_identity"], max_steps=1).train()


def test_a_tokenizer_without_end_is_refused(tiny_model, tmp_path):
    model = without(tiny_model, tmp_path / "model", eos_token=None)
    for options in (ON, KL):
        with pytest.raises(ValueError, match=r"The tokenizer has no end-of-sequence token, .* Set tokenizer\.eos"):
            build(*OURS, model, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="The tokenizer has no end-of-sequence token"):
        tiny_dpo.build(DPOTrainer, DPOConfig, model, tmp_path / "out", loss_type=["psipo_identity"])
    neither = without(tiny_model, tmp_path / "neither", eos_token=None, pad_token=None)
    with pytest.raises(
        ValueError, match=r"The specified `pad_token` \('None'\) is not found in the vocabulary"
    ):  # TRL
        tiny_dpo.build(DPOTrainer, DPOConfig, neither, tmp_path / "out", loss_type=["psipo_identity"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.remove_columns("chosen"), r"train_dataset has no column 'chosen'; it has \['prompt', 'rej"),
        (lambda rows: rows.remove_columns("rejected"), "train_dataset has no column 'rejected'; it has"),
        (
            lambda rows: Dataset.from_list(
                [{**row, "rejected": None if i == 3 else "a"} for i, row in enumerate(rows)]
            ),
            "Column 'rejected' must hold texts or conversations, got None in row 3 of train_dataset.",
        ),
    ],
)
def test_pairs_that_are_none_are_refused_before_a_model_loads(tmp_path, change, message):
    rows = change(tiny_dpo.pairs())
    with pytest.raises(ValueError, match=message):
        tiny_dpo.build(
            DPOTrainer, DPOConfig, "no/such/model", tmp_path, loss_type=["psipo_identity"], train_dataset=rows
        )


@pytest.mark.parametrize("kind", ["emptyprompt", "emptychosen", "without prompt"])
def test_empty_texts_of_pairs_are_trained_on_as_by_trl(tiny_model, tmp_path, kind):
    rows = tiny_dpo.pairs()
    if kind == "without prompt":
        rows = rows.map(lambda row: {"chosen": "ab" + row["chosen"], "rejected": "ab" + row["rejected"]})
        rows = rows.remove_columns("prompt")
    else:
        column = kind.removeprefix("empty")
        rows = rows.remove_columns(column).add_column(column, [""] * len(rows))
    trained = []
    for classes, loss in (((DPOTrainer, DPOConfig), "gpo_logistic"), ((trl.DPOTrainer, trl.DPOConfig), "sigmoid")):
        trainer = tiny_dpo.build(*classes, tiny_model, tmp_path, loss_type=[loss], train_dataset=rows, max_steps=2)
        trainer.train()
        trained.append(weights(trainer))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_wrong_probabilities_are_refused_by_row_before_a_model_loads(tmp_path):
    options = {"loss_type": ["gpo_logistic"], "preference_prob_column": "p"}
    rows = tiny_dpo.pairs(p=lambda i: 1.5 if i == 5 else 0.5)
    good = tiny_dpo.pairs(p=lambda i: 0.5)
    with pytest.raises(ValueError) as error:
        tiny_dpo.build(DPOTrainer, DPOConfig, "no/such/model", tmp_path, train_dataset=rows, **options)
    assert str(error.value) == "Column 'p' must hold a number in [0, 1], got 1.5 in row 5 of train_dataset."
    shuffled = rows.select(range(15, -1, -1))  # rows are those of the data set as it was given
    with pytest.raises(ValueError, match=r"got 1\.5 in row 10 of eval_dataset"):
        evaluated = {"train_dataset": good, "eval_dataset": {"a": good, "b": shuffled}}
        tiny_dpo.build(DPOTrainer, DPOConfig, "no/such/model", tmp_path, **evaluated, **options)


def test_wrong_probabilities_of_a_stream_are_refused_when_they_come(tiny_model, tmp_path):
    options = {"loss_type": ["gpo_logistic"], "preference_prob_column": "p"}
    rows = tiny_dpo.pairs(p=lambda i: -0.5 if i == 5 else 0.5).to_iterable_dataset()
    trainer = tiny_dpo.build(DPOTrainer, DPOConfig, tiny_model, tmp_path, train_dataset=rows, **options)
    with pytest.raises(ValueError, match=r"Column 'p' must hold a number in \[0, 1\], got -0.5."):
        trainer.train()
