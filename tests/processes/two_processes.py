"""
Worker of `test_processes.py`: trains every case and saves what this process saw to `<folder>/<rank>of<world>.pt`.

    python -m torch.distributed.run --nproc_per_node 2 two_processes.py MODEL FOLDER WORLD_SIZE
"""

import sys
from pathlib import Path

from accelerate import PartialState
from launch import leave
from tiny import build, logged, scripted_rollout, weights

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
OUTCOMES_ALONE = [name for name, row in ADVANTAGE_ESTIMATORS.items() if row.steps != "needed" and not row.values]
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
OUTCOME = {"advantage_estimator": "leave_one_out"}
REFUSED = {
    **{function.__name__: {"reward_funcs": function, **STEPS} for function in (one_too_many, lists_on_one_process)},
    **{f.__name__: {"reward_funcs": f, **OUTCOME} for f in (raises, async_raises, one_number, too_few, a_word)},
    "not cut": {
        "reward_funcs": by_step,
        "advantage_estimator": "process_group_relative",
        "step_ends_function": "two_processes.no_ends_on_the_last_process",
    },
}


class Recorder(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("seen", []).append(output["advantages"])
        return output


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    for name, options in CASES.items():
        trainer = build(
            Recorder,
            GRPOConfig,
            model,
            folder,
            per_device_train_batch_size=BATCH // world_size,
            max_steps=4,
            optim="sgd",
            learning_rate=0.1,
            rollout_func=scripted_rollout,
            **{"reward_funcs": some_fail, **options},
        )
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        results[name] = {
            "advantages": trainer.seen,
            "weights": weights(trainer),
            "log": logged(trainer),
            "table": list(trainer._logs["advantages"]),
        }
    return results


def refused(model: str, folder: Path, world_size: int) -> dict:
    """What each process is told of functions that go wrong on one of them."""
    errors = {}
    for name, options in REFUSED.items():
        settings = {"per_device_train_batch_size": BATCH // world_size, "rollout_func": scripted_rollout, **options}
        trainer = build(GRPOTrainer, GRPOConfig, model, folder, **settings)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            errors[name] = f"{type(error).__name__}: {error}", repr(error.__cause__)
    return errors


if __name__ == "__main__":
    model, folder, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    results = {**run(model, folder, world_size), "refused": refused(model, folder, world_size)}
    leave(results, folder, world_size)
