"""How a prompt and its steps are written for a process-reward model, and where the number of each step is read."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from ..functional.step_objectives import STEP_OBJECTIVES

FILE = "process_reward_model.json"
# What a kind writes after each step. "chat" writes nothing: it answers each step with `good`.
SEPARATORS = {"token_classifier": "\n", "marker": "<extra_0>", "good_bad": " ки\n", "chat": ""}
_LANGUAGE_MODELS = ("good_bad", "chat")


def refuse_escapes(name: str, text: str) -> None:
    r"""
    Refuses `\n`, `\t` and `\r` written as two characters, unless a letter follows, as in LaTeX's `\nabla`. Shells, and
    YAML without double quotes, leave the backslash as it is; such a separator never occurs, and nothing would fail.
    """
    if re.search(r"\\[nrt](?![A-Za-z])", text):
        meant = text.encode("unicode_escape").decode().replace("\\\\", "\\")
        raise ValueError(
            f"{name} holds a backslash and a letter where a control character is meant, got {text!r}. Write "
            f"\"{meant}\" with double quotes in YAML, $'{meant}' in a shell."
        )


@dataclass(frozen=True)
class StepFormat:
    """
    The format of a model's steps, which training and scoring share; see [`~trl_ext.rewards.ProcessRewardModel`].

    Args:
        kind (`str`):
            `"token_classifier"`, `"marker"`, `"good_bad"` or `"chat"`.
        separator (`str`, *optional*):
            Text after each step. Default by kind.
        good, bad (`str`, *optional*):
            Answers of `"good_bad"` and `"chat"`, by default `"+"` and `"-"`.
        system_prompt (`str`, *optional*):
            System message, for `"marker"` and `"chat"`.
        objective (`str`, *optional*, defaults to `"classification"`):
            What the number of a step is: see [`~trl_ext.functional.STEP_OBJECTIVES`].

    Raises:
        `ValueError`: If an option is none of these, or one that the kind does not read.
    """

    kind: str
    separator: str | None = None
    good: str | None = None
    bad: str | None = None
    system_prompt: str | None = None
    objective: str = "classification"

    def __post_init__(self) -> None:
        kind = self.kind
        if kind not in SEPARATORS:
            raise ValueError(f"kind must be one of {sorted(SEPARATORS)}, got {kind!r}.")
        if self.objective not in STEP_OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(STEP_OBJECTIVES)}, got {self.objective!r}.")
        separator = SEPARATORS[kind] if self.separator is None else self.separator
        if (kind == "chat") != (separator == ""):
            raise ValueError(f"separator must be {'left out' if kind == 'chat' else 'a text'} for {kind!r}.")
        refuse_escapes("separator", separator)
        answers = {"good": self.good, "bad": self.bad}
        if not self.is_language_model and any(answer is not None for answer in answers.values()):
            raise ValueError(f"good and bad are answers of {_LANGUAGE_MODELS}; kind={kind!r} has outputs of its own.")
        if self.is_language_model:
            answers = {"good": "+" if self.good is None else self.good, "bad": "-" if self.bad is None else self.bad}
        if self.system_prompt is not None and kind not in ("marker", "chat"):
            raise ValueError(f"system_prompt is read by 'marker' and 'chat', whose text is a chat, not by {kind!r}.")
        if self.is_language_model and not STEP_OBJECTIVES[self.objective].probability:
            raise ValueError(
                f"objective={self.objective!r} needs an output of its own; kind={kind!r} has two answers. Use "
                "'token_classifier' or 'marker'."
            )
        for name, value in {**answers, "separator": separator}.items():
            object.__setattr__(self, name, value)

    @property
    def is_language_model(self) -> bool:
        """Whether good and bad are two tokens of a vocabulary, and not outputs of a head."""
        return self.kind in _LANGUAGE_MODELS

    # The file beside a trained model

    def save(self, folder: str | Path, **facts: Any) -> None:
        """Writes the format, and `facts` that only loading reads, to `folder`."""
        written = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.kind == "chat":
            del written["separator"]
        text = json.dumps({**written, **facts}, indent=2, ensure_ascii=False)
        Path(folder, FILE).write_text(text + "\n", encoding="utf-8")

    # Text

    def answer_ids(self, tokenizer: Any) -> list[int]:
        """
        The tokens of bad and good: the last of each, as a tokenizer may put a mark for the start of a word before it.
        None for a model with a head.
        """
        if not self.is_language_model:
            return []
        ids = [tokenizer(answer, add_special_tokens=False)["input_ids"][-1:] for answer in (self.bad, self.good)]
        if [] in ids or ids[0] == ids[1]:
            raise ValueError(
                f"good={self.good!r} and bad={self.bad!r} end in the same token of this tokenizer; choose two that "
                "differ."
            )
        return [answer for (answer,) in ids]

    def encode(self, tokenizer: Any, prompt: Any, steps: list[str]) -> tuple[list[int], list[int]]:
        """Token ids of prompt and steps, and for each step the token to read its number at."""
        separator = self.separator or ""
        marker = separator.strip()
        texts = [step.strip().removesuffix(marker).strip() for step in steps]
        messages = [_message("user", prompt)] if isinstance(prompt, str) else prompt
        messages = [{**message, "content": _text(message["content"])} for message in messages]
        if self.kind == "chat":
            return self._encode_chat(tokenizer, messages, texts)
        head = self._prompt_text(tokenizer, messages)
        if self.kind == "token_classifier":  # trained on pieces that were encoded one by one
            pieces = [head, *(piece for text in texts for piece in (text, separator))]
            ids = tokenizer(pieces, add_special_tokens=False)["input_ids"]
            ends = [sum(map(len, ids[: 2 * j + 3])) - 1 for j in range(len(texts))]
            start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            return [*start, *itertools.chain(*ids)], [len(start) + end for end in ends]
        text, places = head, []
        for step in texts:
            text += step + separator
            places.append(len(text) - len(separator) + len(separator.rstrip()))
        return self._ids_and_tokens(tokenizer, text, [place - 1 for place in places])

    def _encode_chat(self, tokenizer: Any, messages: list[dict], steps: list[str]) -> tuple[list[int], list[int]]:
        *before, question = ([] if self.system_prompt is None else [_message("system", self.system_prompt)]) + messages
        turns, starts = [*before], []
        for j, step in enumerate(steps):
            turns.append(_message("user", f"{question['content']} {step}" if j == 0 else step))
            starts.append(len(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
            turns.append(_message("assistant", self.good))
        if not steps:
            return [], []
        good = self.answer_ids(tokenizer)[1]
        ids, tokens = self._ids_and_tokens(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False), starts)
        for j, token in enumerate(tokens):
            if token is None or ids[token] != good:
                raise ValueError(
                    f"The chat template of {_name(tokenizer)!r} does not write the answer to step {j} where its "
                    "generation prompt ends, so that its score would be read inside other text. kind='chat' needs a "
                    "template that begins a conversation as it renders the beginning alone: save the model with one."
                )
        return ids, [token - 1 for token in tokens]

    def _prompt_text(self, tokenizer: Any, messages: list[dict]) -> str:
        """The prompt, through the chat template where the tokenizer has one and the model wants it."""
        if self.kind == "marker" and tokenizer.chat_template is not None:
            if self.system_prompt is not None:
                messages = [_message("system", self.system_prompt), *(m for m in messages if m["role"] != "system")]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if self.system_prompt is not None:
            raise ValueError(f"system_prompt needs a chat template, which {_name(tokenizer)!r} has not.")
        text = "\n".join(message["content"] for message in messages)
        return f"{text} " if self.kind == "good_bad" else text

    def _ids_and_tokens(self, tokenizer: Any, text: str, characters: list[int]) -> tuple[list[int], list[int]]:
        """Token ids of `text`, and the tokens in which these characters lie."""
        # A rendered chat brings its own special tokens.
        plain = self.kind == "good_bad" or tokenizer.chat_template is None
        encoded = tokenizer(text, add_special_tokens=plain)
        tokens = [encoded.char_to_token(character) for character in characters]
        if None in tokens and self.kind != "chat":
            raise ValueError(
                f"The tokenizer of {_name(tokenizer)!r} writes no token where step {tokens.index(None)} ends, so that "
                f"it has no score. Choose a separator that it keeps, got {self.separator!r}."
            )
        return encoded["input_ids"], tokens

    # Numbers

    def read(
        self, model: Any, head: Any, answer_ids: list[int], at: tuple[torch.Tensor, torch.Tensor], **inputs: Any
    ) -> torch.Tensor:
        """
        The number of each step: the log-odds of good against bad, or the one output of a model trained by regression.

        Args:
            model (`torch.nn.Module`):
                Model, or what wraps it in training.
            head (`torch.nn.Module`):
                Its last layer.
            answer_ids (`list[int]`):
                Those of [`answer_ids`].
            at (`tuple[torch.Tensor, torch.Tensor]`):
                Row and token of each step, `(n,)` each.
            inputs:
                What the model is called with.

        Returns:
            `torch.Tensor` of shape `(n,)`: float32.
        """
        if not self.is_language_model:
            logits = model(**inputs)[0][at].float()
            self._check_outputs(logits.size(-1))
        else:  # the head is given these hidden states alone: it has an output per word
            handle = head.register_forward_pre_hook(lambda module, args: (args[0][at][None],))
            try:
                logits = model(**inputs)[0][0][:, answer_ids].float()
            finally:
                handle.remove()
        return logits[:, 0] if logits.size(-1) == 1 else logits[:, 1] - logits[:, 0]

    def _check_outputs(self, number: int) -> None:
        """Refuses a head with another number of outputs than the objective has."""
        if number not in ((1, 2) if STEP_OBJECTIVES[self.objective].probability else (1,)):
            needs = "2 (bad, good), or 1" if STEP_OBJECTIVES[self.objective].probability else "1"
            raise ValueError(
                f"The model has {number} outputs per token; kind={self.kind!r} needs {needs} with "
                f"objective={self.objective!r}."
            )


def saved_facts(model: str, revision: str | None = None) -> dict[str, Any]:
    """
    What the file beside a trained model says; nothing where there is none.

    Args:
        model (`str`):
            Folder or model id.
        revision (`str`, *optional*):
            Revision of a model id.

    Raises:
        `ValueError`: If there is one that cannot be read.
    """
    path = cached_file(
        model,
        FILE,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Write it again, or remove it and give kind.") from error
    if not isinstance(facts, dict) or "kind" not in facts:
        raise ValueError(f"{path} must hold a mapping with 'kind', got {facts!r}.")
    return facts


def format_of(model: str, given: Mapping[str, Any], facts: Mapping[str, Any]) -> StepFormat:
    """
    The format from what the caller gives and, where that is `None`, from the file beside the model.

    Raises:
        `ValueError`: If the two contradict each other.
    """
    names = [field.name for field in dataclasses.fields(StepFormat)]
    saved = {name: facts[name] for name in names if name in facts}
    for name, ours in given.items():
        if ours is not None and name in saved and ours != saved[name]:
            refuse_contradiction(model, name, saved[name], ours)
    options = saved | {name: value for name, value in given.items() if value is not None}
    if "kind" not in options:
        raise ValueError(f"{model!r} has no {FILE} that says what kind it is; give kind, one of {sorted(SEPARATORS)}.")
    return StepFormat(**options)


def refuse_contradiction(model: str, option: str, theirs: Any, ours: Any) -> None:
    raise ValueError(f"{model!r} was trained with {option}={theirs!r}, got {ours!r}. Leave it out, or train again.")


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path.rstrip("/").split("/")[-1]


def _message(role: str, content: Any) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(content: Any) -> str:
    """The text of a message, of which TRL makes a list of blocks for models with images."""
    if isinstance(content, str | None):
        return content or ""
    kinds = {block["type"] for block in content}
    if kinds - {"text"}:
        raise ValueError(f"A process-reward model reads text alone, but the prompt holds blocks of {sorted(kinds)}.")
    return "".join(block["text"] for block in content)
