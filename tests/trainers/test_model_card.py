"""What a registered run leaves behind: the model card, checkpoints, and who can load them."""

import warnings
from typing import NamedTuple

import pytest
import torch
import trl
from tiny import build, scripted_rollout, weights
from transformers import AutoModelForCausalLM

import trl_ext
from trl_ext import __version__
from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.preference import PREFERENCE_LOSSES
from trl_ext.papers import PAPERS
from trl_ext.trainers.model_card import model_card_with_options


@pytest.fixture(autouse=True)
def registered():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="These names were imported from TRL before")
        with trl_ext.register():
            yield


def trainer(tiny_model, folder, **options):
    settings = {"rollout_func": scripted_rollout, "optim": "sgd", "learning_rate": 0.1, **options}
    return build(trl.GRPOTrainer, trl.GRPOConfig, tiny_model, folder, **settings)


def card(trainer, tmp_path):
    trainer.create_model_card(model_name="mine", tags="clock")
    return (tmp_path / "README.md").read_text()


REINFORCE_PLUS_PLUS = {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward", "beta": 0.1}


def test_the_card_names_the_method_its_paper_and_the_options(tiny_model, tmp_path):
    text = card(trainer(tiny_model, tmp_path, **REINFORCE_PLUS_PLUS, advantage_kwargs={"gamma": 0.9}), tmp_path)
    title = "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization"
    assert (
        f"This model was trained with REINFORCE++, a method introduced in "
        f"[{title}](https://huggingface.co/papers/2501.03262)." in text
    )
    assert "Cite REINFORCE++ as:" in text and "@article{hu2025reinforce,\n    title   = {{REINFORCE++: Stab" in text
    assert "    eprint  = {arXiv:2501.03262},\n}\n" in text
    assert (
        f"### Options of trl_ext {__version__}\n\n- `advantage_estimator`: `reinforce_plus_plus`\n"
        "- `advantage_kwargs`: `{'gamma': 0.9}`\n- `kl_placement`: `reward`\n- `beta`: `0.1`\n"
        "- `epsilon`: `0.2`\n- `loss_type`: `dapo`\n- `num_generations`: `4`\n\n### Framework versions\n" in text
    )
    assert all(f"- {tag}\n" in text for tag in ("trl", "grpo", "trl-ext", "clock"))


def test_without_our_options_the_card_is_trls(tiny_model, tmp_path):
    ours = card(trainer(tiny_model, tmp_path), tmp_path)
    trl_ext.unregister()
    theirs = card(trainer(tiny_model, tmp_path), tmp_path)
    assert sorted(ours.splitlines()) == sorted(theirs.splitlines())  # TRL writes the tags in any order


def test_what_is_pushed_to_the_hub_has_the_same_card(tiny_model, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda _, **options: pushed.append(options["folder_path"])
    )
    pushing = trainer(tiny_model, tmp_path, **REINFORCE_PLUS_PLUS)
    pushing.hub_model_id = "someone/mine"
    pushing.push_to_hub(dataset_name="clock")
    assert pushed == [str(tmp_path)]
    text = (tmp_path / "README.md").read_text()
    assert "trained with REINFORCE++, a method" in text and "- `kl_placement`: `reward`\n" in text


def test_other_options_are_listed_under_trls_method(tiny_model, tmp_path):
    text = card(trainer(tiny_model, tmp_path, advantage_estimator="group_relative"), tmp_path)
    assert "trained with GRPO, a method introduced in [DeepSeekMath" in text
    assert "- `advantage_estimator`: `group_relative`\n" in text


class Row(NamedTuple):
    """What a table's row says to the card."""

    method: str = ""
    paper: str = ""


def written(trainer, tmp_path, *rows, also=()):
    with model_card_with_options(trainer, rows, also):
        super(type(trainer), trainer).create_model_card(model_name="mine")
    return (tmp_path / "README.md").read_text()


def test_the_first_row_with_a_method_names_the_card(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path)
    text = written(run, tmp_path, Row(), Row("RLOO", "rloo"), Row("OPO", "opo"), also=["beta", "loss_type"])
    assert f"trained with RLOO, a method introduced in [{PAPERS['rloo'].title}]({PAPERS['rloo'].url})" in text
    assert f"### Options of trl_ext {__version__}\n\n- `beta`: `0.0`\n- `loss_type`: `dapo`\n\n### Fr" in text


def test_a_method_without_a_paper_cites_none(tiny_model, tmp_path):
    text = written(trainer(tiny_model, tmp_path), tmp_path, Row("Mine"))
    assert "This model was trained with Mine" in text
    assert "DeepSeekMath" not in text and "Cite Mine" not in text


def test_after_the_card_the_trainer_has_its_own_name_paper_and_tags(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, **REINFORCE_PLUS_PLUS)
    before = run._name, run._paper, run._tag_names
    assert "trained with RLOO" in written(run, tmp_path, Row("RLOO", "rloo"))
    assert (run._name, run._paper, run._tag_names) == before
    with pytest.raises(ZeroDivisionError), model_card_with_options(run, [Row("OPO", "opo")]):
        _ = 1 / 0
    assert (run._name, run._paper, run._tag_names) == before


def test_the_card_of_an_adapter_keeps_the_tag(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, **REINFORCE_PLUS_PLUS, lora=True)
    run.save_model(str(tmp_path / "adapter"))
    assert "- trl-ext\n" in (tmp_path / "adapter" / "README.md").read_text()
    off = trainer(tiny_model, tmp_path, lora=True)
    off.save_model(str(tmp_path / "off"))
    assert "trl-ext" not in (tmp_path / "off" / "README.md").read_text()


def test_the_card_in_a_checkpoint_of_an_adapter_is_ours_with_pefts_facts(tiny_model, tmp_path):
    options = {"lora": True, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    for name, ours in (("on", REINFORCE_PLUS_PLUS), ("off", {})):
        trainer(tiny_model, tmp_path / name, **options, **ours).train()
    text = (tmp_path / "on" / "checkpoint-1" / "README.md").read_text()
    assert "trained with REINFORCE++, a method introduced in" in text and "- `kl_placement`: `reward`\n" in text
    assert "library_name: peft\n" in text and f"base_model: {tiny_model}\n" in text and "- trl-ext\n" in text
    off = (tmp_path / "off" / "checkpoint-1" / "README.md").read_text()
    assert "trl-ext" not in off and "Model Card for Model ID" in off, "PEFT's own"
    full = {**options, "lora": False}
    trainer(tiny_model, tmp_path / "full", **full, **REINFORCE_PLUS_PLUS).train()
    assert not (tmp_path / "full" / "checkpoint-1" / "README.md").exists(), "as with TRL"


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS.keys() - {"group_relative"}))
def test_each_estimator_names_the_paper_that_its_docstring_links(name):
    row = ADVANTAGE_ESTIMATORS[name]
    assert row.method and PAPERS[row.paper].url in row.function.__doc__


def test_every_loss_has_its_method_except_the_one_without_paper():
    for name in {*PREFERENCE_LOSSES, "psipo"} - {"margin_dpo"}:
        row = PREFERENCE_LOSSES[name]
        assert row.method and row.paper in PAPERS, name


def test_the_card_of_a_preference_run_names_its_first_loss(tiny_model, tmp_path):
    from tiny.dpo import build as build_dpo

    run = build_dpo(trl.DPOTrainer, trl.DPOConfig, tiny_model, tmp_path, loss_type=["sft", "psipo_identity", "dpop"])
    text = card(run, tmp_path)
    assert "trained with IPO, a method introduced in [A General Theoretical Paradigm" in text
    assert "- `loss_type`: `['sft', 'psipo_identity', 'dpop']`\n" in text


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_resumes_and_its_weights_load_without_us(tiny_model, tmp_path, lora):
    options = {**REINFORCE_PLUS_PLUS, "max_steps": 4, "lora": lora}
    whole = trainer(tiny_model, tmp_path / "whole", **options, save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert type(torch.load(checkpoint / "training_args.bin", weights_only=False)) is trl_ext.GRPOConfig
    assert "REINFORCE++" in (tmp_path / "whole" / "README.md").read_text()

    steps = []

    def rollout(prompts, trainer):
        steps.append(trainer.state.global_step)
        return scripted_rollout(prompts, trainer)

    resumed = trainer(tiny_model, tmp_path / "resumed", **options, rollout_func=rollout)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert steps == [2, 3]
    expected = weights(whole)
    for name, weight in weights(resumed).items():
        torch.testing.assert_close(weight, expected[name], msg=name)

    trl_ext.unregister()
    theirs = trainer(tiny_model, tmp_path / "theirs", beta=0.1, lora=lora, max_steps=3)
    theirs.train(resume_from_checkpoint=str(checkpoint))  # TRL's own trainer goes on from our checkpoint
    assert type(theirs).__module__ == "trl.trainer.grpo_trainer" and theirs.state.global_step == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    trained = whole.model.merge_and_unload() if lora else whole.model
    ids = torch.tensor([[2, 5, 9]])
    loaded_logits, logits = (model.float().eval()(input_ids=ids).logits for model in (loaded, trained))
    torch.testing.assert_close(loaded_logits, logits, atol=1e-5, rtol=1e-5)
