"""Process-reward models as reward functions: one number per reasoning step, for models that TRL cannot take."""

import inspect
import itertools
import math
import re
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

_SCORES = ("probability", "difference")
# What a kind writes after each step. "chat" writes nothing: it answers each step with `good`.
_SEPARATORS = {"token_classifier": "\n", "marker": "<extra_0>", "good_bad": " ки\n", "chat": ""}


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


class ProcessRewardModel:
    r"""
    A process-reward model (PRM) that scores every step of a completion.

    Pass an instance in `reward_funcs`, or its options as `process_reward_model` of the config. The model reads prompt
    and `completion_steps` as text through its own tokenizer; steps are written in its own format, with `separator` in
    place of the policy's. A text longer than `max_length` is cut, and its last steps are not scored (`None`).

    `kind` says what the model looks like and where a score is read:

    - `"token_classifier"`: a token classification model with 2 labels (bad, good; the former `PRMTrainer` of TRL), or
      1 (a logit). Read at the last token of the separator.
    - `"marker"`: the same head, or a model whose `AutoModel` returns two logits per token (Qwen2.5-Math-PRM). Read at
      the marker after each step.
    - `"good_bad"`: a language model that predicts a good or a bad token (Math-Shepherd). Read at the last visible
      character of the separator.
    - `"chat"`: a language model in which steps are user turns and `good` answers each (RLHFlow). Read at the token
      before the answer.

    Good and bad are the only two outcomes: their probabilities add up to 1.

    Args:
        model (`str`):
            Model id or folder.
        kind (`str`):
            One of the above.
        separator (`str`, *optional*):
            Text after each step; a step's own surrounding white space is removed. Default by kind: a line break,
            `"<extra_0>"`, `" ки\n"`. Not for `"chat"`.
        good, bad (`str`, *optional*, defaults to `"+"` and `"-"`):
            The two tokens of `"good_bad"` and `"chat"`.
        score (`str`, *optional*, defaults to `"probability"`):
            `"probability"`: \\(P(\text{good})\\), in [0, 1]. `"difference"`: \\(P(\text{good})-P(\text{bad})\\), in
            [−1, 1].
        system_prompt (`str`, *optional*):
            System message before the prompt, for tokenizers with a chat template.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions per forward pass.
        max_length (`int`, *optional*):
            Largest number of tokens of prompt and completion together. Default: the model's own.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Quantise the weights to 4-bit NF4 with bitsandbytes.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights.
        revision (`str`, *optional*):
            Revision of model and tokenizer.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that the model repository contains.

    Raises:
        `ValueError`: If an option is outside the values above.
    """

    def __init__(
        self,
        model: str,
        kind: str,
        separator: str | None = None,
        good: str = "+",
        bad: str = "-",
        score: str = "probability",
        system_prompt: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        load_in_4bit: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        if kind not in _SEPARATORS:
            raise ValueError(f"kind must be one of {sorted(_SEPARATORS)}, got {kind!r}.")
        if score not in _SCORES:
            raise ValueError(f"score must be one of {list(_SCORES)}, got {score!r}.")
        separator = _SEPARATORS[kind] if separator is None else separator
        if (kind == "chat") != (separator == ""):
            raise ValueError(f"separator must be {'left out' if kind == 'chat' else 'a text'} for {kind!r}.")
        refuse_escapes("separator", separator)
        for name, value in (("batch_size", batch_size), ("max_length", max_length or 1)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        self.kind, self.separator, self.answers, self.score = kind, separator, (bad, good), score
        self.system_prompt, self.batch_size, self.max_length = system_prompt, batch_size, max_length
        self.source: dict[str, Any] = {
            "pretrained_model_name_or_path": model,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        self.load_in_4bit, self.dtype = load_in_4bit, dtype
        self.model: Any = None
        self.__name__ = model.rstrip("/").split("/")[-1]

    @classmethod
    def from_options(cls, options: Any) -> "ProcessRewardModel":
        """An instance from the mapping of a config. Nothing is loaded."""
        if not isinstance(options, dict):
            raise ValueError(f"process_reward_model must be a mapping of option to value, got {options!r}.")
        known = inspect.signature(cls).parameters
        for key in options:
            if key not in known:
                raise ValueError(f"process_reward_model has no {key!r}; it takes {sorted(known)}.")
        for key in ("model", "kind"):
            if key not in options:
                raise ValueError(f"process_reward_model needs {key!r}.")
        return cls(**options)

    def load(self) -> None:
        """Loads tokenizer and model onto the trainer's device. Doing so again changes nothing."""
        if self.model is not None:
            return
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{self.__name__!r} has no fast tokenizer, which is needed to find the ends of the steps."
            )
        predicts_tokens = self.kind in ("good_bad", "chat")
        auto_class: Any = AutoModelForCausalLM if predicts_tokens else AutoModelForTokenClassification
        if self.kind == "marker" and "AutoModel" in getattr(AutoConfig.from_pretrained(**self.source), "auto_map", {}):
            auto_class = AutoModel  # the repository's own class, with the head
            if not self.source["trust_remote_code"]:  # transformers would load a model without the head
                raise ValueError(
                    f"{self.__name__!r} brings its own code. Read it, then set trust_remote_code=True and a revision."
                )
        device = PartialState().device
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=["lm_head", "score", "classifier"],  # small heads, read for their exact value
            )
            options["device_map"] = {"": device}
        model = auto_class.from_pretrained(**self.source, **options)
        self.model = (model if self.load_in_4bit else model.to(device)).eval()
        self.answer_ids = [self._answer_id(answer) for answer in self.answers]

    def _answer_id(self, answer: str) -> int:
        """The last token of `answer` (a tokenizer may put a mark for the start of a word before it)."""
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"][-1]

    def __call__(self, prompts: list, completion_steps: list[list[str]], **kwargs: Any) -> list[list[float | None]]:
        """Scores of the steps of each completion, `None` beyond `max_length`."""
        self.load()
        encoded = [self._encode(prompt, steps) for prompt, steps in zip(prompts, completion_steps, strict=True)]
        scores: list[list[float | None]] = [[] for _ in encoded]
        # Of like length together, so that little is padded. Completions without steps need no pass.
        order = sorted((i for i, (_, places) in enumerate(encoded) if places), key=lambda i: len(encoded[i][0]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for i, values in zip(rows, self._scores([encoded[i] for i in rows]), strict=True):
                scores[i] = values
        return scores

    @torch.inference_mode()
    def _scores(self, batch: list[tuple[list[int], list[int]]]) -> list[list[float | None]]:
        """Scores at the places of each row of token ids. The model is causal, so padding on the right is not seen."""
        limit = self.max_length or getattr(self.model.config, "max_position_embeddings", None) or math.inf
        width = int(min(max(len(ids) for ids, _ in batch), limit))
        lengths = torch.tensor([min(len(ids), width) for ids, _ in batch])
        input_ids = torch.full((len(batch), width), self.tokenizer.pad_token_id or 0)
        for row, (ids, _) in enumerate(batch):
            input_ids[row, : lengths[row]] = torch.tensor(ids[:width])
        mask = (torch.arange(width) < lengths[:, None]).long()
        device = next(self.model.parameters()).device
        logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device))[0]
        if self.kind in ("good_bad", "chat"):
            logits = logits[..., self.answer_ids]
        elif logits.size(-1) == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=-1)
        elif logits.size(-1) != 2:
            raise ValueError(
                f"{self.__name__!r} has {logits.size(-1)} outputs per token; kind={self.kind!r} needs 2 (bad, "
                "good), or 1."
            )
        good = logits.float().softmax(-1)[..., 1].cpu()
        good = 2 * good - 1 if self.score == "difference" else good
        return [
            [good[row, place].item() if place < width else None for place in places]
            for row, (_, places) in enumerate(batch)
        ]

    def _encode(self, prompt: Any, steps: list[str]) -> tuple[list[int], list[int]]:
        """Token ids of prompt and steps in the model's format, and for each step the token to read its score at."""
        marker = self.separator.strip()
        texts = [step.strip().removesuffix(marker).strip() for step in steps]
        if self.kind == "chat":
            return self._encode_chat(prompt, texts)
        head = self._prompt_text(prompt)
        if self.kind == "token_classifier":  # trained on pieces that were encoded one by one
            pieces = [self._ids(head), *(self._ids(piece) for text in texts for piece in (text, self.separator))]
            ends = [sum(map(len, pieces[: 2 * j + 3])) - 1 for j in range(len(texts))]
            start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
            return [*start, *itertools.chain(*pieces)], [len(start) + end for end in ends]
        text, places = head, []
        for step in texts:
            text += step + self.separator
            places.append(len(text) - len(self.separator) + len(self.separator.rstrip()))
        return self._ids_and_tokens(text, [place - 1 for place in places])

    def _encode_chat(self, prompt: Any, steps: list[str]) -> tuple[list[int], list[int]]:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        *before, question = ([] if self.system_prompt is None else [_message("system", self.system_prompt)]) + messages
        turns, starts = [*before], []
        for j, step in enumerate(steps):
            turns.append(_message("user", f"{question['content']} {step}" if j == 0 else step))
            starts.append(len(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
            turns.append(_message("assistant", self.answers[1]))
        if not steps:
            return [], []
        ids, tokens = self._ids_and_tokens(self.tokenizer.apply_chat_template(turns, tokenize=False), starts)
        return ids, [token - 1 for token in tokens]

    def _prompt_text(self, prompt: Any) -> str:
        """The prompt, through the chat template where the tokenizer has one and the model wants it."""
        messages = prompt if isinstance(prompt, list) else [_message("user", prompt)]
        if self.kind == "marker" and self.tokenizer.chat_template is not None:
            if self.system_prompt is not None:
                messages = [_message("system", self.system_prompt), *(m for m in messages if m["role"] != "system")]
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = "\n".join(message["content"] for message in messages)
        return f"{text} " if self.kind == "good_bad" else text

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _ids_and_tokens(self, text: str, characters: list[int]) -> tuple[list[int], list[int]]:
        """Token ids of `text`, and the tokens in which these characters lie."""
        # A rendered chat brings its own special tokens.
        plain = self.kind == "good_bad" or self.tokenizer.chat_template is None
        encoded = self.tokenizer(text, add_special_tokens=plain)
        tokens = [encoded.char_to_token(character) for character in characters]
        if None in tokens:
            raise ValueError(
                f"The tokenizer of {self.__name__!r} writes no token where step {tokens.index(None)} ends, so that it "
                f"has no score. Choose a separator that it keeps, got {self.separator!r}."
            )
        return encoded["input_ids"], tokens


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
