"""Beam search over steps against enumeration of a small tree, its edges, and the comparison of ways to choose."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

from recipes.clock import search
from recipes.clock.accuracy import HardAccuracyReport, read_rows
from recipes.clock.search import Selection, beam_search, choices
from trl_ext.rewards import ProcessRewardModel
from trl_ext.trainers.grpo.steps import segment

END = 9
PROMPTS = [[100], [200, 201]]
HARD = search.HERE / "hard" / "model"


def in_turn(children):
    """A sampler that takes the children of a prefix in turn: as many samples as there are children find them all."""

    def sample_step(prefixes, n, budgets):
        groups, taken = [], Counter()
        for prefix, number, budget in zip(prefixes, n, budgets, strict=True):
            steps, first = children(prefix), taken[tuple(prefix)]
            groups.append([steps[place % len(steps)][:budget] for place in range(first, first + number)])
            taken[tuple(prefix)] += number
        return groups

    return sample_step


def depth_three(prefix):
    """Three steps of one or two tokens, two ways each; the third ends."""
    depth = sum(token in (1, 2, 4) for token in prefix)
    return ([[1], [3, 2]], [[1], [3, 4]], [[1, END], [2, END]])[depth]


def by_hash(places, answers):
    """Scores without any order in them, other ones for each prompt."""
    hashes = [sum((token + 1) * 7**k for k, token in enumerate(ids)) for ids in answers]
    return [math.sin(1 + place + 10 * value) for place, value in zip(places, hashes, strict=True)]


def test_where_all_is_kept_every_answer_is_found_and_the_best_is_first():
    found = beam_search(PROMPTS, in_turn(depth_three), by_hash, END, beams=8, expansions=1)
    for i, pool in enumerate(found):
        every = [(*a, *b, *c) for a, b, c in itertools.product([(1,), (3, 2)], [(1,), (3, 4)], [(1, END), (2, END)])]
        expected = sorted(zip(by_hash([i] * 8, every), every, strict=True), reverse=True)
        assert [(beam.score, beam.ids) for beam in pool] == expected and all(beam.finished for beam in pool)


@pytest.mark.parametrize(("beams", "expansions"), [(1, 4), (2, 3), (3, 2), (4, 4)])
def test_each_round_keeps_the_best_of_what_was_sampled(beams, expansions):
    def slowly(place):
        """The same search of one prompt: a table of copies for each depth."""
        copies = {(): beams * expansions}
        for depth in range(3):
            table = Counter()
            for ids, number in copies.items():
                steps = depth_three([*PROMPTS[place], *ids])
                for k in range(number if depth == 0 else number * expansions):
                    table[(*ids, *steps[k % len(steps)])] += 1
            copies = Counter()
            for ids in sorted(table, key=lambda ids: -by_hash([place], [ids])[0]):
                copies[ids] = min(table[ids], beams - copies.total())
        return [*copies.elements()]

    found = beam_search(PROMPTS, in_turn(depth_three), by_hash, END, beams, expansions)
    assert [[beam.ids for beam in pool] for pool in found] == [slowly(0), slowly(1)]


def test_one_beam_takes_the_best_step_each_time():
    found = beam_search(PROMPTS, in_turn(depth_three), by_hash, END, beams=1, expansions=2)
    for i, pool in enumerate(found):
        ids = ()
        while not ids or ids[-1] != END:
            options = [(*ids, *step) for step in depth_three([*PROMPTS[i], *ids])]
            ids = max(options, key=lambda option: by_hash([i], [option])[0])
        assert [beam.ids for beam in pool] == [ids]


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_the_rounds_of_all_prompts_run_together_and_do_not_touch_each_other(beams):
    calls = []
    sampler = in_turn(depth_three)

    def counted(prefixes, n, budgets):
        calls.append(sum(n))
        return sampler(prefixes, n, budgets)

    together = beam_search(PROMPTS, counted, by_hash, END, beams, 2)
    assert len(calls) == 3 and calls[0] == 2 * beams * 2
    for i, pool in enumerate(together):
        alone = beam_search(
            [PROMPTS[i]], in_turn(depth_three), lambda p, a, i=i: by_hash([i] * len(p), a), END, beams, 2
        )
        assert alone == [pool]


def test_tokens_are_carried_on_as_they_were_sampled_within_the_budget():
    seen = []
    sampler = in_turn(lambda prefix: [[5, 6], [7]])  # it never ends by itself

    def watched(prefixes, n, budgets):
        seen.extend(zip(map(tuple, prefixes), budgets, strict=True))
        return sampler(prefixes, n, budgets)

    (pool,) = beam_search([[100]], watched, by_hash, END, beams=2, expansions=2, longest=5)
    assert all(budget == 5 - (len(prefix) - 1) >= 1 and prefix[0] == 100 for prefix, budget in seen)
    assert all(beam.finished and len(beam.ids) == 5 for beam in pool), "cut, but no longer than allowed"


def test_a_finished_answer_competes_and_is_expanded_no_more():
    tree = {(0,): [[1, END], [2]], (0, 2): [[3, END], [4, END]]}
    scores = {(1, END): 0.7, (2,): 0.9, (2, 3, END): 0.6, (2, 4, END): 0.8}

    def found(beams, expansions, scores):
        score = lambda places, answers: [scores[ids] for ids in answers]  # noqa: E731
        (pool,) = beam_search([[0]], in_turn(lambda prefix: tree[tuple(prefix)]), score, END, beams, expansions)
        return [beam.ids for beam in pool]

    assert found(2, 1, scores) == [(1, END), (2, 3, END)], "one sample each: the other end was not seen"
    assert found(1, 2, scores) == [(2, 4, END)]
    assert found(1, 2, scores | {(1, END): 0.95}) == [(1, END)]
    assert found(3, 1, scores) == [(1, END), (1, END), (2, 3, END)]
    assert found(1, 2, scores | {(2,): math.nan}) == [(1, END)], "NaN is worse than any"
    assert found(2, 1, dict.fromkeys(scores, math.nan)) == [(1, END), (2, 3, END)]


def test_equal_beginnings_are_scored_once_and_each_is_a_beam():
    scored = []

    def score(places, answers):
        scored.extend(zip(places, answers, strict=True))
        return [0.5] * len(answers)

    same = in_turn(lambda prefix: [[1, END] if prefix[-1] == 1 else [1]])
    found = beam_search([[0], [0]], same, score, END, beams=3, expansions=4)
    assert [[beam.ids for beam in pool] for pool in found] == [[(1, 1, END)] * 3] * 2
    assert len(scored) == len({*scored}) == 4


@pytest.mark.parametrize("widths", [(0, 4, 64), (4, 0, 64), (4, 4, 0)])
def test_a_search_of_nothing_is_refused(widths):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        beam_search(PROMPTS, in_turn(depth_three), by_hash, END, *widths)


# With the model and the data of the recipe


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    """Folder of a process-reward model that has learned nothing."""
    folder = tmp_path_factory.mktemp("prm")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(HARD, num_labels=2)
    AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HARD).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def selection():
    return Selection(HARD, read_rows(HardAccuracyReport.test_file)[:3])


def test_a_sampled_step_is_a_step_as_grpo_cuts_it(selection):
    torch.manual_seed(0)
    sampler = selection.sampler(search.tokens_with(selection.tokenizer, "\n"))
    answers = [() for _ in selection.prompt_ids]
    for number in range(1, 10):
        prefixes = [[*prompt, *ids] for prompt, ids in zip(selection.prompt_ids, answers, strict=True)]
        steps = [step for (step,) in sampler(prefixes, [1] * 3, [search.LONGEST - len(ids) for ids in answers])]
        answers = [(*ids, *step) for ids, step in zip(answers, steps, strict=True)]
        for ids, step in zip(answers, steps, strict=True):
            cut = segment([*ids], None, selection.tokenizer, "\n")
            assert len(cut) == number and cut[-1] == [*range(len(ids) - len(step), len(ids))]
    assert all(ids[-1] == selection.tokenizer.eos_token_id for ids in answers)
    assert sampler.tokens == sum(map(len, answers))


def test_separators_that_may_be_spread_over_tokens_are_refused(selection):
    assert search.tokens_with(selection.tokenizer, "\n") == [selection.tokenizer.convert_tokens_to_ids("\n")]
    with pytest.raises(ValueError, match=r"one character.*got '\\n\\n'"):
        search.tokens_with(selection.tokenizer, "\n\n")


def test_a_search_with_the_program_as_its_judge_is_right(selection):
    """The scores are the task's own rewards of steps: no wrong line is kept where a right one was sampled."""
    torch.manual_seed(0)
    found = selection.search(search.program, "prod", beams=4, expansions=4)
    assert found["accuracy"] == 1.0 and found["tokens"] > 0


def test_choices_worked_by_hand():
    texts = ["#3", "#7", "#7", "none", "#1", "#1", "#2", "#2"]
    right = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    clean = [False] * 6 + [False, True]
    scores = [[0.9, 0.9], [0.3], [0.4, None], [1.0, 0.1], [0.2], [], [0.9, 0.2], [0.3, 0.3]]
    four = choices(texts, right, clean, scores, 4)
    assert four["one"] == 3 / 8 and four["any"] == 1.0 and four["any clean"] == 0.5
    assert four["majority"] == 0.0  # 7 of the first four; a tie of 1 and 2 in the others, 1 being first
    # First: .81 for 3 to .7 for 7. Second: .2 for 1 to .18 + .09 for 2.
    assert four["weighted, prod"] == 1.0 and four["best, prod"] == 0.5
    assert four["best, last"] == four["best, min"] == 1.0
    assert choices(texts, right, clean, scores, 1)["best, prod"] == 3 / 8
    assert choices(["none"], [0.0], [False], [[]], 1) == dict.fromkeys(four, 0.0)


def test_the_command_measures_prints_and_draws(prm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    options = [str(prm), "--kind", "token_classifier", "--limit", "2", "--num_generations", "4"]
    monkeypatch.setattr("sys.argv", ["search", *options, "--output", str(tmp_path)])
    search.main()
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    ways = [line.split("|")[1].strip() for line in table]
    assert ways[2:4] == ["one sample", "majority of 4"] and ways[-2:] == ["any of 4", "beam 2 × 2"]
    assert {len(line.split("|")) for line in table} == {4}
    results = json.loads((tmp_path / "search.json").read_text())[str(prm)]
    assert [*results["choices"]] == ["1", "2", "4"] and 0 <= results["choices"]["4"]["any"] <= 1
    for one, more in itertools.pairwise(results["choices"].values()):
        assert one["any"] <= more["any"]
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_the_model_and_a_run_is_repeated_by_its_seed(prm, selection):
    scorer = ProcessRewardModel(str(prm), kind="token_classifier")
    answers = selection.answers(2)
    first, again = (search.measure(selection, scorer, answers, "min", seed=3) for _ in range(2))
    assert first == again


def test_what_a_faultless_judge_chooses_is_clean_where_anything_is(selection):
    answers = selection.answers(16)
    found = search.measure(selection, search.program, answers, "prod", seed=0)["choices"][16]
    assert found["best, prod"] >= found["any clean"] and found["any"] >= found["any clean"]
