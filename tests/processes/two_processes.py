"""
Worker of `test_processes.py`: trains every case and saves what this process saw to `<folder>/<rank>of<world>.pt`.
"""

from pathlib import Path

import torch
from accelerate import PartialState
from tiny import build, logged, scripted_rollout, weights
from transformers import AutoModelForSequenceClassification

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

BATCH = 8


def some_fail(completions, completion_ids, **kwargs):
    """A reward of the completion alone, so that it does not depend on the process; some are not scored."""
    return [None if sum(ids) % 5 == 0 else (sum(ids) % 7) / 7 for ids in completion_ids]


def by_step(completion_ids, completion_steps, completion_step_ends, **kwargs):
    """One reward per step, of its text and last token alone; some steps and some completions are not scored."""
    rewards = []
    for ids, steps, ends in zip(completion_ids, completion_steps, completion_step_ends, strict=True):
        row = [(3 * len(step) + ids[end]) % 7 / 7 for step, end in zip(steps, ends, strict=True)]
        rewards.append(None if sum(ids) % 5 == 1 else [None if value > 0.8 else value for value in row])
    return rewards


def one_too_many(completion_steps, **kwargs):
    """Wrong on the last process only, from its second completion on."""
    state = PartialState()
    extra = state.process_index == state.num_processes - 1
    return [[0.0] * (len(steps) + (extra and i > 0)) for i, steps in enumerate(completion_steps)]


def lists_on_one_process(completion_steps, **kwargs):
    first = PartialState().is_main_process
    return [[0.0] * len(steps) if first else 0.0 for steps in completion_steps]


def on_the_last_process(function):
    """`function` on the last process, a constant elsewhere."""

    def reward(completions, **kwargs):
        state = PartialState()
        return function(**kwargs) if state.process_index == state.num_processes - 1 else [0.5] * len(completions)

    async def later(completions, **kwargs):
        return reward(completions, **kwargs)

    reward.__name__ = later.__name__ = function.__name__
    return later if function.__name__.startswith("async_") else reward


@on_the_last_process
def raises(prompts, **kwargs):
    raise KeyError("answer")


@on_the_last_process
def async_raises(prompts, **kwargs):
    raise TimeoutError


@on_the_last_process
def one_number(prompts, **kwargs):
    return 0.5


@on_the_last_process
def too_few(prompts, **kwargs):
    return [0.5]


@on_the_last_process
def a_word(prompts, **kwargs):
    return [0.5, "good", *[0.5] * (len(prompts) - 2)]


def no_ends_on_the_last_process(token_ids, tokenizer):
    state = PartialState()
    return [] if state.process_index < state.num_processes - 1 else [len(token_ids)]


STEPS = {"advantage_estimator": "process_group_relative", "step_separator": "b"}
OUTCOMES_ALONE = [
    name
    for name, row in ADVANTAGE_ESTIMATORS.items()
    if row.steps != "needed" and not row.values and not row.baseline  # of a greedy answer, which is not scripted
]
CASES = {name: {"advantage_estimator": name} for name in OUTCOMES_ALONE}
CASES |= {
    f"{name}, KL in the reward": {"advantage_estimator": name, "kl_placement": "reward", "beta": 0.1}
    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "group_relative")
}
CASES |= {
    f"{name} in the loss": {"kl_estimator": name, "beta": 0.1, "num_iterations": 2}
    for name in ("k1", "k2", "k3", "exact")
}
CASES |= {"the KL of completions": {"kl_placement": "sequence", "beta": 0.1, "num_iterations": 2}}
CASES |= {
    "adaptive beta": {"kl_estimator": "k2", "beta": 0.1, "kl_target": 0.01, "kl_horizon": 100.0},
    "a group across processes": {"advantage_estimator": "leave_one_out", "num_generations": 8},
    "weighted by sequence": {
        "advantage_estimator": "reinforce_plus_plus",
        "advantage_kwargs": {"weighting": "sequence", "correction": 1},
    },
}
CASES |= {
    "step rewards": {**STEPS, "reward_funcs": by_step},
    "step rewards of a group across processes": {**STEPS, "reward_funcs": by_step, "num_generations": 8},
    "step rewards, softmin": {**STEPS, "reward_funcs": by_step, "advantage_kwargs": {"credit": "softmin"}},
    "step and outcome rewards": {**STEPS, "reward_funcs": [by_step, some_fail], "process_weight": 0.5},
    "PRIME with step rewards": {**STEPS, "reward_funcs": [by_step, some_fail], "advantage_estimator": "prime"},
    "PRIME": {"advantage_estimator": "prime", "implicit_prm": {"beta": 0.5, "learning_rate": 0.02}, "lora": True},
    "step rewards in REINFORCE++": {**STEPS, "reward_funcs": by_step, "advantage_estimator": "reinforce_plus_plus"},
}
# Samples are scripted, greedy answers are the model's. With three rows each, both processes have the second prompt.
STRADDLING = {"advantage_estimator": "remax", "num_generations": 2, "rollout_func": None, "rows": 6}
GREEDY = {
    "greedy answers": STRADDLING,
    "greedy answers, steps and KL": {
        **STRADDLING,
        "reward_funcs": [by_step, some_fail],
        "step_separator": "b",
        "kl_placement": "reward",
        "beta": 0.1,
    },
    "greedy answers, one completion": {**STRADDLING, "num_generations": 1},
    "greedy answers, one prompt": {**STRADDLING, "num_generations": 6},
}
OUTCOME = {"advantage_estimator": "leave_one_out"}
REFUSED = {
    **{function.__name__: {"reward_funcs": function, **STEPS} for function in (one_too_many, lists_on_one_process)},
    **{f.__name__: {"reward_funcs": f, **OUTCOME} for f in (raises, async_raises, one_number, too_few, a_word)},
    "not cut": {
        "reward_funcs": by_step,
        "advantage_estimator": "process_group_relative",
        "step_ends_function": "two_processes.no_ends_on_the_last_process",
    },
    "a model raises": OUTCOME,  # with the model below
}


class Recorder(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("seen", []).append(output["advantages"])
        return output

    def _generate_single_turn(self, prompt_ids, *args):
        if self._greedy is not None:
            return super()._generate_single_turn(prompt_ids, *args)
        prompts = self.processing_class.batch_decode(prompt_ids)
        return scripted_rollout(prompts, self)["completion_ids"], None


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for name, options in (CASES | GREEDY).items():
        settings = {"reward_funcs": some_fail, "rollout_func": scripted_rollout, "rows": BATCH, **options}
        settings["per_device_train_batch_size"] = settings.pop("rows") // world_size
        trainer = build(Recorder, GRPOConfig, model, folder, max_steps=4, optim="sgd", learning_rate=0.1, **settings)
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        results[name] = {
            "advantages": trainer.seen,
            "weights": weights(trainer),
            "log": logged(trainer),
            "table": list(trainer._logs["advantages"]),
        }
    return results


def bounded(model: str, folder: Path, world_size: int) -> dict:
    """
    Two updates on each of two generation batches: with no bound that acts, and with bounds just below and just above
    the KL of the second update. A process alone would measure its own.
    """
    results, bound = {}, 1e6
    for name in ("free", "below", "above"):
        trainer = build(
            GRPOTrainer, GRPOConfig, model, folder, max_steps=4, learning_rate=0.01, weight_decay=0.5,
            rollout_func=scripted_rollout, reward_funcs=some_fail, num_iterations=2, lr_scheduler_type="constant",
            per_device_train_batch_size=BATCH // world_size,
            policy_kl_stop=bound * {"free": 1, "below": 0.99, "above": 1.01}[name],
        )  # fmt: skip
        trainer.train()
        kl = [entry["policy_kl"] for entry in logged(trainer)]
        bound = kl[1] if name == "free" else bound
        skipped = [entry["policy_kl/skipped"] for entry in logged(trainer)]
        results[name] = {"kl": kl, "skipped": skipped, "weights": weights(trainer)}
    return results


def judge(model: str) -> torch.nn.Module:
    """A reward model that raises on the last process."""

    def overflows(*args):
        state = PartialState()
        if state.process_index == state.num_processes - 1:
            raise MemoryError("no space is left")

    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    judge.register_forward_pre_hook(overflows)
    return judge


def refused(model: str, folder: Path, world_size: int) -> dict:
    """What each process is told of functions that go wrong on one of them."""
    errors = {}
    for name, options in REFUSED.items():
        settings = {"per_device_train_batch_size": BATCH // world_size, "rollout_func": scripted_rollout, **options}
        if name == "a model raises":
            settings["reward_funcs"] = judge(model)
        trainer = build(GRPOTrainer, GRPOConfig, model, folder, **settings)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            errors[name] = f"{type(error).__name__}: {error}", repr(error.__cause__)
    return errors


def run_in_two(model: str, folder: Path, world_size: int) -> dict:
    results = {**run(model, folder, world_size), "refused": refused(model, folder, world_size)}
    return {**results, "bounded": bounded(model, folder, world_size)}
