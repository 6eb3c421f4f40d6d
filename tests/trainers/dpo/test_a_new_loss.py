"""A new preference loss is one function and one row: everything else finds it."""

import subprocess
import sys

import pytest
import torch
from tiny.dpo import build, pairs

from trl_ext.functional.preference import PREFERENCE_LOSSES, Loss
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.dpo.losses import parse_losses

MODULE = '''
from trl_ext.functional.preference import PREFERENCE_LOSSES, Loss


class Count:
    """A state: how many micro-batches there were."""

    def __init__(self, seed, *, strength=1.0):
        self.batches = 0

    def observe(self, margins, offset, training):
        from trl_ext.functional.preference import GlobalMargins

        self.batches += training
        return GlobalMargins(margins.double(), offset, 0.0, 1.0)

    def step(self):
        pass

    def state(self):
        return {"batches": self.batches}

    def restore(self, state):
        self.batches = state["batches"]

    def metrics(self, batch):
        return {"probe/pairs": float(len(batch.global_margins.margins))}


def probe(batch, *, strength=1.0):
    return strength * (batch.margin - batch.reward_margin).abs()


def probe_metrics(batch):
    return {"probe/higher": batch.reward_margin > 0}


ROW = Loss(
    probe, scores=True, per_token=True, state=Count, metrics=probe_metrics, method="Probe-DPO", paper="odpo"
)
'''
CPU = {"bf16": False, "use_cpu": True, "report_to": "none"}
SCORES = {"chosen_reward_column": "good", "rejected_reward_column": "bad"}


@pytest.fixture
def probe(tmp_path, monkeypatch):
    (tmp_path / "probe_loss.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import probe_loss

    monkeypatch.setitem(PREFERENCE_LOSSES, "probe", probe_loss.ROW)
    yield probe_loss
    del sys.modules["probe_loss"]


def test_validation_knows_it(probe):
    with pytest.raises(ValueError, match=r"'prob' is neither one of .*'probe'"):
        DPOConfig("out", loss_type=["prob"], **CPU)
    with pytest.raises(ValueError, match="loss_type 'probe' compares scores of the two completions; set chosen"):
        DPOConfig("out", loss_type=["probe"], **CPU)
    with pytest.raises(ValueError, match=r"loss_kwargs has no 'power' for 'probe'; it takes \['strength'\]"):
        DPOConfig("out", loss_type=["probe"], loss_kwargs={"probe": {"power": 1}}, **SCORES, **CPU)
    with pytest.raises(ValueError, match="label_smoothing is not read by loss_type 'probe'"):
        DPOConfig("out", loss_type=["probe"], label_smoothing=0.1, **SCORES, **CPU)
    (loss,) = parse_losses(DPOConfig("out", loss_type=["probe"], **SCORES, **CPU)).ours
    assert loss.per_token and loss.row is probe.ROW


def test_a_run_logs_saves_and_describes_it(probe, tiny_model, tmp_path):
    rows = pairs(8, good=lambda i: float(i), bad=lambda i: 2.5)
    options = {"loss_type": ["probe"], "loss_kwargs": {"probe": {"strength": 0.5}}, **SCORES}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "train_dataset": rows}
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path / "out", **options)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(entry["probe/higher"] for entry in entries) == 2 * 5 / 8
    assert [entry["probe/pairs"] for entry in entries] == [4.0, 4.0] and all(
        "loss/probe" in entry for entry in entries
    )
    assert trainer.get_extra_state() == {"probe": {"batches": 2}}
    resumed = build(DPOTrainer, DPOConfig, tiny_model, tmp_path / "out", **{**options, "max_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.get_extra_state() == {"probe": {"batches": 3}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Probe-DPO" in card and "Direct Preference Optimization with an Offset" in card


def test_a_checkpoint_without_the_state_of_a_loss_starts_it_anew(probe, tiny_model, tmp_path):
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, loss_type=["beta_dpo"])
    with pytest.warns(UserWarning, match="The checkpoint has no state of loss_type 'beta_dpo', which starts anew"):
        trainer.set_extra_state({"probe": {"batches": 1}})


def test_the_help_lists_it(probe, tmp_path):
    code = (
        "import probe_loss; from trl_ext.functional.preference import PREFERENCE_LOSSES as table; "
        "table['probe'] = probe_loss.ROW; from trl_ext import DPOConfig; "
        "print(DPOConfig.__dataclass_fields__['loss_kwargs'].metadata['help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("probe", *PREFERENCE_LOSSES))


def test_a_function_of_the_users_has_unknown_facts():
    config = DPOConfig("out", loss_type=["test_a_new_loss.absolute"], preference_prob_column="p", **SCORES, **CPU)
    (loss,) = parse_losses(config).ours
    assert loss.row == Loss(absolute, prob=None, scores=None) and not loss.row.method


def absolute(batch):
    return torch.abs(batch.margin)
