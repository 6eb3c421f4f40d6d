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
        device (`str`, *optional*):
            Where the model is loaded, such as `"cpu"`. Default: the trainer's device.

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
        device: str | None = None,
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
        self.load_in_4bit, self.dtype, self.device = load_in_4bit, dtype, device
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
        """Loads tokenizer and model onto their device. Doing so again changes nothing."""
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
        device = torch.device(self.device) if self.device else PartialState().device
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
        scores: list[list[float | None]] = [[None] * len(places) for _, places in batch]
        steps = [(row, j) for row, (_, places) in enumerate(batch) for j, place in enumerate(places) if place < width]
        if not steps:
            return scores
        rows, columns = torch.tensor([(row, batch[row][1][j]) for row, j in steps], device=device).T
        logits = self._logits((rows, columns), input_ids=input_ids.to(device), attention_mask=mask.to(device))
        if logits.size(-1) == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=-1)
        good = logits.float().softmax(-1)[:, 1].cpu()
        good = 2 * good - 1 if self.score == "difference" else good
        for (row, j), score in zip(steps, good.tolist(), strict=True):
            scores[row][j] = score
        return scores

    def _logits(self, at: tuple[torch.Tensor, torch.Tensor], **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of bad and good, or of good alone, at these rows and tokens: `(places, 2)` or `(places, 1)`."""
        if self.kind in ("good_bad", "chat"):
            # The head of a language model is given these hidden states alone: it has an output per word.
            head = self.model.get_output_embeddings()
            handle = head.register_forward_pre_hook(lambda module, args: (args[0][at][None],))
            try:
                return self.model(**inputs)[0][0][:, self.answer_ids]
            finally:
                handle.remove()
        logits = self.model(**inputs)[0][at]
        if logits.size(-1) not in (1, 2):
            raise ValueError(
                f"{self.__name__!r} has {logits.size(-1)} outputs per token; kind={self.kind!r} needs 2 (bad, "
                "good), or 1."
            )
        return logits

    def _encode(self, prompt: Any, steps: list[str]) -> tuple[list[int], list[int]]:
        """Token ids of prompt and steps in the model's format, and for each step the token to read its score at."""
        marker = self.separator.strip()
        texts = [step.strip().removesuffix(marker).strip() for step in steps]
        messages = [_message("user", prompt)] if isinstance(prompt, str) else prompt
        messages = [{**message, "content": _text(message["content"])} for message in messages]
        if self.kind == "chat":
            return self._encode_chat(messages, texts)
        head = self._prompt_text(messages)
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

    def _encode_chat(self, messages: list[dict], steps: list[str]) -> tuple[list[int], list[int]]:
        *before, question = ([] if self.system_prompt is None else [_message("system", self.system_prompt)]) + messages
        turns, starts = [*before], []
        for j, step in enumerate(steps):
            turns.append(_message("user", f"{question['content']} {step}" if j == 0 else step))
            starts.append(len(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
            turns.append(_message("assistant", self.answers[1]))
        if not steps:
            return [], []
        ids, tokens = self._ids_and_tokens(self.tokenizer.apply_chat_template(turns, tokenize=False), starts)
        for j, token in enumerate(tokens):
            if token is None or ids[token] != self.answer_ids[1]:
                raise ValueError(
                    f"The chat template of {self.__name__!r} does not write the answer to step {j} where its "
                    "generation prompt ends, so that its score would be read inside other text. kind='chat' needs a "
                    "template that begins a conversation as it renders the beginning alone: save the model with one."
                )
        return ids, [token - 1 for token in tokens]

    def _prompt_text(self, messages: list[dict]) -> str:
        """The prompt, through the chat template where the tokenizer has one and the model wants it."""
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
        if None in tokens and self.kind != "chat":
            raise ValueError(
                f"The tokenizer of {self.__name__!r} writes no token where step {tokens.index(None)} ends, so that it "
                f"has no score. Choose a separator that it keeps, got {self.separator!r}."
            )
        return encoded["input_ids"], tokens


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(content: Any) -> str:
    """The text of a message, of which TRL makes a list of blocks for models with images."""
    if isinstance(content, str | None):
        return content or ""
    kinds = {block["type"] for block in content}
    if kinds - {"text"}:
        raise ValueError(f"A process-reward model reads text alone, but the prompt holds blocks of {sorted(kinds)}.")
    return "".join(block["text"] for block in content)
