"""Columns of ours on their way from the dataset to the loss, cached references, and metrics."""

import math

import datasets
import pytest
import torch
import trl
from datasets import Dataset
from tiny import logged
from tiny.dpo import build, pairs
from transformers import AutoTokenizer

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.dpo import pairs as dpo_pairs
from trl_ext.trainers.dpo import trainer as dpo_module

COLUMNS = {
    "preference_prob_column": "p",
    "chosen_reward_column": "good",
    "rejected_reward_column": "bad",
    "pair_weight_column": "w",
    "reward_margin_scale": 0.5,
}
VALUES = {"p": lambda i: 0.4 + i / 40, "good": lambda i: float(i), "bad": lambda i: i / 2, "w": lambda i: 1 + i % 3}
SEEN = []


def recorded(batch):
    """A pair loss of the user's own, which remembers what it was given."""
    SEEN.append(batch)
    return batch.margin.square() + batch.chosen_logps * 0


def conversational(rows):
    """The pairs as conversations; the tiny tokenizer gets a template in `build_conversational`."""
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return rows.map(
        lambda row: {
            "prompt": message("user", row["prompt"]),
            "chosen": message("assistant", row["chosen"]),
            "rejected": message("assistant", row["rejected"]),
        }
    )


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory):
    """The tiny model with a chat template."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("chat") / "model"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
    )
    tokenizer.save_pretrained(path)
    return str(path)


def column_trainer(model, folder, rows=None, **options):
    rows = pairs(8, **VALUES) if rows is None else rows
    settings = {"loss_type": ["test_dpo_columns.recorded"], "max_steps": 2, **COLUMNS, **options}
    SEEN.clear()
    return build(DPOTrainer, DPOConfig, model, folder, train_dataset=rows, **settings)


KINDS = {
    "plain": {},
    "conversational": {},
    "iterable": {},
    "precompute": {"precompute_ref_log_probs": True},
    "LoRA": {"kind": "lora"},
    "LoRA and precompute": {"kind": "lora", "precompute_ref_log_probs": True},
    "an adapter": {"kind": "adapter", "precompute_ref_log_probs": True},
    "unused columns kept": {"remove_unused_columns": False},
    "ld_alpha": {"ld_alpha": 0.5},
}


@pytest.mark.parametrize("case", KINDS)
def test_each_pair_keeps_its_own_columns(chat_model, tmp_path, case, monkeypatch):
    rows = pairs(8, **VALUES)
    if case == "conversational":
        rows = conversational(rows)
    if case == "iterable":
        rows = rows.to_iterable_dataset()
    trainer = column_trainer(chat_model, tmp_path, rows, **KINDS[case])
    index_of_length = {}  # the pair that a batch row came from, by its number of tokens
    tokens = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset]
    for i, lengths in enumerate(tokens):
        assert lengths not in index_of_length, "otherwise rows cannot be told apart"
        index_of_length[lengths] = i
    trainer.train()
    found = []
    for batch in SEEN:
        for row in range(len(batch.preference_prob)):
            i = index_of_length[int(batch.chosen_lengths[row]), int(batch.rejected_lengths[row])]
            found.append(i)
            assert batch.preference_prob[row].item() == pytest.approx(VALUES["p"](i))
            assert batch.reward_margin[row].item() == pytest.approx(0.5 * (VALUES["good"](i) - VALUES["bad"](i)))
    assert sorted(found) == list(range(8))


def test_a_weight_multiplies_the_loss_of_its_pair_and_is_not_normalised(tiny_model, tmp_path):
    rows = pairs(4, **VALUES)
    options = {"loss_type": ["psipo_identity"], "preference_prob_column": "p", "kind": "reference"}
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, train_dataset=rows, pair_weight_column="w", **options)
    plain = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, train_dataset=rows, **options)
    batch = trainer.data_collator(list(trainer.train_dataset))
    single = [plain.data_collator([row]) for row in plain.train_dataset]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        losses = [plain.compute_loss(plain.model, one).item() for one in single]
    expected = sum(VALUES["w"](i) * loss for i, loss in enumerate(losses)) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert trainer._metrics["eval"]["loss/psipo_identity"] == [pytest.approx(loss.item(), rel=1e-6)]


def test_sum_ipo_is_equation_17_from_raw_logits(tiny_model, tmp_path):
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, kind="reference", loss_type=["psipo_identity"], beta=0.4
    )
    rows = list(trainer.train_dataset)[:5]

    def log_prob(model, prompt, completion):
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        return sum(logps[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.size(1)))

    expected = 0.0
    with torch.no_grad():
        for row in rows:
            h = 0.0
            for name, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
                h += sign * log_prob(trainer.model, row["prompt_ids"], row[name])
                h -= sign * log_prob(trainer.ref_model, row["prompt_ids"], row[name])
            expected += (h - 1 / (2 * 0.4)) ** 2 / len(rows)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_is_a_constant_probability(tiny_model, tmp_path):
    losses = {}
    rows = pairs(4, p=lambda i: 0.9)
    for name, options in {
        "smoothing": {"label_smoothing": 0.1},
        "column": {"preference_prob_column": "p"},
        "column wins": {"preference_prob_column": "p", "label_smoothing": 0.3},
        "taken over": {"label_smoothing": 0.1, "logp_reduction": "sum", "loss_type": ["sigmoid"]},
        "hard": {},
    }.items():
        trainer = build(
            DPOTrainer,
            DPOConfig,
            tiny_model,
            tmp_path,
            kind="reference",
            train_dataset=rows,
            **{"loss_type": ["gpo_logistic"], **options},
        )
        with torch.no_grad():
            batch = trainer.data_collator(list(trainer.train_dataset))
            losses[name] = trainer.compute_loss(trainer.model, batch).item()
    assert losses["smoothing"] == pytest.approx(losses["column"], rel=1e-6)
    assert losses["smoothing"] == losses["taken over"]
    assert losses["column"] == losses["column wins"]
    assert losses["hard"] != pytest.approx(losses["smoothing"], rel=1e-3)


@pytest.mark.filterwarnings("ignore:The `'keep_end'`")
def test_scored_tokens_are_counted_where_a_row_begins_with_the_completion(tiny_model, tmp_path):
    # keep_end cuts into the completion: its first token is not predicted, so it is not scored. TRL's ipo counts it.
    SEEN.clear()
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, loss_type=["test_dpo_columns.recorded"], max_length=4,
        truncation_mode="keep_end", per_device_train_batch_size=16,
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    (batch,) = SEEN
    expected = [min(len(row["chosen_ids"]), 3) for row in rows]
    assert batch.chosen_lengths.tolist() == expected
    assert any(len(row["chosen_ids"]) >= 4 for row in rows)


# Evaluation


@pytest.mark.parametrize("precompute", [False, True])
def test_new_data_can_be_evaluated(tiny_model, tmp_path, precompute):
    trainer = column_trainer(
        tiny_model,
        tmp_path,
        kind="reference",
        loss_type=["psipo_logit", "rpo_sq"],
        precompute_ref_log_probs=precompute,
    )
    trainer.train()
    metrics = trainer.evaluate(pairs(6, **VALUES))
    assert {"eval_loss", "eval_loss/psipo_logit", "eval_loss/rpo_sq", "eval_rewards/agreement"} <= metrics.keys()
    assert trainer.evaluate({"a": pairs(4, **VALUES)})["eval_a_loss"] > 0
    with pytest.raises(ValueError, match="The eval dataset has no column 'p'; it has \\['bad', 'chosen'"):
        trainer.evaluate(pairs(4, **{**VALUES, "p": VALUES["p"]}).remove_columns("p"))


# Errors in the data


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("p", 1.5, r"Column 'p' must hold a number in \[0, 1\], got 1.5."),
        ("p", float("nan"), r"Column 'p' must hold a number in \[0, 1\], got nan."),
        ("p", None, r"Column 'p' must hold a number in \[0, 1\], got None."),
        ("w", -1.0, "Column 'w' must hold a finite number >= 0, got -1.0."),
        ("w", float("inf"), "Column 'w' must hold a finite number >= 0, got inf."),
        ("good", float("inf"), "Column 'good' must hold finite numbers, got inf."),
    ],
)
def test_bad_values_are_refused(tiny_model, tmp_path, column, value, message):
    rows = pairs(4, **{**VALUES, column: lambda i: value})
    with pytest.raises(ValueError, match=message.removesuffix(".") + " in row 0 of train_dataset."):
        column_trainer("no/such/model", tmp_path, rows)
    trainer = column_trainer(tiny_model, tmp_path, rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_missing_column_is_refused_before_the_model_loads(tmp_path):
    with pytest.raises(
        ValueError, match=r"train_dataset has no column 'p'; it has \['chosen', 'prompt', 'rejected'\]"
    ):
        build(DPOTrainer, DPOConfig, "no/such/model", tmp_path, loss_type=["gpo_logistic"], preference_prob_column="p")
    with pytest.raises(ValueError, match="train_dataset has no column 'p'"):
        build(
            DPOTrainer, DPOConfig, "no/such/model", tmp_path, loss_type=["gpo_logistic"], preference_prob_column="p",
            train_dataset=pairs().to_iterable_dataset(),
        )  # fmt: skip


def test_a_column_of_a_similar_name_is_pointed_at(tmp_path):
    rows, options = pairs(4, prob=lambda i: 0.5), {"loss_type": ["gpo_logistic"], "preference_prob_column": "probb"}
    with pytest.raises(ValueError, match=r"it has \['chosen', 'prob', 'prompt', 'rejected'\]; did you mean 'prob'\?"):
        build(DPOTrainer, DPOConfig, "no/such/model", tmp_path, train_dataset=rows, **options)


def test_hard_labels_with_the_logit_are_refused_unless_clamped(tiny_model, tmp_path):
    options = {"loss_type": ["psipo_logit"], "preference_prob_column": "p", "max_steps": 1}
    hard = pairs(4, p=lambda i: 1.0)
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, train_dataset=hard.to_iterable_dataset(), **options)
    with pytest.raises(ValueError, match="Ψ is infinite at a preference probability of 1"):
        trainer.train()
    options["loss_kwargs"] = {"psipo_logit": {"eps": 0.01}}
    build(DPOTrainer, DPOConfig, tiny_model, tmp_path, train_dataset=hard, **options).train()


@pytest.mark.parametrize("value", [0.0, 1.0, 1 - 1e-9, 1], ids=str)
@pytest.mark.parametrize("name", ["train", "eval"])
def test_one_infinite_target_is_refused_with_its_row_before_a_model_loads(tmp_path, value, name):
    rows = pairs(8, p=lambda i: float(value) if i in (5, 6) else 0.25)
    given = {"train_dataset": rows} if name == "train" else {"train_dataset": pairs(8, p=lambda i: 0.5)}
    given |= {"eval_dataset": {"mine": rows}} if name == "eval" else {}
    for options in ({"loss_type": ["psipo_logit"]}, {"loss_type": ["psipo"], "psi": "test_dpo_columns.steep"}):
        message = (
            rf"Column 'p' holds \S+ in row 5 of {name}_dataset: Ψ is infinite at a preference probability of [01],"
        )
        with pytest.raises(ValueError, match=message):
            build(DPOTrainer, DPOConfig, "no/such/model", tmp_path, preference_prob_column="p", **options, **given)


def steep(prob):
    return -1 / prob


def test_rows_are_read_once_and_those_of_a_new_evaluation_too(tiny_model, tmp_path, monkeypatch):
    read = []
    original = dpo_module.require_texts
    monkeypatch.setattr(dpo_module, "require_texts", lambda data, *args: [read.append(data), original(data, *args)])
    rows, held_out, new = pairs(4), pairs(3), pairs(2)
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, loss_type=["dpop"], train_dataset=rows,
        eval_dataset={"a": held_out},
    )  # fmt: skip
    assert [id(data) for data in read] == [id(rows), id(held_out)] and not trainer._checked
    trainer.evaluate(new)
    assert [id(data) for data in read[2:]] == [id(new)]


def test_a_loss_of_the_wrong_shape_is_refused(tiny_model, tmp_path):
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, loss_type=["test_dpo_columns.scalar"])
    with pytest.raises(ValueError, match=r"'test_dpo_columns.scalar' returned \(\); it must return one loss per pair"):
        trainer.train()


def scalar(batch):
    return batch.margin.mean()


# Cached references


@pytest.fixture
def saved_rows(tmp_path):
    """Rows in a file: only those have a cache."""
    pairs(8).to_json(tmp_path / "rows.jsonl")
    return lambda: Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore:The `'keep_end'`")
def test_cached_references_are_not_used_under_other_options(tiny_model, tmp_path, saved_rows, monkeypatch):
    passes = []
    original = trl.DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(trl.DPOTrainer, "compute_ref_log_probs", lambda *args: passes.append(1) or original(*args))

    def references(**options):
        passes.clear()
        settings = {"max_length": None, "precompute_ref_log_probs": True, "loss_type": ["gpo_logistic"], **options}
        trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, train_dataset=saved_rows(), **settings)
        return torch.tensor(trainer.train_dataset["ref_rejected_logps"][:]), len(passes)

    first, computed = references()
    assert computed > 0
    again, computed = references()
    assert computed == 0 and torch.equal(first, again)
    other_rate, computed = references(learning_rate=0.5)
    assert computed == 0 and torch.equal(first, other_rate)
    for options in ({"ld_alpha": 0.3}, {"truncation_mode": "keep_end", "max_length": 5}):
        values, computed = references(**options)
        assert computed > 0 and not torch.allclose(values, first), options
    values, computed = references(truncation_mode="keep_end", max_length=4)
    assert computed > 0


# Metrics


def test_metrics_are_the_means_they_say(tiny_model, tmp_path):
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, kind="reference", train_dataset=pairs(8, **VALUES),
        loss_type=["psipo_identity", "test_dpo_columns.recorded"], loss_weights=[1.0, 0.5], beta=0.2,
        preference_prob_column="p",
    )  # fmt: skip
    SEEN.clear()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    (batch,), metrics = SEEN, {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    w, r, p = batch.chosen_logratios, batch.rejected_logratios, batch.preference_prob
    target = (2 * p - 1) / (2 * 0.2)
    reached = [abs(u) >= abs(t) and u * t >= 0 for u, t in zip((w - r).tolist(), target.tolist(), strict=True)]
    expected = {
        "loss/psipo_identity": (w - r - target).square().mean(),
        "loss/test_dpo_columns.recorded": (w - r).square().mean(),
        "rewards/agreement": torch.where(w > r, p, 1 - p).mean(),
        "logratios/chosen": w.mean(),
        "logratios/rejected": r.mean(),
        "logratios/chosen_per_token": (w / batch.chosen_lengths).mean(),
        "logratios/rejected_per_token": (r / batch.rejected_lengths).mean(),
        "logratios/chosen_falling": (w < 0).float().mean(),
        "margins/target_distance": (w - r - target).abs().mean(),
        "margins/target_reached": sum(reached) / 8,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert not any("kl" in name for name in metrics)
    assert 0 < metrics["logratios/chosen_falling"] < 1 and 0 < metrics["margins/target_reached"] < 1


def test_the_share_of_offsets_that_odpo_clamps_is_logged(tiny_model, tmp_path):
    rows = pairs(8, good=lambda i: float(i), bad=lambda i: 2.0)  # not above the other: 0, 1 and 2
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, train_dataset=rows, loss_type=["odpo"],
        chosen_reward_column="good", rejected_reward_column="bad",
    )  # fmt: skip
    with torch.no_grad():
        trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert trainer._metrics["eval"]["rewards/offset_clamped"] == [3 / 8]


def test_a_part_of_trl_that_moved_is_noticed(tiny_model, tmp_path, monkeypatch):
    original = dpo_pairs.completion_logps
    trainer = build(DPOTrainer, DPOConfig, tiny_model, tmp_path, loss_type=["gpo_logistic"])
    monkeypatch.setattr(dpo_pairs, "completion_logps", lambda *args: original(*args) * 1.01)
    with pytest.raises(RuntimeError, match=r"TRL .* is not laid out as trl_ext expects: the mean log-prob"):
        trainer.train()


# Without a reference


WITHOUT_REFERENCE = {  # options, and the loss of two mean log-probs
    "simpo": ({"gamma": 0.3}, lambda w, r: math.log1p(math.exp(0.3 - 2.0 * (w - r)))),
    "rrhf": ({"sft_weight": 0.5}, lambda w, r: max(0.0, r - w) - 0.5 * w),
}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_without_a_reference_none_is_loaded_and_there_is_one_forward_pass(tiny_model, tmp_path, name, kind):
    options, by_hand = WITHOUT_REFERENCE[name]
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, kind=kind, loss_type=[name, "sft"], beta=2.0, max_steps=2,
        loss_kwargs={name: options}, eval_dataset=pairs(4), eval_strategy="epoch",
    )  # fmt: skip
    assert trainer.ref_model is None
    calls = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 3  # two steps, and one batch of evaluation
    assert not any(name.startswith("logratios/") for entry in logged(trainer) for name in entry)
    assert not trainer.args.precompute_ref_log_probs and trainer.args.loss_type == [name, "sft"]
    metrics = trainer.evaluate(pairs(6))
    assert metrics[f"eval_loss/{name}"] > 0 and 0 <= metrics["eval_rewards/accuracies"] <= 1
    rows = list(trainer.train_dataset)[:4]
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        trainer._metrics["train"].clear()
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch)
        expected, rewards = 0.0, []
        for row in rows:
            means = []
            for side in ("chosen_ids", "rejected_ids"):
                ids = torch.tensor([row["prompt_ids"] + row[side]])
                logps = trainer.model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
                per_token = logps.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
                means.append(per_token.mean().item())
            rewards.append([2.0 * mean for mean in means])
            expected += by_hand(*means) / 4
    found = {key: values for key, values in trainer._metrics["train"].items() if key.startswith("rewards/")}
    chosen, rejected = torch.tensor(rewards).T
    assert trainer._metrics["train"][f"loss/{name}"][-1] == pytest.approx(expected, rel=1e-5)
    assert found == {
        "rewards/chosen": [pytest.approx(chosen.mean().item(), rel=1e-5)],
        "rewards/rejected": [pytest.approx(rejected.mean().item(), rel=1e-5)],
        "rewards/margins": [pytest.approx((chosen - rejected).mean().item(), rel=1e-4)],
        "rewards/accuracies": [(chosen > rejected).float().mean().item()],
    }


def test_the_best_model_can_be_that_of_the_best_accuracy_without_a_reference(tiny_model, tmp_path):
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model, tmp_path, loss_type=["simpo"], beta=2.0, max_steps=2,
        eval_dataset=pairs(4), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_rewards/accuracies",
    )  # fmt: skip
    trainer.train()
    accuracies = [entry["eval_rewards/accuracies"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(accuracies) == 2 and trainer.state.best_metric == max(accuracies)


def test_simpo_refuses_a_reference(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="reads no reference model; do not pass ref_model"):
        build(DPOTrainer, DPOConfig, tiny_model, tmp_path, kind="reference", loss_type=["simpo"])


def test_the_module_of_the_trainer_offers_the_config():
    assert dpo_module.DPOConfig is DPOConfig
    assert datasets.__version__
