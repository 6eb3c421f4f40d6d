"""The model that a PRM trainer starts from: loaded with the head of its kind, for TRL, which knows one kind."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ...functional.step_objectives import STEP_OBJECTIVES
from ...rewards.precision import HEADS, head_of
from ...rewards.process_reward_model import auto_class, require_fast
from ...rewards.step_format import StepFormat

_WITH_A_HEAD = ("ForTokenClassification", "ForSequenceClassification")


def load(given: dict[str, Any], step_format: StepFormat) -> dict[str, Any]:
    """
    The arguments of TRL's trainer from those of ours: model and tokenizer loaded, and what is then read left out.

    Args:
        given (`dict[str, Any]`):
            Arguments of the trainer, `args` among them.
        step_format ([`~trl_ext.rewards.StepFormat`]):
            Format that the options select.

    Raises:
        `ValueError`: If the model has other outputs, or the adapter leaves a new head out.
    """
    args, model = given["args"], given["model"]
    options = dict(args.model_init_kwargs or {}) if isinstance(model, str) else {}
    if isinstance(model, str):
        source = {
            "pretrained_model_name_or_path": model,
            "revision": options.get("revision"),
            "trust_remote_code": options.setdefault("trust_remote_code", args.trust_remote_code),
        }
        if find_adapter_config_file(model, revision=source["revision"]):
            raise ValueError(
                f"{model!r} is an adapter, which would be loaded frozen. Merge it into its base, or pass the model of "
                "PeftModel.from_pretrained(…, is_trainable=True)."
            )
    else:
        if args.model_init_kwargs is not None or given.get("quantization_config") is not None:
            raise ValueError(
                "model_init_kwargs and quantization_config say how a model is loaded, and this one is. Remove them, "
                "or give the model's name."
            )
        model_id = get_config_model_id(model.config)
        source = {"pretrained_model_name_or_path": model_id, "trust_remote_code": args.trust_remote_code}
    tokenizer = given.get("processing_class") or AutoTokenizer.from_pretrained(**source)
    require_fast(tokenizer, tokenizer.name_or_path)
    step_format.answer_ids(tokenizer)  # refuses two that are one
    config = AutoConfig.from_pretrained(**source) if isinstance(model, str) else model.config
    _check_adapter(given.get("peft_config") or _adapter_of(model), config, step_format)
    if isinstance(model, str):
        options |= _head_options(config, step_format)
        if quantization := _quantization(given.get("quantization_config"), options):
            options["quantization_config"] = quantization
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None  # as TRL does
        set_seed(args.seed)  # before the head is made
        model = create_model_from_path(model, auto_class(step_format, source, model), **options)
    _check_outputs(model, step_format)
    theirs = {name: value for name, value in given.items() if name != "quantization_config"}
    return {**theirs, "model": model, "processing_class": tokenizer}


def _has_a_head(config: Any) -> bool:
    names = getattr(config, "architectures", None) or []
    return any(name.endswith(_WITH_A_HEAD) for name in names) or "AutoModel" in getattr(config, "auto_map", {})


def _head_options(config: Any, step_format: StepFormat) -> dict[str, Any]:
    """The outputs of a new head. Two of them tell good from bad, so that the folder of an adapter needs no config."""
    if step_format.is_language_model or _has_a_head(config):
        return {}
    if not STEP_OBJECTIVES[step_format.objective].probability:
        return {"num_labels": 1}
    return {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


def _quantization(given: Any, options: dict[str, Any]) -> Any:
    """The configuration, with heads left out; of the two places in which it may be given, one."""
    inside = options.pop("quantization_config", None)
    if given is not None and inside is not None:
        raise ValueError("quantization_config is given twice: to the trainer and in model_init_kwargs. Remove one.")
    quantization = copy.deepcopy(inside if given is None else given)
    if hasattr(quantization, "llm_int8_skip_modules"):
        own = quantization.llm_int8_skip_modules or []
        quantization.llm_int8_skip_modules = [*own, *(name for name in HEADS if name not in own)]
    return quantization


def _adapter_of(model: Any) -> Any:
    """The configuration of the adapter that a model brings; `None` without one."""
    return getattr(model, "peft_config", {}).get("default") if not isinstance(model, str) else None


def _check_adapter(peft_config: Any, config: Any, step_format: StepFormat) -> None:
    if peft_config is None:
        return
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft_config).__name__} puts tokens of its own before the text, in which PRMTrainer finds the ends "
            "of the steps. Use LoRA."
        )
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    saved = getattr(peft_config, "modules_to_save", None) or []
    if not (step_format.is_language_model or _has_a_head(config) or task == "TOKEN_CLS" or {*saved} & {*HEADS}):
        raise ValueError(
            "peft_config does not train the new score head, which is random. Use task_type='TOKEN_CLS' "
            "(--lora_task_type TOKEN_CLS), or modules_to_save=['score']."
        )
    fitting = "CAUSAL_LM" if step_format.is_language_model else "TOKEN_CLS"
    if task not in (None, fitting):
        raise ValueError(
            f"task_type={task!r} does not fit kind={step_format.kind!r}; use {fitting!r} (--lora_task_type {fitting})."
        )


def _check_outputs(model: Any, step_format: StepFormat) -> None:
    """Refuses a head of another size. That of a model with code of its own shows in the first forward pass."""
    number = getattr(head_of(model, step_format.is_language_model), "out_features", None)
    if step_format.is_language_model or number is None:
        return
    if not STEP_OBJECTIVES[step_format.objective].probability:
        if number != 1:
            raise ValueError(f"A model trained with objective='regression' has 1 output; this one has {number}.")
    elif number not in (1, 2):
        raise ValueError(f"A token classifier for steps has 2 outputs (bad, good), or 1; this one has {number}.")


@contextmanager
def one_output(config: Any) -> Iterator[None]:
    """For TRL's constructor, which takes a model of one output: ours may have two, or a vocabulary of them."""
    names = config.id2label, config.label2id
    config.num_labels = 1
    try:
        yield
    finally:
        config.id2label, config.label2id = names
