"""What no checkpoint of TRL's holds: the reference that `sync_ref_model` moves, and the place in a stream."""

import warnings

import pytest
import tiny
import tiny.dpo as tiny_dpo
import torch
import trl

from trl_ext.trainers import reference
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS, TRLS = (GRPOTrainer, GRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6, "beta": 0.5}
SAVE = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-2}
ON = {
    "GRPO": (tiny.build, *OURS, {"kl_estimator": "k2"}),
    "GRPO, exact": (tiny.build, *OURS, {"kl_estimator": "exact"}),
    "DPO": (tiny_dpo.build, DPOTrainer, DPOConfig, {"loss_type": ["psipo_identity"]}),
}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", ON)
def test_a_run_with_a_moving_reference_continues_bit_for_bit(tiny_model, tmp_path, kind):
    build, trainer_class, config_class, options = ON[kind]
    make = lambda: build(trainer_class, config_class, tiny_model, tmp_path, **SAVE, **SYNC, **options)  # noqa: E731
    whole, resumed = make(), make()
    whole.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reference")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(resumed.ref_model, whole.ref_model) and same(resumed.model, whole.model)


def test_a_checkpoint_without_its_reference_is_said_to_have_none(tiny_model, tmp_path):
    make = lambda: tiny.build(*OURS, tiny_model, tmp_path, **SAVE, **SYNC, kl_estimator="k2")  # noqa: E731
    whole, resumed = make(), make()
    whole.train()
    (tmp_path / "checkpoint-2" / reference.FILE).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no reference\.safetensors, as TRL alone writes none"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not same(resumed.model, whole.model), "or TRL saves its reference by now"


def test_a_reference_in_one_flat_row_is_not_resumed_from(tiny_model, tmp_path, monkeypatch):
    make = lambda: tiny.build(*OURS, tiny_model, tmp_path, **SAVE, **SYNC, kl_estimator="k2")  # noqa: E731
    monkeypatch.setattr(reference, "is_flat", lambda trainer: True)
    make().train()
    assert not list(tmp_path.glob(f"*/{reference.FILE}"))
    with pytest.raises(ValueError, match="sync_ref_model has moved the reference, which is saved in no checkpoint"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_reference_is_saved_only_if_it_moves_and_something_of_ours_is_on(tiny_model, tmp_path):
    for name, options in (("still", {"beta": 0.1, "kl_estimator": "k2"}), ("off", SYNC)):
        tiny.train(*OURS, tiny_model, tmp_path / name, **{**SAVE, **options, "max_steps": 1})
        assert not list((tmp_path / name).glob(f"*/{reference.FILE}"))


@pytest.mark.parametrize(("classes", "options"), [(OURS, {"advantage_estimator": "group_mean"}), (OURS, {})])
def test_resuming_a_stream_beyond_its_first_epoch_is_warned_of_once(tiny_model, tmp_path, classes, options):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(prompts[0])
        return tiny.digits(completions)

    def make():
        stream = tiny.dataset().select(range(6)).to_iterable_dataset()
        settings = {**SAVE, "max_steps": 10, **options}
        return tiny.build(*classes, tiny_model, tmp_path, train_dataset=stream, reward_funcs=reward, **settings)

    make().train()
    whole = list(seen)
    for step, replays in ((4, False), (6, False), (8, True)):
        seen.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            make().train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        said = [str(w.message) for w in said if "of a stream" in str(w.message)]
        assert (seen != whole[step:]) == replays, "or streams continue where they stopped by now"
        assert len(said) == (replays and bool(options))
        if said:
            assert "checkpoint-8 was written in epoch 2 of a stream" in said[0]
