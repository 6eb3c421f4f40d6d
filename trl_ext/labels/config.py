"""The options of `trl-ext label-steps`, and what is refused before anything loads."""

import importlib.util
import json
from dataclasses import dataclass, field
from typing import Any

from ..functional.step_labels import STEP_LABELS
from ..lookup import import_path
from ..trainers.grpo.checks import check_cuts
from ..trainers.input_checks import is_number, quoted
from ..trainers.written import mapping, with_numbers

SEARCHES, BACKENDS = ("all", "first_error"), ("transformers", "vllm")


@dataclass
class SamplingConfig:
    r"""
    Options for sampling answers to the prompts of a data set and verifying them. Those that [`GRPOConfig`] or TRL's
    scripts have too are called as there.

    Parameters:
        model_name_or_path (`str`):
            Policy whose answers are labelled: a model, or the folder of an adapter.
        dataset_name (`str`):
            Data set with a column `prompt`, of texts or conversations, and the columns that the verifier reads.
        verifier (`str`):
            Dotted path of a reward function, as TRL calls it. An answer is right if its reward is above `threshold`;
            `None` is wrong.
        output_dir (`str`):
            Folder to write to. What is finished there is not done again.
        num_generations (`int`, *optional*, defaults to `4`):
            Answers sampled to each prompt.
        threshold (`float`, *optional*, defaults to `0.5`):
            An answer is right if its reward is above it.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling, for answers and continuations. Positive.
        top_p (`float`, *optional*, defaults to `1.0`):
            Least total probability of the tokens that are sampled from, in (0, 1].
        max_completion_length (`int`, *optional*, defaults to `256`):
            Largest number of tokens of an answer, continuations included.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text that ends a step.
        step_ends_function (`str`, *optional*):
            Dotted path of a function of `(token_ids, tokenizer)` that returns the indices of the last token of each
            step, used instead of `step_separator`.
        chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Further arguments of the chat template, such as `{"enable_thinking": false}`.
        dataset_config (`str`, *optional*):
            Configuration of the data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split whose prompts are answered.
        limit (`int`, *optional*):
            Number of prompts, from the first. `None`: all.
        backend (`str`, *optional*, defaults to `"transformers"`):
            What samples: `"transformers"`, or `"vllm"` where it is installed.
        batch_size (`int`, *optional*):
            Largest number of continuations that `transformers` samples at once; 256 by default. vLLM makes its own
            batches.
        chunk_size (`int`, *optional*, defaults to `64`):
            Prompts that are labelled, and written, together.
        seed (`int`, *optional*, defaults to `0`):
            Of all samples.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that a model repository contains.
    """

    model_name_or_path: str = field(metadata={"help": "Policy whose answers are labelled."})
    dataset_name: str = field(metadata={"help": "Data set with a column prompt, and those that the verifier reads."})
    verifier: str = field(metadata={"help": "Dotted path of a reward function; a reward above threshold is right."})
    output_dir: str = field(metadata={"help": "Folder to write to. What is finished there is not done again."})
    num_generations: int = field(default=4, metadata={"help": "Answers sampled to each prompt."})
    threshold: float = field(default=0.5, metadata={"help": "An answer is right if its reward is above it."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of answers and continuations."})
    top_p: float = field(default=1.0, metadata={"help": "Least total probability of the tokens sampled from."})
    max_completion_length: int = field(
        default=256, metadata={"help": "Largest number of tokens of an answer, continuations included."}
    )
    step_separator: str = field(
        default="\n", metadata={"help": "Text that ends a step. Default: %(default)r, a line break."}
    )
    step_ends_function: str | None = field(
        default=None,
        metadata={"help": "Dotted path of a function that finds the last token of each step, instead of a separator."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of the chat template, such as '{\"enable_thinking\": false}'."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split whose prompts are answered."})
    limit: int | None = field(default=None, metadata={"help": "Number of prompts, from the first. Default: all."})
    backend: str = field(default="transformers", metadata={"help": f"What samples: {quoted(BACKENDS)}."})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Largest number of continuations that transformers samples at once. Default: 256."},
    )
    chunk_size: int = field(default=64, metadata={"help": "Prompts that are labelled, and written, together."})
    seed: int = field(default=0, metadata={"help": "Seed of all samples."})
    dtype: str = field(
        default="auto", metadata={"help": "Precision of the weights: 'auto', 'float32', 'bfloat16', 'float16'."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code that a model repository contains."}
    )

    def __post_init__(self):
        self.chat_template_kwargs = template_options(self.chat_template_kwargs)
        check_texts(self, ("model_name_or_path", "dataset_name", "verifier", "output_dir", "dataset_train_split"))
        check_texts(self, ("step_ends_function", "dataset_config"), optional=True)
        _check_backend(self)
        _check_numbers(self)
        check_cuts(self)
        import_path(self.verifier, "verifier")


@dataclass
class LabelStepsConfig(SamplingConfig):
    r"""
    Options of [`label_steps`], on top of those of [`SamplingConfig`].

    Parameters:
        completer (`str`, *optional*):
            Model that continues the prefixes, with the policy's vocabulary. `None`: the policy. A stronger one makes
            better labels.
        rollouts (`int`, *optional*, defaults to `8`):
            Continuations of each prefix.
        estimate (`str`, *optional*):
            `"soft"`: share of the continuations that end right. `"hard"`: 1 if any does. Default: soft, and hard with
            `search="first_error"`.
        search (`str`, *optional*, defaults to `"all"`):
            `"all"`: every step is labelled. `"first_error"`: right answers are labelled 1 throughout, wrong ones are
            searched by bisection for the step with which they die.
    """

    completer: str | None = field(
        default=None, metadata={"help": "Model that continues the prefixes. Default: the policy."}
    )
    rollouts: int = field(default=8, metadata={"help": "Continuations of each prefix."})
    estimate: str | None = field(
        default=None,
        metadata={"help": f"Label of a step: {quoted(STEP_LABELS)}. Default: 'soft', 'hard' with 'first_error'."},
    )
    search: str = field(
        default="all",
        metadata={"help": "Steps that are rolled out: 'all', or 'first_error' for a bisection of wrong answers."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_texts(self, ("completer",), optional=True)
        check_whole(self, {"rollouts": 1})
        check_choice(self, "search", SEARCHES)
        if self.estimate not in (None, *STEP_LABELS):
            raise ValueError(f"estimate must be one of {sorted(STEP_LABELS)}, got {self.estimate!r}.")
        if self.search == "first_error" and self.estimate == "soft":
            raise ValueError("search='first_error' knows only dead or alive; use estimate='hard'.")
        if self.estimate is None:
            self.estimate = "hard" if self.search == "first_error" else "soft"


def template_options(value: Any) -> dict[str, Any]:
    """The mapping that a text, or nothing, stands for."""
    found = mapping("chat_template_kwargs", value) or {}
    try:
        found = with_numbers(json.loads(found) if isinstance(found, str) else found)
    except json.JSONDecodeError as error:
        raise ValueError(f"chat_template_kwargs must be a mapping in JSON, got {value!r}: {error.msg}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping of option to value, got {value!r}.")
    return found


def check_texts(config: SamplingConfig, names: tuple[str, ...], optional: bool = False) -> None:
    """Refuses anything but a text where one is meant; YAML reads `false`, `no` and `off` as a truth value."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, str | None if optional else str) or value == "":
            hint = " Leave it out for the default." if optional else ""
            raise ValueError(f"{name} must be a text, got {value!r}.{hint}")


def check_choice(config: SamplingConfig, name: str, allowed: tuple[str, ...]) -> None:
    """Refuses what is none of these."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(config, name)!r}.")


def check_whole(config: SamplingConfig, least: dict[str, int]) -> None:
    """Refuses anything but whole numbers of at least so much."""
    for name, bound in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{name} must be a whole number of at least {bound}, got {value!r}.")


def _check_backend(config: SamplingConfig) -> None:
    check_choice(config, "backend", BACKENDS)
    check_choice(config, "dtype", ("auto", "float32", "bfloat16", "float16"))
    if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("backend='vllm' needs vLLM, which is not installed. Install it, or use 'transformers'.")
    if config.backend == "vllm" and config.batch_size is not None:
        raise ValueError(
            "batch_size is read with backend='transformers' alone; vLLM makes its own batches. Remove it."
        )


def _check_numbers(config: SamplingConfig) -> None:
    least = {"num_generations": 1, "max_completion_length": 1, "chunk_size": 1, "seed": 0}
    check_whole(config, least | {name: 1 for name in ("batch_size", "limit") if getattr(config, name) is not None})
    for name in ("threshold", "temperature", "top_p"):
        value = getattr(config, name)
        if not is_number(value):
            raise ValueError(f"{name} must be a number, got {value!r}.")
    if config.temperature <= 0:
        raise ValueError(
            f"temperature must be positive, got {config.temperature!r}: greedy continuations of a prefix are all the "
            "same, and say nothing about how often it ends right."
        )
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {config.top_p!r}.")
