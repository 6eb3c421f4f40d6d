"""Process-reward models as reward functions: one number per reasoning step, for models that TRL cannot take."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.utils import find_adapter_config_file

from ..functional.step_objectives import STEP_OBJECTIVES
from ..sharded import not_divided
from .precision import Precision, four_bit, head_of
from .step_format import StepFormat, format_of, refuse_contradiction, saved_facts

_SCORES = ("probability", "difference", "value")


def auto_class(step_format: StepFormat, source: dict[str, Any], name: str) -> Any:
    """The class of transformers that loads a model of this format, with its head."""
    if step_format.is_language_model:
        return AutoModelForCausalLM
    if step_format.kind == "marker" and "AutoModel" in _config(source).get("auto_map", {}):
        if not source["trust_remote_code"]:  # transformers would load a model without the head
            raise ValueError(f"{name!r} brings its own code. Read it, then set trust_remote_code=True and a revision.")
        return AutoModel  # the repository's own class
    return AutoModelForTokenClassification


def _config(source: dict[str, Any]) -> dict[str, Any]:
    """The config of a model or, for an adapter, of its base, as it is written: no code is run."""
    name, options = source["pretrained_model_name_or_path"], {"revision": source.get("revision")}
    if adapter := find_adapter_config_file(name, **options):
        name, options = json.loads(Path(adapter).read_text())["base_model_name_or_path"], {}
    return PretrainedConfig.get_config_dict(name, **options)[0]


def _adapter(source: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter as they were saved; nothing of a whole model."""
    name, revision = source["pretrained_model_name_or_path"], source["revision"]
    if not find_adapter_config_file(name, revision=revision):
        return {}
    from peft import load_peft_weights

    return load_peft_weights(name, device="cpu", revision=revision)


def require_fast(tokenizer: Any, name: str) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"{name!r} has no fast tokenizer, which is needed to find the ends of the steps.")


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

    A model that [`~trl_ext.PRMTrainer`] has trained brings a file that says all this, and the precision it was trained
    in; then `model` is enough, and what contradicts the file is refused.

    Args:
        model (`str`):
            Model id or folder.
        kind (`str`, *optional*):
            One of the above. Needed where the model brings no file.
        separator (`str`, *optional*):
            Text after each step; a step's own surrounding white space is removed. Default by kind: a line break,
            `"<extra_0>"`, `" ки\n"`. Not for `"chat"`.
        good, bad (`str`, *optional*):
            The two tokens of `"good_bad"` and `"chat"`; by default `"+"` and `"-"`.
        score (`str`, *optional*):
            `"probability"`: \\(P(\text{good})\\), in [0, 1]. `"difference"`: \\(P(\text{good})-P(\text{bad})\\), in
            [−1, 1]. `"value"`: the one output itself, of a model trained by regression. Default: `"value"` for such a
            model, else `"probability"`.
        system_prompt (`str`, *optional*):
            System message before the prompt, for `"chat"`, and for `"marker"` with a chat template.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions per forward pass.
        max_length (`int`, *optional*):
            Largest number of tokens of prompt and completion together. Default: the model's own.
        load_in_4bit (`bool`, *optional*):
            Quantise the weights to 4-bit NF4 with bitsandbytes. Default: as it was trained, else not.
        dtype (`str`, *optional*):
            Precision of the weights. Default: as it was trained, mixed precision included; else that of the files.
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
        kind: str | None = None,
        separator: str | None = None,
        good: str | None = None,
        bad: str | None = None,
        score: str | None = None,
        system_prompt: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        load_in_4bit: bool | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
    ):
        if score is not None and score not in _SCORES:
            raise ValueError(f"score must be one of {list(_SCORES)}, got {score!r}.")
        for name, number in (("batch_size", batch_size), ("max_length", max_length or 1)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a positive whole number, got {number!r}.")
        facts = saved_facts(model, revision)
        given = {"kind": kind, "separator": separator, "good": good, "bad": bad, "system_prompt": system_prompt}
        self.format = format_of(model, given | {"objective": _objective(model, score, facts)}, facts)
        self.score = score or ("probability" if STEP_OBJECTIVES[self.format.objective].probability else "value")
        self.precision = Precision(**facts.get("precision", {}))
        trained_in = self.precision.quantization
        if load_in_4bit is not None and trained_in is not None and load_in_4bit != trained_in["load_in_4bit"]:
            refuse_contradiction(model, "load_in_4bit", trained_in["load_in_4bit"], load_in_4bit)
        self.quantization = BitsAndBytesConfig.from_dict(trained_in) if trained_in else four_bit(load_in_4bit)
        if dtype is not None:  # the caller's own choice
            self.precision = Precision(weights=dtype)
        self.batch_size, self.max_length = batch_size, max_length
        self.source: dict[str, Any] = {
            "pretrained_model_name_or_path": model,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        self.device = device
        self.model: Any = None
        self.__name__ = model.rstrip("/").split("/")[-1]

    @classmethod
    def from_options(cls, options: Any) -> "ProcessRewardModel":
        """An instance from the mapping of a config. No model is loaded."""
        if not isinstance(options, dict):
            raise ValueError(f"process_reward_model must be a mapping of option to value, got {options!r}.")
        known = inspect.signature(cls).parameters
        for key in options:
            if key not in known:
                raise ValueError(f"process_reward_model has no {key!r}; it takes {sorted(known)}.")
        if not isinstance(options.get("model"), str):
            raise ValueError("process_reward_model needs 'model', a folder or a model id.")
        return cls(**options)

    def load(self) -> None:
        """Loads tokenizer and model onto their device. Doing so again changes nothing."""
        if self.model is not None:
            return
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        require_fast(self.tokenizer, self.__name__)
        self.answer_ids = self.format.answer_ids(self.tokenizer)
        device = torch.device(self.device) if self.device else PartialState().device
        options: dict[str, Any] = {"dtype": self.precision.weights}
        if self.format.objective == "regression":
            options["num_labels"] = 1  # the folder of an adapter does not say how many
        if self.quantization is not None:
            options |= {"quantization_config": self.quantization, "device_map": {"": device}}
        with not_divided():
            model = auto_class(self.format, self.source, self.__name__).from_pretrained(**self.source, **options)
        self.model = (model if self.quantization is not None else model.to(device)).eval()
        self.head = head_of(self.model, self.format.is_language_model)
        self.precision.apply(self.model, self.head, _adapter(self.source))

    def __call__(self, prompts: list, completion_steps: list[list[str]], **kwargs: Any) -> list[list[float | None]]:
        """Scores of the steps of each completion, `None` beyond `max_length`."""
        self.load()
        encode = self.format.encode
        encoded = [encode(self.tokenizer, *texts) for texts in zip(prompts, completion_steps, strict=True)]
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
        cut = [torch.tensor(ids[:width]) for ids, _ in batch]
        input_ids = pad_sequence(cut, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in cut], batch_first=True)
        device = next(self.model.parameters()).device
        scores: list[list[float | None]] = [[None] * len(places) for _, places in batch]
        steps = [(row, j) for row, (_, places) in enumerate(batch) for j, place in enumerate(places) if place < width]
        if not steps:
            return scores
        rows, columns = torch.tensor([(row, batch[row][1][j]) for row, j in steps], device=device).T
        inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
        with self.precision.context(device):
            numbers = self.format.read(self.model, self.head, self.answer_ids, (rows, columns), **inputs)
        for (row, j), number in zip(steps, self._as_scores(numbers).tolist(), strict=True):
            scores[row][j] = number
        return scores

    def _as_scores(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.score == "value":
            return numbers
        good = numbers.sigmoid()
        return 2 * good - 1 if self.score == "difference" else good


def _objective(model: str, score: str | None, facts: dict[str, Any]) -> str | None:
    """The objective that a score belongs to; refused if the model was trained for another."""
    if score is None:
        return None
    ours = "regression" if score == "value" else "classification"
    theirs = facts.get("objective", ours)
    if theirs != ours:
        raise ValueError(
            f"{model!r} was trained with objective={theirs!r}, which score={score!r} does not fit. Leave it out."
        )
    return ours
