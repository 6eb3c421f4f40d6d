"""The clock task: its rules by hand-written examples, and the shipped tokenizer, model and data."""

import json
import random
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipes.clock import accuracy as accuracy_module
from recipes.clock import compare
from recipes.clock.accuracy import accuracy, draw_curves, read_rows, write_completions
from recipes.clock.task import (
    Problem,
    correct_values,
    flawed_values,
    outcome_reward,
    parse_prompt,
    process_reward,
    random_problem,
    step_rewards,
    write_answer,
    write_prompt,
)

FOLDER = Path(accuracy_module.__file__).parent
PROMPT = "4 a+3 b-5:"
RIGHT = "a4+3=7\nb7-5=2\n#2"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "model", local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", local_files_only=True)


def chat(role, content):
    return [{"role": role, "content": content}]


# Task


def test_a_worked_example_passes_zero_both_ways():
    problem = Problem(8, (5, -4, 1))
    assert write_prompt(problem) == "8 a+5 b-4 c+1:"
    assert correct_values(problem) == [3, 9, 0]
    assert write_answer(problem, correct_values(problem)) == "a8+5=3\nb3-4=9\nc9+1=0\n#0"


def test_parsing_undoes_writing_also_inside_a_chat():
    rng = random.Random(0)
    for num_moves in range(1, 10):
        problem = random_problem(rng, num_moves)
        text = write_prompt(problem)
        assert parse_prompt(text) == problem
        assert parse_prompt(f"<bos><|user|>1 a+1:<|assistant|>#2<|user|>{text}<|assistant|>") == problem


@pytest.mark.parametrize("text", ["", "4:", "what is 4+3?", "4 a+3 b-5"])
def test_a_prompt_without_a_problem_is_refused(text):
    with pytest.raises(ValueError, match="No clock problem"):
        parse_prompt(text)


@pytest.mark.parametrize("num_moves", [0, 10])
def test_a_problem_has_one_to_nine_moves(num_moves):
    with pytest.raises(ValueError, match="1 to 9 moves"):
        write_prompt(Problem(0, (1,) * num_moves))


def test_the_systematic_mistake_is_one_too_high_where_a_move_passes_zero():
    rng = random.Random(0)
    # 8+5 passes 0: 4 for 3. 4-4 and 9+1 stop at 0 and do not pass it. 0-1 does: 0 for 9.
    assert flawed_values(Problem(8, (5, -4, -1, 5, 5)), rng, miscarry=1.0, slip=0.0) == [4, 0, 0, 5, 0]
    assert flawed_values(Problem(8, (5, -4, -1)), rng, miscarry=0.0, slip=0.0) == [3, 9, 8]


def test_a_random_slip_always_writes_another_digit():
    rng = random.Random(0)
    values = [flawed_values(Problem(4, (3,)), rng, slip=1.0)[0] for _ in range(500)]
    assert set(values) == set(range(10)) - {7}


def test_flawed_answers_have_the_step_accuracy_of_their_two_mistakes():
    # A sum leaves 0…9 with probability 0.3 (the mean of |move| / 10) and is 10 with probability 0.05. The 1 in 9 slips
    # that undo the systematic mistake are right after all.
    rng = random.Random(0)
    rewards = []
    for _ in range(4000):
        problem = random_problem(rng, 6)
        rewards += step_rewards(write_answer(problem, flawed_values(problem, rng)), write_prompt(problem))[:-1]
    wrong = (0.3 - 0.05) * 0.6
    assert sum(rewards) / len(rewards) == pytest.approx((1 - wrong) * 0.95 + wrong * 0.05 / 9, abs=0.01)


# Rewards


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (RIGHT, 1.0),
        (RIGHT + "\n", 1.0),
        ("#2", 1.0),  # only the result counts
        ("#7\n#2", 1.0),  # the last one
        ("a4+3=7\nb7-5=2\n#3", 0.0),
        ("a4+3=7\nb7-5=2", 0.0),
        ("#2\n#7", 0.0),
        ("#2 or so", 0.0),
        ("#23", 0.0),
        ("#", 0.0),
        ("#²", 0.0),
        ("", 0.0),
        ("\n\n", 0.0),
        ("###=-+: abc\x00 🙂", 0.0),
    ],
)
def test_the_outcome_is_the_final_digit(completion, reward):
    assert outcome_reward([PROMPT], [completion], answer=["2"], completion_ids=[[0]]) == [reward]
    assert outcome_reward([chat("user", PROMPT)], [chat("assistant", completion)]) == [reward]


NO_TEXT = [None, [], [None], [{"role": "assistant"}], chat("assistant", None), chat("tool", ["x"])]


@pytest.mark.parametrize("completion", NO_TEXT)
def test_a_completion_without_text_earns_nothing(completion):
    assert outcome_reward([chat("user", PROMPT)], [completion]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "rewards"),
    [
        (RIGHT, [1, 1, 1]),
        (RIGHT + "\n", [1, 1, 1]),
        ("a4+3=8\nb8-5=3\n#3", [0, 1, 1]),  # a slip is blamed once
        ("a4+3=8\nb7-5=2\n#2", [0, 0, 1]),  # silently taking it back is a second one
        ("a4+3=7\nb7-5=2\n#7", [1, 1, 0]),
        ("a4+3=7\nb7-4=3\n#3", [1, 0, 1]),  # not the prompt's move
        ("a4+3=7\nc7-5=2\n#2", [1, 0, 1]),  # not the move's name
        ("nonsense\nb4-5=9\n#9", [0, 1, 1]),  # a line without a value leaves the value as it was
        ("#4", [0]),  # the result comes after the moves
        ("a4+3=7\nb7-5=2\n#2\n#2", [1, 1, 1, 0]),
        ("a4+3=7\n\nb7-5=2", [1, 0, 0]),
        ("a4+3=7 \nb7-5=2", [0, 0]),
        ("a4+3=", [0]),
        ("", []),
        ("\n", [0]),
    ],
)
def test_a_step_is_judged_by_the_written_value_before_it(completion, rewards):
    assert step_rewards(completion, PROMPT) == rewards


@pytest.mark.parametrize(
    ("steps", "rewards"),
    [
        (["a4+3=8\n", "b8-5=3\n", "#3"], [0, 1, 1]),
        (["a4+3=7\n\n", "\nb7-5=2\n", "#2\n"], [1, 1, 1]),  # empty lines are no steps
        (["a4+3=7\nb7-5=2\n", "#2"], [0, 0]),  # two lines are not one
        (["a4+3=7\n", "b7-"], [1, 0]),
        ([""], [0]),
        ([], []),
    ],
)
def test_the_process_reward_judges_steps_as_lines(steps, rewards):
    assert process_reward([chat("user", PROMPT)], [None], [steps], completion_ids=[[0]]) == [rewards]
    assert process_reward([PROMPT] * 2, [None] * 2, [steps, ["#2"]]) == [rewards, [0]]


# Shipped tokenizer, model and data


@pytest.mark.parametrize("text", [PROMPT, RIGHT, "\n\n  #", "a b", " ", "0123456789+-=:# \nabcdefghi"])
def test_encoding_is_one_token_per_character_and_decoding_undoes_it(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    framed = [tokenizer.pad_token_id, tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert tokenizer.decode(framed, skip_special_tokens=True) == text
    assert tokenizer.decode(framed) == f"<pad><bos>{text}<eos>"


def test_characters_outside_the_task_become_unknown(tokenizer):
    assert tokenizer("a?é")["input_ids"] == [tokenizer.convert_tokens_to_ids("a"), *[tokenizer.unk_token_id] * 2]


def test_the_chat_template_renders_and_marks_the_answer(tokenizer):
    messages = chat("system", "a") + chat("user", PROMPT) + chat("assistant", RIGHT)
    prompt = f"<bos><|system|>a<|user|>{PROMPT}<|assistant|>"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + RIGHT + "<eos>"
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, marked in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(answer) == RIGHT + "<eos>"


def test_padding_is_on_the_left_with_a_token_of_its_own(tokenizer):
    batch = tokenizer(["12", "1"], padding=True)
    assert batch["attention_mask"] == [[1, 1], [0, 1]]
    assert batch["input_ids"][1][0] == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_model_is_small_full_precision_and_agrees_with_its_tokenizer(model, tokenizer):
    assert model.num_parameters() == 86_528
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    for config in (model.config, model.generation_config):
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            assert getattr(config, name) == getattr(tokenizer, name)


def test_the_data_load_with_disjoint_splits_and_right_answers(tmp_path):
    data = load_dataset(str(FOLDER / "data"), cache_dir=str(tmp_path))
    assert {name: len(part) for name, part in data.items()} == {"train": 2000, "test": 200}
    prompts = {name: [row["prompt"][0]["content"] for row in part] for name, part in data.items()}
    assert len({*prompts["train"], *prompts["test"]}) == 2200
    for name, part in data.items():
        assert [str(correct_values(parse_prompt(text))[-1]) for text in prompts[name]] == part["answer"]
    assert {len(parse_prompt(text).moves) for text in prompts["train"] + prompts["test"]} == {6}


def test_the_base_is_right_sometimes_and_measuring_it_leaves_no_trace(model, tokenizer):
    model.train()
    model.model.layers[0].eval()  # a mixture of modes must come back as it was
    modes = {name: module.training for name, module in model.named_modules()}
    random_state, generation_config = torch.get_rng_state(), model.generation_config.to_dict()
    greedy, sampled, again = (accuracy(model, tokenizer, read_rows(), s) for s in (False, True, True))
    assert greedy < 0.30
    assert 0.20 < sampled < 0.40
    assert sampled == again
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config.to_dict() == generation_config


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_models_own_generation_config_does_not_change_what_is_measured(model, tokenizer, do_sample):
    rows, own = read_rows()[:4], model.generation_config
    expected = write_completions(model, tokenizer, rows, do_sample)
    try:
        for name, value in {"repetition_penalty": 5.0, "num_beams": 3, "min_new_tokens": 60}.items():
            model.generation_config = GenerationConfig()
            setattr(model.generation_config, name, value)
            assert write_completions(model, tokenizer, rows, do_sample) == expected, name
    finally:
        model.generation_config = own


def test_the_hard_base_is_rarely_right_and_its_data_are_right():
    hard = FOLDER / "hard"
    parts = {name: read_rows(hard / "data" / f"{name}.jsonl") for name in ("train", "test")}
    prompts = [row["prompt"][0]["content"] for rows in parts.values() for row in rows]
    assert len(parts["train"]) == 2000 and len(parts["test"]) == 200 and len(set(prompts)) == 2200
    assert [row["answer"] for rows in parts.values() for row in rows] == [
        str(correct_values(parse_prompt(text))[-1]) for text in prompts
    ]
    assert {len(parse_prompt(text).moves) for text in prompts} == {8}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(hard / "model"),
        AutoTokenizer.from_pretrained(hard / "model"),
    )
    assert model.num_parameters() == 86_528
    assert 0.05 < accuracy(model, tokenizer, parts["test"], do_sample=True) < 0.20


def test_the_comparison_runs_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(FOLDER.parent.parent)
    options = ["--seeds", "0", "--max_steps", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["compare", *options])
    compare.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed 0, ")]
    assert [line.split(":")[0] for line in lines] == ["seed 0, outcome", "seed 0, process"]
    results = json.loads((tmp_path / "compare.json").read_text())
    assert results["process"]["0"]["curve"][0] == results["outcome"]["0"]["curve"][0]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_also_where_a_quantity_was_not_logged(tmp_path):
    history = [{"step": 1, "reward": 0.2}, {"step": 2, "reward": 0.4}, {"step": 2, "train_loss": 0.0}]
    draw_curves(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
