"""DPO with selectable preference losses: entries of TRL's own `loss_type`, and options that are off by default."""

import dataclasses
import inspect
import types
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from datasets.fingerprint import Hasher
from trl.trainer.dpo_trainer import DPOTrainer as _DPOTrainer

from ...functional.preference import LossState, PairBatch
from ...upstream import UpstreamChanged, check_overridden
from ..callbacks import add_callbacks
from ..foreign import Needed, Options
from ..input_checks import column_names, datasets_of, require_columns, require_eos, require_texts
from ..interruptions import Interruptible
from ..model_card import add_model_tag, model_card_with_options
from ..moving_reference import MovesReference
from ..shared_prefix import SharesPrefixes
from .columns import CollatorWithColumns, check_columns, columns_of, without_our_columns
from .config import DPOConfig as DPOConfig
from .losses import PairLosses, parse_losses
from .pairs import mean_over_processes, pair_batch, pair_metrics
from .refusals import check_targets
from .taps import FirstOutput, overridden


class DPOTrainer(MovesReference, SharesPrefixes, Interruptible, _DPOTrainer):
    """
    TRL's [`~trl.DPOTrainer`] with the options of [`DPOConfig`]. Takes the same arguments.

    Logged in addition, when one of our losses is active, each the mean over the pairs of all processes:
    `loss/<entry>`; `rewards/agreement`, the probability of the preference that the margin expresses; the log-ratios,
    policy over reference, `logratios/chosen` and `logratios/rejected` (nats per completion), the same with
    `_per_token`, and `logratios/chosen_falling`, the share of pairs whose chosen completion lost probability; for the
    first regression loss `margins/target_distance` (nats) and `margins/target_reached` (share); and what the row of a
    loss and its state add. None of these is a KL: the completions were not sampled from the policy.
    [`~trl_ext.trainers.dpo.samples.PolicySamples`] measures that.
    """

    _losses = PairLosses()  # false: everything is TRL's
    _states: Mapping[str, LossState] = types.MappingProxyType({})
    _columns: Mapping[str, str] = types.MappingProxyType({})
    _needed: Needed  # what a subclass must not cut off
    _checked: tuple = ()  # the data sets that the constructor was given and has checked
    _signature_columns: list[str]
    data_collator: Any

    def __init__(self, *args, **kwargs):
        check_overridden(type(self))
        given = inspect.signature(_DPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        config = given.get("args")
        during: dict[str, Any] = {}
        self._losses = parse_losses(config) if isinstance(config, DPOConfig) else PairLosses()
        if isinstance(config, DPOConfig) and self._losses:
            self._columns, self._states = columns_of(config), self._losses.states(config.seed)
            for name in ("train_dataset", "eval_dataset"):
                for dataset in datasets_of(given.get(name)):
                    self._check_data(config, dataset, name)
                    self._checked += (dataset,)
            during = {**self._losses.trls, **self._without_reference(given)}
        # For TRL's constructor only, so that checkpoints record what the user wrote.
        with overridden(config, **during):
            super().__init__(*args, **kwargs)
        if self._losses:
            self._needed = Needed(DPOTrainer, {"_compute_loss": ("_compute_loss", "compute_loss")})
            self._needed.add("_compute_loss", f"loss_type={self.args.loss_type}")
        if self._is_ours:
            add_model_tag(self)
        if self._losses.reference_free:
            self.precompute_ref_logps = False
        if self._columns:  # not before: the precompute pass inside the constructor must see TRL's collator
            self.data_collator = CollatorWithColumns(self.data_collator, self._columns)
        self._checked = ()  # no longer held in memory
        add_callbacks(self, Options(config))

    @property
    def _is_ours(self) -> bool:  # type: ignore[override]
        return bool(self._losses or self._shared or self._moving)

    def _without_reference(self, given: dict[str, Any]) -> dict[str, Any]:
        """What TRL's constructor is to read so that it loads no reference, where none is read."""
        if not self._losses.reference_free:
            return {}
        if given.get("ref_model") is not None:
            raise ValueError(f"loss_type {given['args'].loss_type} reads no reference model; do not pass ref_model.")
        images = {"image", "images"} & {*column_names(given.get("train_dataset"))}
        return {} if images else {"precompute_ref_log_probs": True}  # TRL's way of keeping none; not for images

    # Data

    def _check_data(self, config, dataset, name: str):
        check_columns(dataset, name, self._columns)
        check_targets(config, self._losses, dataset, name)
        require_columns(dataset, name, ["chosen", "rejected"])
        require_texts(dataset, name, ["prompt", "chosen", "rejected"])

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if not self._losses:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not any(dataset is checked for checked in self._checked):
            self._check_data(args, dataset, f"The {dataset_name} dataset")
        require_eos(self._tokenizer)
        # TRL's filter closes over all of `args`, so that a new learning rate would be a new dataset to the cache.
        read = types.SimpleNamespace(
            dataset_num_proc=args.dataset_num_proc, max_length=args.max_length, truncation_mode=args.truncation_mode
        )
        return super()._prepare_dataset(dataset, processing_class, read, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        ours = [column for column in self._columns.values() if column not in self._signature_columns]
        self._signature_columns += ours

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not self._losses:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self._losses.reference_free:
            return dataset
        # TRL's key of the cache is dataset and model, but the values depend on these options too.
        options = ("max_length", "truncation_mode", "ld_alpha", "bf16", "fp16")
        key = Hasher.hash((self._precompute_model_hash, [getattr(self.args, option) for option in options]))
        with overridden(self, _precompute_model_hash=key):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        if self._columns:
            inputs, _ = without_our_columns(inputs, self._columns)
        return super().compute_ref_log_probs(model, inputs)

    # Loss

    def training_step(self, *args, **kwargs):
        with self._needed.after(self) if self._losses else nullcontext():
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model, inputs, return_outputs):
        if not self._losses:
            return super()._compute_loss(model, inputs, return_outputs)
        self._needed.has_run("_compute_loss")
        inputs, columns = without_our_columns(inputs, self._columns)
        inputs = self._with_references(inputs)
        policy = FirstOutput(model)
        # TRL's own losses and every metric of TRL, with the references read from the batch.
        with overridden(self, precompute_ref_logps=True):
            result = super()._compute_loss(policy, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        batch, weights = pair_batch(self, policy.output, inputs, columns)
        per_pair, metrics = {}, self._metrics["train" if self.model.training else "eval"]
        for pair_loss in self._losses.ours:
            view = self._with_global_margins(pair_loss.view(batch), self._states.get(pair_loss.name))
            losses = pair_loss(view)
            per_pair[pair_loss.name] = losses = losses if weights is None else losses * weights
            loss = loss + pair_loss.weight * losses.mean()
            if pair_loss.name in self._states:
                for name, value in self._states[pair_loss.name].metrics(view).items():
                    metrics[name].append(value)
        self._log_pairs(metrics, {**pair_metrics(self._losses, batch, per_pair), "logps/chosen": batch.chosen_logps})
        return (loss, outputs) if return_outputs else loss

    def _with_references(self, inputs: dict) -> dict:
        """The batch with the references' log-probs, `(B,)` each, in which nothing that is read is missing."""
        references = ("ref_chosen_logps", "ref_rejected_logps")
        if self._losses.reference_free:
            zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
            return {**inputs, **dict.fromkeys(references, zeros)}
        if self.precompute_ref_logps:
            return inputs
        logps = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return {**inputs, **dict(zip(references, logps, strict=True))}

    def _with_global_margins(self, view: PairBatch, state: LossState | None) -> PairBatch:
        """For a loss with a state, the same pairs with the margins of all processes and of the batches before."""
        if state is None:
            return view
        own = view.margin.detach()
        margins, offset = self.accelerator.gather(own), self.accelerator.process_index * len(own)
        known = state.observe(margins, offset, self.model.training)
        if self.model.training and self.accelerator.sync_gradients:
            state.step()
        return dataclasses.replace(view, global_margins=known)

    def _log_pairs(self, metrics: dict[str, list], columns: dict[str, torch.Tensor]):
        if self._losses.reference_free:  # TRL's are β times sums, as if the reference gave every text the log-prob 0
            for name in [name for name in metrics if name.startswith("rewards/")]:
                metrics[name].pop()
        means = mean_over_processes(self.accelerator, columns)
        ours, theirs = means.pop("logps/chosen"), metrics["logps/chosen"][-1]
        if abs(ours - theirs) > 1e-3 * abs(theirs) + 1e-6:
            raise UpstreamChanged(f"the mean log-prob of the chosen completions is {theirs} there, {ours} here")
        for name, mean in means.items():
            metrics[name].append(mean)

    # Interruptions, and the model card

    def get_extra_state(self) -> dict[str, Any]:
        return {name: state.state() for name, state in self._states.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, own in self._states.items():
            if name in state:
                own.restore(state[name])
            else:
                warnings.warn(f"The checkpoint has no state of loss_type {name!r}, which starts anew.", stacklevel=2)

    def create_model_card(self, *args, **kwargs):
        with model_card_with_options(self, [loss.row for loss in self._losses.ours], ("loss_type", "beta")):
            super().create_model_card(*args, **kwargs)
