"""A trained LM head under FSDP2: what is warned of, and what is left behind. The gradients: `test_engines.py`."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_ext.trainers.trained_head import trained_head, warn_of_trained_head


def trainer_of(path, **options):
    base = AutoModelForCausalLM.from_pretrained(path)
    add_fused_lm_head(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **options)) if options else base
    return SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda model: model))


def test_an_adapter_that_trains_the_head_is_warned_of_where_the_gradient_is_trls(tiny_model):
    with pytest.warns(UserWarning, match=r"FSDP2 divides the LM head .* With any option of trl_ext it is right"):
        warn_of_trained_head(trainer_of(tiny_model, modules_to_save=["lm_head"]))


@pytest.mark.parametrize("options", [{}, {"task_type": "CAUSAL_LM"}])
def test_other_heads_are_not(tiny_model, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warn_of_trained_head(trainer_of(tiny_model, **options))


def test_a_head_that_is_whole_is_left_alone_and_nothing_stays_behind(tiny_model):
    trainer = trainer_of(tiny_model)
    model, ids = trainer.model, torch.tensor([[2, 3, 4]])
    before = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    with trained_head(trainer):
        during = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        with pytest.raises(AttributeError):  # in the middle of a forward
            model(input_ids=ids, labels=ids, fused_lm_head=True, attention_mask="no mask")
        assert "get_output_embeddings" not in vars(model)
    assert torch.equal(before, during)
    assert not model._forward_hooks and not model._forward_pre_hooks
