"""KTO's trainer with BCO: TRL's where it is off, the paper's loss where it is on, the shift in interrupted runs."""

import json
import math
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from tiny import assert_same_weights, logged, weights
from tiny.command import trl_ext_here
from tiny.dpo import build, pairs, save_moe, words

import trl_ext
from trl_ext.functional.preference import UNPAIRED_LOSSES
from trl_ext.trainers.kto import KTOConfig, KTOTrainer
from trl_ext.trainers.kto.config import TRL_LOSSES

OURS, TRLS = (KTOTrainer, KTOConfig), (trl.KTOTrainer, trl.KTOConfig)
ROOT = Path(__file__).parents[3]
BCO = {"loss_type": "bco", "beta": 0.3, "optim": "sgd", "learning_rate": 0.05}


def unpaired(rows=16):
    """Good and bad completions in no regular order."""
    data = [
        {"prompt": words(3 * i + 1, 6), "completion": words(5 * i + 2, 9), "label": i * i % 3 > 0} for i in range(rows)
    ]
    return Dataset.from_list(data)


@pytest.fixture
def made(tiny_model, tmp_path):
    def make(classes, model=tiny_model, folder=tmp_path / "out", **options):
        return build(*classes, model, folder, **{"train_dataset": unpaired(), **options})

    return make


# Off is TRL's


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_with_trls_losses_it_is_trls_trainer_bit_for_bit(made, loss_type, kind):
    options = {"loss_type": loss_type, "kind": kind, "eval_dataset": unpaired(8), "eval_strategy": "epoch"}
    ours, theirs = made(OURS, **options), made(TRLS, **options)
    for trainer in (ours, theirs):
        trainer.train()
    assert_same_weights(ours, theirs)
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        timed = {name for name in other if "runtime" in name or "per_second" in name}
        assert {n: mine[n] for n in mine.keys() - timed} == {n: other[n] for n in other.keys() - timed}
    assert not ours._is_ours and ours.get_extra_state() == {}


def test_the_losses_known_as_trls_are_all_that_trl_has():
    choices = trl.KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"]
    assert choices == TRL_LOSSES and not {*choices} & {*UNPAIRED_LOSSES}


def test_no_other_field_of_trl_is_changed_and_each_of_ours_is_off():
    theirs, fields = trl.KTOConfig.__dataclass_fields__, KTOConfig.__dataclass_fields__
    declared = {name for name in KTOConfig.__annotations__ if not name.startswith("_")}
    assert declared & theirs.keys() == {"loss_type"} and fields["loss_type"].default == theirs["loss_type"].default
    assert {fields[name].default for name in declared - theirs.keys()} == {None}


# The paper's loss, by hand


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


class ByHand(KTOTrainer):
    """Computes each loss in a loop over plain logits, with averages of its own, and keeps it with the trainer's."""

    seen: list
    averages: dict
    window: list

    def _compute_loss(self, model, inputs, return_outputs):
        with torch.no_grad():
            peft = self.ref_model is None
            with self.accelerator.unwrap_model(model).disable_adapter() if peft else nullcontext():
                reference = self._sums(model if peft else self.ref_model, inputs)
            policy = self._sums(model, inputs)
        rewards = [self.beta * (p - r) for p, r in zip(policy, reference, strict=True)]
        labels = inputs["label"].tolist()
        if not self.averages:
            self.averages = self._means(rewards, labels)
        shift = sum(self.averages.get(kind, 0.0) for kind in (True, False)) / 2
        weight = {True: self.desirable_weight, False: self.undesirable_weight}
        losses = [
            weight[good] * minus_log_sigmoid(r - shift if good else shift - r)
            for r, good in zip(rewards, labels, strict=True)
        ]
        self.window += [*zip(rewards, labels, strict=True)]
        if self.accelerator.sync_gradients:
            for kind, mean in self._means(*zip(*self.window, strict=True)).items():
                self.averages[kind] = 0.9 * self.averages.get(kind, mean) + 0.1 * mean
            self.window = []
        loss = super()._compute_loss(model, inputs, return_outputs)
        self.seen.append((loss.item(), sum(losses) / len(losses), self._metrics["train"]["bco/shift"][-1], shift))
        return loss

    def _means(self, rewards, labels):
        of = {kind: [r for r, label in zip(rewards, labels, strict=True) if label == kind] for kind in (True, False)}
        return {kind: sum(values) / len(values) for kind, values in of.items() if values}

    def _sums(self, model, inputs):
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        logps = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].double().log_softmax(-1)
        return logps.gather(-1, ids[:, 1:, None])[..., 0].masked_fill(~mask, 0.0).sum(1).tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reference", {}),
        ("full", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("reference", {"desirable_weight": 0.5, "undesirable_weight": 2.0, "max_length": 12}),
        ("lora", {}),
        ("reference", {"per_device_train_batch_size": 1}),
    ],
    ids=["reference", "accumulated", "weighted, cut", "LoRA", "one completion at a time"],
)
def test_the_loss_and_its_shift_are_the_papers_in_a_loop(made, kind, options):
    trainer = made((ByHand, KTOConfig), kind=kind, **BCO, **options)
    trainer.seen, trainer.averages, trainer.window = [], {}, []
    trainer.train()
    assert len(trainer.seen) == 4 * options.get("gradient_accumulation_steps", 1)
    for loss, by_hand, shift, by_hand_shift in trainer.seen:
        assert shift == pytest.approx(by_hand_shift, rel=1e-4, abs=1e-5)
        assert loss == pytest.approx(by_hand, rel=1e-4)
    assert any(abs(shift) > 1e-3 for _, _, shift, _ in trainer.seen)
    assert not any("kl" in entry for entry in logged(trainer)), "nothing measures one"


def test_the_gradient_is_that_of_the_classifier(made):
    trainer = made(OURS, kind="reference", **BCO)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer._compute_loss(trainer.model, inputs, False).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    mask = inputs["completion_mask"][:, 1:].bool()

    def sums(model):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return (chosen * mask).sum(1)

    rewards = trainer.beta * (sums(trainer.model) - sums(trainer.ref_model).detach())
    good = inputs["label"].bool()
    assert good.any() and not good.all()
    shift = (rewards[good].mean() + rewards[~good].mean()).item() / 2
    (-torch.where(good, rewards - shift, shift - rewards).sigmoid().log()).mean().backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_precomputed_references_change_nothing(made):
    runs = [made(OURS, precompute_ref_log_probs=flag, **BCO) for flag in (True, False)]
    for trainer in runs:
        trainer.train()
    assert runs[0].ref_model is None
    assert_same_weights(*runs, atol=1e-6, rtol=1e-5)


def test_pairs_are_taken_apart_as_trl_does(made):
    trainer = made(OURS, train_dataset=pairs(4), train_sampling_strategy="random", **BCO)
    assert sorted(trainer.train_dataset["label"]) == [False] * 4 + [True] * 4
    trainer.train()
    assert {"bco/mean_chosen", "bco/mean_rejected", "rewards/accuracies", "rewards/margins"} <= logged(trainer)[
        -1
    ].keys()


def test_the_auxiliary_loss_of_a_mixture_of_experts_stays(tiny_model, tmp_path, made):
    moe = save_moe(tiny_model, tmp_path / "moe")
    trainer = made(OURS, model=moe, max_steps=1, **{**BCO, "learning_rate": 0.0})
    trainer.train()
    (entry,) = logged(trainer)
    assert entry["aux_loss"] > 0 and entry["loss"] == pytest.approx(math.log(2) + 0.1 * entry["aux_loss"], rel=1e-3)


def test_evaluation_reads_the_shift_and_does_not_move_it(made):
    trainer = made(OURS, eval_dataset=unpaired(8), **BCO)
    trainer.train()
    before = trainer.get_extra_state()
    found = trainer.evaluate()
    assert json.dumps(trainer.get_extra_state()) == json.dumps(before)
    assert found["eval_bco/shift"] == pytest.approx(sum(before["means"]) / 2)
    assert "eval_rewards/accuracies" in trainer.evaluate(unpaired(4))


# TRL's defaults, conversations, the embedded model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_conversations_in_trls_default_precision(tmp_path, lora):
    from peft import LoraConfig

    rows = [json.loads(line) for line in (ROOT / "recipes/clock/preferences/train.jsonl").open()][:8]
    dataset = Dataset.from_list(
        [
            {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
            for r in rows
            for k in ("chosen", "rejected")
        ]
    )
    args = KTOConfig(
        str(tmp_path), loss_type="bco", max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        logging_steps=1, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    assert args.bf16 and args.gradient_checkpointing
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = KTOTrainer(str(ROOT / "recipes/clock/model"), args=args, train_dataset=dataset, peft_config=config)
    trainer.train()
    first, second = logged(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=0.05) and math.isfinite(second["loss"])


# Interrupted runs


def test_an_interrupted_run_continues_bit_for_bit(made, tmp_path):
    options = {**BCO, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    whole = made(OURS, **options)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    state = json.loads((checkpoint / "trl_ext_state.json").read_text())
    assert all(isinstance(mean, float) for mean in state["means"])
    resumed = made(OURS, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(resumed, whole)
    assert resumed.get_extra_state() == whole.get_extra_state() != state
    assert torch.load(checkpoint / "training_args.bin", weights_only=False).loss_type == "bco"


def test_a_checkpoint_without_the_averages_is_said_to_have_none(made, tmp_path):
    made(TRLS, **{**BCO, "loss_type": "apo_zero_unpaired"}, save_strategy="steps", save_steps=2, max_steps=2).train()
    resumed = made(OURS, **BCO)
    with pytest.warns(UserWarning, match=r"has no trl_ext_state\.json; these start anew: \['means'\]"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type must be one of 'kto', 'apo_zero_unpaired', 'bco', got 'dpo'."),
        ({"bco_momentum": 0.5}, "bco_momentum is read only with loss_type 'bco'; set that too, or remove it."),
        (
            {"loss_type": "bco", "bco_momentum": 1.0},
            "bco_momentum must be a number of at least 0 and below 1, got 1.0.",
        ),
        ({"loss_type": "bco", "bco_momentum": math.nan}, "bco_momentum must be a number of at least 0 and below 1"),
        ({"loss_type": "bco", "bco_momentum": True}, "bco_momentum is no switch, got True."),
        ({"loss_type": "bco", "beta": 0.0}, "beta must be positive, got 0.0."),
        (
            {"loss_type": "bco", "undesirable_weight": -1.0},
            "undesirable_weight must be a finite number of at least 0, got -1.0.",
        ),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KTOConfig("out", bf16=False, use_cpu=True, report_to="none", **options)


def rows(**columns):
    return Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False], **columns})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (rows().remove_columns("label"), "train_dataset has no column 'label'; it has ['completion', 'prompt']."),
        (
            rows().rename_column("completion", "response"),
            "Rename one: dataset.rename_column('response', 'completion').",
        ),
        (
            rows(label=[1, -1]),
            "Column 'label' must hold true for good completions and false for bad ones, got -1 in row 1 of "
            "train_dataset.",
        ),
        (
            rows(label=["good", "bad"]),
            "must hold true for good completions and false for bad ones, got 'good' in row 0",
        ),
        (rows(completion=["c", None]), "Column 'completion' must hold texts or conversations, got None in row 1"),
        (rows(image=["x", "y"]), "loss_type 'bco' is for texts; train_dataset has images."),
    ],
)
def test_data_that_cannot_be_learnt_from_are_refused_before_a_model_loads(made, dataset, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made(OURS, model="no such model", train_dataset=dataset, **BCO)


def test_data_of_one_kind_are_refused(made):
    with pytest.raises(ValueError, match=re.escape("but all 2 rows of train_dataset are bad ones (label False).")):
        made(OURS, train_dataset=rows(label=[False, False]), **BCO)
    made(OURS, eval_dataset=rows(label=[False, False]), **BCO)  # is evaluated all the same


def test_sorted_data_are_warned_about(made):
    message = "In 4 of 4 optimizer steps of an epoch all completions have one label"
    with pytest.warns(UserWarning, match=message):
        made(OURS, train_dataset=pairs(8), **BCO)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="In .* optimizer steps")
        made(OURS, train_dataset=pairs(8), train_sampling_strategy="random", **BCO)
        made(OURS, **BCO)


def test_zeros_and_ones_are_labels(made):
    made(OURS, train_dataset=rows(label=[0, 1]), max_steps=1, **BCO).train()


# Other people's classes, TRL's trainer, registration, the model card


def test_a_loss_of_somebody_elses_without_super_is_named(made):
    class Theirs(KTOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            return trl.KTOTrainer._compute_loss(self, model, inputs, return_outputs)

    class Changed(KTOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            return 2 * super()._compute_loss(model, inputs, return_outputs)

    with pytest.raises(ValueError, match=r"Theirs overrides _compute_loss without .*loss_type='bco' has no effect"):
        made((Theirs, KTOConfig), **BCO).train()
    made((Theirs, KTOConfig)).train()
    (twice,), (once,) = ([e["loss"] for e in logged(t)][:1] for t in _trained(made, Changed, KTOTrainer))
    assert twice == pytest.approx(2 * once, rel=1e-5)


def _trained(made, *classes):
    for cls in classes:
        trainer = made((cls, KTOConfig), max_steps=1, **BCO)
        trainer.train()
        yield trainer


def test_trls_own_trainer_refuses_our_loss(made):
    with pytest.raises(ValueError, match=r"does not know the options of trl_ext that are set \(loss_type='bco'\)"):
        made((trl.KTOTrainer, KTOConfig), **BCO)


def test_registration_gives_ours_also_under_the_old_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with trl_ext.register():
            assert trl.KTOTrainer is KTOTrainer and trl.KTOConfig is KTOConfig
            code = "import trl_ext; trl_ext.register(); from trl.experimental.kto import KTOConfig, KTOTrainer; "
            code += "assert issubclass(KTOTrainer, trl_ext.KTOTrainer) and issubclass(KTOConfig, trl_ext.KTOConfig)"
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)
        assert trl.KTOTrainer is TRLS[0] and trl.KTOConfig is TRLS[1]


def test_the_card_names_the_method(made, tmp_path):
    trainer = made(OURS, **BCO)
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained with BCO, a method introduced in" in card and "2404.04656" in card
    assert "- `loss_type`: `bco`\n" in card


def test_trl_ext_kto_trains_in_the_worker(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    unpaired(8).to_json(tmp_path / "data" / "train.jsonl")
    options = {
        "model_name_or_path": tiny_model, "dataset_name": "data", "output_dir": "out", "loss_type": "bco",
        "max_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    command = ["kto", "--config", "run.yaml", "--num_processes", "1", "--bco_momentum"]
    done = trl_ext_here(monkeypatch, capfd, *command, "0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count("bco/shift") == 2
    assert (tmp_path / "out" / "model.safetensors").exists()
    wrong = trl_ext_here(monkeypatch, capfd, *command, "2")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert "bco_momentum must be a number of at least 0 and below 1, got 2.0." in wrong.stderr


def test_weights_of_zero_learn_nothing_from_their_kind(made):
    before = made(OURS, **BCO)
    start = weights(before)
    nothing = made(OURS, desirable_weight=0.0, undesirable_weight=0.0, **BCO)
    nothing.train()
    for name, weight in weights(nothing).items():
        assert torch.equal(weight, start[name]), name
