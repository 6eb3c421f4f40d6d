"""What is rolled out, what counts as right and what is written; and that samples come from the model alone."""

import itertools
import math

import pytest
import torch
from tiny import CHARACTERS, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from trl_ext.labels import LabelStepsConfig
from trl_ext.labels.answers import Labeller, Verifier
from trl_ext.labels.sampling import Source, TransformersSampler

EOS = 1


def options(**given):
    required = {"model_name_or_path": "m", "dataset_name": "d", "verifier": "tiny.verifiers.has_digit"}
    return LabelStepsConfig(**{**required, "output_dir": "o", "max_completion_length": 12, **given})


class Scripted:
    """A sampler that gives what it is told, and writes down what it was asked."""

    def __init__(self, continuations):
        self.continuations, self.calls, self.tokens = continuations, [], 0

    def __call__(self, prefixes, n, budgets):
        self.calls.append([*zip(prefixes, n, budgets, strict=True)])
        return [self.continuations(prefix, count) for prefix, count in zip(prefixes, n, strict=True)]


@pytest.fixture(scope="module")
def merging():
    """Writes `ab` as one token, and a model may sample it as two; `;` and `1` are tokens."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "a", "b", "ab", ";", "1"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split(";", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


A, B, AB, END, ONE = 2, 3, 4, 5, 6
HEAD = [A, A]


def label(config, tokenizer, answers, continuations, rows=None):
    """Labelled rows of one prompt with these sampled answers, and the calls of the completer."""
    policy = Scripted(lambda prefix, count: [*answers])
    completer = Scripted(continuations)
    rows = rows or [{"prompt": "aa"}]
    return Labeller(config, tokenizer, policy, completer)(rows), completer.calls, policy.calls


def test_prefixes_are_the_sampled_tokens_and_never_their_text_encoded_again(merging):
    assert merging("ab;ab;1")["input_ids"] == [AB, END, AB, END, ONE]
    sampled = [A, B, END, A, B, END, ONE, EOS]  # another way to write the same text
    config = options(step_separator=";", rollouts=2, num_generations=1)
    rows, (asked,), (policy,) = label(config, merging, [sampled], lambda prefix, n: [[ONE, EOS]] * n)
    assert policy == [(HEAD, 1, 12)]
    assert asked == [([*HEAD, *sampled[:3]], 2, 9), ([*HEAD, *sampled[:6]], 2, 6)], "and what is left of the budget"
    assert rows == [{"prompt": "aa", "completions": ["ab;", "ab;", "1"], "labels": [1.0, 1.0, 1.0], "outcome": 1.0}]


def test_soft_and_hard_labels_and_the_outcome_of_the_last_step(merging):
    sampled = [A, END, B, END, A, EOS]  # wrong
    ending = {3: [[ONE, EOS], [A, EOS], [A, EOS], [A, EOS]]}  # one rollout in four is right, behind the first step
    for estimate, first in (("soft", 0.25), ("hard", 1.0)):
        config = options(step_separator=";", rollouts=4, num_generations=1, estimate=estimate)
        rows, *_ = label(config, merging, [sampled], lambda p, n: ending.get(len(p) - 1, [[A, EOS]] * n))
        assert rows[0]["labels"] == [first, 0.0, 0.0] and rows[0]["outcome"] == 0.0


def test_an_answer_of_one_step_is_its_outcome_without_a_rollout(merging):
    for search in ("all", "first_error"):
        config = options(step_separator=";", num_generations=3, search=search)
        answers = [[ONE, EOS], [A, EOS], [EOS]]  # the last one says nothing at all
        rows, calls, _ = label(config, merging, answers, lambda prefix, n: pytest.fail("rolled out"))
        assert [row["labels"] for row in rows] == [[1.0], [0.0], [0.0]] and calls == []
        assert [row["completions"] for row in rows] == [["1"], ["a"], [""]]


def test_prefixes_that_answers_share_are_rolled_out_once_and_labelled_alike(merging):
    answers = [[A, END, A, EOS], [A, END, B, EOS], [B, END, B, EOS]]
    config = options(step_separator=";", rollouts=2, num_generations=3)
    continuations = lambda prefix, n: [[ONE, EOS], *[[A, EOS]] * (n - 1)]  # noqa: E731
    rows, (asked,), _ = label(config, merging, answers, continuations)
    assert asked == [([*HEAD, A, END], 4, 10), ([*HEAD, B, END], 2, 10)]
    assert [row["labels"] for row in rows] == [[0.25, 0.0], [0.25, 0.0], [0.5, 0.0]]


def test_equal_prompts_with_other_columns_share_nothing(merging):
    config = options(
        step_separator=";", rollouts=2, num_generations=1, verifier="tiny.verifiers.equals_answer", estimate="hard"
    )
    rows = [{"prompt": "aa", "answer": "a;b"}, {"prompt": "aa", "answer": "a;1"}]
    labelled, (asked,), _ = label(config, merging, [[A, END, B, EOS]], lambda prefix, n: [[ONE, EOS]] * n, rows)
    assert [n for _, n, _ in asked] == [2, 2]
    assert [(row["answer"], row["labels"], row["outcome"]) for row in labelled] == [
        ("a;b", [0.0, 1.0], 1.0),
        ("a;1", [1.0, 0.0], 0.0),
    ]


@pytest.mark.parametrize("place", range(5))
def test_bisection_labels_up_to_the_first_error_and_rolls_out_wrong_answers_only(merging, place):
    wrong = [*itertools.chain(*[[A, END]] * 4), A, EOS]
    right = [*itertools.chain(*[[B, END]] * 4), ONE, EOS]
    config = options(step_separator=";", num_generations=2, rollouts=3, search="first_error")
    alive = len(HEAD) + 2 * place  # tokens of the longest living prefix
    continuations = lambda prefix, n: [[A, EOS], [A, EOS], [ONE if len(prefix) <= alive else A, EOS]]  # noqa: E731
    rows, calls, _ = label(config, merging, [wrong, right], continuations)
    assert rows[0]["labels"] == [1.0] * place + [0.0] + [None] * (4 - place)
    assert rows[1]["labels"] == [1.0] * 5
    assert len(calls) <= 3 and all(len(call) == 1 and call[0][0][2] == A for call in calls)


def test_what_bisection_knows_from_another_answer_is_not_asked_again(merging):
    shared = [A, END, A, END]
    answers = [[*shared, A, END, A, EOS], [*shared, B, EOS]]  # the second asks first after one step, then after two
    config = options(step_separator=";", num_generations=2, rollouts=1, search="first_error")
    rows, calls, _ = label(config, merging, answers, lambda prefix, n: [[ONE if len(prefix) <= 4 else A, EOS]] * n)
    assert [len(call) for call in calls] == [2], "the second round is known"
    assert [row["labels"] for row in rows] == [[1.0, 0.0, None, None], [1.0, 0.0, None]]


# Verifiers


def verdicts(tokenizer, name, ids, rows):
    return Verifier(options(verifier=f"tiny.verifiers.{name}"), tokenizer)(rows, ids)


def test_a_verifier_is_called_as_trl_calls_it_and_none_is_wrong(merging):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": None}]
    assert verdicts(merging, "equals_answer", [[ONE, EOS]] * 3, rows) == [True, False, False]
    asked = [{**row, "prompt": [{"role": "user", "content": "a"}]} for row in rows]
    assert verdicts(merging, "equals_answer", [[ONE, EOS]] * 3, asked) == [True, False, False]
    assert verdicts(merging, "later", [[ONE], [A]], [{"prompt": "a"}] * 2) == [True, False]


def test_a_verifier_that_returns_anything_else_is_refused(merging):
    with pytest.raises(ValueError, match=r"steps' returned a list for an answer; a verifier returns one number"):
        verdicts(merging, "steps", [[ONE], [A]], [{"prompt": "a"}] * 2)
    with pytest.raises(ValueError, match=r"too_few' returned 1 rewards, but 2 were expected"):
        verdicts(merging, "too_few", [[ONE], [A]], [{"prompt": "a"}] * 2)


# The sampler of transformers


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A tiny model whose own generation config would change every sample."""
    path = save_model(tmp_path_factory.mktemp("leaky") / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.nn.init.normal_(model.lm_head.weight, std=0.4)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=9.0, num_return_sequences=2, eos_token_id=[EOS, 5]
    )
    model.save_pretrained(path)
    return path


def sampler(path, **given):
    tokenizer = AutoTokenizer.from_pretrained(path)
    source = Source.of(path, [tokenizer], trust_remote_code=False)
    return TransformersSampler.load(source, options(model_name_or_path=path, **given)), tokenizer, source


def value(model, prefix, budget, temperature, ends):
    """The chance that a continuation of `prefix` has a digit: the sum over all of them."""
    if not budget:
        return 0.0
    with torch.no_grad():
        probabilities = (model(torch.tensor([prefix])).logits[0, -1].double() / temperature).softmax(-1).tolist()
    digits = {2 + CHARACTERS.index(c) for c in "0123456789"}
    return sum(
        p
        * (
            1.0
            if token in digits
            else 0.0
            if token in ends
            else value(model, [*prefix, token], budget - 1, temperature, ends)
        )
        for token, p in enumerate(probabilities)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_soft_label_is_the_value_of_the_prefix(leaky, temperature):
    rollouts = 4000
    config = {"rollouts": rollouts, "max_completion_length": 3, "temperature": temperature, "batch_size": 2000}
    completer, tokenizer, source = sampler(leaky, **config)
    assert source.end_tokens == [EOS, 5]
    letters = [2, 3, 4]  # without a digit
    policy = Scripted(lambda prefix, n: [letters])
    given = options(step_ends_function="tiny.verifiers.every_token", num_generations=1, **config)
    torch.manual_seed(0)
    rows = Labeller(given, tokenizer, policy, completer)([{"prompt": "ab"}, {"prompt": "h2345"}])
    for row in rows:
        head = tokenizer(row["prompt"])["input_ids"]
        for j, found in enumerate(row["labels"][:-1]):
            exact = value(completer.model, [*head, *letters[: j + 1]], 2 - j, temperature, source.end_tokens)
            assert 0.02 < exact < 0.98 and abs(found - exact) <= 5 * math.sqrt(exact * (1 - exact) / rollouts)
        assert row["labels"][-1] == 0.0


def test_continuations_end_with_an_end_token_or_with_their_own_budget(leaky):
    complete, _, source = sampler(leaky, batch_size=64)
    torch.manual_seed(0)
    budgets, n = [1, 9, 4], [40, 40, 40]
    groups = complete([[2], [3, 4, 5, 6], [7, 8]], n, budgets)
    lengths = set()
    for group, budget in zip(groups, budgets, strict=True):
        assert len(group) == 40
        for ids in group:
            ended = [token in source.end_tokens for token in ids]
            assert not any(ended[:-1]) and 1 <= len(ids) <= budget and (ended[-1] or len(ids) == budget)
            lengths.add(len(ids))
    assert len(lengths) > 5 and complete.tokens == sum(len(ids) for group in groups for ids in group)
    assert complete.model.generation_config.top_k == 1, "its own again"
