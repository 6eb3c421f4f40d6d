"""Asynchronous GRPO with selectable advantages and a KL: what passes through TRL's trainer goes to our objects."""

import functools
import inspect
from contextlib import nullcontext

import torch
from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer as _AsyncGRPOTrainer

from ...rewards import ProcessRewardModel
from ...upstream import check_overridden
from ...upstream_async import check_columns
from ..callbacks import add_callbacks
from ..foreign import Needed, Options
from ..grpo.checks import check_data
from ..grpo.kl import BetaController
from ..interruptions import Interruptible
from ..model_card import add_model_tag, model_card_with_options
from .checks import check_arguments, kl_choice
from .child import scoring_loop
from .config import AsyncGRPOConfig as AsyncGRPOConfig
from .reference import FirstOutput, ReferenceKL, reference_metrics
from .step import StepAdvantages

_STEP, _LOSS = "get_batch_samples", "compute_loss"


class AsyncGRPOTrainer(Interruptible, _AsyncGRPOTrainer):
    """
    TRL's [`~trl.experimental.async_grpo.AsyncGRPOTrainer`] with the options of [`AsyncGRPOConfig`]. Takes the same
    arguments.

    Logged in addition, over the trained tokens of all processes:

    - with `advantage_estimator`: `advantages/mean` and `advantages/std` of each optimizer step, over the tokens that
      take part; `advantages/frac_groups_zero_std`, the fraction of groups whose scored completions have one reward;
    - with `beta`, in nats: `kl/reference`, the mean of the KL in use (ratio included), and `kl/k1`, `kl/k2`, `kl/k3`,
      `kl/saturated` as in GRPO; `perf/reference_s`. (`kl` is TRL's: of the sampler to the trainer.)
    - with step rewards, those of [`~trl_ext.trainers.grpo.metrics.step_metrics`] for each group, and
      `process/realigned_total`, the conversations whose steps could not be found again;
    - `kl/beta` with `kl_target`, and `kl/effective_beta`, β/σ, where REINFORCE++ divides a KL in the reward by σ.
    """

    beta: float = 0.0
    _advantages: StepAdvantages | None = None  # None: advantages are TRL's
    _penalty: ReferenceKL | None = None  # None: there is no KL
    _controller: BetaController | None = None  # None: `beta` is constant
    _needed: Needed  # what a subclass must not cut off

    def __init__(self, *args, **kwargs):
        given = inspect.signature(_AsyncGRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        check_overridden(type(self))
        options = Options(given.get("args"))
        check_arguments(given, options)
        if options.advantage_estimator is not None or options.beta:
            check_data(given, options)
        if options.process_reward_model is not None:
            functions = given.get("reward_funcs") or []
            functions = functions if isinstance(functions, list) else [functions]
            model = ProcessRewardModel.from_options(options.process_reward_model)  # loaded where it is called
            del given["self"]
            args, kwargs = (), {**given, "reward_funcs": [*functions, model]}
        super().__init__(*args, **kwargs)
        self._take_over(options)
        add_callbacks(self, options)
        if self._is_ours:
            add_model_tag(self)

    def _take_over(self, options: Options):
        """Makes the objects that do what the options ask for."""
        self._needed = Needed(AsyncGRPOTrainer, {_STEP: (_STEP,), _LOSS: (_LOSS,)})
        placement, name = kl_choice(options)
        if placement is not None and name is not None:
            self.beta, self._penalty = options.beta, ReferenceKL(self, placement, name)
            for method in (_STEP,) if self._penalty.in_reward else (_STEP, _LOSS):
                self._needed.add(method, f"kl_estimator={name!r} in the {placement}")
        if options.kl_target is not None:
            self._controller = BetaController(options.kl_target, options.kl_horizon, options.kl_target_unit)
        if options.advantage_estimator is None:
            return
        check_columns()
        self._advantages = StepAdvantages(self, options)
        self._needed.add(_STEP, f"advantage_estimator={self._advantages.name!r}")
        if self.accelerator.is_main_process:  # before the rollout process starts, which makes the loop
            worker = self.rollout_worker
            worker._loop_cls = functools.partial(scoring_loop, worker._loop_cls, self._advantages.for_the_child())

    @property
    def _is_ours(self) -> bool:  # type: ignore[override]
        """Whether training is not TRL's, bit for bit."""
        return self._advantages is not None or self._penalty is not None

    # One optimizer step

    def get_batch_samples(self, *args, **kwargs):
        """The micro-batches of one optimizer step of this process: here, and only here, all of them are together."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self._is_ours:
            self._needed.has_run(_STEP)
            self._complete(batches, super().compute_loss)
        return batches, count

    def _complete(self, batches: list[dict[str, torch.Tensor]], loss):
        """Adds log-probs of the reference and puts our advantages in place."""
        if self._advantages is not None:
            self._advantages.take_apart(batches)
        kl_penalties = None
        if self._penalty is not None:
            self._penalty.attach(batches, loss)
            if self._penalty.in_reward:
                found, sums = self._penalty.penalties(batches)
                kl_penalties = [self.beta * per_token_kl for per_token_kl in found]
        if self._advantages is not None:
            self._advantages.finish(batches, kl_penalties)
        if kl_penalties is not None:
            self._observe_kl(sums, end_of_step=True)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self._is_ours:
            self._needed.has_run(_LOSS)
        if self._penalty is None or self._penalty.in_reward:
            return super().compute_loss(model, inputs, *args, **kwargs)
        model = FirstOutput(model)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        kl, sums = self._penalty.in_loss(inputs, model)
        beta = self.beta
        self._observe_kl(sums, end_of_step=self.accelerator.sync_gradients)
        # As TRL divides its own terms, so that the mean over processes and micro-batches is one over their tokens.
        tokens = (inputs["global_n_tokens"][0] / self.accelerator.num_processes).clamp(min=1.0)
        return loss + beta * kl / tokens.to(torch.float32) / self.current_gradient_accumulation_steps

    def _observe_kl(self, sums: torch.Tensor, end_of_step: bool):
        """Logs the KL of all processes; then the controller moves `beta` for what comes next."""
        sums = self.accelerator.reduce(sums, reduction="sum")
        metrics, beta = self._metrics["train"], self.beta
        if self._controller is not None:
            self.beta = self._controller.after(beta, torch.stack([sums[0], *sums[-3:]]), end_of_step)
            metrics["kl/beta"].append(beta)
        for name, value in reference_metrics(sums).items():
            metrics[name].append(value)

    def training_step(self, *args, **kwargs):
        with self._needed.after(self) if self._is_ours else nullcontext():
            return super().training_step(*args, **kwargs)

    # Interruptions

    def get_extra_state(self):
        return {} if self._controller is None else {"beta": self.beta}

    def set_extra_state(self, state):
        self.beta = state["beta"]

    def create_model_card(self, *args, **kwargs):
        rows = [] if self._advantages is None else [self._advantages.row]
        with model_card_with_options(self, rows, ("epsilon", "num_generations") if self._is_ours else ()):
            super().create_model_card(*args, **kwargs)
