"""Nothing outside the table knows its rows: a row added to it is named, listed, refused and cited like the others."""

import importlib.util
import sys
import warnings

import pytest
from tiny import build, scripted_rollout

import trl_ext.trainers.shared_options
from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS, Estimator
from trl_ext.papers import PAPERS
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.grpo.checks import estimator_row, names_of
from trl_ext.trainers.model_card import model_card_with_options

PROBE = '''
def probe(batch, *, limit=1.0):
    """Returns, cut off."""
    if limit <= 0:
        raise ValueError(f"limit must be positive, got {limit!r}.")
    return batch.per_completion(batch.rewards.sum(1).clamp(max=limit))


def weighted(batch, *, process_weight=1.0):
    """Step rewards alone."""
    return process_weight * batch.steps * batch.mask
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module with functions for new rows."""
    (tmp_path / "rows_of_a_user.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rows_of_a_user", raising=False)
    return importlib.import_module("rows_of_a_user")


@pytest.fixture
def add(module, monkeypatch):
    """Adds the probe as a row with these facts, and gives it."""

    def add(function="probe", **facts):
        row = Estimator(getattr(module, function), **facts)
        monkeypatch.setitem(ADVANTAGE_ESTIMATORS, "probe", row)
        return row

    return add


def config(**options):
    return GRPOConfig("out", **{"bf16": False, "use_cpu": True, "report_to": "none", **options})


def refusal(**options):
    with pytest.raises(ValueError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config(**options)
    return str(error.value)


def said(**options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config(**options)
    return [str(warning.message) for warning in caught if "probe" in str(warning.message)]


def test_a_row_is_found_by_its_name(add):
    row = add()
    assert estimator_row("probe") is row
    assert config(advantage_estimator="probe", advantage_kwargs={"limit": 0.5}).advantage_estimator == "probe"
    assert "'probe'" in names_of(lambda row: not row.siblings)
    assert "'probe'" not in names_of(lambda row: row.siblings)


def test_an_unknown_name_is_answered_with_the_row_among_the_others(add):
    assert "'probe'" not in refusal(advantage_estimator="reinforce++")
    add()
    names = sorted(ADVANTAGE_ESTIMATORS)
    assert "probe" in names
    assert refusal(advantage_estimator="reinforce++") == (
        f"advantage_estimator 'reinforce++' is neither one of {names} nor a dotted path such as "
        "'my_package.my_function'; did you mean 'reinforce_plus_plus'?"
    )


def test_the_help_text_lists_the_row(add, monkeypatch):
    add()
    # The help is written where the class is made: make it once more, beside the real one.
    spec = importlib.util.spec_from_file_location(
        "trl_ext.trainers.shared_options_once_more", trl_ext.trainers.shared_options.__file__
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    help_text = module.SharedOptions.__dataclass_fields__["advantage_estimator"].metadata["help"]
    assert all(repr(name) in help_text for name in ADVANTAGE_ESTIMATORS) and "'probe'" in help_text
    assert "'probe'" not in GRPOConfig.__dataclass_fields__["advantage_estimator"].metadata["help"]


def test_a_row_without_siblings_accepts_one_completion_and_is_listed_among_those(add):
    add()
    alone = [name for name, row in ADVANTAGE_ESTIMATORS.items() if not row.siblings and not row.values]
    assert alone[-1] == "probe"
    assert refusal(advantage_estimator="leave_one_out", num_generations=1) == (
        "advantage_estimator='leave_one_out' compares completions of one prompt and needs num_generations >= 2, got "
        f"1. These accept 1: {names_of(lambda row: not row.siblings and not row.values)}."
    )
    assert "'probe'" in refusal(advantage_estimator="leave_one_out", num_generations=1)
    assert config(advantage_estimator="probe", num_generations=1).num_generations == 1


def test_a_row_with_siblings_refuses_one_completion_and_is_not_listed(add):
    add(siblings=True)
    message = refusal(advantage_estimator="probe", num_generations=1)
    assert message.startswith("advantage_estimator='probe' compares completions of one prompt and needs")
    assert "'probe'" not in message.partition("These accept 1")[2]


def test_options_are_those_of_the_rows_function(add):
    add()
    assert refusal(advantage_estimator="probe", advantage_kwargs={"gamma": 1.0}) == (
        "advantage_kwargs has no 'gamma' for 'probe'; it takes ['limit']."
    )
    assert refusal(advantage_estimator="probe", advantage_kwargs={"limit": -1}) == "limit must be positive, got -1."


def test_a_row_of_one_number_per_token_is_refused_where_one_per_completion_is_read(add):
    add()
    config(advantage_estimator="probe", importance_sampling_level="sequence")
    add(per_token=True)
    for options in ({"importance_sampling_level": "sequence"}, {"loss_type": "vespo"}):
        assert "advantage_estimator='probe'" in refusal(advantage_estimator="probe", **options)


def test_a_row_says_what_it_is_warned_of(add):
    reused = {"advantage_estimator": "probe", "num_iterations": 2}
    in_loss = {"advantage_estimator": "probe", "beta": 0.1}
    add()
    assert said(**reused) == [] and said(**in_loss) == []
    add(on_policy=True)
    assert said(**reused) == ["'probe' is derived for exactly on-policy updates; rollouts are reused here."]
    add(kl_placement="reward")
    assert said(**in_loss) == [
        "The paper of 'probe' puts k1 in the reward; with kl_placement unset the KL stays in TRL's loss."
    ]


def test_what_needs_steps_names_the_rows_that_take_them(add):
    model = {"model": "no/such-model", "kind": "marker"}
    add("weighted", per_token=True, steps="needed")
    config(advantage_estimator="probe", process_weight=0.5, process_reward_model=model)
    needed = names_of(lambda row: row.steps == "needed")
    assert "'probe'" in needed
    assert refusal(advantage_estimator="group_mean", process_reward_model=model) == (
        "process_reward_model gives one reward per step, which advantage_estimator='group_mean' cannot use. Use "
        f"{needed}."
    )
    assert "'probe'" in refusal(advantage_estimator="group_mean", process_weight=0.5)
    assert refusal(advantage_estimator="probe", kl_placement="reward", beta=0.1) == (
        "'probe' normalises step rewards, and a KL penalty belongs to no step. Use kl_placement='loss'."
    )
    add("weighted", per_token=True, steps="refused")
    assert "'probe'" not in refusal(advantage_estimator="group_mean", process_reward_model=model)
    add()
    assert "'probe'" not in refusal(advantage_estimator="group_mean", process_weight=0.5)


def test_a_row_is_trained_with_and_names_the_model_card(add, tiny_model, tmp_path):
    row = add(method="Cut-off REINFORCE", paper="opo")
    run = build(
        GRPOTrainer, GRPOConfig, tiny_model, tmp_path, advantage_estimator="probe", rollout_func=scripted_rollout,
        max_steps=1,
    )  # fmt: skip
    seen = []
    replaced = run._replace_advantages

    def watched(scoring, rollout, output):
        replaced(scoring, rollout, output)
        seen.append(output["advantages"].clone())

    run._replace_advantages = watched
    run.train()
    assert seen and all((x >= 0).all() and x.any() for x in seen)  # returns: never below 0, not relative to siblings

    run.create_model_card(model_name="mine")
    through_the_trainer = (tmp_path / "README.md").read_text()
    with model_card_with_options(run, [row], also=("beta", "epsilon", "num_generations", "loss_type")):
        super(GRPOTrainer, run).create_model_card(model_name="mine")
    directly = (tmp_path / "README.md").read_text()
    for text in (through_the_trainer, directly):
        assert f"trained with Cut-off REINFORCE, a method introduced in [{PAPERS['opo'].title}]" in text
        assert "- `advantage_estimator`: `probe`\n" in text
    assert sorted(directly.splitlines()) == sorted(through_the_trainer.splitlines())


def test_a_row_without_a_method_leaves_trls_name_on_the_card(add, tiny_model, tmp_path):
    add()
    run = build(GRPOTrainer, GRPOConfig, tiny_model, tmp_path, advantage_estimator="probe")
    run.create_model_card(model_name="mine")
    text = (tmp_path / "README.md").read_text()
    assert "trained with GRPO, a method introduced in [DeepSeekMath" in text
    assert "- `advantage_estimator`: `probe`\n" in text


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_each_row_names_the_paper_that_its_docstring_links(name):
    row = ADVANTAGE_ESTIMATORS[name]
    assert bool(row.method) == bool(row.paper) == (name != "group_relative")  # which is TRL's own
    if row.paper:
        assert PAPERS[row.paper].url in row.function.__doc__


def test_a_dotted_path_is_a_row_of_which_nothing_is_known(module):
    row = estimator_row("rows_of_a_user.probe")
    assert row == Estimator(module.probe, per_token=None, steps="added")
