"""A bound on the policy's KL: what is measured, what is skipped, and that a skipped step changes nothing at all."""

import copy
import itertools
import math
import re

import pytest
import torch
from tiny import assert_same_weights, build, dataset, logged, scripted_rollout, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_ext.trainers.foreign import Options
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.grpo.policy_kl import check_policy_kl
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

# Four updates on each of two generation batches.
REUSED = {"rollout_func": scripted_rollout, "num_iterations": 4, "max_steps": 8, "lr_scheduler_type": "constant"}
REUSED |= {"learning_rate": 0.02, "weight_decay": 0.5}


class Steps(TrainerCallback):
    """Weights and optimizer state after each step."""

    trainer = None

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = copy.deepcopy(self.trainer.optimizer.state_dict()["state"])
        self.seen.append((weights(self.trainer), optimizer))


def run(tiny_model, tmp_path, trainer_class=GRPOTrainer, config_class=GRPOConfig, **options):
    trainer = build(trainer_class, config_class, tiny_model, tmp_path, **{**REUSED, **options})
    trainer.steps = Steps()
    trainer.steps.trainer = trainer
    trainer.add_callback(trainer.steps)
    trainer.train()
    return trainer


def same(one, other):
    """Whether weights and optimizer state are equal, bit for bit."""
    flat = [
        [*state[0].values(), *(value for row in state[1].values() for value in row.values())] for state in (one, other)
    ]
    return len(flat[0]) == len(flat[1]) and all(map(torch.equal, *flat))


@pytest.mark.parametrize("estimator", [None, "reinforce_plus_plus"])
def test_a_skipped_step_changes_neither_weights_nor_moments(tiny_model, tmp_path, estimator):
    trainer = run(tiny_model, tmp_path, policy_kl_stop=1e-6, advantage_estimator=estimator)
    assert logged(trainer, "policy_kl/skipped") == [[x] for x in (0, 1, 1, 1, 0, 1, 1, 1)]
    states = trainer.steps.seen
    moved = [not same(*pair) for pair in itertools.pairwise(states)]
    assert moved == [False, False, False, True, False, False, False]
    counts = [{int(row["step"]) for row in state[1].values()} for state in states]
    assert counts == [{1}] * 4 + [{2}] * 4
    kl = [value for (value,) in logged(trainer, "policy_kl")]
    assert kl[0] == pytest.approx(0.0, abs=1e-9) and kl[4] == pytest.approx(0.0, abs=1e-9)
    assert kl[1] == kl[2] == kl[3] > 1e-6, "the policy stands still"


def test_the_rest_is_skipped_from_the_step_on_whose_kl_is_too_large(tiny_model, tmp_path):
    free = run(tiny_model, tmp_path, policy_kl_stop=1e6)
    kl = [value for (value,) in logged(free, "policy_kl")]
    assert kl[0] < kl[1] < kl[2]
    bound = (kl[1] + kl[2]) / 2
    stopped = run(tiny_model, tmp_path, policy_kl_stop=bound)
    assert logged(stopped, "policy_kl/skipped")[:4] == [[0.0], [0.0], [1.0], [1.0]]
    for step in range(2):
        assert same(stopped.steps.seen[step], free.steps.seen[step])
    assert same(stopped.steps.seen[3], free.steps.seen[1]) and not same(stopped.steps.seen[2], free.steps.seen[2])


def test_a_bound_that_is_never_reached_changes_nothing(tiny_model, tmp_path):
    with_bound, without = (run(tiny_model, tmp_path, **options) for options in ({"policy_kl_stop": 1e6}, {}))
    assert_same_weights(with_bound, without)
    assert {*logged(with_bound)[0]} - {*logged(without)[0]} == {"policy_kl", "policy_kl/skipped"}


def token_logps(model, prompt, completion):
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0, :-1].double().log_softmax(-1)
    ids = torch.tensor([*prompt, *completion][1:])
    return logps.gather(1, ids[:, None])[len(prompt) - 1 :, 0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_is_the_kl_from_the_sampler_to_the_policy_per_trainable_token(tiny_model, tmp_path, accumulation):
    seen = []

    class Seen(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(inputs)
            return super()._compute_loss(model, inputs)

    options = {"steps_per_generation": 2 * accumulation, "gradient_accumulation_steps": accumulation}
    trainer = run(tiny_model, tmp_path, Seen, policy_kl_stop=1e6, num_iterations=1, max_steps=2, **options)
    sampler, policy = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    policy.load_state_dict(trainer.steps.seen[0][0])
    expected = []
    for inputs in seen[accumulation : 2 * accumulation]:  # the micro-batches of the second step, after one update
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        for row in range(len(mask)):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
            completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
            ratio = token_logps(policy, prompt, completion) - token_logps(sampler, prompt, completion)
            trainable = mask[row][: len(completion)].bool()
            expected += (ratio.expm1() - ratio)[trainable].tolist()
    assert logged(trainer, "policy_kl")[1][0] == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_shared_prefixes_stop_at_the_same_steps(tiny_model, tmp_path):
    plain, shared = (run(tiny_model, tmp_path, policy_kl_stop=1e-3, shared_prefix=on) for on in (None, True))
    assert logged(plain, "policy_kl/skipped") == logged(shared, "policy_kl/skipped")
    for (ours,), (theirs,) in zip(logged(shared, "policy_kl"), logged(plain, "policy_kl"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-6)


def test_a_window_of_several_micro_batches_is_skipped_as_a_whole(tiny_model, tmp_path):
    options = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    trainer = run(tiny_model, tmp_path, policy_kl_stop=1e-6, **options)
    assert logged(trainer, "policy_kl/skipped") == [[x] for x in (0, 1, 1, 1, 0, 1, 1, 1)]
    assert same(trainer.steps.seen[0], trainer.steps.seen[3]) and not same(*trainer.steps.seen[3:5])


def test_nan_is_too_far(tiny_model, tmp_path):
    class Lost(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            logps, *rest = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            return logps * math.nan if logps.requires_grad and self.state.global_step == 1 else logps, *rest

    trainer = run(tiny_model, tmp_path, Lost, policy_kl_stop=1e6, max_steps=3)
    assert logged(trainer, "policy_kl/skipped") == [[0.0], [1.0], [1.0]]
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert same(trainer.steps.seen[0], trainer.steps.seen[2])


def test_evaluation_neither_resets_nor_measures(tiny_model, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": dataset().select(range(4)), "max_steps": 4}
    trainer = run(tiny_model, tmp_path, policy_kl_stop=1e-6, num_generations_eval=2, **options)
    assert logged(trainer, "policy_kl/skipped") == [[0.0], [1.0], [1.0], [1.0]]
    assert not any(
        "policy_kl" in name for entry in trainer.state.log_history if "eval_loss" in entry for name in entry
    )


def test_a_resumed_run_samples_anew_and_is_not_stopped(tiny_model, tmp_path):
    options = {"policy_kl_stop": 1e-6, "save_strategy": "steps", "save_steps": 2}
    run(tiny_model, tmp_path / "a", **options, max_steps=2)
    trainer = build(GRPOTrainer, GRPOConfig, tiny_model, tmp_path / "a", **{**REUSED, **options, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert logged(trainer, "policy_kl/skipped") == [[0.0], [1.0], [0.0], [1.0]]


@pytest.mark.parametrize("lora", [False, True])
def test_with_trls_defaults_it_trains(tiny_model, tmp_path, lora):
    trainer = run(tiny_model, tmp_path, policy_kl_stop=1e-3, lora=lora, bf16=True, gradient_checkpointing=True)
    assert all(math.isfinite(value) for (value,) in logged(trainer, "policy_kl"))


@pytest.mark.parametrize("lora", [False, True])
def test_ppos_critic_goes_on_while_the_policy_stands(tiny_model, tmp_path, lora):
    critics = []

    class Seen(PPOTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            critics.append(torch.cat([p.detach().flatten() for p in self.critic.named_parameters().values()]))
            return loss

    options = {"policy_kl_stop": 1e-6, "num_generations": 1, "max_steps": 4, "critic_learning_rate": 0.01}
    trainer = run(tiny_model, tmp_path, Seen, PPOConfig, lora=lora, **options)
    assert logged(trainer, "policy_kl/skipped") == [[0.0], [1.0], [1.0], [1.0]]
    own = [{n: p for n, p in state[0].items() if ".critic" not in n} for state in trainer.steps.seen]
    assert all(torch.equal(own[0][name], own[3][name]) for name in own[0])
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(critics))


# Refused


def config(**options):
    return GRPOConfig("out", **{"bf16": False, "use_cpu": True, "report_to": "none", **options})


NEVER = "policy_kl_stop skips further updates of a generation batch, but there is one only. Raise num_iterations or"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_kl_stop": 0.0}, "policy_kl_stop must be a positive number, got 0.0."),
        ({"policy_kl_stop": -1}, "policy_kl_stop must be a positive number, got -1."),
        ({"policy_kl_stop": math.nan}, "policy_kl_stop must be a positive number, got nan."),
        ({"policy_kl_stop": math.inf}, "policy_kl_stop must be a positive number, got inf."),
        ({"policy_kl_stop": True}, "policy_kl_stop is no switch, got True."),
        ({"policy_kl_stop": "much"}, "policy_kl_stop must be a positive number, got 'much'."),
        ({"policy_kl_stop": 0.1, "num_iterations": 1}, NEVER),
        ({"policy_kl_stop": 0.1, "gradient_accumulation_steps": 4, "steps_per_generation": 2}, NEVER),
        (
            {"policy_kl_stop": 0.1, "num_iterations": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "steps_per_generation * num_iterations = 3 is no multiple of gradient_accumulation_steps=2.",
        ),
        ({"policy_kl_stop": 0.1, "optim": "lomo"}, "before the optimizer's step, but optim='lomo' keeps them."),
        (
            {"policy_kl_stop": 0.1, "shared_prefix": True, "skip_zero_advantages": True},
            "policy_kl_stop measures the KL on all rows, but skip_zero_advantages leaves some out. Remove one.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**{"num_iterations": 2, **options})


@pytest.mark.parametrize("launched", [False, True])
def test_deepspeed_is_refused(monkeypatch, launched):
    options = config(num_iterations=2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(launched))
    options.deepspeed, options.policy_kl_stop = None if launched else "zero2.json", 0.1
    with pytest.raises(ValueError, match="takes gradients away before the optimizer's step, but DeepSpeed keeps them"):
        check_policy_kl(Options(options))


def test_a_subclass_with_a_loss_of_its_own_is_told_so(tiny_model, tmp_path):
    class Own(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return sum(p.square().sum() for p in model.parameters())

    with pytest.raises(ValueError, match=r"Own overrides _compute_loss without calling that of GRPOTrainer, so that "
                                         r"policy_kl_stop has no effect with it\."):  # fmt: skip
        run(tiny_model, tmp_path, Own, policy_kl_stop=0.1)
