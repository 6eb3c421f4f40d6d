"""KTO's data and trainer with another loss of good and bad completions."""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.kto_trainer import KTOTrainer as _KTOTrainer

from ...functional.preference import UNPAIRED_LOSSES, MovingRewards, UnpairedBatch, UnpairedLoss
from ...upstream import UpstreamChanged, check_overridden
from ..callbacks import add_callbacks
from ..dpo.pairs import mean_over_processes
from ..dpo.taps import FirstOutput, overridden
from ..foreign import Needed, Options
from ..input_checks import datasets_of, require_eos
from ..interruptions import Interruptible
from ..model_card import add_model_tag, model_card_with_options
from .config import WITHOUT_KL
from .config import KTOConfig as KTOConfig
from .data import check_both_kinds, check_data, warn_of_order


class KTOTrainer(Interruptible, _KTOTrainer):
    """
    TRL's [`~trl.KTOTrainer`] with the options of [`KTOConfig`]. Takes the same arguments.

    Logged in addition with a loss of ours, over the completions of all processes: `bco/shift`, the reward between good
    and bad that the batch was compared with; `bco/mean_chosen` and `bco/mean_rejected`, the moving averages behind it;
    `rewards/accuracies`, the share of completions on the right side of the shift. There is no `kl`: nothing measures
    one.
    """

    _unpaired: UnpairedLoss | None = None  # None: everything is TRL's
    _loss_name: str
    _state: MovingRewards
    _needed: Needed  # what a subclass must not cut off
    _checked: tuple = ()  # the data sets that the constructor was given and has checked

    def __init__(self, *args, **kwargs):
        check_overridden(type(self))
        given = inspect.signature(_KTOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        config, options = given.get("args"), Options(given.get("args"))
        during = {}
        if isinstance(config, KTOConfig) and config.loss_type in UNPAIRED_LOSSES:
            momentum = {} if options.bco_momentum is None else {"momentum": options.bco_momentum}
            self._loss_name, self._unpaired = config.loss_type, UNPAIRED_LOSSES[config.loss_type]
            self._state = self._unpaired.state(**momentum)
            for name in ("train_dataset", "eval_dataset"):
                for dataset in datasets_of(given.get(name)):
                    check_data(dataset, name, config.loss_type)
                    self._checked += (dataset,)
            during = {"loss_type": WITHOUT_KL}  # in the constructor: checkpoints record what the user wrote
        with overridden(config, **during):
            super().__init__(*args, **kwargs)
        self._checked = ()  # no longer held in memory
        if self._unpaired is not None:
            self._needed = Needed(KTOTrainer, {"_compute_loss": ("_compute_loss", "compute_loss")})
            self._needed.add("_compute_loss", f"loss_type={self._loss_name!r}")
            add_model_tag(self)
        add_callbacks(self, options)

    @property
    def _is_ours(self) -> bool:  # type: ignore[override]
        return self._unpaired is not None

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self._unpaired is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        name = self._loss_name
        if not any(dataset is checked for checked in self._checked):
            check_data(dataset, f"The {dataset_name} dataset", name)
        require_eos(self._tokenizer)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if dataset_name == "train" and isinstance(prepared, Dataset):
            labels = prepared["label"][:]
            check_both_kinds(labels, name)
            if args.train_sampling_strategy == "sequential":
                size = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
                warn_of_order(labels, size, name)
        return prepared

    # Loss

    def training_step(self, *args, **kwargs):
        with self._needed.after(self) if self._unpaired is not None else nullcontext():
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model, inputs, return_outputs):
        if self._unpaired is None:
            return super()._compute_loss(model, inputs, return_outputs)
        self._needed.has_run("_compute_loss")
        if not self.precompute_ref_logps:
            references, _ = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_logps": references}
        policy, metrics = FirstOutput(model), self._metrics["train" if self.model.training else "eval"]
        # TRL's metrics, and the loss of a mixture of experts; its own loss has no weight.
        with overridden(self, precompute_ref_logps=True, desirable_weight=0.0, undesirable_weight=0.0):
            result = super()._compute_loss(policy, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        del metrics["kl"]  # 0: nothing measures it
        logps = policy.output.log_probs[:, -(inputs["input_ids"].size(1) - 1) :].sum(1)
        loss = loss + self._unpaired_loss(self._unpaired, logps, inputs, metrics)
        return (loss, outputs) if return_outputs else loss

    def _unpaired_loss(
        self, row: UnpairedLoss, logps: torch.Tensor, inputs: dict[str, Any], metrics: dict[str, list]
    ) -> torch.Tensor:
        """The weighted mean of our loss over the completions of this process; logs it, and moves the shift."""
        desirable = inputs["label"].to(logps.device).bool()
        rewards = self.beta * (logps.float() - inputs["ref_logps"].to(logps.device))
        of_all = self.accelerator.gather(torch.stack([rewards.detach(), desirable.float()], 1))
        shift = self._state.observe(of_all[:, 0], of_all[:, 1].bool(), self.model.training)
        found = {"bco/shift": shift, **self._state.metrics()}
        if self.model.training and self.accelerator.sync_gradients:
            self._state.step()
        batch = UnpairedBatch(rewards, desirable, shift)
        columns = {"rewards/accuracies": (rewards > shift) == desirable, "logps": logps}
        means = mean_over_processes(self.accelerator, columns)
        self._compare(means.pop("logps"), of_all[:, 1].mean().item(), metrics)
        for name, value in (found | means).items():
            metrics[name].append(value)
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        return (weights * row.function(batch)).mean()

    def _compare(self, ours: float, share: float, metrics: dict[str, list]) -> None:
        """Our mean log-prob and TRL's: they come from one forward pass, and differ only if TRL has changed."""
        of_trl = {"chosen": share, "rejected": 1.0 - share}
        theirs = sum(part * metrics[f"logps/{kind}"][-1] for kind, part in of_trl.items() if part)
        if abs(ours - theirs) > 1e-3 * abs(theirs) + 1e-6:
            raise UpstreamChanged(f"the mean log-prob of the completions is {theirs} there, {ours} here")

    # Interruptions, and the model card

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self._unpaired is None else self._state.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._state.restore(state)

    def create_model_card(self, *args, **kwargs):
        rows = [] if self._unpaired is None else [self._unpaired]
        with model_card_with_options(self, rows, ("loss_type", "beta") if rows else ()):
            super().create_model_card(*args, **kwargs)
