"""DPO with selectable preference losses: entries of TRL's own `loss_type`, and options that are off by default."""

import contextlib
import dataclasses
import inspect
import types
from functools import partial
from typing import Any

import torch
from datasets.fingerprint import Hasher
from trl.trainer.dpo_trainer import DPOTrainer as _DPOTrainer

from ...functional.preference_losses import BETA_FLOOR, ODPO_FLOOR, PairBatch, batch_beta
from ...lookup import import_path
from ...upstream import UpstreamChanged, check_overridden
from ..input_checks import (
    checked_number,
    column_names,
    datasets_of,
    require_columns,
    require_eos,
    require_numbers,
    require_texts,
)
from ..interruptions import begin_checkpoint, keeping_dtypes, whole_checkpoint
from ..method_rows import rows_of
from ..model_card import add_model_tag, model_card_with_options
from .beta_dpo import MovingMargin
from .config import READS_LABEL_SMOOTHING, PairLoss
from .config import DPOConfig as DPOConfig


class DPOTrainer(_DPOTrainer):
    """
    TRL's [`~trl.DPOTrainer`] with the options of [`DPOConfig`]. Takes the same arguments.

    Logged in addition, when one of our losses is active, each the mean over the pairs of all processes:
    `loss/<entry>`; `rewards/agreement`, the probability of the preference that the margin expresses; the log-ratios,
    policy over reference, `logratios/chosen` and `logratios/rejected` (nats per completion), the same with
    `_per_token`, and `logratios/chosen_falling`, the share of pairs whose chosen completion lost probability; for the
    first regression loss `margins/target_distance` (nats) and `margins/target_reached` (share); for `odpo`
    `rewards/offset_clamped`, the share of pairs whose chosen completion does not have the higher score; and for
    `beta_dpo` `beta_dpo/beta` of the batch, `beta_dpo/clamped`, whether that is at its floor, and the moving mean and
    standard deviation that the batch was compared with, `beta_dpo/moving_mean` and `beta_dpo/moving_std` (nats). None
    of these is a KL: the completions were not sampled from the policy.
    [`~trl_ext.trainers.dpo.samples.SampledMetrics`] measures that.
    """

    _pair_losses: tuple[PairLoss, ...] = ()
    _columns: dict[str, str] = types.MappingProxyType({})  # type: ignore[assignment]
    _reference_free = False
    _moving_margin: MovingMargin | None = None
    _batch_beta: Any
    _signature_columns: list[str]
    data_collator: Any

    def __init__(self, *args, **kwargs):
        check_overridden(type(self))
        given = inspect.signature(_DPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        config = given.get("args")
        if not isinstance(config, DPOConfig):  # TRL's plain config has none of our fields
            super().__init__(*args, **kwargs)
            return
        native, ours = config._split_losses()
        for loss in ours:
            options = config._kwargs_of(loss)
            target = loss.target and partial(loss.target, **options)
            self._pair_losses += (loss._replace(loss=partial(loss.loss, **options), target=target),)
            if loss.entry == "beta_dpo":
                self._moving_margin = MovingMargin(config.seed)
                self._batch_beta = partial(batch_beta, **options)
        self._columns, self._reference_free = config._columns, config._reference_free
        for name in ("train_dataset", "eval_dataset"):
            for dataset in datasets_of(given.get(name)):
                self._check_data(dataset, name)
        during: dict[str, Any] = dict(native) if ours else {}
        if self._reference_free:
            if given.get("ref_model") is not None:
                raise ValueError(f"loss_type {config.loss_type} reads no reference model; do not pass ref_model.")
            if not {"image", "images"} & {*column_names(given.get("train_dataset"))}:
                during["precompute_ref_log_probs"] = True  # TRL's way of keeping no reference; not for images
        # For TRL's constructor only, so that checkpoints record what the user wrote.
        with _temporarily(config, **during):
            super().__init__(*args, **kwargs)
        if ours:
            add_model_tag(self)
        if self._reference_free:
            self.precompute_ref_logps = False
        if self._columns:  # not before: the precompute pass inside the constructor must see TRL's collator
            self.data_collator = _WithColumns(self.data_collator, self._columns)
        for path in config.callbacks or []:
            callback = import_path(path)()
            if hasattr(callback, "trainer"):
                callback.trainer = self
            self.add_callback(callback)

    # Data

    def _check_data(self, dataset, name: str):
        require_columns(dataset, name, [*self._columns.values()])
        for key, column in self._columns.items():
            require_numbers(dataset, name, key, column)
        if self._pair_losses:
            require_columns(dataset, name, ["chosen", "rejected"])
            require_texts(dataset, name, ["prompt", "chosen", "rejected"])

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        self._check_data(dataset, f"The {dataset_name} dataset")
        if self._pair_losses:
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
        if self._reference_free:
            return dataset
        # TRL's key of the cache is dataset and model, but the values depend on these options too.
        options = ("max_length", "truncation_mode", "ld_alpha", "bf16", "fp16")
        key = Hasher.hash((self._precompute_model_hash, [getattr(self.args, option) for option in options]))
        with _temporarily(self, _precompute_model_hash=key):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, self._split_off(inputs)[0])

    def _split_off(self, inputs) -> tuple[dict, dict[str, torch.Tensor]]:
        """What TRL knows, and our columns: TRL sends every key that it does not know to the model."""
        if not self._columns:
            return inputs, {}
        extra = {key: inputs[key] for key in self._columns if key in inputs}
        return {key: value for key, value in inputs.items() if key not in self._columns}, extra

    # Loss

    def _compute_loss(self, model, inputs, return_outputs):
        if not self._pair_losses:
            return super()._compute_loss(model, inputs, return_outputs)
        inputs, extra = self._split_off(inputs)
        references = ("ref_chosen_logps", "ref_rejected_logps")
        if self._reference_free:
            zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
            inputs = {**inputs, **dict.fromkeys(references, zeros)}
        elif not self.precompute_ref_logps:
            logps = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, **dict(zip(references, logps, strict=True))}
        policy = _FirstOutput(model)
        # TRL's own losses and every metric of TRL, with the references read from the batch.
        with _temporarily(self, precompute_ref_logps=True):
            result = super()._compute_loss(policy, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        batch, weights = self._pair_batch(policy.output, inputs, extra)
        batch = self._with_everyone(batch)
        per_pair = {}
        for pair_loss in self._pair_losses:
            losses = pair_loss.loss(batch.per_token() if pair_loss.mean else batch)
            if not isinstance(losses, torch.Tensor) or losses.shape != batch.prob.shape:
                got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
                raise ValueError(
                    f"loss_type {pair_loss.name!r} returned {got}; it must return one loss per pair, a tensor of "
                    f"shape {tuple(batch.prob.shape)}."
                )
            per_pair[pair_loss.name] = losses = losses if weights is None else losses * weights
            loss = loss + pair_loss.weight * losses.mean()
        self._log_pairs(batch, per_pair)
        return (loss, outputs) if return_outputs else loss

    def _pair_batch(self, outputs, inputs, extra) -> tuple[PairBatch, torch.Tensor | None]:
        """The pairs, sums over tokens, and the weight of each pair (`None`: 1)."""
        mask = inputs["completion_mask"][:, 1:]  # the first token of a row is not predicted
        per_token_logps = outputs.log_probs[:, -mask.size(1) :]
        lengths = mask.sum(1)
        chosen_logps, rejected_logps = self._sums(per_token_logps, mask, lengths).chunk(2)
        chosen_lengths, rejected_lengths = lengths.clamp(min=1.0).to(per_token_logps.dtype).chunk(2)
        theirs = READS_LABEL_SMOOTHING & {*self.loss_types}
        hard = torch.full_like(chosen_logps, 1.0 if theirs else 1.0 - self.label_smoothing)
        reward_margin = None
        if "pair_chosen_reward" in extra:
            reward_margin = self.args.reward_scale * (extra["pair_chosen_reward"] - extra["pair_rejected_reward"])
        batch = PairBatch(
            chosen_logps,
            rejected_logps,
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            chosen_lengths,
            rejected_lengths,
            prob=extra.get("pair_prob", hard),
            beta=self.beta,
            reward_margin=reward_margin,
        )
        weights = extra.get("pair_weight")
        if self.use_weighting:  # WPO: the probability of the pair, each token's relative to the policy's mean
            aligned = (per_token_logps - outputs.log_sum_sq_probs[:, -mask.size(1) :]).detach() * mask
            chosen, rejected = torch.exp(aligned.sum(1) / lengths.clamp_min(1)).chunk(2)
            weights = chosen * rejected if weights is None else weights * (chosen * rejected)
        return batch, weights

    def _with_everyone(self, batch: PairBatch) -> PairBatch:
        """For `beta_dpo`, the same pairs with the margins of all processes and of the batches before."""
        if self._moving_margin is None:
            return batch
        mean = next(pair_loss.mean for pair_loss in self._pair_losses if pair_loss.entry == "beta_dpo")
        own = (batch.per_token() if mean else batch).margin.detach()
        margins, first = self.accelerator.gather(own), self.accelerator.process_index * len(own)
        everyone = self._moving_margin(margins, first, self.model.training)
        if self.model.training and self.accelerator.sync_gradients:
            self._moving_margin.step()
        return dataclasses.replace(batch, everyone=everyone)

    def _sums(self, per_token_logps, mask, lengths) -> torch.Tensor:
        """Log-prob of each row; `ld_alpha` weighs the tokens beyond the length of the shorter one of the pair."""
        if self.ld_alpha is None:
            return per_token_logps.sum(1)
        position = mask.cumsum(1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
        tail = (per_token_logps * (position > shared)).sum(1)
        return (per_token_logps * ((position > 0) & (position <= shared))).sum(1) + self.ld_alpha * tail

    def _log_pairs(self, batch: PairBatch, per_pair: dict[str, torch.Tensor]):
        metrics = self._metrics["train" if self.model.training else "eval"]
        columns: dict[str, Any] = {f"loss/{name}": losses for name, losses in per_pair.items()}
        if self._reference_free:
            for name in [name for name in metrics if name.startswith("rewards/")]:
                del metrics[name]  # β · log π, no reward
        else:
            margin = batch.margin
            columns["rewards/agreement"] = torch.where(margin > 0, batch.prob, 1 - batch.prob)
            columns["logratios/chosen"], columns["logratios/rejected"] = batch.chosen, batch.rejected
            columns["logratios/chosen_per_token"] = batch.chosen / batch.chosen_lengths
            columns["logratios/rejected_per_token"] = batch.rejected / batch.rejected_lengths
            columns["logratios/chosen_falling"] = batch.chosen < 0
        for pair_loss in self._pair_losses:
            if pair_loss.target is not None:
                target = pair_loss.target(batch)
                distance = (batch.per_token() if pair_loss.mean else batch).margin - target
                columns["margins/target_distance"] = distance.abs()
                columns["margins/target_reached"] = distance * target.sign() >= 0  # a target of 0 is reached
                break
        if batch.reward_margin is not None and any(pair_loss.entry == "odpo" for pair_loss in self._pair_losses):
            columns["rewards/offset_clamped"] = batch.reward_margin < ODPO_FLOOR
        if batch.everyone is not None:
            beta = self._batch_beta(batch)
            metrics["beta_dpo/beta"].append(beta)
            metrics["beta_dpo/clamped"].append(float(beta <= BETA_FLOOR))
            metrics["beta_dpo/moving_mean"].append(batch.everyone.moving_mean)
            metrics["beta_dpo/moving_std"].append(batch.everyone.moving_std)
        columns["logps/chosen"] = batch.chosen_logps
        table = torch.stack([column.detach().to(torch.float32) for column in columns.values()])
        means = dict(zip(columns, self.accelerator.gather(table.T.contiguous()).mean(0).tolist(), strict=True))
        ours, theirs = means.pop("logps/chosen"), metrics["logps/chosen"][-1]
        if abs(ours - theirs) > 1e-3 * abs(theirs) + 1e-6:
            raise UpstreamChanged(f"the mean log-prob of the chosen completions is {theirs} there, {ours} here")
        for name, mean in means.items():
            metrics[name].append(mean)

    # Interruptions

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self._pair_losses:
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with keeping_dtypes(model or self.model) if self._pair_losses else contextlib.nullcontext():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model, trial):
        if self._pair_losses:
            folder = begin_checkpoint(self, trial)
            if self._moving_margin is not None and self.args.should_save:  # before the state makes it whole
                self._moving_margin.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._moving_margin is not None and checkpoint is not None:
            self._moving_margin.load(checkpoint)

    def create_model_card(self, *args, **kwargs):
        with model_card_with_options(self, rows_of(self.args.loss_type), ("beta", "loss_type")):
            super().create_model_card(*args, **kwargs)


class _FirstOutput:
    """Stands for `model` and keeps what its first call returned, with graph."""

    def __init__(self, model):
        self.model = model
        self.output: Any = None

    def __call__(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        self.output = output if self.output is None else self.output
        return output


class _WithColumns:
    """A collator, and the columns of ours as float32 tensors of shape `(B,)`."""

    def __init__(self, collator, columns: dict[str, str]):
        self.collator = collator
        self.columns = columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        extra = {
            key: torch.tensor([self._value(key, column, example) for example in examples], dtype=torch.float32)
            for key, column in self.columns.items()
        }
        return {**self.collator(examples), **extra}

    def _value(self, key: str, column: str, example: dict[str, Any]) -> float:
        if column not in example:
            raise ValueError(f"The dataset has no column {column!r}; it has {sorted(example)}.")
        return checked_number(key, column, example[column])


@contextlib.contextmanager
def _temporarily(thing, **values):
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)
