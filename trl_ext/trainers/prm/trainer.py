"""Training of process-reward models: TRL's reward trainer with a loss per step."""

import inspect
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from trl.trainer.reward_trainer import RewardTrainer as _RewardTrainer
from trl.trainer.utils import get_config_model_id

from ...functional.step_objectives import STEP_OBJECTIVES
from ...rewards.precision import Precision, head_of, keep_head_in
from ...upstream import check_overridden
from ..callbacks import add_callbacks
from ..dpo.taps import overridden
from ..foreign import Options
from ..input_checks import datasets_of
from ..interruptions import Interruptible
from ..model_card import add_model_tag, model_card_with_options
from .card import show_scoring
from .config import PRMConfig, step_format
from .data import ALL, ENCODED, IGNORED, Selection, StepCollator, check_rows, encoded
from .models import load, one_output


class PRMTrainer(Interruptible, _RewardTrainer):
    r"""
    Trains a process-reward model (PRM), which [`~trl_ext.rewards.ProcessRewardModel`] then reads, with the options of
    [`PRMConfig`]. Takes the arguments of TRL's [`~trl.RewardTrainer`].

    Rows have a `prompt`, a text or a conversation; `completions`, the texts of the steps; and `labels`, one for each
    step: `True`, `False`, a probability that it is good, or `None`, on which nothing is trained. With
    `objective="regression"` any number.

    The loss is the mean over the labelled steps of the whole accumulation window and of all processes. Logged, as
    ratios of sums over the steps since the last log and over all processes: see
    [`~trl_ext.functional.classification_metrics`] and [`~trl_ext.functional.regression_metrics`]; a ratio of nothing
    is left out. `eval_loss` is the mean over all steps of the data set.
    """

    _tag_names = ["trl", "prm"]
    _name = "PRM"
    _is_ours = True
    loss_is_scaled_for_ga = True

    def __init__(self, *args, **kwargs):
        check_overridden(type(self))
        given = inspect.signature(_RewardTrainer.__init__).bind(self, *args, **kwargs).arguments
        del given["self"]
        config = given["args"] = given.get("args") or self._default_args(given["model"])
        if not isinstance(config, PRMConfig):
            raise ValueError(f"PRMTrainer needs a PRMConfig, got {type(config).__name__}.")
        self._options = Options(config)
        self._format = step_format(self._options)
        self._objective = STEP_OBJECTIVES[self._format.objective]
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        for name in ("train_dataset", "eval_dataset"):
            for dataset in datasets_of(given.get(name)):
                check_rows(dataset, name, self._format.objective)
        given = load(given, self._format)
        self._trained_rows = given.get("train_dataset")
        collator = StepCollator(given["processing_class"], config.pad_to_multiple_of)
        given["data_collator"] = given.get("data_collator") or collator
        # The model is loaded: TRL would remark that it does not read what it was loaded with.
        with overridden(config, model_init_kwargs=None), one_output(given["model"].config):
            super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # transformers counts the labels of an accumulation window,
        self._loss_shifts_labels = False  # all of them
        self.label_names = ["targets"]  # what `compute_metrics` is given
        collator.tokenizer = self.processing_class  # TRL may have replaced it, with a chat template of another
        self._answer_ids = self._format.answer_ids(self.processing_class)
        self._head = head_of(self.model, self._format.is_language_model)
        self._unround_head()
        add_model_tag(self)
        add_callbacks(self, self._options)

    @staticmethod
    def _default_args(model: Any) -> PRMConfig:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return PRMConfig(f"{name.split('/')[-1]}-PRM")

    def _unround_head(self):
        """TRL has cast what is trained of a quantised model to bfloat16, the head too, whose updates are small."""
        is_quantized = any(getattr(self.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
        if is_quantized and any(parameter.requires_grad for parameter in self._head.parameters()):
            keep_head_in(torch.float32, self.model, self._head)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        options, trained = self._options, dataset is self._trained_rows
        self._trained_rows = None  # TRL prepares these first; they may be evaluated on, too
        selection = Selection(options.train_on_last_step_only, options.skip_after_bad_step, options.label_threshold)
        return encoded(dataset, dataset_name, processing_class, self._format, args, selection if trained else ALL)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = ENCODED

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        places, targets = inputs["labels"], inputs["targets"]
        labelled = places != IGNORED
        at = labelled.nonzero()[:, 0], places[labelled]
        text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        numbers = self._format.read(model, self._head, self._answer_ids, at, **text)
        losses = self._objective.loss(numbers, targets[labelled])
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self._tp_size)  # the gradients of processes are averaged
        logits = torch.full_like(targets, IGNORED).masked_scatter(labelled, numbers.detach())
        per_row = torch.zeros_like(targets).masked_scatter(labelled, losses.detach()).sum(1)
        self._count({**self._sums_of(logits, targets, labelled), "loss": per_row}, inputs["attention_mask"])
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _sums_of(self, logits, targets, labelled) -> dict[str, torch.Tensor]:
        return self._objective.sums(logits, targets, labelled, self._options.label_threshold)

    @torch.no_grad()
    def _count(self, per_row: dict[str, torch.Tensor], attention_mask: torch.Tensor):
        """Adds the sums of each row of this batch, `(B,)` each, of all processes."""
        mode = "train" if self.model.training else "eval"
        table = torch.stack([*per_row.values(), attention_mask.sum(1)], dim=1).double()
        if mode == "train":
            totals = self.accelerator.reduce(table.sum(0), reduction="sum").tolist()
            self._total_train_tokens += int(totals[-1]) // self._tp_size
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        else:  # without the rows that fill up the last batch of an evaluation
            totals = self.accelerator.gather_for_metrics(table).sum(0).tolist()
        for name, total in zip(per_row, totals, strict=False):
            self._sums[mode][name] += total

    def _measured(self, mode: str) -> dict[str, float]:
        """The metrics since they were last asked for; none of nothing."""
        sums, self._sums[mode] = self._sums[mode], defaultdict(float)
        metrics = self._objective.metrics(sums) | {"loss": sums["loss"] / sums["steps"]} if sums else {}
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def log(self, logs, start_time=None):
        if self.model.training:
            metrics = self._measured("train")
            metrics.pop("loss", None)  # transformers logs its own
            self._metrics["train"].update({name: [value] for name, value in metrics.items()})
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in self._measured("eval").items()})
        return output

    # What is written

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        precision = Precision.of(model, self._head, self.accelerator.mixed_precision)
        self._format.save(output_dir or self.args.output_dir, precision=precision.as_dict())

    def create_model_card(self, *args, **kwargs):
        with model_card_with_options(self, [self._objective]):
            super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            show_scoring(Path(self.args.output_dir, "README.md"), self.hub_model_id)
