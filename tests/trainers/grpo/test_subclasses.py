"""
Other people's subclasses of our GRPO trainer: each method that they override, whole or with `super()`, with each of
our options, trains with the changed result or ends in one sentence that names class, method and option.

The expected advantages, KL and gradient are computed here by loops and autograd, and share nothing with the package.
"""

import re
import sys
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.grpo_trainer as upstream
from functional.reference import group_relative, leave_one_out, reinforce_plus_plus
from tiny import CHARACTERS, build, scripted_rollout
from transformers import TrainerCallback

import trl_ext
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.upstream import trl_class

TRL = trl_class(GRPOTrainer)
BETA, SIZE = 0.3, 4

OPTIONS = {
    "completion": {"advantage_estimator": "leave_one_out"},
    "token": {"advantage_estimator": "reinforce_plus_plus"},
    "steps": {"advantage_estimator": "process_group_relative", "step_ends_function": f"{__name__}.step_ends"},
    "k2": {"kl_estimator": "k2", "beta": BETA},
    "exact": {"kl_estimator": "exact", "beta": BETA},
    "sequence": {"kl_placement": "sequence", "beta": BETA},
    "kl in reward": {"advantage_estimator": "leave_one_out", "kl_placement": "reward", "beta": BETA},
}
# How the option stands in a refusal.
IN_WORDS = {
    "completion": "advantage_estimator='leave_one_out'",
    "token": "advantage_estimator='reinforce_plus_plus'",
    "steps": "advantage_estimator='process_group_relative'",
    "k2": "kl_estimator='k2'",
    "exact": "kl_estimator='exact'",
    "sequence": "kl_placement='sequence'",
    "kl in reward": "kl_estimator='k1' in the reward|advantage_estimator='leave_one_out'",
}


# The task: digits. A reward is the share of them in a completion, or in a step, which ends with every even token.


def digits(token_ids):
    return sum(CHARACTERS[i - 2].isdigit() for i in token_ids) / len(token_ids)


def step_ends(token_ids, tokenizer=None):
    return [t for t, i in enumerate(token_ids) if i % 2 == 0 or t == len(token_ids) - 1]


def of_steps(token_ids):
    ends = step_ends(token_ids)
    starts = [0, *(end + 1 for end in ends)]
    return [digits(token_ids[start : end + 1]) for start, end in zip(starts, ends, strict=False)]


def outcomes(completion_ids, **kwargs):
    return [digits(ids) for ids in completion_ids]


def steps(completion_ids, completion_step_ends, **kwargs):
    assert completion_step_ends == [step_ends(ids) for ids in completion_ids]
    return [of_steps(ids) for ids in completion_ids]


# What a subclass does. A whole override is TRL's own function, as a copy of it would be.


def whole(method):
    def override(self, *args, **kwargs):
        return getattr(TRL, method)(self, *args, **kwargs)

    return {method: override}


def changed(method, change):
    """With `super()`: `change` is made to its result."""

    def override(self, *args, **kwargs):
        return change(getattr(super(type(self), self), method)(*args, **kwargs))

    return {method: override}


def twice_the_advantages(batch):
    return {**batch, "advantages": 2 * batch["advantages"]}


def twice(result):
    return 2 * result


def squared(rewards_per_func):
    return rewards_per_func.square()


def twice_the_logps(result):
    return 2 * result[0], *result[1:]


def three_tokens(result):
    prompt_ids, ids, tool_mask, completions, logprobs, *rest = result
    return prompt_ids, [i[:3] for i in ids], tool_mask, [c[:5] for c in completions], [p[:3] for p in logprobs], *rest


def own_prepare_inputs(self, generation_batch):
    return getattr(TRL, "_generate_and_score_completions")(self, generation_batch)  # noqa: B009 (inlined, in real code)


def own_compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    return TRL._compute_loss(self, model, inputs)


def own_calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
    """Without the reward functions."""
    return torch.tensor(outcomes(completion_ids_list))[:, None].square()


def own_logps(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
    return 2 * logps, torch.zeros_like(logps), None


ALL = ", ".join(OPTIONS)
# method, how it is overridden, what that changes (of `by_hand`), options that are refused with it; all others train.
TABLE = [
    ("_generate_and_score_completions", "whole", None, "completion, token, steps, exact, sequence, kl in reward"),
    ("_generate_and_score_completions", twice_the_advantages, "advantages", ""),
    ("_prepare_inputs", "whole", None, ""),  # TRL's calls `_generate_and_score_completions`
    ("_prepare_inputs", own_prepare_inputs, None, "completion, token, steps, exact, sequence, kl in reward"),
    ("_prepare_inputs", twice_the_advantages, "advantages", ""),
    ("_compute_loss", "whole", None, "token, steps, k2, exact, sequence, kl in reward"),
    ("_compute_loss", twice, "loss", ""),
    ("compute_loss", "whole", None, ""),  # TRL's calls `_compute_loss`
    ("compute_loss", own_compute_loss, None, "token, steps, k2, exact, sequence, kl in reward"),
    ("compute_loss", twice, "loss", ""),
    ("_calculate_rewards", "whole", None, ""),
    ("_calculate_rewards", own_calculate_rewards, "rewards", "steps"),
    ("_calculate_rewards", squared, "rewards", "steps"),
    ("_get_per_token_logps_and_entropies", "whole", None, "exact, sequence"),
    ("_get_per_token_logps_and_entropies", own_logps, "logps", "exact, sequence"),
    ("_get_per_token_logps_and_entropies", twice_the_logps, "logps", "exact, sequence"),
    ("_generate", "whole", None, ""),
    ("_generate", three_tokens, "tokens", ""),
]
CELLS = [
    pytest.param(method, how, change, option, option in refused.split(", "), id=f"{method}-{name}-{option}")
    for method, how, change, refused in TABLE
    for option in OPTIONS
    for name in [how if how == "whole" else how.__name__]
]


def subclass(method, how, base=GRPOTrainer):
    if how == "whole":
        body = whole(method)
    else:
        body = {method: how} if how.__name__.startswith("own") else changed(method, how)
    return type("Theirs", (base,), {"__module__": "their_code", **body})


# One step of training, and what was seen of it


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rollout(prompts, trainer):
    found = scripted_rollout(prompts, trainer)
    del found["env_mask"]
    return found


@pytest.fixture
def one_step(tiny_model, tmp_path, monkeypatch):
    """`one_step(trainer class, **options)`: the prompts, completions, advantages, KL and gradient of one step."""

    def run(trainer_class, config_class=GRPOConfig, prepare=lambda trainer: None, **options):
        seen = SimpleNamespace(losses=0)

        theirs = TRL._compute_loss

        def watched(self, model, inputs):
            seen.losses += 1
            seen.inputs = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            return theirs(self, model, inputs)

        monkeypatch.setattr(TRL, "_compute_loss", watched)
        monkeypatch.setattr(upstream, "shuffle_sequence_dict", lambda batch: batch)
        settings = {"loss_type": "bnpo", "max_grad_norm": 0.0, "max_steps": 1, "per_device_train_batch_size": 8}
        trainer = build(
            trainer_class, config_class, tiny_model, tmp_path, rollout_func=rollout,
            reward_funcs=steps if "step_ends_function" in options else outcomes,
            num_generations=SIZE, **settings, **options,
        )  # fmt: skip
        perturb(trainer.model)
        prepare(trainer)
        gradient = Gradient()
        trainer.add_callback(gradient)
        seen.policy = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        monkeypatch.setattr(TRL, "_compute_loss", theirs)
        seen.gradient, seen.trainer = gradient.found, trainer
        seen.kl = next(entry["kl"] for entry in trainer.state.log_history if "loss" in entry) if trainer.beta else None
        return seen

    return run


def perturb(model):
    """So that the policy is not the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


# The same by hand


def step_advantages(completions):
    """Each token: the sum of the normalised rewards of its own step and the later ones (DeepSeekMath, §4.1.3)."""
    rows = []
    for start in range(0, len(completions), SIZE):
        group = completions[start : start + SIZE]
        pooled = torch.tensor([reward for ids in group for reward in of_steps(ids)], dtype=torch.float64)
        for ids in group:
            normalised = [float((reward - pooled.mean()) / (pooled.std() + 1e-4)) for reward in of_steps(ids)]
            rows.append([sum(normalised[sum(end < t for end in step_ends(ids)) :]) for t in range(len(ids))])
    return rows


def advantages_by_hand(completions, kls, option, change):
    """One row of token advantages for each completion."""
    lengths = [len(ids) for ids in completions]
    rewards = [r**2 if change == "rewards" else r for r in outcomes(completions)]
    if option == "kl in reward":
        rewards = [r - BETA * float(kl.sum()) for r, kl in zip(rewards, kls, strict=True)]
    if option == "steps":
        rows = step_advantages(completions)
    elif option == "token":
        at_end = [[0.0] * (n - 1) + [r] for n, r in zip(lengths, rewards, strict=True)]
        rows = reinforce_plus_plus(at_end, [[1] * n for n in lengths], [True] * len(rewards))
    else:
        estimator = group_relative if option in ("k2", "exact", "sequence") else leave_one_out
        per_row = estimator(rewards, lengths, SIZE)
        rows = [[a] * n for a, n in zip(per_row, lengths, strict=True)]
    if change == "advantages":
        rows = [[2 * a for a in row] for row in rows]
    return rows


def by_hand(seen, option, change, reference):
    """Advantages per token, mean KL and gradient of one step, on the policy that sampled."""
    policy = seen.trainer.model
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(seen.policy[name])
    policy.zero_grad()
    fields = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    prompts, prompt_masks, completions, masks = (seen.inputs[name] for name in fields)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(prompts, prompt_masks, strict=True)]
    completions = [ids[mask.bool()].tolist() for ids, mask in zip(completions, masks, strict=True)]
    factor = 2.0 if change == "logps" else 1.0
    logps, kls = [], []
    for prompt, ids in zip(prompts, completions, strict=True):
        sequence = torch.tensor([[*prompt, *ids]])
        ours, theirs = (model(sequence).logits[0, -len(ids) - 1 : -1].log_softmax(-1) for model in (policy, reference))
        chosen, of_reference = (x[range(len(ids)), ids] * factor for x in (ours, theirs))
        exact = (ours.exp() * (ours - theirs)).sum(-1)
        k1 = chosen - of_reference
        kls.append({"k2": k1.square() / 2, "exact": exact, "sequence": exact, "kl in reward": k1}.get(option, 0 * k1))
        logps.append(chosen)
    rows = advantages_by_hand(completions, kls, option, change)
    loss, tokens = 0.0, sum(len(ids) for ids in completions)
    for i, (row, logp, kl) in enumerate(zip(rows, logps, kls, strict=True)):
        ratio = (logp - logp.detach()).exp()
        penalty = BETA * kl if option in ("k2", "exact", "sequence") else 0.0
        if option == "sequence":
            later = torch.tensor([[sum(other.tolist()[t + 1 :]) for t in range(len(kl))] for other in kls])
            others = torch.cat([later[:i], later[i + 1 :]])
            penalty = penalty + BETA * ratio * (later[i] - others.mean(0))
        loss = loss + (penalty - torch.tensor(row) * ratio).sum() / tokens
    (2 * loss if change == "loss" else loss).backward()
    gradient = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return rows, float(torch.cat(kls).mean()), gradient


def agree(seen, expected):
    rows, kl, gradient = expected
    for row, found, mask in zip(rows, seen.inputs["advantages"], seen.inputs["completion_mask"], strict=True):
        found = found.expand(mask.shape) if found.dim() == 0 else found
        torch.testing.assert_close(found[: len(row)], torch.tensor(row), rtol=1e-3, atol=1e-5)
        assert mask.sum() == len(row)
    if seen.kl is not None:
        assert seen.kl == pytest.approx(kl, rel=1e-3)
    assert max(g.abs().max() for g in gradient.values()) > 1e-4
    for name, value in gradient.items():
        torch.testing.assert_close(seen.gradient[name], value, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def reference(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)


@pytest.mark.parametrize(("method", "how", "change", "option", "refused"), CELLS)
def test_a_subclass_trains_with_its_result_or_is_named(one_step, reference, method, how, change, option, refused):
    theirs = subclass(method, how)
    if refused:
        with pytest.raises(ValueError) as caught:
            one_step(theirs, **OPTIONS[option])
        sentence = str(caught.value)
        assert f"their_code.Theirs overrides {method} " in sentence and re.search(IN_WORDS[option], sentence)
        assert "\n" not in sentence and "TRL 1" not in sentence
        return
    seen = one_step(theirs, **OPTIONS[option])
    if change == "tokens":
        assert seen.inputs["completion_ids"].size(1) == 3 < 7
    agree(seen, by_hand(seen, option, change, reference))


# More than the table


def test_a_loss_of_its_own_may_say_that_it_takes_token_advantages(one_step, reference):
    theirs = subclass("_compute_loss", "whole")
    theirs.per_token_advantages = True
    seen = one_step(theirs, **OPTIONS["token"])
    agree(seen, by_hand(seen, "token", None, reference))


@pytest.fixture
def gmpo(monkeypatch):
    """TRL's experimental GMPO under registration: a subclass of our trainer with a loss of its own."""
    for name in [name for name in sys.modules if name.startswith("trl.experimental.gmpo")]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings(action="ignore"), trl_ext.register():
        from trl.experimental.gmpo import GMPOTrainer
    for name in [name for name in sys.modules if name.startswith("trl.experimental.gmpo")]:
        del sys.modules[name]
    assert issubclass(GMPOTrainer, GRPOTrainer)
    return GMPOTrainer


@pytest.mark.parametrize("option", ["token", "steps", "k2", "exact", "kl in reward"])
def test_gmpo_refuses_what_its_loss_does_not_read(one_step, gmpo, option):
    with pytest.raises(ValueError, match=r"gmpo_trainer.GMPOTrainer overrides _compute_loss without") as caught:
        one_step(gmpo, **OPTIONS[option])
    assert re.search(IN_WORDS[option], str(caught.value))


def test_gmpo_trains_with_one_advantage_per_completion(one_step, gmpo, reference, monkeypatch):
    """Its ratio is 1 on the policy that sampled, so the gradient is that of the mean log-prob of each completion."""
    seen, found = one_step(subclass("_generate", "whole"), **OPTIONS["completion"]), []
    theirs = gmpo._compute_loss
    monkeypatch.setattr(gmpo, "_compute_loss", lambda s, m, i: (found.append(i["advantages"]), theirs(s, m, i))[1])
    one_step(gmpo, **OPTIONS["completion"])
    assert torch.equal(found[0], seen.inputs["advantages"])


def test_an_error_before_the_loss_is_not_blamed_on_an_override_with_super(one_step):
    def fails(self, inputs, *args):
        raise RuntimeError("their own")

    class Theirs(GRPOTrainer):
        _calculate_rewards = fails

        def _compute_loss(self, model, inputs):
            return 2 * super()._compute_loss(model, inputs)

    with pytest.raises(RuntimeError, match=r"^their own$"):
        one_step(Theirs, **OPTIONS["token"])


@pytest.mark.parametrize("option", ["token", "k2"])
def test_an_error_before_the_loss_is_not_blamed_on_a_copy_that_reaches_ours(one_step, option):
    class Theirs(GRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self._compute_loss(model, inputs)

        def _calculate_rewards(self, *args):
            raise RuntimeError("their own")

    with pytest.raises(RuntimeError, match=r"^their own$"):
        one_step(Theirs, **OPTIONS[option])


def test_an_error_above_super_is_left_as_it_is(one_step):
    class Theirs(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            inputs["missing"]
            return super()._compute_loss(model, inputs)

    with pytest.raises(KeyError, match=r"missing"):
        one_step(Theirs, **OPTIONS["k2"])


@pytest.mark.parametrize("option", ["k2", "exact"])
def test_a_method_between_ours_and_trls_is_named(one_step, option):
    def own_loss(self, model, inputs):
        return model.lm_head.weight.sum() * 0.0

    mixin = type("Between", (TRL,), {"__module__": "their_code", "_compute_loss": own_loss})
    sentence = "their_code.Between overrides _compute_loss and does not multiply beta .* remove kl_estimator='"
    with pytest.raises(ValueError, match=sentence):
        one_step(type("Theirs", (GRPOTrainer, mixin), {}), **OPTIONS[option])


def test_a_result_without_what_exact_needs_is_named(one_step):
    def drop(batch):
        return {name: value for name, value in batch.items() if name != "ref_hidden_states"}

    theirs = subclass("_generate_and_score_completions", drop)
    with pytest.raises(
        ValueError, match=r"their_code.Theirs overrides _gen.* and leaves .* remove kl_estimator='exact'"
    ):
        one_step(theirs, **OPTIONS["exact"])


def test_a_method_replaced_on_the_object_is_seen_too(one_step):
    def replace(trainer):
        trainer._compute_loss = lambda model, inputs: TRL._compute_loss(trainer, model, inputs)

    with pytest.raises(ValueError, match=r"overrides _compute_loss without .*kl_estimator='k2'"):
        one_step(GRPOTrainer, prepare=replace, **OPTIONS["k2"])


def test_the_tool_mask_is_the_one_that_a_subclass_returns(one_step, reference):
    def without_first_token(result):
        prompt_ids, ids, _, *rest = result
        return prompt_ids, ids, [[0] + [1] * (len(i) - 1) for i in ids], *rest

    seen = one_step(subclass("_generate", without_first_token), **OPTIONS["token"])
    advantages, mask = seen.inputs["advantages"], seen.inputs["completion_mask"].bool()
    assert not advantages[:, 0].any() and advantages[:, 1:][mask[:, 1:]].all()
    assert advantages[:, 1:][mask[:, 1:]].mean().item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("option", ["k2", "exact", "kl in reward"])
def test_a_beta_of_zero_switches_the_kl_off_as_in_trl(one_step, option):
    """A schedule of the user's may end there."""

    def no_beta(trainer):
        trainer.beta = 0.0

    seen = one_step(GRPOTrainer, prepare=no_beta, **OPTIONS[option])
    assert "ref_per_token_logps" not in seen.inputs
    expected = {k: v for k, v in OPTIONS[option].items() if k == "advantage_estimator"}
    plain = one_step(GRPOTrainer, **expected)
    assert all(torch.equal(seen.gradient[name], value) for name, value in plain.gradient.items())


def test_a_trainer_made_without_its_constructor_is_trls():
    trainer = object.__new__(GRPOTrainer)
    trainer.args, trainer.model = None, torch.nn.Linear(1, 1)
    theirs = {name: getattr(TRL, name) for name in ("_compute_loss", "_generate_and_score_completions")}
    for name, function in theirs.items():
        try:
            setattr(TRL, name, lambda self, *args: args)
            batch = {"advantages": 1}
            args = (trainer.model, batch) if name == "_compute_loss" else (batch,)
            assert getattr(trainer, name)(*args) == args
        finally:
            setattr(TRL, name, function)
    assert trainer.get_extra_state() == {} and trainer._get_train_sampler.__func__ is GRPOTrainer._get_train_sampler


# Configs


@dataclass
class TheirConfig(GRPOConfig):
    """Fields of open-r1, axolotl and others."""

    advantage_estimator: str = "grpo"
    kl_estimator: str = "k1"
    callbacks: list[str] = field(default_factory=lambda: ["push_to_hub_revision"])
    callback_paths: list[str] = field(default_factory=lambda: ["no_such_callback"])
    step_separator: str = "###"
    kl_target: str = "low"
    reward_clip_range: str = "none"


@dataclass
class Deliberate(GRPOConfig):
    trl_ext_fields = ("advantage_estimator",)
    advantage_estimator: str | None = "leave_one_out"


def test_fields_that_a_config_declares_again_are_its_own(one_step):
    with pytest.warns(UserWarning, match=r"declared by that class") as caught:
        seen = one_step(GRPOTrainer, TheirConfig, beta=BETA)
    (warning,) = [w for w in caught if "declared by that class" in str(w.message)]
    for name in ("advantage_estimator", "kl_estimator", "callback_paths", "step_separator", "kl_target"):
        assert f"TheirConfig.{name}" in str(warning.message)
    args = seen.trainer.args
    assert (args.advantage_estimator, args.kl_estimator, args.step_separator) == ("grpo", "k1", "###")
    assert not seen.trainer._is_ours
    expected = one_step(TRL, trl_class(GRPOConfig), beta=BETA)
    assert all(torch.equal(value, expected.gradient[name]) for name, value in seen.gradient.items())
    weights = dict(expected.trainer.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in seen.trainer.model.named_parameters())


def test_a_value_of_theirs_that_is_also_ours_switches_nothing_on(one_step):
    with pytest.warns(UserWarning, match=r"declared by that class"):
        seen = one_step(GRPOTrainer, TheirConfig, advantage_estimator="reinforce_plus_plus")
    assert not seen.trainer._is_ours and seen.inputs["advantages"].dim() == 1


def test_a_config_may_mean_our_option(one_step, reference):
    seen = one_step(GRPOTrainer, Deliberate)
    agree(seen, by_hand(seen, "completion", None, reference))


@pytest.mark.parametrize(
    "options",
    [
        *({**OPTIONS[name]} for name in OPTIONS),
        {"advantage_estimator": "reinforce", "num_generations": 1},
        {"callback_paths": ["transformers.PrinterCallback"]},
    ],
)
def test_trls_own_trainer_refuses_our_options(tiny_model, tmp_path, options):
    with pytest.raises(
        ValueError, match=r"grpo_trainer.GRPOTrainer does not know the options of trl_ext that are set"
    ):
        build(TRL, GRPOConfig, tiny_model, tmp_path, **{"per_device_train_batch_size": 8, **options})


def test_trls_own_trainer_takes_our_config_with_nothing_set(one_step):
    seen, expected = one_step(TRL), one_step(TRL, trl_class(GRPOConfig))
    assert all(torch.equal(value, expected.gradient[name]) for name, value in seen.gradient.items())
