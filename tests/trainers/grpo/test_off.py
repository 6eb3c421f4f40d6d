"""With none of our options set, TRL's path is taken: nothing of ours stands between TRL and the user's functions."""

import sys
from types import FunctionType

import accelerate
import pytest
import torch
import trl.trainer.grpo_trainer as upstream
from datasets import Dataset
from tiny import PROMPTS, build, digits, scripted_rollout, weights

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.upstream import trl_class

TRL, TRL_CONFIG = trl_class(GRPOTrainer), trl_class(GRPOConfig)
PAIRS = {"theirs": (TRL, TRL_CONFIG), "ours": (GRPOTrainer, GRPOConfig)}
# The overrides that a call passes through; each only calls `super()` when we are off.
THIN = {
    "train",
    "training_step",
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
}
COLLECTIVES = ("gather", "reduce", "pad_across_processes", "gather_for_metrics")


@pytest.fixture
def make(tiny_model, tmp_path):
    def make(which, **options):
        settings = {"rollout_func": scripted_rollout, "beta": 0.1, "optim": "sgd", **options}
        return build(*PAIRS[which], tiny_model, tmp_path, **settings)

    return make


def ours_on_the_stack():
    """Our functions between the caller and the top of the stack."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "trl_ext":
            found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


def watch(monkeypatch, owner, name, before):
    theirs = getattr(owner, name)

    def watched(*args, **kwargs):
        before(*args, **kwargs)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)


def test_trl_calls_the_users_own_functions(make, monkeypatch):
    """The very objects, with the thin overrides alone on the stack, and no attribute that shadows a method."""
    stacks, attributes, given = [], [], []

    def reward(completions, **kwargs):
        stacks.append(ours_on_the_stack())
        attributes.append({name for name in vars(trainer) if hasattr(type(trainer), name)})
        given.append(sorted(kwargs))
        return digits(completions)

    async def later(completions, **kwargs):
        return digits(completions)

    trainer = make("ours", reward_funcs=[reward, later])
    assert trainer.reward_funcs[0] is reward and trainer.reward_funcs[1] is later
    held = []
    watch(monkeypatch, TRL, "_calculate_rewards", lambda self, *args: held.append([*self.reward_funcs]))
    trainer.train()
    assert held and all(functions[0] is reward and functions[1] is later for functions in held)
    assert {name for stack in stacks for name in stack} <= THIN
    # scoring and `training_step` also as those of the classes that move references and share prefixes
    scoring, step = ["_generate_and_score_completions"] * 3, ["training_step"] * 3
    expected = [*scoring, "_prepare_inputs", *step, "train"]
    assert all(stack == expected for stack in stacks), stacks[0]
    expected = make("theirs", reward_funcs=[digits])
    assert attributes[0] == {name for name in vars(expected) if hasattr(type(trainer), name)} and given[0] == [
        "completion_ids", "log_extra", "log_metric", "prompts", "trainer_state"
    ]  # fmt: skip


def test_nothing_of_ours_runs_in_the_forward_and_the_loss(make, monkeypatch):
    stacks = []
    trainer = make("ours")
    trainer.model.register_forward_pre_hook(lambda *args: stacks.append(ours_on_the_stack()))
    trainer.train()
    assert {name for stack in stacks for name in stack} <= THIN
    assert type(trainer.beta) is float and not trainer.model._forward_hooks


def count_collectives(trainer, patched):
    calls = []

    def note(name):
        return lambda *args, **kwargs: calls.append(name)

    for name in COLLECTIVES:
        watch(patched, accelerate.Accelerator, name, note(name))
    modules = [module for name, module in sys.modules.items() if name.startswith("trl_ext.")]
    for module in [upstream, *modules]:
        if isinstance(vars(module).get("gather_object"), FunctionType):
            watch(patched, module, "gather_object", note("gather_object"))
    trainer.train()
    return calls


def test_no_collective_is_added(make, monkeypatch):
    counts = {}
    for which in PAIRS:
        with monkeypatch.context() as patched:
            counts[which] = count_collectives(make(which), patched)
    assert counts["ours"] == counts["theirs"] and {"gather", "gather_object", "reduce"} <= {*counts["ours"]}


@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2}, {"loss_type": "grpo", "gradient_accumulation_steps": 2}]
)
def test_weights_and_logs_are_trls(make, options):
    trained = []
    for which in PAIRS:
        trained.append(make(which, **options))
        trained[-1].train()
    theirs, ours = trained
    expected = weights(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in weights(ours).items())
    timed = ("train_runtime", "samples_per_second", "steps_per_second", "step_time")
    logs = [
        [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]
        for trainer in (theirs, ours)
    ]
    assert repr(logs[0]) == repr(logs[1])


def lists(completions, **kwargs):
    return [[1.0]] * (len(completions) - 1) + [[1.0, 2.0]]


def too_few(completions, **kwargs):
    return [1.0]


def wrong_type(completions, **kwargs):
    return ["good"] * len(completions)


def fails(completions, **kwargs):
    raise KeyError("of the function's own")


@pytest.mark.parametrize("reward", [lists, too_few, wrong_type, fails])
def test_trls_own_errors_appear(make, reward):
    errors = {}
    for which in PAIRS:
        with pytest.raises(Exception) as caught:
            make(which, reward_funcs=reward).train()
        errors[which] = type(caught.value), str(caught.value)
    assert errors["ours"] == errors["theirs"]


@pytest.mark.parametrize("column", ["completion_steps", "completion_step_ends"])
def test_a_column_is_the_users_when_off_and_refused_when_on(make, column):
    found = []

    def reward(completions, **kwargs):
        found.extend(kwargs[column])
        return digits(completions)

    data = Dataset.from_dict({"prompt": PROMPTS, column: [f"of {prompt}" for prompt in PROMPTS]})
    make("ours", reward_funcs=reward, train_dataset=data, max_steps=1).train()
    assert set(found) <= {f"of {prompt}" for prompt in PROMPTS} and len(found) == 4
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"{name} has a column '{column}', the name .* Rename the column.$"):
            make("ours", reward_funcs=reward, advantage_estimator="leave_one_out", **{name: data})


def test_a_column_that_appears_while_training_is_refused_too(make):
    def rollout(prompts, trainer):
        return {**scripted_rollout(prompts, trainer), "completion_steps": ["theirs"] * len(prompts)}

    def reward(completions, completion_steps, **kwargs):
        return digits(completions)

    make("ours", rollout_func=rollout, reward_funcs=reward, max_steps=1).train()
    with pytest.raises(ValueError, match=r"^The data have a column 'completion_steps', the name"):
        make("ours", rollout_func=rollout, reward_funcs=reward, advantage_estimator="reinforce_plus_plus").train()
