"""The options of label-steps: each is described, and what cannot be honoured is refused in a sentence."""

import inspect
import re

import pytest

from trl_ext.labels import LabelStepsConfig
from trl_ext.labels.answers import SEARCHES
from trl_ext.labels.config import BACKENDS, SamplingConfig
from trl_ext.labels.config import SEARCHES as NAMES
from trl_ext.labels.sampling import SAMPLERS


def make(**options):
    required = {"model_name_or_path": "m", "dataset_name": "d", "verifier": "tiny.verifiers.has_digit"}
    return LabelStepsConfig(**{**required, "output_dir": "o", **options})


def test_every_option_is_in_the_docstring_and_has_help():
    docs = inspect.getdoc(SamplingConfig) + "\n" + inspect.getdoc(LabelStepsConfig)
    described = re.findall(r"^    ([a-z_]+) \(`", docs, re.MULTILINE)
    fields = LabelStepsConfig.__dataclass_fields__
    assert described == [*fields]
    assert all(field.metadata["help"].endswith(".") for field in fields.values())


def test_the_names_are_those_of_the_tables():
    assert [*SEARCHES] == [*NAMES] and [*SAMPLERS] == [*BACKENDS]


def test_the_estimate_follows_the_search_unless_it_is_given():
    assert make().estimate == "soft" and make(search="first_error").estimate == "hard"
    assert make(estimate="hard").estimate == "hard"


def test_options_of_the_template_are_read_as_json_and_as_yaml():
    for text in ('{"enable_thinking": false}', "{enable_thinking: false}", {"enable_thinking": False}):
        assert make(chat_template_kwargs=text).chat_template_kwargs == {"enable_thinking": False}
    assert make().chat_template_kwargs == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0}, "temperature must be positive, got 0: greedy continuations of a prefix are all the same"),
        ({"temperature": float("nan")}, "temperature must be a number, got nan."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5."),
        ({"threshold": True}, "threshold must be a number, got True."),
        ({"rollouts": 0}, "rollouts must be a whole number of at least 1, got 0."),
        ({"rollouts": 2.5}, "rollouts must be a whole number of at least 1, got 2.5."),
        ({"num_generations": True}, "num_generations must be a whole number of at least 1, got True."),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0."),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0."),
        ({"chunk_size": -1}, "chunk_size must be a whole number of at least 1, got -1."),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1."),
        ({"estimate": "medium"}, "estimate must be one of ['hard', 'soft'], got 'medium'."),
        ({"search": "none"}, "search must be one of ['all', 'first_error'], got 'none'."),
        ({"backend": "sglang"}, "backend must be one of ['transformers', 'vllm'], got 'sglang'."),
        ({"dtype": "int8"}, "dtype must be one of ['auto', 'float32', 'bfloat16', 'float16'], got 'int8'."),
        (
            {"search": "first_error", "estimate": "soft"},
            "search='first_error' knows only dead or alive; use estimate='hard'.",
        ),
        ({"backend": "vllm"}, "backend='vllm' needs vLLM, which is not installed. Install it, or use 'transformers'."),
        (
            {"step_separator": r"\n"},
            "step_separator holds a backslash and a letter where a control",
        ),
        ({"step_separator": ""}, "step_separator must be a text of at least one character, got ''."),
        ({"step_separator": False}, "step_separator must be a text of at least one character, got False."),
        (
            {"step_separator": ";", "step_ends_function": "tiny.digits"},
            "step_ends_function finds the steps by itself, so step_separator is not read. Remove one.",
        ),
        ({"verifier": "has_digit"}, "verifier 'has_digit' is not a dotted path such as 'my_package.my_function'."),
        ({"verifier": "tiny.verifiers.has_digits"}, "has no 'has_digits'; did you mean 'has_digit'?"),
        ({"completer": False}, "completer must be a text, got False. Leave it out for the default."),
        ({"output_dir": ""}, "output_dir must be a text, got ''."),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs must be a mapping in JSON"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping of option to value, got [1]."),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make(**options)
