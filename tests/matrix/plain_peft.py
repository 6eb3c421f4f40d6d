"""
Reads what the matrix has saved by transformers and PEFT alone, in a process that never imports trl_ext or TRL:

    python plain_peft.py FOLDER

`FOLDER` holds `cells.json`, a list of `{model, saved, four_bit}`, and `logits.pt`, what the trainers' models answer.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@torch.no_grad()
def probe(model) -> torch.Tensor:
    """Logits of some rows of tokens. There is no dropout; for the mode, see `cells.load`."""
    model.train()
    ids = (torch.arange(24).view(3, 8) * 5) % 19 + 2
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def load(model: str, saved: str, four_bit: bool):
    if not Path(saved, "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    quantization = None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=quantization)
    loaded = PeftModel.from_pretrained(base, saved)
    for name, parameter in loaded.named_parameters():
        # TRL trains the adapter of a quantised model in bfloat16; PEFT reads the same values in float32.
        if four_bit and "lora_" in name:
            assert torch.equal(parameter, parameter.bfloat16().float())
            parameter.data = parameter.data.bfloat16()
    return loaded


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    expected = torch.load(folder / "logits.pt")
    for cell, logits in zip(json.loads((folder / "cells.json").read_text()), expected, strict=True):
        torch.testing.assert_close(
            probe(load(**cell)), logits, atol=0, rtol=0, msg=lambda text, c=cell: f"{c}: {text}"
        )
    assert not {"trl", "trl_ext"} & {name.partition(".")[0] for name in sys.modules}
    print(len(expected))
