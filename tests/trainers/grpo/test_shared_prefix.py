"""`shared_prefix` in the GRPO trainer: fewer tokens, the same losses, gradients and updates as TRL's."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import trl
from theorems import proves
from tiny import build, logged, weights
from tiny.packed import by_tokens, prompts, rollout, save
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from trl_ext.packed import attention
from trl_ext.packed.forward import NAME, shared_prefix_of
from trl_ext.packed.verdict import has_dropout
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.shared_prefix import check_shared_prefix
from trl_ext.upstream import UpstreamChanged

OURS, TRLS = (GRPOTrainer, GRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
LIMIT = 1e-5  # relative error of an update or gradient, float32; 4e-7 to 2e-6 are seen


def some_alike(completion_ids, **kwargs):
    """Half of the groups have one reward for all: their advantages are 0."""
    return [(sum(ids) % 7) / 7 if (i // 4) % 2 else 0.5 for i, ids in enumerate(completion_ids)]


def by_step(completion_ids, completion_steps, **kwargs):
    return [
        [(len(step) + sum(ids)) % 5 / 5 for step in steps]
        for ids, steps in zip(completion_ids, completion_steps, strict=True)
    ]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return save(tiny_model, tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture
def made(model, tmp_path):
    """`made(classes, **options)`: a trainer over prompts that are long for their completions."""

    def make(classes, **options):
        settings = {
            "per_device_train_batch_size": 8, "reward_funcs": by_tokens, "rollout_func": rollout,
            "train_dataset": prompts(), "optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 1e9,
            "lr_scheduler_type": "constant", "max_steps": 1, **options,
        }  # fmt: skip
        return build(*classes, model, tmp_path / "out", **settings)

    return make


def trained(trainer) -> torch.Tensor:
    """The update of all steps."""
    before = weights(trainer)
    torch.manual_seed(0)  # of the shuffle
    trainer.train()
    return torch.cat([(w - before[name]).flatten() for name, w in weights(trainer).items()])


def assert_same_update(ours, theirs, limit=LIMIT, packed=True):
    """Trains both. `packed`: whether all passes of ours are on packed rows, or all on padded ones."""
    ours_update, their_update = trained(ours), trained(theirs)
    assert their_update.norm() > 0
    assert (ours_update - their_update).norm() <= limit * their_update.norm()
    for counts in ours.shared_prefix_counts.values():
        assert counts["packed" if packed else "padded"] > 0 == counts["padded" if packed else "packed"]
        assert counts["packed_tokens"] <= 0.9 * counts["padded_tokens"]


# Loss and gradient, away from reference and sampler


def scored(trainer):
    """What the loss gets, with the policy moved away from reference and sampler."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions([{"prompt": p} for p in ["abcdefgh"] * 4 + ["h23 f45 a"] * 4])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return output


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def assert_close(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    assert (ours[1] - theirs[1]).norm() <= LIMIT * theirs[1].norm()


@pytest.mark.theorem(
    "Shared prefixes",
    "A packed training step has TRL's gradient, for eight loss types, full and LoRA (relative, float32)",
    at_most=1e-05,
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_and_gradient_are_trls_for_every_loss_type(made, monkeypatch, lora, level):
    options = {"beta": 0.1, "steps_per_generation": 2, "lora": lora, "importance_sampling_level": level}
    ours, theirs = made(OURS, shared_prefix=True, **options), made(TRLS, **options)
    our_inputs, their_inputs = scored(ours), scored(theirs)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(our_inputs[name], their_inputs[name], atol=1e-5, rtol=1e-5)
    for loss_type in LOSS_TYPES:
        for trainer in (ours, theirs):
            monkeypatch.setattr(trainer, "loss_type", loss_type)
        our, their = loss_and_gradient(ours, our_inputs), loss_and_gradient(theirs, their_inputs)
        assert_close(our, their)
        proves((our[1] - their[1]).norm() / their[1].norm())
        for name in ("kl", "entropy"):
            our, their = (trainer._metrics["train"][name][-1] for trainer in (ours, theirs))
            assert our == pytest.approx(their, rel=1e-4) and their > 1e-3
    assert ours.shared_prefix_counts["policy"]["padded"] == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:kl_estimator='k1' in the loss")
def test_every_kl_in_the_loss(made, lora, estimator):
    options = {"beta": 0.1, "lora": lora, "kl_estimator": estimator, "temperature": 0.8}
    ours, theirs = made(OURS, shared_prefix=True, **options), made(OURS, **options)
    assert_close(loss_and_gradient(ours, scored(ours)), loss_and_gradient(theirs, scored(theirs)))
    for name in ("kl", "kl/k1", "kl/k3"):
        our, their = (trainer._metrics["train"][name][-1] for trainer in (ours, theirs))
        assert our == pytest.approx(their, rel=1e-3, abs=1e-6)
    assert {counts["padded"] for counts in ours.shared_prefix_counts.values()} == {0}


def test_the_exact_kl_comes_with_the_log_probs_of_a_frozen_head(made, monkeypatch):
    refuse = lambda *args: pytest.fail("a second pass over the vocabulary")  # noqa: E731
    monkeypatch.setattr("trl_ext.trainers.grpo.exact_kl.exact_kl", refuse)
    trainer = made(OURS, shared_prefix=True, lora=True, beta=0.1, kl_estimator="exact")
    loss_and_gradient(trainer, scored(trainer))


# Updates

CASES = {
    "full": {},
    "LoRA and a KL": {"lora": True, "beta": 0.1},
    "checkpointing": {"lora": True, "beta": 0.1, "gradient_checkpointing": True},
    "checkpointing, full": {"gradient_checkpointing": True},
    "reused rollouts": {"beta": 0.1, "num_iterations": 2, "max_steps": 2},
    "reused twice, torn groups": {
        "num_iterations": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3,
    },
    "reused within a step and beyond it": {
        "num_iterations": 3, "steps_per_generation": 1, "gradient_accumulation_steps": 2, "max_steps": 3, "lora": True,
    },
    "two micro-batches, torn groups": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "four micro-batches, torn groups": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "steps per generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 2},
    "bnpo with accumulation": {
        "loss_type": "bnpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    },
    "entropy bonus": {"entropy_coef": 0.05, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "entropy bonus, LoRA": {"entropy_coef": 0.05, "lora": True},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "head in float32": {"cast_lm_head_to_fp32": True, "lora": True},
    "temperature": {"temperature": 0.7, "lora": True},
    "truncated completions": {"mask_truncated_completions": True, "max_completion_length": 6},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2, "max_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_trls(made, case):
    options = CASES[case]
    assert_same_update(made(OURS, shared_prefix=True, **options), made(TRLS, **options))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_update_is_trls_for_every_loss_type(made, loss_type, lora):
    options = {"loss_type": loss_type, "lora": lora, "beta": 0.1}
    assert_same_update(made(OURS, shared_prefix=True, **options), made(TRLS, **options))


OURS_ONLY = {
    "k1 in the reward": {"beta": 0.1, "kl_placement": "reward", "advantage_estimator": "reinforce_plus_plus"},
    "process rewards": {
        "reward_funcs": by_step, "advantage_estimator": "process_group_relative", "step_separator": " ",
        "max_completion_length": 16,
    },
    "exact KL, torn groups": {
        "lora": True, "beta": 0.1, "kl_estimator": "exact", "per_device_train_batch_size": 4, "num_iterations": 2,
        "gradient_accumulation_steps": 2, "max_steps": 2,
    },
    "the KL of completions, torn groups": {
        "lora": True, "beta": 0.1, "kl_placement": "sequence", "per_device_train_batch_size": 4, "num_iterations": 2,
        "gradient_accumulation_steps": 2, "max_steps": 2,
    },
    "adaptive beta": {
        "beta": 0.1, "kl_estimator": "k3", "kl_target": 0.05, "kl_horizon": 50.0, "num_iterations": 2, "max_steps": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", OURS_ONLY)
def test_an_update_with_our_options_is_that_of_padded_rows(made, case):
    options = OURS_ONLY[case]
    assert_same_update(made(OURS, shared_prefix=True, **options), made(OURS, **options))


def test_bf16_autocast(made):
    """TRL's default: not further from float32 than TRL is."""
    truth = trained(made(TRLS, beta=0.1))
    theirs, ours = (
        (trained(made(classes, beta=0.1, bf16=True, **options)) - truth).norm() / truth.norm()
        for classes, options in ((TRLS, {}), (OURS, {"shared_prefix": True}))
    )
    assert ours <= 1.25 * theirs


@pytest.mark.filterwarnings("ignore:No completion of the batch")
def test_all_rows_truncated(made):
    options = {"mask_truncated_completions": True, "max_completion_length": 1, "beta": 0.0}
    with pytest.warns(UserWarning, match="a batch cannot be packed, because nothing is scored in it"):
        ours = made(OURS, shared_prefix=True, **options)
        ours.rollout_func = lambda prompts, trainer: {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": [[2]] * len(prompts), "logprobs": [[0.0]] * len(prompts),
        }  # fmt: skip
        assert not trained(ours).any()


def test_evaluation(made):
    options = {"eval_dataset": prompts().select(range(4)), "per_device_eval_batch_size": 8, "beta": 0.1}
    ours, theirs = made(OURS, shared_prefix=True, **options), made(TRLS, **options)
    found = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_reward"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5)
    assert ours.shared_prefix_counts["policy"]["packed"] > 0


# Generation sees the model's own attention


def names_in_the_backward_pass(trainer) -> list:
    """What the model's config has named its attention, at each backward pass."""
    found, backward = [], trainer.accelerator.backward
    trainer.accelerator.backward = lambda *a, **k: (
        found.append(trainer.model.config._attn_implementation) or backward(*a, **k)
    )
    return found


def test_generation_and_saving_do_not_see_the_name_of_our_attention(made, tmp_path):
    seen = []
    trainer = made(OURS, shared_prefix=True, rollout_func=None, max_completion_length=4)
    config, generate = trainer.model.config, trainer.model.generate
    trainer.model.generate = lambda *a, **k: seen.append(config._attn_implementation) or generate(*a, **k)
    in_steps = names_in_the_backward_pass(trainer)
    trainer.train()
    assert {*seen} == {config._attn_implementation} == {"sdpa"} and in_steps == [NAME]
    trainer.save_model(str(tmp_path / "saved"))
    assert NAME not in (tmp_path / "saved" / "config.json").read_text()


def test_outside_of_training_steps_the_model_has_its_own_attention_and_rows_are_packed(made):
    """Continuous batching refuses a name that it does not know."""

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            outside.append(model.config._attn_implementation)

    options = {"beta": 0.1, "eval_dataset": prompts().select(range(4)), "gradient_checkpointing": True, "max_steps": 2}
    trainer = made(OURS, shared_prefix=True, **options)
    models, inside = [trainer.model, trainer.ref_model], names_in_the_backward_pass(trainer)
    outside = [model.config._attn_implementation for model in models]
    trainer.add_callback(Ends)
    trainer.train()
    before = trainer.shared_prefix_counts["policy"]["packed"]
    trainer.evaluate()
    assert trainer.shared_prefix_counts["policy"]["packed"] > before
    outside += [model.config._attn_implementation for model in models]
    assert inside == [NAME] * 2 and outside == ["sdpa"] * 6
    assert {counts["padded"] for counts in trainer.shared_prefix_counts.values()} == {0}


# Counts


def test_backbone_passes_are_as_many_as_trls(made):
    def counted(trainer):
        passes = []
        for model in (trainer.model, trainer.ref_model):
            model.base_model.register_forward_hook(lambda *_: passes.append(1))
        trainer.train()
        return len(passes)

    options = {"beta": 0.1}
    looked_at = 3  # one packed pass of two rows for each model, and TRL's of the same rows
    ours = counted(made(OURS, shared_prefix=True, max_steps=2, **options))
    theirs = counted(made(TRLS, max_steps=2, **options))
    assert theirs == 4 and ours == theirs + 2 * (looked_at - 1)


def test_tokens_of_a_step(made):
    trainer = made(OURS, shared_prefix=True, beta=0.1)
    trainer.train()
    batch = torch.cat([b["completion_mask"] for b in trainer._buffered_inputs])
    prompt = {tuple(row[mask.bool()].tolist()) for b in trainer._buffered_inputs
              for row, mask in zip(b["prompt_ids"], b["prompt_mask"], strict=True)}  # fmt: skip
    expected = sum(len(p) - 1 for p in prompt) + int(batch.sum())
    for counts in trainer.shared_prefix_counts.values():
        assert counts["packed_tokens"] == expected


class Products(TorchDispatchMode):
    """Matrix products with the vocabulary, in units of scored tokens · vocabulary · hidden size."""

    def __init__(self, tokens, vocabulary, hidden):
        super().__init__()
        self.one, self.sizes, self.total = tokens * vocabulary * hidden, {vocabulary, hidden}, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = (x for x in args[-2:])
            sizes = (a.shape[0], a.shape[1], b.shape[1])
            if self.sizes <= {*sizes}:
                self.total += sizes[0] * sizes[1] * sizes[2] / self.one
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "products"), [({}, 2), ({"beta": 0.1}, 3), ({"beta": 0.1, "kl_estimator": "exact"}, 5)]
)
def test_products_with_the_vocabulary(made, options, products):
    """Of a frozen head; TRL takes 3 and, with a reference, 4 for each padded completion token."""
    trainer = made(OURS, shared_prefix=True, lora=True, **options)
    trainer._compute_loss(trainer.model, scored(trainer))  # the model has been looked at
    before = dict(trainer.shared_prefix_counts["policy"])
    head = trainer.model.get_base_model().lm_head.weight
    count = Products(1, *head.shape)
    with count:
        inputs = trainer._generate_and_score_completions([{"prompt": "abcdefgh"}] * 8)
        trainer._compute_loss(trainer.model, inputs).backward()
    assert count.total == products * int(inputs["completion_mask"].sum())
    assert trainer.shared_prefix_counts["policy"]["packed"] > before["packed"]


# Old log-probs of reused rollouts


def passes(trainer) -> int:
    """Forward passes of the policy in two steps on one generation batch."""
    trained(trainer)
    return sum(trainer.shared_prefix_counts["policy"][kind] for kind in ("packed", "padded"))


def by_completion(batch) -> dict:
    """Old log-probs of each row; rows of ours are in another order."""
    rows = zip(*(batch[name] for name in ("completion_ids", "completion_mask", "old_per_token_logps")), strict=True)
    return {tuple(ids[mask.bool()].tolist()): logps[mask.bool()] for ids, mask, logps in rows}


REUSED = {"num_iterations": 2, "max_steps": 2}


def test_old_log_probs_are_those_of_the_first_training_pass(made):
    seen = []

    class Watched(GRPOTrainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            seen.append(self._buffered_inputs[0]["old_per_token_logps"])
            return loss

    trainer = made((Watched, GRPOConfig), shared_prefix=True, **REUSED)
    assert passes(trainer) == 2 and seen[1] is seen[0] and trainer.num_iterations == 2
    theirs = made(TRLS, **REUSED)
    trained(theirs)
    ours, expected = (by_completion(t._buffered_inputs[0]) for t in (trainer, theirs))
    assert ours.keys() == expected.keys() and len(ours) == 8
    for completion, logps in ours.items():
        torch.testing.assert_close(logps, expected[completion], atol=1e-5, rtol=1e-5)


EARLIER = {
    "KL in the reward": {"beta": 0.1, "kl_placement": "reward", "advantage_estimator": "reinforce_plus_plus"},
    "an optimizer step before all rows were seen": {
        "num_iterations": 1, "per_device_train_batch_size": 4, "steps_per_generation": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", EARLIER)
def test_where_they_are_needed_earlier_they_have_a_pass_of_their_own(made, case):
    options = {**REUSED, **EARLIER[case]}
    ours = made(OURS, shared_prefix=True, **options)
    scoring = 2 if "per_device_train_batch_size" in options else 1  # by the micro-batch
    assert passes(ours) == 2 + scoring
    assert ours._buffered_inputs[0]["old_per_token_logps"] is not None
    assert_same_update(made(OURS, shared_prefix=True, **options), made(OURS, **options))


def test_with_dropout_they_have_a_pass_of_their_own(made):
    trainer = made(OURS, shared_prefix=True, lora=True, **REUSED)
    assert trainer._takes_old and not has_dropout(trainer.model.get_base_model())
    layer = next(module for module in trainer.model.modules() if hasattr(module, "lora_dropout"))
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert not trainer._first_pass_is_old()
    layer.lora_dropout["default"].p = 0.0
    trainer.model.config.attention_dropout = 0.1
    assert not trainer._first_pass_is_old()


@pytest.mark.parametrize("method", ["_generate_and_score_completions", "_compute_loss"])
def test_with_a_subclass_that_may_read_them_they_have_a_pass_of_their_own(made, method):
    def override(self, *args):
        return getattr(GRPOTrainer, method)(self, *args)

    trainer = made((type("Theirs", (GRPOTrainer,), {method: override}), GRPOConfig), shared_prefix=True, **REUSED)
    assert passes(trainer) == 3


def test_a_batch_that_is_not_kept_between_its_passes_is_an_error(made):
    trainer = made(OURS, shared_prefix=True, **REUSED)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: compute_loss(model, {**inputs}, *args, **kwargs)
    with pytest.raises(UpstreamChanged, match="not kept between its passes"):
        trainer.train()


# Rows whose advantage is 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_advantage_are_left_out_of_the_same_update(made, loss_type):
    options = {"loss_type": loss_type, "reward_funcs": some_alike, "num_iterations": 2, "max_steps": 2}
    ours, theirs = made(OURS, shared_prefix=True, skip_zero_advantages=True, **options), made(TRLS, **options)
    whole = made(OURS, shared_prefix=True, **options)
    assert_same_update(ours, theirs)
    whole.train()
    skipped, all_rows = (t.shared_prefix_counts["policy"]["packed_tokens"] for t in (ours, whole))
    assert skipped < 0.9 * all_rows
    for our, their in zip(logged(ours), logged(theirs), strict=True):
        assert our.get("frac_reward_zero_std", 0.5) == 0.5
        assert our["loss"] == pytest.approx(their["loss"], abs=1e-5)


def test_a_batch_without_advantages_keeps_its_shortest_row(made):
    trainer = made(
        OURS, shared_prefix=True, skip_zero_advantages=True, reward_funcs=lambda completions, **_: [0.5] * 8
    )
    assert not trained(trainer).any()
    lengths = torch.cat([b["completion_mask"].sum(1) for b in trainer._buffered_inputs])
    (b,) = trainer._buffered_inputs
    shortest = int(lengths.argmin())
    assert trainer.shared_prefix_counts["policy"]["packed_tokens"] == (
        int(b["prompt_mask"][shortest].sum()) - 1 + int(lengths[shortest])
    )


def test_with_a_kl_in_the_reward_rows_may_be_left_out(made):
    options = {"advantage_estimator": "group_mean", "kl_placement": "reward", "beta": 0.1, "reward_funcs": some_alike}
    ours = made(OURS, shared_prefix=True, skip_zero_advantages=True, **options)
    assert_same_update(ours, made(OURS, **options))


# Off, refused, or said


def test_off_installs_nothing(made, monkeypatch):
    refuse = lambda *args, **kwargs: pytest.fail("ours was asked")  # noqa: E731
    for name in ("shared_prefix.install", "shared_prefix.use_attention", "grpo.packed_steps.keep_groups"):
        monkeypatch.setattr(f"trl_ext.trainers.{name}", refuse)
    trainer, theirs = made(OURS, beta=0.1), made(TRLS, beta=0.1)
    assert not trainer._is_ours and trainer.shared_prefix_counts == {}
    assert trainer.model.config._attn_implementation == "sdpa" and shared_prefix_of(trainer.model) is None
    assert trainer.model.forward.__func__.__code__ is theirs.model.forward.__func__.__code__
    assert torch.equal(trained(trainer), trained(theirs))


CPU = {"bf16": False, "use_cpu": True, "report_to": "none"}
REFUSED = {
    "shared_prefix must be true or false, got 'yes'": {"shared_prefix": "yes"},
    "shared_prefix is not available with torch_compile": {"shared_prefix": True, "torch_compile": True},
    "model_init_kwargs asks for 'flash_attention_2'": {
        "shared_prefix": True, "model_init_kwargs": {"attn_implementation": "flash_attention_2"},
    },
    "skip_zero_advantages is read only with shared_prefix": {"skip_zero_advantages": True},
    "with beta > 0 with the KL in the loss": {"shared_prefix": True, "skip_zero_advantages": True, "beta": 0.1},
    "with entropy_coef": {"shared_prefix": True, "skip_zero_advantages": True, "entropy_coef": 0.1},
    "with top_entropy_quantile < 1": {
        "shared_prefix": True, "skip_zero_advantages": True, "top_entropy_quantile": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused(message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig("out", **CPU, **REFUSED[message])


def test_fsdp1_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shared_prefix is not available with FSDP1"):
        GRPOConfig("out", **CPU, shared_prefix=True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    GRPOConfig("out", **CPU, shared_prefix=True)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("FSDP1", {"fsdp_plugin_args": {"fsdp_version": 1}}),
        ("context parallelism", {"parallelism_config": SimpleNamespace(cp_enabled=True)}),
        ("sequence parallelism", {"parallelism_config": SimpleNamespace(sp_enabled=True)}),
        ("tensor parallelism", {"parallelism_config": SimpleNamespace(tp_enabled=True)}),
    ],
)
def test_what_cuts_weights_or_sequences_is_refused(message, options):
    known = {"shared_prefix": True, "torch_compile": False, "fsdp_plugin_args": None, "deepspeed_plugin": None,
             "parallelism_config": None, "model_init_kwargs": None}  # fmt: skip
    with pytest.raises(ValueError, match=f"shared_prefix is not available with {message}"):
        check_shared_prefix(SimpleNamespace(**{**known, **options}))
    check_shared_prefix(SimpleNamespace(**known))


def test_another_attention_is_refused(made):
    with pytest.raises(
        ValueError, match="in place of attn_implementation='sdpa', but this Qwen3ForCausalLM has 'eager'"
    ):
        from transformers import AutoModelForCausalLM

        path = made(TRLS).model.config._name_or_path
        eager = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        made((lambda model, **k: GRPOTrainer(model=eager, **k), GRPOConfig), shared_prefix=True)


def test_a_subclass_that_computes_logits_itself_is_named(made):
    class Theirs(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            return model(input_ids=ids).logits.mean()

    with pytest.raises(ValueError, match=r"Theirs overrides _compute_loss .* shared_prefix has no effect"):
        made((Theirs, GRPOConfig), shared_prefix=True).train()


def test_a_subclass_that_may_read_all_rows_keeps_them(made):
    class Theirs(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    options = {"shared_prefix": True, "reward_funcs": some_alike}
    with pytest.warns(UserWarning, match=r"skip_zero_advantages is off: .*Theirs\._compute_loss may use rows"):
        theirs = made((Theirs, GRPOConfig), skip_zero_advantages=True, **options)
    whole = made(OURS, **options)
    assert torch.equal(trained(theirs), trained(whole))
    assert theirs.shared_prefix_counts == whole.shared_prefix_counts


def test_a_subclass_that_may_depend_on_the_micro_batches_keeps_them(made, monkeypatch):
    class Theirs(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    monkeypatch.setattr("trl_ext.trainers.grpo.packed_steps.keep_groups", lambda *args: pytest.fail("rows moved"))
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.warns(UserWarning, match=r"leaves rows in TRL's order: .* may matter to .*Theirs\._compute_loss"):
        theirs = made((Theirs, GRPOConfig), shared_prefix=True, **options)
    assert_same_update(theirs, made(TRLS, **options))


def test_nothing_gained_is_said_and_takes_trls_forward(made):
    with pytest.warns(UserWarning, match="takes TRL's forward for some batches: packing saves less than 5%"):
        ours = made(OURS, shared_prefix=True, max_completion_length=40)
        ours.rollout_func = lambda prompts, trainer: {
            "prompt_ids": [[2 + i, 3] for i in range(len(prompts))],
            "completion_ids": [[4, 5, 6, 7] * 10] * len(prompts), "logprobs": [[0.0] * 40] * len(prompts),
        }  # fmt: skip
        theirs = made(TRLS, max_completion_length=40)
        theirs.rollout_func = ours.rollout_func
        assert torch.equal(trained(ours), trained(theirs))
    assert ours.shared_prefix_counts["policy"]["packed"] == 0


def test_nothing_is_said_where_all_is_well(made):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "shared_prefix")
        made(OURS, shared_prefix=True).train()


def test_the_attention_is_called_once_per_layer_and_pass(made, monkeypatch):
    calls, original = [], attention.shared_prefix_attention
    monkeypatch.setattr(attention, "shared_prefix_attention", lambda *a: calls.append(1) or original(*a))
    trainer = made(OURS, shared_prefix=True)
    inputs = scored(trainer)
    trainer._compute_loss(trainer.model, inputs)
    calls.clear()
    trainer._compute_loss(trainer.model, inputs)
    assert len(calls) == trainer.model.config.num_hidden_layers


def test_the_model_card_lists_the_option(made, tmp_path):
    trainer = made(OURS, shared_prefix=True)
    trainer.create_model_card()
    assert "- `shared_prefix`: `True`" in (tmp_path / "out" / "README.md").read_text()
