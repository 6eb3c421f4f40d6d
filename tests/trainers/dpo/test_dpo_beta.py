"""β-DPO in the trainer: equal to TRL's DPO without a slope, its state once per step, and in interrupted runs."""

import json

import pytest
import torch
import trl
from theorems import proves
from tiny import logged, weights
from tiny.dpo import build, pairs

from trl_ext.functional.preference import MovingMargins, moving_statistics
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer

OURS = (DPOTrainer, DPOConfig)
TRLS = (trl.DPOTrainer, trl.DPOConfig)


def trained(classes, model, folder, **options):
    trainer = build(*classes, model, folder, **{"loss_type": ["beta_dpo"], "kind": "reference", **options})
    trainer.train()
    return trainer


def assert_equal_weights(ours, theirs):
    for name, weight in weights(theirs).items():
        assert torch.equal(weights(ours)[name], weight), name


FILTER = {"loss_kwargs": {"beta_dpo": {"alpha": 0.1, "keep": 0.5}}}


@pytest.mark.theorem(
    "Side by side with TRL",
    "β-DPO with α = 0 trains to the weights of TRL's DPO",
    paper="beta_dpo",
    at_most=0,
)
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [("sigmoid", {}), ("sigmoid", {"kind": "lora"}), ("sigmoid_norm", {"logp_reduction": "mean"})],
    ids=["sum", "LoRA", "mean"],
)
def test_without_slope_it_trains_as_sigmoid_does_bit_for_bit(tiny_model, tmp_path, loss_type, options):
    shared = {"kind": options.get("kind", "reference"), "gradient_accumulation_steps": 2}
    theirs = trained(TRLS, tiny_model, tmp_path, loss_type=[loss_type], **shared)
    ours = trained(OURS, tiny_model, tmp_path, **{**shared, "loss_kwargs": {"beta_dpo": {"alpha": 0.0}}, **options})
    assert_equal_weights(ours, theirs)
    proves(weights(ours), weights(theirs))
    for our_entry, their_entry in zip(logged(ours), logged(theirs), strict=True):
        assert {name: our_entry[name] for name in ("loss", "grad_norm", "rewards/margins")} == {
            name: their_entry[name] for name in ("loss", "grad_norm", "rewards/margins")
        }
        assert our_entry["beta_dpo/beta"] == 0.1


def test_a_slope_changes_the_run(tiny_model, tmp_path):
    flat = trained(OURS, tiny_model, tmp_path, loss_kwargs={"beta_dpo": {"alpha": 0.0}})
    steep = trained(OURS, tiny_model, tmp_path, loss_kwargs={"beta_dpo": {"alpha": 0.1}})
    assert any(not torch.equal(weight, weights(flat)[name]) for name, weight in weights(steep).items())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_beta_follows_the_logged_margins(tiny_model, tmp_path, reduction):
    options = {"loss_kwargs": {"beta_dpo": {"alpha": 0.2}}, "max_steps": 6, "logp_reduction": reduction}
    trainer = trained(OURS, tiny_model, tmp_path, **options)
    moving, betas = None, []
    unit = "_per_token" if reduction == "mean" else ""
    names = ("beta_dpo/beta", "beta_dpo/moving_mean", "beta_dpo/clamped")
    for chosen, rejected, beta, moving_mean, clamped in logged(
        trainer, f"logratios/chosen{unit}", f"logratios/rejected{unit}", *names
    ):
        margin = chosen - rejected
        moving = margin if moving is None else moving
        assert moving_mean == pytest.approx(moving, rel=1e-4, abs=1e-5)
        assert beta == pytest.approx(max(0.1 * (1 + 0.2 * (margin - moving)), 1e-3), rel=1e-4)
        assert clamped == float(beta == 1e-3)
        moving = 0.9 * moving + 0.1 * margin
        betas.append(beta)
    assert trainer.get_extra_state()["beta_dpo"]["moving"][0] == pytest.approx(moving, rel=1e-4)
    assert betas[0] == 0.1 and len({*betas}) == 6


def test_the_clamp_is_logged(tiny_model, tmp_path):
    trainer = trained(OURS, tiny_model, tmp_path, loss_kwargs={"beta_dpo": {"alpha": 1e3}}, max_steps=6)
    betas = [beta for (beta,) in logged(trainer, "beta_dpo/beta")]
    assert [clamped for (clamped,) in logged(trainer, "beta_dpo/clamped")] == [float(beta == 1e-3) for beta in betas]
    assert 1e-3 in betas and max(betas) > 0.1


def test_it_moves_once_per_optimizer_step_over_all_its_micro_batches(tiny_model, tmp_path, monkeypatch):
    windows, step = [], MovingMargins.step

    def recorded(state):
        windows.append((state.moving, state.window))
        step(state)

    monkeypatch.setattr(MovingMargins, "step", recorded)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer = trained(OURS, tiny_model, tmp_path, **options)
    (first, one), (second, two) = windows
    assert [len(margins) for margins in (*one, *two)] == [2] * 8
    assert first == moving_statistics(one[0])
    assert second == moving_statistics(torch.cat(one), first)
    after = moving_statistics(torch.cat(two), second)
    assert trainer.get_extra_state() == {"beta_dpo": {"moving": after, "draws": 8}}
    means = [entry["beta_dpo/moving_mean"] for entry in logged(trainer)]
    assert means == pytest.approx([first[0], second[0]])  # constant inside a step


def test_evaluation_changes_nothing_and_keeps_every_pair(tiny_model, tmp_path):
    trainer = trained(OURS, tiny_model, tmp_path, **FILTER)
    before = trainer.get_extra_state()
    moving = before["beta_dpo"]["moving"]
    rows = pairs(4)
    metrics = trainer.evaluate(rows)
    assert trainer.get_extra_state() == before
    assert metrics["eval_beta_dpo/moving_mean"] == moving[0]
    margin = metrics["eval_rewards/margins"] / 0.1
    assert metrics["eval_beta_dpo/beta"] == pytest.approx(max(0.1 * (1 + 0.1 * (margin - moving[0])), 1e-3), rel=1e-4)
    fresh = build(*OURS, tiny_model, tmp_path, loss_type=["beta_dpo"], kind="reference", **FILTER)
    theirs = build(*TRLS, tiny_model, tmp_path, loss_type=["sigmoid"], kind="reference")
    assert fresh.evaluate(rows)["eval_loss"] == theirs.evaluate(rows)["eval_loss"]  # before training: β
    assert fresh.get_extra_state() == {"beta_dpo": {"moving": None, "draws": 0}}


@pytest.mark.parametrize("options", [{}, FILTER], ids=["", "a filter"])
def test_an_interrupted_run_continues_bit_for_bit(tiny_model, tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **options}
    options = {"per_device_train_batch_size": 2, **options}
    whole = trained(OURS, tiny_model, tmp_path / "out", **options)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = json.loads((checkpoint / "trl_ext_state.json").read_text())["beta_dpo"]
    assert saved["draws"] == 4 and len(saved["moving"]) == 2
    resumed = build(*OURS, tiny_model, tmp_path / "out", loss_type=["beta_dpo"], kind="reference", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert resumed.get_extra_state() == whole.get_extra_state()
    assert_equal_weights(resumed, whole)
    # And the state matters: without it the run is another.
    (checkpoint / "trl_ext_state.json").unlink()
    forgetful = build(*OURS, tiny_model, tmp_path / "out", loss_type=["beta_dpo"], kind="reference", **options)
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no trl_ext_state.json; these start anew: \['beta_dpo'\]"):
        forgetful.train(resume_from_checkpoint=str(checkpoint))
    assert any(not torch.equal(weight, weights(whole)[name]) for name, weight in weights(forgetful).items())


def test_the_seed_decides_what_the_filter_keeps(tiny_model, tmp_path):
    shared = {**FILTER, "data_seed": 7, "max_steps": 3}
    one, same, other = (trained(OURS, tiny_model, tmp_path, seed=seed, **shared) for seed in (1, 1, 2))
    assert_equal_weights(one, same)
    assert any(not torch.equal(weight, weights(one)[name]) for name, weight in weights(other).items())


def test_other_losses_write_no_state(tiny_model, tmp_path):
    trained(OURS, tiny_model, tmp_path, loss_type=["gpo_logistic"], max_steps=1, save_strategy="steps", save_steps=1)
    assert not (tmp_path / "checkpoint-1" / "trl_ext_state.json").exists()
