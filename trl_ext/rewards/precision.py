"""The precision that a process-reward model was trained in, so that it scores with the same numbers afterwards."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import BitsAndBytesConfig

HEADS = ("lm_head", "score", "classifier")  # small, and read for their exact value: never quantised


def head_of(model: Any, is_language_model: bool) -> torch.nn.Module:
    """The layer that makes a model's logits."""
    if is_language_model:
        return model.get_output_embeddings()
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return next(getattr(model, name) for name in HEADS if hasattr(model, name))


def four_bit(wanted: bool | None) -> BitsAndBytesConfig | None:
    """The quantisation, if wanted, of a model that was not trained in 4-bit."""
    if not wanted:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*HEADS],
    )


@dataclass(frozen=True)
class Precision:
    """
    Precision of each part of a model, as names of torch's dtypes; `None` where there is nothing to say.

    Args:
        weights (`str`, *optional*, defaults to `"auto"`):
            Of what is not quantised.
        adapter, head (`str`, *optional*):
            Of the adapter's matrices; of the head.
        autocast (`str`, *optional*):
            Of mixed precision.
        quantization (`dict`, *optional*):
            The configuration of bitsandbytes.
    """

    weights: str = "auto"
    adapter: str | None = None
    head: str | None = None
    autocast: str | None = None
    quantization: dict[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, model: Any, head: torch.nn.Module, mixed_precision: str) -> "Precision":
        """That of a model in training; `mixed_precision` is accelerate's word for it."""
        adapter = [p for name, p in _adapter_parameters(model) if p.requires_grad]
        quantization = getattr(model.config, "quantization_config", None)
        if quantization is not None and not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        is_bitsandbytes = quantization is not None and quantization.get("quant_method") == "bitsandbytes"
        return cls(
            weights=_name(model.get_input_embeddings().weight.dtype),
            adapter=_name(adapter[0].dtype) if adapter else None,
            head=_name(next(head.parameters()).dtype),
            autocast={"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision),
            quantization=quantization if is_bitsandbytes else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what there is to say."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def apply(self, model: Any, head: torch.nn.Module, adapter: Mapping[str, torch.Tensor]) -> None:
        """
        Gives adapter and head of a model that was loaded the precision that they were trained in.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Model with its adapter, if it has one.
            head (`torch.nn.Module`):
                Its last layer.
            adapter (`Mapping[str, torch.Tensor]`):
                The adapter as it was saved: transformers has read it in the precision of the weights.
        """
        if self.adapter is not None:
            for _, parameter in _adapter_parameters(model):
                parameter.data = parameter.data.to(getattr(torch, self.adapter))
        dtype = next(head.parameters()).dtype if self.head is None else getattr(torch, self.head)
        keep_head_in(dtype, model, head)
        if adapter and (self.adapter is not None or self.head is not None):
            from peft import set_peft_model_state_dict

            state = {name.removeprefix("base_model.model."): value for name, value in adapter.items()}
            set_peft_model_state_dict(model, state)

    def context(self, device: torch.device) -> AbstractContextManager:
        """Mixed precision, around the forward pass of a model."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.autocast))


def keep_head_in(dtype: torch.dtype, model: Any, head: torch.nn.Module) -> None:
    """A head of this precision above layers of any: without mixed precision, nothing else would cast its input."""
    for parameter in head.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if model.get_input_embeddings().weight.dtype != dtype:
        head.register_forward_pre_hook(lambda module, args: (args[0].to(dtype), *args[1:]))


def _adapter_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The matrices of adapters. PEFT keeps DoRA's magnitudes in float32, and heads are told apart."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" in name and "lora_magnitude_vector" not in name
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
