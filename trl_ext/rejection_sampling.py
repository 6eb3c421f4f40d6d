"""Rejection sampling for fine-tuning (RFT): a model's right and distinct answers, as the data of `trl-ext sft`."""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from .functional.selection import accepted
from .labels.answers import AnswerSampler, prompt_ids
from .labels.config import SamplingConfig, check_texts, check_whole, template_options
from .labels.folder import LabelFolder, write_whole
from .labels.run import work_through
from .trainers.grpo.separators import decode
from .trainers.input_checks import require_columns
from .trainers.places import load_rows

# Options that are read without a model too.
_WITHOUT_MODEL = {"dataset_name", "dataset_config", "dataset_train_split", "output_dir"}
_WITHOUT_MODEL |= {"answers_per_prompt", "chat_template_kwargs"}


@dataclass(kw_only=True)
class RejectionSamplingConfig(SamplingConfig):
    r"""
    Options of [`rejection_sampling`], on top of those of [`SamplingConfig`].

    Parameters:
        model_name_or_path (`str`, *optional*):
            Model whose answers are sampled. `None`: the data set holds answers, in the columns `prompt`,
            `completions` (the steps) and `outcome` (right above 0.5), as `trl-ext label-steps` writes them. Then no
            model is read, and the options of sampling are refused.
        verifier (`str`, *optional*):
            Dotted path of a reward function, as TRL calls it; needed with a model. An answer is right if its reward is
            above `threshold`; `None` is wrong.
        answers_per_prompt (`int`, *optional*):
            Right and distinct answers that are kept of each prompt at most, the first ones. `None`: all.
        num_generations (`int`, *optional*, defaults to `16`):
            Answers sampled to each prompt.
        temperature (`float`, *optional*, defaults to `0.7`):
            Of sampling.
    """

    model_name_or_path: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Model whose answers are sampled. Default: the data set holds answers."}
    )
    verifier: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Dotted path of a reward function; a reward above threshold is right."}
    )
    answers_per_prompt: int | None = field(
        default=None, metadata={"help": "Right and distinct answers kept of each prompt at most. Default: all."}
    )
    num_generations: int = field(default=16, metadata={"help": "Answers sampled to each prompt."})
    temperature: float = field(default=0.7, metadata={"help": "Temperature of the answers."})

    def __post_init__(self):
        if self.answers_per_prompt is not None:
            check_whole(self, {"answers_per_prompt": 1})
        if self.model_name_or_path is not None:
            return super().__post_init__()
        for option in fields(self):
            if option.name not in _WITHOUT_MODEL and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"{option.name} is read only with model_name_or_path; without it, dataset_name holds answers that "
                    "were sampled and verified. Set that too, or remove it."
                )
        self.chat_template_kwargs = template_options(self.chat_template_kwargs)
        check_texts(self, ("dataset_name", "output_dir", "dataset_train_split"))
        check_texts(self, ("dataset_config",), optional=True)


class Counts(NamedTuple):
    """
    What became of sampled answers.

    Args:
        prompts, answers (`int`):
            All.
        right (`int`):
            Answers that are right.
        distinct (`int`):
            Those of them that are finished, and distinct in their steps from the others to their prompt.
        kept (`int`):
            Those of them that are within `answers_per_prompt`.
        unsolved, solved (`int`):
            Prompts without any right answer; prompts without a wrong one.
    """

    prompts: int
    answers: int
    right: int
    distinct: int
    kept: int
    unsolved: int
    solved: int

    def __str__(self) -> str:
        return (
            f"Kept {self.kept} of {self.answers} answers to {self.prompts} prompts: {self.right} are right, "
            f"{self.distinct} of these finished and distinct. Prompts without a right answer: {self.unsolved}; "
            f"without a wrong one, which teach little: {self.solved}."
        )


def kept_answers(
    rows: Iterable[dict[str, Any]], config: RejectionSamplingConfig
) -> tuple[list[dict[str, Any]], Counts]:
    """
    Rows to train on, of sampled answers.

    An answer that was cut at `max_completion_length` is never kept: the training would teach it with an end.

    Args:
        rows (`Iterable[dict[str, Any]]`):
            `prompt`, `completions` (the steps), `outcome`; and, where known, `completion`, the whole text, and
            `finished`.
        config ([`RejectionSamplingConfig`]):
            Its `answers_per_prompt` and `chat_template_kwargs`.

    Returns:
        `tuple[list[dict[str, Any]], Counts]`: Rows with `prompt` and `completion`, both texts or both conversations,
        and the template's arguments, if any, in the column where `trl-ext sft` looks for them.

    Raises:
        `ValueError`: If nothing is kept.
    """
    rows = [{**row, "outcome": row["outcome"] if row["outcome"] is not None else math.nan} for row in rows]
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append(row["outcome"] > 0.5)
    whole = [row for row in rows if row.get("finished") is not False]
    kept = [whole[place] for place in accepted(whole, config.answers_per_prompt)]
    counts = Counts(
        prompts=len(right),
        answers=len(rows),
        right=sum(map(sum, right.values())),
        distinct=len(accepted(whole)),
        kept=len(kept),
        unsolved=sum(not any(verdicts) for verdicts in right.values()),
        solved=sum(map(all, right.values())),
    )
    if not kept:
        raise ValueError(
            f"None of the {counts.answers} answers can be kept: {counts.right} are right, and none of these is "
            "finished. Sample more answers, or longer ones, or look at what the verifier says."
        )
    template = {"chat_template_kwargs": config.chat_template_kwargs} if config.chat_template_kwargs else {}
    return [{"prompt": row["prompt"], "completion": _completion(row), **template} for row in kept], counts


def _completion(row: dict[str, Any]) -> str | list[dict[str, str]]:
    text = row["completion"] if row.get("completion") is not None else "".join(row["completions"])
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


class _Answers(AnswerSampler):
    """From rows of the data to rows of sampled answers."""

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        template = self.config.chat_template_kwargs
        answers = self.sample(rows, [prompt_ids(row["prompt"], self.tokenizer, template) for row in rows])
        longest, end = self.config.max_completion_length, self.tokenizer.eos_token_id
        return [
            {
                "prompt": rows[answer.row]["prompt"],
                "completions": answer.texts,
                # The whole text: some decoders leave out a space where a step begins.
                "completion": decode(self.tokenizer, answer.ids, skip_special_tokens=True),
                "outcome": float(answer.right),
                "finished": len(answer.ids) < longest or answer.ids[-1] == end,
            }
            for answer in answers
        ]


class _Folder(LabelFolder):
    """Chunks of all sampled answers, and `train.jsonl` of those that are kept."""

    made = "sampled"
    unread = ("output_dir", "answers_per_prompt")

    def __init__(self, config: RejectionSamplingConfig, rows: list[dict[str, Any]]):
        super().__init__(config, rows)
        self.config = config

    def joined(self, lines: str) -> str:
        return _written(map(json.loads, lines.splitlines()), self.config, self.joined_file)


def _written(answers: Iterable[dict[str, Any]], config: RejectionSamplingConfig, path: Path) -> str:
    rows, counts = kept_answers(answers, config)
    print(f"{counts}\nData for `trl-ext sft`: {path}", file=sys.stderr)
    return "".join(json.dumps(row) + "\n" for row in rows)


def rejection_sampling(config: RejectionSamplingConfig) -> None:
    """
    Samples answers, keeps the right and distinct ones and writes them to `train.jsonl` in `config.output_dir` (Yuan et
    al., 2023, https://huggingface.co/papers/2308.01825).

    All sampled answers stay in its `chunks`. What is there is not sampled again, also with another
    `answers_per_prompt`; a run that was stopped ends with the bytes of one that was not, whatever the number of
    processes.

    Args:
        config ([`RejectionSamplingConfig`]):
            Options.

    Raises:
        `ValueError`: If data, model or what is in the folder do not fit, or nothing is kept.
    """
    if config.model_name_or_path is not None:
        folder, _ = work_through(
            config,
            [config.model_name_or_path],
            _Folder,
            lambda tokenizer, samplers: _Answers(config, tokenizer, *samplers),
        )
        folder.join()
    elif PartialState().is_main_process:
        path = Path(config.output_dir) / "train.jsonl"
        text = _written(_read_answers(config), config, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def _read_answers(config: RejectionSamplingConfig) -> list[dict[str, Any]]:
    """Answers that were sampled before."""
    dataset = load_rows(config.dataset_name, config.dataset_config, config.dataset_train_split)
    require_columns(dataset, "Without model_name_or_path, the data set", ["prompt", "completions", "outcome"])
    rows = dataset.to_list()
    for i, row in enumerate(rows):
        steps = row["completions"]
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise ValueError(f"completions of row {i} must be the list of the texts of its steps, got {steps!r}.")
        if not isinstance(row["outcome"], int | float | None):
            raise ValueError(f"outcome of row {i} must be a number, right above 0.5, got {row['outcome']!r}.")
    return rows
