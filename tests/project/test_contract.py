"""
Every part of TRL that trl_ext depends on beyond its public interface, one test each. A failure here names what has
changed in TRL; the feature tests then need not be read.
"""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
import trl
from tiny import build, scripted_rollout
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.grpo_trainer import GRPOTrainer

import trl_ext
from trl_ext import upstream, upstream_async
from trl_ext.cli.parser import GRPO_LOSSES, parser_class
from trl_ext.functional.preference import PREFERENCE_LOSSES
from trl_ext.trainers.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.dpo.losses import TRL_LOSSES
from trl_ext.trainers.grpo import GRPOConfig
from trl_ext.trainers.grpo import GRPOTrainer as OurGRPOTrainer
from trl_ext.trainers.grpo.exact_kl import lm_head
from trl_ext.trainers.kto import KTOConfig, KTOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer
from trl_ext.trainers.prm import PRMConfig, PRMTrainer
from trl_ext.trainers.shared_options import SharedOptions
from trl_ext.upstream import CHECKS, PARAMETERS, UpstreamChanged

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]


@pytest.mark.parametrize("part", [*CHECKS, *upstream_async.CHECKS])
def test_a_part_of_trl_is_as_expected(part):
    before = set(ALL_ATTENTION_FUNCTIONS)
    {**CHECKS, **upstream_async.CHECKS}[part]()
    assert {*ALL_ATTENTION_FUNCTIONS} == before, "nothing of a check stays in transformers"


def test_a_changed_engine_is_noticed(monkeypatch):
    from trl.experimental.async_grpo import async_rollout_worker, packing

    theirs = packing.TreeRow.pack
    with monkeypatch.context() as patched:
        patched.setattr(packing.TreeRow, "pack", lambda row: theirs(row) | {"old_log_probs": torch.zeros(1)})
        with pytest.raises(UpstreamChanged, match="two numbers per token do not pass through"):
            upstream_async.check_columns.__wrapped__()
    with monkeypatch.context() as patched:
        patched.setattr(upstream.trl_class(AsyncGRPOTrainer), "compute_loss", lambda self, model: model() + model())
        with pytest.raises(UpstreamChanged, match="runs the model 2 times"):
            upstream_async.check_one_forward()
    monkeypatch.delattr(async_rollout_worker.AsyncRolloutWorker, "_loop_cls")
    with pytest.raises(UpstreamChanged, match="_loop_cls"):
        upstream_async.check_rollout_process()


PACKAGE = Path(trl_ext.__file__).parent
OF_TRL = ("trl", "transformers")


def package_of(thing):
    return thing.__module__.partition(".")[0]


def overridden(ours):
    """Names of functions of TRL or transformers that a class of ours replaces, without `__init__` and its like."""
    theirs = [c for c in ours.__mro__ if package_of(c) in OF_TRL]
    for name in {name for c in ours.__mro__ if package_of(c) == "trl_ext" for name in vars(c)}:
        held = next((vars(c)[name] for c in theirs if name in vars(c)), None)
        if inspect.isfunction(held) and not name.startswith("__"):
            yield name


def path_of(thing):
    return f"{thing.__module__}.{thing.__qualname__}"


TRAINERS = [OurGRPOTrainer, DPOTrainer, KTOTrainer, PRMTrainer, AsyncGRPOTrainer]
CONFIGS = [GRPOConfig, DPOConfig, KTOConfig, PRMConfig, AsyncGRPOConfig]


@pytest.mark.parametrize("ours", [*TRAINERS, PPOTrainer, *CONFIGS, PPOConfig, parser_class()])
def test_every_overridden_method_is_listed(ours):
    parent = upstream.trl_class(ours)
    for name in overridden(ours):
        assert f"{path_of(parent)}.{name}" in PARAMETERS, name


def test_the_losses_of_grpo_are_those_that_trl_compares_with():
    tree = ast.parse(textwrap.dedent(inspect.getsource(trl.GRPOTrainer._compute_loss)))
    compared = {
        constant.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "self.loss_type"
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant)
    }
    assert compared == {*GRPO_LOSSES}


# Labels of steps are other data and another loss than pairs of answers: nothing of TRL's is left in these two.
REPLACED = {PRMTrainer: {"_prepare_dataset", "compute_loss"}}


@pytest.mark.parametrize("ours", [*TRAINERS, *CONFIGS])
def test_the_design_page_is_right_about_every_override(ours):
    page = (PACKAGE.parent / "docs/design.md").read_text()
    table = page[page.index("| part of TRL |") :]
    for name in overridden(ours):
        assert f"{name}`" in table, name
        method = next(vars(c)[name] for c in ours.__mro__ if name in vars(c))
        source = textwrap.dedent(inspect.getsource(method))
        assert ("super()" in source) == (name not in REPLACED.get(ours, ()))
        assert len(source.splitlines()) - len((inspect.getdoc(method) or "").splitlines()) <= 25


def test_an_overridden_method_that_is_not_listed_is_found():
    class Ours(OurGRPOTrainer):
        def _generate_single_turn(self, *args):
            pass

        def evaluate(self, *args):
            pass

    Ours.__module__ = "trl_ext.trainers.grpo.new"
    assert {"_generate_single_turn", "evaluate", "_compute_loss", "train"} <= {*overridden(Ours)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_function_of_trl_that_is_called_is_listed(path):
    """Functions imported from the inside of TRL, and private methods of its trainers."""
    parents = [upstream.trl_class(trainer) for trainer in TRAINERS]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl."):
            module = importlib.import_module(node.module)
            held = [getattr(module, alias.name, None) for alias in node.names]  # `None`: a module below it
            assert {path_of(thing) for thing in held if inspect.isfunction(thing)} <= PARAMETERS.keys()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("_"):
            name = node.func.attr
            owners = [c for c in parents if inspect.isfunction(getattr(c, name, None)) and not name.startswith("__")]
            assert not owners or any(f"{path_of(c)}.{name}" in PARAMETERS for c in owners), name


def test_env_check_has_a_line_for_each():
    assert len([name for name in CHECKS if name.startswith("parameters of ")]) == len(PARAMETERS)
    for path in PARAMETERS:
        assert f"parameters of {path.removeprefix('trl.')}" in CHECKS


@pytest.mark.parametrize("ours", [OurGRPOTrainer, DPOTrainer, KTOTrainer])
def test_a_trainer_is_checked_when_it_is_made(monkeypatch, ours):
    class Theirs(ours):
        pass

    parent = upstream.trl_class(ours)
    upstream.check_overridden(Theirs)
    monkeypatch.setattr(upstream, "_checked_once", upstream.check_parameters)  # as in a new process
    monkeypatch.setattr(parent, "_compute_loss", lambda self, inputs: None)
    message = re.escape(f"{path_of(parent)}._compute_loss takes ('self', 'inputs'), expected")
    with pytest.raises(UpstreamChanged, match=message):
        upstream.check_overridden(Theirs)
    with pytest.raises(UpstreamChanged, match=message):
        ours(model="none")


def test_a_trainer_below_another_class_of_trl_is_refused():
    with pytest.raises(UpstreamChanged, match="RLOOTrainer has none of TRL's known trainers among its bases"):
        upstream.check_overridden(trl.RLOOTrainer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: delattr(GRPOTrainer, "_calculate_rewards"), "GRPOTrainer._calculate_rewards is gone"),
        (
            lambda: setattr(GRPOTrainer, "_compute_loss", lambda self, inputs: None),
            "GRPOTrainer._compute_loss takes ('self', 'inputs'), expected ('self', 'model', 'inputs') first",
        ),
    ],
)
def test_registration_names_what_has_changed_and_the_version(change, message):
    theirs = dict(vars(GRPOTrainer))
    try:
        change()
        with pytest.raises(RuntimeError, match=re.escape(message)) as error:
            trl_ext.register()
        assert f"TRL {trl.__version__} is not laid out as trl_ext expects" in str(error.value)
    finally:
        for name in ("_calculate_rewards", "_compute_loss"):
            setattr(GRPOTrainer, name, theirs[name])
    assert trl.GRPOTrainer is GRPOTrainer, "nothing is left half done"


def test_no_field_of_ours_is_a_field_of_trl():
    theirs = trl.GRPOConfig.__dataclass_fields__
    ours = GRPOConfig.__dataclass_fields__.keys() - theirs.keys()
    assert ours >= {"advantage_estimator", "advantage_kwargs", "kl_estimator", "kl_placement", "callback_paths"}
    declared = {name for name in GRPOConfig.__annotations__ if not name.startswith("_")}
    assert declared | {*SharedOptions.__annotations__} == ours, "a field of ours exists in TRL's config"
    assert not declared & {*SharedOptions.__annotations__}


def test_no_new_field_of_ppo_is_a_field_of_trl():
    theirs, ours = trl.GRPOConfig.__dataclass_fields__.keys(), GRPOConfig.__dataclass_fields__.keys()
    declared = {name for name in PPOConfig.__annotations__ if not name.startswith("_")}
    changed_defaults = {"num_generations", "beta", "num_iterations", "disable_dropout"}
    assert declared & theirs == changed_defaults
    assert declared & (ours - theirs) == {"advantage_estimator", "kl_placement"}


def test_every_option_of_ours_is_off_by_default():
    fields = GRPOConfig.__dataclass_fields__
    # What these say is read only together with an option that is off.
    details = {"step_separator": "\n", "process_weight": 1.0, "outcome_weight": 1.0}
    for name in fields.keys() - trl.GRPOConfig.__dataclass_fields__.keys():
        assert fields[name].default == details.get(name), name


@pytest.fixture(scope="module")
def scored(tiny_model, tmp_path_factory):
    """A trainer and what TRL returns from scoring a batch; `old_per_token_logps` because rollouts are reused."""
    trainer = build(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        tiny_model,
        tmp_path_factory.mktemp("out"),
        rollout_func=scripted_rollout,
        beta=0.1,
        num_iterations=2,
        max_completion_length=8,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = [{"prompt": prompt} for prompt in ["ab"] * 4 + ["cde"] * 4]
    seen = []
    gathered = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *a: seen.append(gathered(*a)) or seen[-1]
    output = trainer._generate_and_score_completions(inputs)
    assert len(seen) == 1, "_calculate_rewards is called once per generation batch"
    assert seen[0].shape == (8, 1) and seen[0].dtype == torch.float32
    return trainer, output


def test_what_scoring_returns(scored):
    _, output = scored
    rows, width = output["completion_ids"].shape
    assert next(iter(output)) == "prompt_ids"
    for name in ("completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps"):
        assert output[name].shape == (rows, width), name
    assert output["advantages"].shape == (rows,)
    assert output["num_items_in_batch"] == (output["completion_mask"] * output["tool_mask"]).sum()


def test_trl_logs_one_advantage_per_row(scored):
    trainer, output = scored
    assert list(trainer._logs["advantages"]) == pytest.approx(output["advantages"].tolist()[-4:])  # as long as a batch


def test_the_old_log_probs_are_left_out_where_they_equal_those_of_the_first_loss(tiny_model, tmp_path):
    trainer = build(trl.GRPOTrainer, trl.GRPOConfig, tiny_model, tmp_path, rollout_func=scripted_rollout)
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": "ab"}] * 4)
    assert "old_per_token_logps" not in output and "ref_per_token_logps" not in output


def test_the_log_probs_come_first_and_once_per_loss(scored, monkeypatch):
    trainer, output = scored
    results = []
    original = trainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: results.append(original(*a, **k)) or results[-1],
        raising=False,
    )
    trainer._compute_loss(trainer.model, output)
    assert len(results) == 1 and len(results[0]) == 3
    assert results[0][0].shape == output["completion_ids"].shape and results[0][0].requires_grad


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_constant_rows_of_token_advantages_equal_one_advantage_per_row(scored, monkeypatch, loss_type):
    trainer, output = scored
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    per_row = loss_and_gradient(trainer, output)
    per_token = {**output, "advantages": output["advantages"][:, None].expand_as(output["completion_ids"])}
    torch.testing.assert_close(loss_and_gradient(trainer, per_token), per_row, atol=1e-7, rtol=1e-6)


def test_a_sequence_ratio_erases_token_credit(scored, monkeypatch):
    # The reason why importance_sampling_level="sequence" is refused with one advantage per token.
    trainer, output = scored
    monkeypatch.setattr(trainer, "importance_sampling_level", "sequence")
    monkeypatch.setattr(trainer, "loss_type", "grpo")
    mask = output["completion_mask"] * output["tool_mask"]
    torch.manual_seed(0)
    advantages = torch.randn(mask.shape)
    means = (advantages * mask).sum(1) / mask.sum(1)
    _, of_tokens = loss_and_gradient(trainer, {**output, "advantages": advantages})
    _, of_means = loss_and_gradient(trainer, {**output, "advantages": means})
    torch.testing.assert_close(of_tokens, of_means, atol=1e-7, rtol=1e-5)


def test_the_fused_head_knows_what_it_multiplies_the_logits_by(scored):
    head = lm_head(scored[0].model)
    assert head.weight is scored[0].model.lm_head.weight
    assert (head.logit_scale, head.softcap, head.in_float32) == (1.0, None, False)


def test_the_chunked_kernel_with_beta_one_is_the_kl_from_student_to_teacher():
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    weight, ref_weight = torch.randn(11, 8), torch.randn(11, 8)
    kl, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, ref_hidden, ref_weight, None, 1.0, 0.7, 1.0, None, 1.0, None
    )
    policy, reference = ((h @ w.T / 0.7).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    expected = (policy.exp() * (policy - reference)).sum(-1)
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (kl, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_scoring_returns_the_log_probs_of_the_reference_as_computed(scored, monkeypatch):
    trainer, _ = scored
    results, original = [], trainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: results.append(original(*a, **k)) or results[-1],
        raising=False,
    )
    output = trainer._generate_and_score_completions([{"prompt": "ab"}] * 4)
    assert sum(result[0] is output["ref_per_token_logps"] for result in results) == 1


# DPO


def test_the_losses_known_as_trls_are_all_that_trl_has():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert {*re.findall(r'loss_type == "(\w+)"', source)} == {*TRL_LOSSES}
    assert not {*TRL_LOSSES} & {*PREFERENCE_LOSSES, "psipo"}


def test_no_field_of_ours_is_a_field_of_trls_dpo_config_and_each_is_off():
    theirs, fields = trl.DPOConfig.__dataclass_fields__, DPOConfig.__dataclass_fields__
    ours = fields.keys() - theirs.keys()
    assert {name for name in DPOConfig.__annotations__ if not name.startswith("_")} == ours
    assert {fields[name].default for name in ours} == {None, 1.0}  # reward_scale is a factor


def test_preparing_a_dataset_reads_three_options_only():
    source = inspect.getsource(trl.DPOTrainer._prepare_dataset)
    assert {*re.findall(r"\bargs\.(\w+)", source)} == {"dataset_num_proc", "max_length", "truncation_mode"}
