"""Packed rows below TRL's fused head: exact for whole families of models, and TRL's forward where they are not."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.utils import add_fused_lm_head

from trl_ext.packed import verdict
from trl_ext.packed.attention import NAME
from trl_ext.packed.forward import install, shared_prefix_of

SIZE = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
        "eos_token_id": 1}  # fmt: skip
FAST = {
    "Llama": {}, "Qwen2": {"use_sliding_window": False}, "Qwen3": {"head_dim": 16}, "Gemma3Text": {"head_dim": 16},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "Qwen3Moe": {**EXPERTS, "head_dim": 16}, "DeepseekV3": MLA,
}  # fmt: skip
SLOW = {
    "Mistral": {}, "Gemma": {"head_dim": 16}, "Phi": {}, "Phi3": {}, "Olmo2": {}, "Olmo3": {}, "Granite": {},
    "SmolLM3": {}, "Starcoder2": {}, "Cohere": {}, "Cohere2": {"head_dim": 16}, "Glm4": {"head_dim": 16},
    "Exaone4": {}, "Ministral": {"head_dim": 16}, "GPTNeoX": {},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 32}, "Mixtral": {"num_local_experts": 4},
    "Lfm2": {"layer_types": ["full_attention"] * 2},
}  # fmt: skip


def model(family="Llama", head=True, dtype=torch.float32, **changes):
    """A tiny model, enlarged so that log-probs spread by about a nat: with small weights no neighbour is seen."""
    known = GPT2 if family == "GPT2" else SIZE
    config = getattr(transformers, f"{family}Config")(**{**known, **changes})
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    made = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    if head:
        add_fused_lm_head(made, outputs=("log_probs", "entropy", "mean_logits", "is_top1"), temperature=0.8)
    return made.to(dtype).eval()


def batch(prompt=14, completions=(3, 4, 5), prompts=2, left=0):
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(2, 40, (prompts, prompt), generator=generator)
    ids = torch.zeros(prompts * len(completions), left + prompt + max(completions), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i in range(len(ids)):
        n = completions[i % len(completions)]
        ids[i, left : left + prompt] = starts[i // len(completions)]
        labels[i, left + prompt : left + prompt + n] = torch.randint(2, 40, (n,), generator=generator)
    ids = torch.where(labels != -100, labels, ids)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "fused_lm_head": True}


def results(made, inputs):
    """Output, and the gradient of a loss of its log-probs."""
    made.zero_grad()
    output = made(**inputs)
    output.log_probs.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
    return output, gradient


@pytest.mark.parametrize(
    ("family", "changes"), [*FAST.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())]
)
def test_a_family_is_exact(family, changes):
    made, inputs = model(family, **changes), batch(left=2)
    expected, expected_gradient = results(made, inputs)
    scored = expected.log_probs[inputs["labels"][:, 1:] != -100]
    assert scored.std() > (0.03 if family.startswith("Cohere") else 0.3)
    shared = install(made)
    output, gradient = results(made, inputs)
    assert shared.reason is None and shared.counts == {
        "packed": 1, "padded": 0, "packed_tokens": 2 * 13 + 2 * 12, "padded_tokens": inputs["input_ids"].numel(),
    }  # fmt: skip
    for name in ("loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask"):
        ours, theirs = getattr(output, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=name)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


# Laws


def log_probs(made, inputs):
    with torch.no_grad():
        return made(**inputs).log_probs


def test_permuted_rows_give_permuted_log_probs():
    made, inputs = model(), batch()
    install(made)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = {name: x[order] if torch.is_tensor(x) else x for name, x in inputs.items()}
    torch.testing.assert_close(log_probs(made, permuted), log_probs(made, inputs)[order], atol=2e-6, rtol=0)


def test_a_rows_log_probs_do_not_depend_on_its_neighbours():
    made, inputs = model(), batch()
    install(made)
    before = log_probs(made, inputs)
    inputs["input_ids"][1:, 14:] = torch.where(inputs["labels"][1:, 14:] != -100, 9, 0)
    inputs["labels"][1:, 14:] = torch.where(inputs["labels"][1:, 14:] != -100, 9, -100)
    after = log_probs(made, inputs)
    torch.testing.assert_close(after[0], before[0], atol=2e-6, rtol=0)
    assert (after[1:] - before[1:]).abs().max() > 0.1


def test_a_token_of_one_row_does_not_reach_another():
    made, inputs = model(), batch()
    install(made)
    embedded = []
    made.get_input_embeddings().register_forward_hook(lambda m, i, out: embedded.append(out.requires_grad_()) or out)
    made.requires_grad_(False)
    made(**inputs)  # the model has been looked at
    embedded.clear()
    output = made(**inputs).log_probs
    (gradient,) = torch.autograd.grad(output[1].sum(), embedded[0])
    reached = gradient[0].abs().sum(1).nonzero().flatten().tolist()
    # prefix of 13 tokens, then suffixes of 3, 4 and 5 tokens, then the other group
    assert reached == [*range(13), *range(16, 20)]


def test_under_autocast_it_is_not_further_from_float32_than_trls_forward():
    inputs = batch(40, (12, 20, 16, 8))
    made = model()
    truth = results(made, inputs)
    errors = []
    for packed in (False, True):
        if packed:
            install(made)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, gradient = results(made, inputs)
        errors.append([(output.log_probs - truth[0].log_probs).norm(), (gradient - truth[1]).norm()])
    for theirs, ours in zip(*errors, strict=True):
        assert ours <= 1.25 * theirs


# What it costs


def lora(made):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(made, config).train()


def saved_bytes(made, inputs):
    parameters, kept = {p.untyped_storage().data_ptr() for p in made.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = made(**inputs).log_probs.sum()
    del loss
    return sum(kept.values())


@pytest.fixture
def compact(monkeypatch):
    """TRL's head scores the completions only, as on a GPU."""
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)


def test_saved_bytes_are_in_proportion_to_the_tokens(compact):
    """At 256/128/8. What is kept once whatever the layers, positions first of all, is not in proportion."""
    made, inputs = model(max_position_embeddings=512, num_hidden_layers=6), batch(256, (128,) * 8, prompts=1)
    adapted = lora(made)
    theirs = saved_bytes(adapted, inputs)
    shared = install(made)
    adapted(**inputs)  # the model has been looked at
    ours = saved_bytes(adapted, inputs)
    ratio = inputs["input_ids"].numel() / (255 + 8 * 128)
    assert shared.counts["packed_tokens"] == 2 * (255 + 8 * 128)
    assert theirs / ours >= 0.97 * ratio


def flops(made, inputs):
    with FlopCounterMode(display=False) as counter:
        made(**inputs).log_probs.sum().backward()
    return counter.get_total_flops()


def test_products_are_in_proportion_to_the_tokens(compact):
    """Of the linear layers, by their weights: forward, and backward to inputs and to the adapter."""
    made, inputs = model(), batch(48, (16,) * 8, prompts=1)
    adapted = lora(made)
    install(made)
    adapted(**inputs)
    adapted.zero_grad()
    scored, tokens, per_token = 8 * 16, 47 + 8 * 16, 0
    for name, module in made.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            own_gradient = "lora_" in name
            of_embeddings = "layers.0.self_attn" in name and "o_proj" not in name and "lora_B" not in name
            per_token += 2 * module.weight.numel() * (2 + own_gradient - of_embeddings)
    found = flops(adapted, inputs)
    assert found == pytest.approx(tokens * per_token + 2 * 2 * scored * made.lm_head.weight.numel(), rel=0.02)


# TRL's forward where packed rows are not exact, or not worth it


def said(made, inputs, times=2):
    """The model's `SharedPrefix` and what was said; outputs are TRL's, bit for bit."""
    expected = made(**inputs).log_probs.detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shared = install(made)
        for _ in range(times):
            torch.testing.assert_close(made(**inputs).log_probs.detach(), expected, atol=0, rtol=0)
    assert shared.counts["packed"] == 0 and shared.counts["padded"] == times
    (message,) = [str(w.message) for w in caught if "shared_prefix" in str(w.message)]
    return shared, message


UNFIT = {
    "layers that carry a state, beside attention": (
        "FalconH1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
         "head_dim": 16},
        "it has layers that carry a state from token to token",
    ),
    "short convolutions": (
        "Lfm2", {"layer_types": ["conv", "full_attention"]}, "it has layers that carry a state from token to token"
    ),
    "learned positions, which count the padding in TRL's forward": ("GPT2", {}, "its log-probs differ"),
    "attention of its own": (
        "Falcon", {"num_kv_heads": 4}, "0 of its 2 layers use the attention interface of transformers"
    ),
    "attention of its own, partly rotated": (
        "StableLm", {}, "0 of its 2 layers use the attention interface of transformers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_does_not_fit_takes_trls_forward_for_good(case):
    family, changes, reason = UNFIT[case]
    made = model(family, **changes)
    shared, message = said(made, batch())
    assert shared.reason.startswith(reason) and f"takes TRL's forward for all its batches: {reason}" in message
    assert made.config._attn_implementation == "sdpa"


def test_attention_dropout_takes_trls_forward_also_if_it_comes_later():
    made, inputs = model(attention_dropout=0.1), batch()
    shared = install(made)
    made(**inputs)
    assert shared.counts["packed"] == 1, "without dropout it is exact"
    with pytest.warns(UserWarning, match="for all its batches: its attention uses attention dropout"):
        made.train()(**inputs)
    assert shared.counts["packed"] == 1


def test_attention_that_is_not_causal_takes_trls_forward():
    made = model()
    for layer in made.model.layers:
        layer.self_attn.is_causal = False
    assert said(made, batch())[0].reason == "its attention uses attention that is not causal"


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_arguments_that_a_packed_row_does_not_honour_take_trls_forward(name):
    made, inputs = model(), batch()
    attend = type(made.model.layers[0].self_attn).forward
    for layer in made.model.layers:
        attn = layer.self_attn
        # only packed rows are told, so that TRL's forward does not refuse the argument
        attn.forward = lambda *a, attn=attn, **k: attend(
            attn, *a, **k, **({name: 1.0} if "shared_prefix" in k else {})
        )
    assert said(made, inputs)[0].reason == f"its attention uses {name}"


def test_a_row_beyond_the_sliding_window_takes_trls_forward_for_its_batch():
    made = model("Mistral", sliding_window=16)
    shared, message = said(made, batch())
    assert "for some batches: a row is longer than its sliding window of 16 tokens" in message
    short = batch(9, (3, 4, 5))
    made(**short)
    assert shared.counts["packed"] == 1 and shared.reason is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10_000.0,
         "original_max_position_embeddings": 16, "factor": 1.0},
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_rotary_embeddings_of_the_rows_length_take_trls_forward(rope):
    made = model(rope_parameters=rope, max_position_embeddings=16)
    assert "beyond 16 tokens its rotary embeddings depend on the length" in said(made, batch())[1]
    made(**batch(9, (3, 4, 5)))
    assert shared_prefix_of(made).counts["packed"] == 1


@pytest.mark.parametrize("name", ["attn_temperature_tuning", "attention_chunk_size"])
def test_attention_by_the_place_in_the_row_takes_trls_forward(name):
    made = model()
    setattr(made.config, name, 8)
    reason = "its attention depends on the place of a token in the row that it is given"
    assert said(made, batch())[0].reason == reason


def test_without_that_rule_the_window_would_be_ignored(monkeypatch):
    """The control of all equalities here: what is not honoured is seen."""
    made, inputs = model("Mistral", sliding_window=16), batch()
    expected = log_probs(made, inputs)
    monkeypatch.setattr("trl_ext.packed.forward.smallest_window", lambda layout: None)
    monkeypatch.setitem(verdict.LARGEST_DIFFERENCE, "full", 1e9)
    install(made)
    assert (log_probs(made, inputs) - expected).abs().max() > 0.1


def test_a_family_that_no_rule_knows_is_compared_with_trls_forward():
    made = model()

    def mixes_neighbours(module, args, output):
        return output + 0.3 * output.roll(1, 1)

    made.model.layers[0].mlp.register_forward_hook(mixes_neighbours)
    reason = said(made, batch())[0].reason
    assert reason.startswith("its log-probs differ from those of the padded rows by")


def test_dropout_elsewhere_does_not_disturb_the_comparison():
    made, inputs = model(), batch()
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    adapted = get_peft_model(made, config).train()
    shared = install(made)
    modes = [module.training for module in adapted.modules()]
    adapted(**inputs)
    assert shared.reason is None and modes == [module.training for module in adapted.modules()]


def test_the_loss_of_routers_takes_trls_forward():
    made = model("Qwen3Moe", **EXPERTS, head_dim=16, output_router_logits=True)
    assert "for some batches: the loss of its routers reads every padded row" in said(made, batch())[1]
    made = model("Qwen3Moe", **EXPERTS, head_dim=16)
    assert "the loss of its routers" in said(made, {**batch(), "output_router_logits": True})[1]


def test_other_inputs_take_trls_forward():
    made = model()
    positions = torch.arange(19).expand(6, -1)
    assert "for some batches: it is called with position_ids" in said(made, {**batch(), "position_ids": positions})[1]
    prompted = get_peft_model(made, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.warns(UserWarning, match="it is called with inputs_embeds"):
        prompted(**batch())


def test_holes_and_little_to_save_take_trls_forward():
    inputs = batch()
    inputs["attention_mask"][0, 3] = 0
    assert "a batch cannot be packed, because a row has holes" in said(model(), inputs)[1]
    assert "packing saves less than 5% of a batch's tokens" in said(model(), batch(2, (30,), prompts=3))[1]


def test_a_batch_without_labels_gives_a_zero_that_can_be_differentiated():
    made, inputs = model(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    install(made)
    with pytest.warns(UserWarning, match="because nothing is scored in it"):
        made(**inputs).log_probs.sum()  # TRL's own, of this device


def test_a_model_of_more_than_text_takes_trls_forward():
    class Composite(transformers.LlamaConfig):
        def get_text_config(self, *args, **kwargs):
            return copy.copy(self)

    made = model()
    made.config.__class__ = Composite
    assert said(made, batch())[0].reason == "it is a model of more than text"


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_another_attention_is_refused(family):
    made = model(family)
    made.config._attn_implementation = "eager"
    with pytest.raises(
        ValueError, match=f"in place of attn_implementation='sdpa', but this {family}ForCausalLM has 'eag"
    ):
        install(made)


# Installation


def test_twice_is_an_error():
    made = model()
    shared = install(made)
    assert shared_prefix_of(made) is shared
    with pytest.raises(ValueError, match="installed in this LlamaForCausalLM already"):
        install(made)


def test_without_the_flag_it_is_the_models_forward():
    made, inputs = model(), batch()
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = made(**plain).logits
    shared = install(made)
    assert torch.equal(made(**plain).logits, expected) and not any(shared.counts.values())
    generated = made.generate(**plain, max_new_tokens=3, do_sample=False)
    assert generated.shape == (6, 22)


def test_checkpointing_computes_packed_rows_again():
    inputs = batch()
    made = model().train()
    _, expected_gradient = results(made, inputs)
    install(made)
    made.gradient_checkpointing_enable({"use_reentrant": False})
    _, gradient = results(made, inputs)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_copies_and_pickles_are_as_with_trls_forward():
    made = model()
    install(made)
    assert NAME not in made.config.to_json_string()
    assert pickle.loads(pickle.dumps(made.config)).num_hidden_layers == 2
    copied, inputs = copy.deepcopy(made), batch()
    with torch.no_grad():
        copied.lm_head.weight.mul_(0.5)
    expected = model()
    expected.lm_head.weight.data.mul_(0.5)
    torch.testing.assert_close(log_probs(copied, inputs), log_probs(expected, inputs), atol=1e-5, rtol=1e-5)
    inputs["attention_mask"][0, 3] = 0  # TRL's forward, of the copy
    assert torch.equal(log_probs(copied, inputs), log_probs(expected, inputs))
