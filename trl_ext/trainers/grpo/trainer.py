"""GRPO with selectable advantages and KL: what passes through TRL's trainer is handed to `Scoring` and `KLPenalty`."""

import inspect
from contextlib import ExitStack, nullcontext

import torch
from trl.trainer.grpo_trainer import GRPOTrainer as _GRPOTrainer

from ...upstream import check_overridden
from ..callbacks import add_callbacks
from ..foreign import Needed, Options
from ..input_checks import require_eos
from ..interruptions import Interruptible, resumable
from ..model_card import add_model_tag, model_card_with_options
from .checks import check_data, check_given, kl_choice, makes_own_prompts
from .config import GRPOConfig as GRPOConfig
from .greedy import Greedy
from .implicit_prm import WithImplicitPRM, check_adapter
from .kl import BetaController, KLPenalty
from .metrics import kl_metrics, mean_advantages
from .packed_steps import PackedSteps
from .policy_kl import TrustRegion
from .reference_steps import RefreshesReference
from .reward_calls import with_process_reward_model
from .scoring import Rollout, Scoring

_SCORE, _LOSS = "_generate_and_score_completions", "_compute_loss"
_WAYS: dict[str, tuple[str, ...]] = {_SCORE: (_SCORE, "_prepare_inputs"), _LOSS: (_LOSS, "compute_loss")}


class GRPOTrainer(WithImplicitPRM, RefreshesReference, PackedSteps, Greedy, TrustRegion, Interruptible, _GRPOTrainer):
    """
    TRL's [`~trl.GRPOTrainer`] with the options of [`GRPOConfig`]. Takes the same arguments.

    Logged in addition, over the trainable tokens of all processes:

    - with `advantage_estimator`: `advantages/mean` and `advantages/std` over the scored completions, and
      `advantages/frac_groups_zero_std`, the fraction of prompts whose scored completions all have one reward;
    - with `kl_estimator` or `kl_placement`, in nats: `kl`, the mean of the KL in use (ratio included); `kl/k1`,
      `kl/k2`, `kl/k3`, the same mean of each; `kl/saturated`, the fraction of tokens with a log-ratio beyond ±20;
    - with step rewards, those of [`~trl_ext.trainers.grpo.metrics.step_metrics`], and `process/advantage_share`, the
      share of the steps in the sum of all |advantages|, where outcomes are mixed in;
    - `kl/beta` with `kl_target`, and `kl/effective_beta`, β/σ, where REINFORCE++ divides a KL in the reward by σ.

    A subclass that replaces `_compute_loss` whole may set `per_token_advantages = True` to say that it can take
    `inputs["advantages"]` of shape `(B, T)`.
    """

    beta: float  # TRL's: loads the reference, computes its log-probs, and weights the KL in the loss
    per_token_advantages = False
    _scoring: Scoring | None = None  # None: rewards and advantages are TRL's
    _penalty: KLPenalty | None = None  # None: the KL is TRL's
    _controller: BetaController | None = None  # None: `beta` is constant

    def __init__(self, *args, **kwargs):
        given = inspect.signature(_GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        check_overridden(type(self))
        options = Options(given.get("args"))
        if options.process_reward_model is not None:
            args, kwargs = (), with_process_reward_model(given, options.process_reward_model)
        if ours := options.advantage_estimator is not None or kl_choice(options)[0] is not None:
            check_given(given, options)
            check_adapter(given, options)
        super().__init__(*args, **kwargs)
        if ours and not self.use_vllm and not makes_own_prompts(given):
            require_eos(self._tokenizer)
            check_data(given, options, self._tokenizer)
        self._take_over(options)
        add_callbacks(self, options)
        if self._is_ours:
            add_model_tag(self)

    def _take_over(self, options: Options):
        """Makes the objects that do what the options ask for."""
        super()._take_over(options)
        self._needed = Needed(GRPOTrainer, _WAYS)  # what a subclass must not cut off
        placement, name = kl_choice(options)
        if placement is not None and name is not None:
            self._penalty = KLPenalty(self, placement, name, GRPOTrainer)
            for method in (_LOSS, _SCORE) if self._penalty.in_reward or self._penalty.exact else (_LOSS,):
                self._needed.add(method, self._penalty.in_words)
        if options.kl_target is not None:
            self._controller = BetaController(options.kl_target, options.kl_horizon, options.kl_target_unit)
        if self._moving is not None:
            self._needed.add(_SCORE, "ref_refresh_*")
        if options.advantage_estimator is not None:
            self._scoring = Scoring(self, options, GRPOTrainer)
            self._needed.add(_SCORE, f"advantage_estimator={self._scoring.name!r}")
            if self._scoring.row.per_token:
                self._expect_per_token(self._scoring)

    def _expect_per_token(self, scoring: Scoring):
        if not self.per_token_advantages:
            self._needed.add(_LOSS, f"advantage_estimator={scoring.name!r}, one advantage per token,")

    @property
    def _is_ours(self) -> bool:  # type: ignore[override]
        """Whether training is not TRL's, bit for bit."""
        return any((self._scoring, self._penalty, self._policy_kl, self._shared, self._moving))

    @property
    def _penalty_now(self) -> KLPenalty | None:
        """None also while `beta` is 0: TRL runs no reference then."""
        return self._penalty if self._penalty is not None and self.beta else None

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # One generation batch

    def _generate_and_score_completions(self, inputs):
        if not self._is_ours:
            return super()._generate_and_score_completions(inputs)
        self._needed.has_run(_SCORE)
        self._starts_generation_batch()
        rollout, scoring, penalty = Rollout(), self._scoring, self._penalty_now
        with ExitStack() as during:
            if scoring is not None:
                during.enter_context(scoring.watching(rollout))
            if penalty is not None and penalty.exact:
                passes = during.enter_context(penalty.recording())
            output = super()._generate_and_score_completions(inputs)
        if penalty is not None and penalty.exact:
            output["ref_hidden_states"] = penalty.reference_states(passes, output)
        if scoring is not None:
            self._replace_advantages(scoring, rollout, output)
        return output

    def _replace_advantages(self, scoring: Scoring, rollout: Rollout, output: dict):
        """Puts our advantages in place of TRL's: `(B,)` or `(B, T)`, local rows; and in its table and metrics."""
        mode, mask, beta = self._mode, output["completion_mask"] * output.get("tool_mask", 1), self.beta
        kl = None
        if (penalty := self._penalty_now) is not None and penalty.in_reward:
            per_token_kl, sums = penalty.of_sampler(output, mask)
            kl = beta * scoring.gathered(per_token_kl)
            self._observe_kl(sums, end_of_step=True)
        batch = scoring.batch(rollout, mask, self._group_size, kl_penalty=kl, **self._extras(rollout, output, mask))
        advantages = scoring.advantages(batch)
        output["advantages"] = scoring.local(advantages, output)
        if advantages.dim() == 2:
            self._expect_per_token(scoring)
        logged, rows = self._logs["advantages"], mean_advantages(advantages, batch.mask)
        for _ in range(min(len(rows), len(logged))):  # TRL has logged its own for these rows
            logged.pop()
        logged.extend(rows)
        for name, value in scoring.metrics(rollout, batch, advantages, beta).items():
            self._metrics[mode][name].append(value)

    # The loss

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._penalty is not None:
            self._penalty.own_logps = result[0]
        return result

    def _compute_loss(self, model, inputs):
        if self._is_ours:
            self._needed.has_run(_LOSS)
            self._needed.check(self, _SCORE)  # it comes first
        if self._penalty_now is None:
            return super()._compute_loss(model, inputs)
        with self._penalty_now.in_loss(inputs) as sums:
            loss = super()._compute_loss(model, inputs)
        for seen in sums:
            self._metrics[self._mode]["kl"].pop()  # TRL's own k3
            self._observe_kl(seen, end_of_step=self.accelerator.sync_gradients)
        return loss

    def _observe_kl(self, sums: torch.Tensor, end_of_step: bool):
        """Logs the KL of a batch of all processes; then the controller moves `beta` for the next one."""
        sums = self.accelerator.reduce(sums, reduction="sum")
        metrics, beta = self._metrics[self._mode], self.beta
        if self._controller is not None and self.model.training:
            self.beta = self._controller.after(beta, torch.stack([sums[0], *sums[-3:]]), end_of_step)
        for name, value in kl_metrics(sums, None if self._controller is None else beta).items():
            metrics[name].append(value)

    def training_step(self, *args, **kwargs):
        with self._needed.after(self) if self._is_ours else nullcontext():
            return super().training_step(*args, **kwargs)

    # Interruptions

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        return resumable(sampler) if self._is_ours else sampler

    def get_extra_state(self):
        return {} if self._controller is None else {"beta": self.beta}

    def set_extra_state(self, state):
        self.beta = state["beta"]

    def create_model_card(self, *args, **kwargs):
        rows = [] if self._scoring is None else [self._scoring.row]
        also = ("beta", "epsilon", "loss_type", "num_generations") if self._is_ours else ()
        with model_card_with_options(self, rows, also):
            super().create_model_card(*args, **kwargs)
