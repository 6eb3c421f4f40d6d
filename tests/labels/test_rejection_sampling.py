"""Rejection sampling: what is kept and counted, that TRL trains on it as it is, and that runs end in equal bytes."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import AutoTokenizer

from recipes.clock.task import outcome_reward
from trl_ext.labels.config import SamplingConfig
from trl_ext.rejection_sampling import RejectionSamplingConfig, kept_answers, rejection_sampling

CLOCK = Path(__file__).parents[2] / "recipes" / "clock"
SAMPLED = {"model_name_or_path": str(CLOCK / "model"), "verifier": "recipes.clock.task.outcome_reward"}


def options(**others):
    return RejectionSamplingConfig(**{"dataset_name": str(CLOCK / "data"), "output_dir": "o", **others})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(prompt, text, outcome, **others):
    return {"prompt": prompt, "completions": text.splitlines(keepends=True), "outcome": outcome, **others}


def chat(role, content):
    return [{"role": role, "content": content}]


# What is kept


def test_kept_answers_are_right_distinct_finished_and_counted():
    rows = [
        answer("p", "a\n#2", 1.0),
        answer("p", "a \n#2", 1.0),  # the same
        answer("p", "b\n#2", 1.0, finished=False),  # cut
        answer("p", "c\n#2", 1.0, finished=True, completion=" c\n#2"),
        answer("p", "#3", 0.0),
        answer(chat("user", "q"), "a\n#2", True),
        answer("r", "#3", None),
    ]
    kept, counts = kept_answers(rows, options())
    assert kept == [
        {"prompt": "p", "completion": "a\n#2"},
        {"prompt": "p", "completion": " c\n#2"},
        {"prompt": chat("user", "q"), "completion": chat("assistant", "a\n#2")},
    ]
    assert counts == (3, 7, 5, 3, 3, 1, 1)
    one, fewer = kept_answers(rows, options(answers_per_prompt=1))
    assert one == [kept[0], kept[2]] and fewer == counts._replace(kept=2)
    assert str(fewer) == (
        "Kept 2 of 7 answers to 3 prompts: 5 are right, 3 of these finished and distinct. Prompts without a right "
        "answer: 1; without a wrong one, which teach little: 1."
    )


def test_arguments_of_the_template_go_where_the_training_looks_for_them():
    thinking = {"enable_thinking": False}
    (row,), _ = kept_answers([answer("p", "a", 1.0)], options(chat_template_kwargs=json.dumps(thinking)))
    assert row == {"prompt": "p", "completion": "a", "chat_template_kwargs": thinking}


@pytest.mark.parametrize("rows", [[], [answer("p", "a", 0.5)], [answer("p", "a", 1.0, finished=False)]])
def test_nothing_to_keep_is_an_error(rows):
    right = sum(row["outcome"] > 0.5 for row in rows)
    with pytest.raises(ValueError, match=rf"None of the {len(rows)} answers can be kept: {right} are right"):
        kept_answers(rows, options())


# Options


def test_every_option_is_described_and_has_help():
    described = re.findall(r"^    ([a-z_]+) \(`", inspect.getdoc(RejectionSamplingConfig), re.MULTILINE)
    assert {*described} == {*RejectionSamplingConfig.__annotations__} and len({*described}) == len(described)
    fields = RejectionSamplingConfig.__dataclass_fields__
    assert {*described} | {*SamplingConfig.__dataclass_fields__} == {*fields}
    assert all(field.metadata["help"].endswith(".") for field in fields.values())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"answers_per_prompt": 0}, "answers_per_prompt must be a whole number of at least 1, got 0."),
        ({"num_generations": 4}, "num_generations is read only with model_name_or_path; without it, dataset_name"),
        ({"verifier": SAMPLED["verifier"]}, "verifier is read only with model_name_or_path"),
        ({"temperature": 1.0}, "temperature is read only with model_name_or_path"),
        ({"seed": 1}, "seed is read only with model_name_or_path"),
        ({"output_dir": ""}, "output_dir must be a text, got ''."),
        ({"model_name_or_path": "m"}, "verifier must be a text, got None."),
        ({**SAMPLED, "verifier": "recipes.clock.task.rewards"}, "module 'recipes.clock.task' has no 'rewards'"),
        ({**SAMPLED, "num_generations": 0}, "num_generations must be a whole number of at least 1, got 0."),
        ({**SAMPLED, "temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        options(**given)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: 5 prompts in chunks of 2, 8 answers each."""
    config = options(
        **SAMPLED,
        output_dir=str(tmp_path_factory.mktemp("run")),
        limit=5,
        chunk_size=2,
        num_generations=8,
        temperature=1.0,
    )
    rejection_sampling(config)
    return config, Path(config.output_dir)


def test_a_run_keeps_all_answers_in_chunks_and_the_right_ones_to_train_on(run):
    _, folder = run
    sampled = [row for chunk in sorted((folder / "chunks").iterdir()) for row in lines(chunk)]
    prompts = [row["prompt"] for row in load_dataset(str(CLOCK / "data"), split="train[:5]")]
    assert [row["prompt"] for row in sampled] == [prompt for prompt in prompts for _ in range(8)]
    texts = ["".join(row["completions"]) for row in sampled]
    assert [row["completion"] for row in sampled] == texts
    assert [row["outcome"] for row in sampled] == outcome_reward([row["prompt"] for row in sampled], texts)
    kept = lines(folder / "train.jsonl")
    expected = {
        (json.dumps(row["prompt"]), row["completion"]) for row in sampled if row["outcome"] and row["finished"]
    }
    found = [(json.dumps(row["prompt"]), row["completion"][0]["content"]) for row in kept]
    assert len(found) == len({*found}) > 1 and {*found} == expected
    assert all(row["completion"][0]["role"] == "assistant" and [*row] == ["prompt", "completion"] for row in kept)


def test_a_run_that_was_stopped_ends_with_the_same_bytes(run, tmp_path):
    config, folder = run
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    (part / "chunks" / "000001.jsonl").unlink()
    (part / "train.jsonl").unlink()
    before = (part / "chunks" / "000000.jsonl").stat().st_mtime_ns
    rejection_sampling(RejectionSamplingConfig(**{**vars(config), "output_dir": str(part)}))
    for name in ("chunks/000001.jsonl", "train.jsonl"):
        assert (part / name).read_bytes() == (folder / name).read_bytes()
    assert (part / "chunks" / "000000.jsonl").stat().st_mtime_ns == before, "it was not sampled again"
    with pytest.raises(ValueError, match=r"was sampled with seed=0, got 1; choose another output_dir"):
        rejection_sampling(RejectionSamplingConfig(**{**vars(config), "seed": 1}))


def test_other_answers_are_kept_of_those_that_were_sampled(run, tmp_path):
    config, folder = run
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    model = {"output_dir": str(again), "answers_per_prompt": 1}
    rejection_sampling(RejectionSamplingConfig(**{**vars(config), **model}))
    firsts = {json.dumps(row["prompt"]): row for row in reversed(lines(folder / "train.jsonl"))}
    assert lines(again / "train.jsonl") == [*firsts.values()][::-1]


def test_answers_that_are_there_are_kept_without_a_model(run, tmp_path):
    _, folder = run
    rejection_sampling(options(dataset_name=str(folder / "chunks"), output_dir=str(tmp_path / "all")))
    assert (tmp_path / "all" / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "p", "completions": ["a"]}, "the data set has no column 'outcome'"),
        ({"prompt": "p", "completions": "a", "outcome": 1.0}, "completions of row 0 must be the list of the texts"),
        ({"prompt": "p", "completions": ["a"], "outcome": "yes"}, "outcome of row 0 must be a number"),
    ],
)
def test_data_without_answers_are_refused(row, sentence, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=sentence):
        rejection_sampling(options(dataset_name=str(tmp_path), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_is_kept_is_what_was_sampled_when_trl_trains_on_it(run, tmp_path):
    """The tokens of the training are those of the prompt, of the sampled answer, and its end."""
    from trl import SFTConfig, SFTTrainer

    _, folder = run
    tokenizer = AutoTokenizer.from_pretrained(CLOCK / "model")
    data = load_dataset(str(folder), split="train")
    args = SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", bf16=False, save_strategy="no")
    trainer = SFTTrainer(str(CLOCK / "model"), args, train_dataset=data)
    sampled = [row for chunk in sorted((folder / "chunks").iterdir()) for row in lines(chunk)]
    texts = {json.dumps(row["prompt"]) + row["completion"] for row in sampled if row["outcome"]}
    for row, tokens in zip(lines(folder / "train.jsonl"), trainer.train_dataset, strict=True):
        (message,) = row["completion"]
        assert json.dumps(row["prompt"]) + message["content"] in texts
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        answer_ids = [*tokenizer(message["content"])["input_ids"], tokenizer.eos_token_id]
        assert tokens["input_ids"] == prompt + answer_ids
        assert tokens["labels"] == [-100] * len(prompt) + answer_ids
    assert trainer.train().training_loss > 0
