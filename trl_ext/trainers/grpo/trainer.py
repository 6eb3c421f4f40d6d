"""GRPO with selectable advantages and KL: options of TRL's own config, each `None` (TRL's own code) by default."""

import inspect
import json
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_config import GRPOConfig as _GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer as _GRPOTrainer

from ...functional.kl import KL_ESTIMATORS, SATURATION, adapted_beta, k1, k2, k3, kl_in_loss
from ...functional.reductions import nearly_equal, reward_at_end, weighted_mean
from ...lookup import import_path, lookup
from ...upstream import UpstreamChanged, check_overridden
from ..input_checks import datasets_of, require_columns, require_eos, require_texts
from ..interruptions import begin_checkpoint, keeping_dtypes, resumable, whole_checkpoint
from ..method_rows import rows_of
from ..model_card import add_model_tag, model_card_with_options
from .kl import BetaTimes, check_kl, exact_kl, kl_choice, last_hidden_states, lm_head
from .step_rewards import ESTIMATORS as ADVANTAGE_ESTIMATORS
from .step_rewards import (
    NEEDS_SIBLINGS,
    PER_TOKEN,
    PROCESS_ESTIMATORS,
    StepRewards,
    Steps,
    check_steps,
    mixed,
    step_metrics,
    with_process_reward_model,
)
from .steps import segment

_CONTROLLER_FILE = "kl_controller.json"


class _One(int):
    """1, for TRL's check that a group has at least two completions: our estimators decide that themselves."""

    def __lt__(self, other: int) -> bool:
        return False


def _is_active(config: Any) -> bool:
    """Whether a config, possibly TRL's own or none, switches on anything that acts on training."""
    return any(getattr(config, n, None) is not None for n in ("advantage_estimator", "kl_estimator", "kl_placement"))


@dataclass
class GRPOConfig(_GRPOConfig):
    r"""
    TRL's [`~trl.GRPOConfig`] and the options below. With none of them set, training is TRL's, bit for bit.

    Parameters:
        advantage_estimator (`str`, *optional*):
            How rewards become advantages: an entry of `trl_ext.functional.advantages.ADVANTAGE_ESTIMATORS`
            (`"group_relative"`, `"group_mean"`, `"leave_one_out"`, `"length_weighted"`, `"reinforce"`,
            `"reinforce_plus_plus"`, `"reinforce_plus_plus_baseline"`), `"process_group_relative"` for step rewards, or
            a dotted path to a function of `(rewards, scored, completion_mask, num_generations)`. `None`: TRL's own.
        advantage_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments of the estimator, such as `{"weighting": "sequence"}`.
        reward_clip_range (`list[float]`, *optional*):
            Two numbers, lowest and highest: range to which the weighted sum of the rewards of a completion is clipped
            before `advantage_estimator` sees it.
        kl_estimator (`str`, *optional*):
            Estimator of KL(policy‖reference) per token: `"k1"`, `"k2"`, `"k3"`, `"exact"` (over the whole vocabulary),
            or a dotted path to a function of `(per_token_logps, ref_per_token_logps)`. `None`: TRL's own, or, with
            `kl_placement`, the one that is right there: `"k3"` in the loss, `"k1"` in the reward.
        kl_placement (`str`, *optional*):
            `"loss"`: `beta` · KL is added to the loss of every token, with TRL's `use_bias_correction_kl`. `"reward"`:
            it is subtracted from the reward of every token before the advantages. `None`: TRL's own, or, with
            `kl_estimator`, the loss.
        kl_target (`float`, *optional*):
            KL in nats at which an adaptive `beta` is kept. `None`: `beta` is constant.
        kl_horizon (`float`, *optional*):
            Completions over which the adaptive `beta` changes by at most a factor of about e^±0.2; 10,000 if unset.
        kl_target_unit (`str`, *optional*):
            Unit of `kl_target`: `"token"` (if unset), mean per trainable token, or `"sequence"`, mean of the
            completions' sums.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text that ends a step. Reward functions receive the steps as `completion_steps`.
        step_function (`str`, *optional*):
            Dotted path of a function of `(token_ids, tokenizer)` that returns the indices of the last token of each
            step, used instead of `step_separator`.
        process_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages from step rewards with `"process_group_relative"`.
        outcome_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages from rewards of whole completions there. Both are normalised separately.
        process_reward_model (`str` or `dict[str, Any]`, *optional*):
            Options of [`~trl_ext.rewards.ProcessRewardModel`], to be added to the reward functions.
        callbacks (`list[str]`, *optional*):
            Dotted paths of [`~transformers.TrainerCallback`] classes to add to the trainer.
    """

    _VALID_DICT_FIELDS = [*_GRPOConfig._VALID_DICT_FIELDS, "advantage_kwargs", "process_reward_model"]

    advantage_estimator: str | None = field(
        default=None,
        metadata={
            "help": "How rewards become advantages: 'group_relative', 'group_mean', 'leave_one_out', "
            "'length_weighted', 'reinforce', 'reinforce_plus_plus', 'reinforce_plus_plus_baseline', "
            "'process_group_relative', or a dotted path. Default: TRL's own."
        },
    )
    advantage_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Keyword arguments of the advantage estimator, such as \'{"weighting": "sequence"}\'.'},
    )
    reward_clip_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest value to which the weighted sum of a completion's rewards is clipped before "
            "the advantage estimator sees it."
        },
    )
    kl_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Estimator of KL(policy||reference) per token: 'k1', 'k2', 'k3', 'exact', or a dotted path. "
            "Default: TRL's own."
        },
    )
    kl_placement: str | None = field(
        default=None,
        metadata={"help": "Where the KL penalty acts: 'loss' or 'reward'. Default: TRL's own, in the loss."},
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL in nats at which an adaptive beta is kept. Default: beta is constant."},
    )
    kl_horizon: float | None = field(
        default=None,
        metadata={
            "help": "Completions over which the adaptive beta changes by at most about a fifth. Default: 10000."
        },
    )
    kl_target_unit: str | None = field(
        default=None,
        metadata={"help": "Unit of kl_target: 'token' (default) or 'sequence'."},
    )
    step_separator: str = field(
        default="\n",
        metadata={"help": "Text that ends a step of a completion, for rewards of steps. Default: a line break."},
    )
    step_function: str | None = field(
        default=None,
        metadata={"help": "Dotted path of a function that finds the last token of each step, instead of a separator."},
    )
    process_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the advantages from step rewards in 'process_group_relative'."},
    )
    outcome_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the advantages from outcome rewards in 'process_group_relative'."},
    )
    process_reward_model: dict | str | None = field(
        default=None,
        metadata={
            "help": "A process-reward model to add to the reward functions, such as "
            '\'{"model": "Qwen/Qwen2.5-Math-PRM-7B", "kind": "marker"}\'.'
        },
    )
    callbacks: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted paths of TrainerCallback classes to add to the trainer."},
    )

    def __post_init__(self):
        estimator = self.advantage_estimator
        num_generations: int = self.num_generations
        if num_generations == 1 and estimator in NEEDS_SIBLINGS:
            raise ValueError(
                f"advantage_estimator={estimator!r} compares completions of one prompt and needs num_generations >= "
                "2, got 1. 'reinforce' and 'reinforce_plus_plus' accept 1."
            )
        if num_generations == 1 and estimator is not None:
            self.num_generations: int = _One(1)
        super().__post_init__()
        self.num_generations = num_generations
        self._check_advantages()
        check_kl(self)
        check_steps(self)
        for path in self.callbacks or []:
            import_path(path)

    def _check_advantages(self):
        name, options = self.advantage_estimator, self.advantage_kwargs
        if name is None:
            for option in ("advantage_kwargs", "reward_clip_range"):
                if getattr(self, option) is not None:
                    raise ValueError(f"{option} is read only with advantage_estimator; set that too, or remove it.")
            return
        estimator = lookup(name, ADVANTAGE_ESTIMATORS)
        if not isinstance(options, dict | None):
            raise ValueError(f"advantage_kwargs must be a mapping of option to value, got {options!r}.")
        if name in ADVANTAGE_ESTIMATORS:
            known = inspect.signature(estimator).parameters.values()
            allowed = {option.name for option in known if option.kind is option.KEYWORD_ONLY} - {"kl_penalty"}
            for key in options or {}:
                if key not in allowed:
                    raise ValueError(f"advantage_kwargs has no {key!r} for {name!r}; it takes {sorted(allowed)}.")
            # The estimator itself knows which values it takes: ask it, on two completions of one token.
            one = torch.ones(2, 1)
            estimator(torch.tensor([[0.0], [1.0]]), one.bool(), one, 2, **options or {})
        if self.reward_clip_range is not None:
            try:
                low, high = self.reward_clip_range
                ordered = low < high
            except (TypeError, ValueError):
                ordered = False
            if not ordered:
                raise ValueError(
                    f"reward_clip_range must be two numbers, the lower one first, got {self.reward_clip_range!r}."
                )
        if self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not read when advantage_estimator is set. For 'none' use "
                "advantage_estimator='group_mean'; for 'batch' leave advantage_estimator unset."
            )
        if self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "advantage_estimator works on the weighted sum of the rewards; "
                "multi_objective_aggregation='normalize_then_sum' is not available with it."
            )
        if name in PER_TOKEN:
            self._check_per_token_advantages()
        if name == "length_weighted" and self._rollouts_reused:
            warnings.warn(
                "'length_weighted' (OPO) is derived for exactly on-policy updates; rollouts are reused here.",
                stacklevel=4,
            )

    def _check_per_token_advantages(self):
        """Refuses what would silently change its meaning with one advantage per token."""
        name = self.advantage_estimator
        if self.importance_sampling_level == "sequence":
            raise ValueError(
                f"advantage_estimator={name!r} gives one advantage per token, but importance_sampling_level="
                "'sequence' uses one ratio per completion: its gradient is that of the mean advantage, so the "
                "per-token signal vanishes. Use 'token'."
            )
        for option, active in (
            ("loss_type='vespo'", self.loss_type == "vespo"),
            ("off_policy_mask_threshold", self.off_policy_mask_threshold is not None),
        ):
            if active:
                raise ValueError(
                    f"{option} reads the sign of one advantage per completion and is not available with "
                    f"advantage_estimator={name!r}."
                )

    @property
    def _rollouts_reused(self) -> bool:
        """Whether a completion is trained on after the policy that sampled it has changed (TRL's own test)."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) != 0


class GRPOTrainer(_GRPOTrainer):
    """
    TRL's [`~trl.GRPOTrainer`] with the options of [`GRPOConfig`]. Takes the same arguments.

    Logged in addition, over the trainable tokens of all processes:

    - with `advantage_estimator`: `advantages/mean` and `advantages/std` over the scored completions, and
      `advantages/frac_zero_variance_groups`, the fraction of prompts whose scored completions all have one reward;
    - with `kl_estimator` or `kl_placement`, in nats: `kl`, the mean of the KL in use (ratio included); `kl/k1`,
      `kl/k2`, `kl/k3`, the same mean of each; `kl/saturated`, the fraction of tokens with a log-ratio beyond ±20;
    - with step rewards, those of [`~trl_ext.trainers.step_rewards.step_metrics`], and `process/advantage_share`, the
      share of the steps in the sum of all |advantages|, where outcomes are mixed in;
    - `kl/beta` with `kl_target`, and `kl/effective_beta`, β/σ, where REINFORCE++ divides a KL in the reward by σ.
    """

    reward_funcs: list  # TRL's
    beta: float  # TRL's: loads the reference, computes its log-probs, and weights the KL in the loss
    # Of the batch being scored
    _rewards_per_func: torch.Tensor | None = None  # (N, functions), all processes; NaN for process functions
    _tool_mask: list[list[int]] | None = None  # of this process: 0 for tokens of tools
    _steps: Steps  # of this process
    _process: list[int] = []  # indices of the reward functions that returned step rewards
    _shown_steps: list[int] = []  # those whose step rewards are in the completions table
    _log_prob_calls: Any = None  # (log-probs, hidden states) of the calls inside a loss or, for `exact`, a scoring
    _kl_window: Any = 0.0  # sums since the adaptive beta last changed, see `_adapt_beta`

    def __init__(self, *args, **kwargs):
        check_overridden(type(self))
        given = inspect.signature(_GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        if getattr(given.get("args"), "process_reward_model", None) is not None:
            del given["self"]
            args, kwargs = (), with_process_reward_model(given)
        # What generates in place of the trainer may take other prompts, or none.
        foreign = given.get("environment_factory") is not None or given.get("rollout_func") is not None
        checked = _is_active(given.get("args")) and not foreign
        if checked:
            self._check_data(given)
        super().__init__(*args, **kwargs)
        if self._is_ours:
            add_model_tag(self)
        if checked and not self.use_vllm:
            require_eos(self._tokenizer)
            self._check_data(given, self._tokenizer)
        for path in self._option("callbacks") or []:
            self.add_callback(import_path(path)())
        if self._kl_choice[1] == "exact" and self.ref_model is None and self._head(None).weight.requires_grad:
            raise ValueError(
                "kl_estimator='exact' needs one LM head for policy and reference with PEFT, but this adapter trains "
                "its own copy (modules_to_save). Leave the head out of it, or use 'k3'."
            )

    def _check_data(self, given: dict[str, Any], tokenizer: Any = None):
        for name in ("train_dataset", "eval_dataset"):
            for dataset in datasets_of(given.get(name)):
                require_columns(dataset, name, ["prompt"])
                require_texts(dataset, name, ["prompt"], tokenizer)

    def _option(self, name: str) -> Any:
        # TRL's plain config, or a trainer built without one, has none of our fields.
        return getattr(getattr(self, "args", None), name, None)

    @property
    def _kl_choice(self) -> tuple[str | None, Any]:
        return kl_choice(getattr(self, "args", None))

    @property
    def _is_ours(self) -> bool:
        """Whether training is not TRL's, bit for bit."""
        return _is_active(getattr(self, "args", None))

    # Scoring

    def _generate(self, *args, **kwargs):
        generated = super()._generate(*args, **kwargs)
        self._tool_mask = generated[2]
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        estimator = self._option("advantage_estimator")
        lengths = [len(mask) for mask in self._tool_mask or completion_ids_list]
        if lengths != [len(ids) for ids in completion_ids_list]:
            raise UpstreamChanged("_generate does not return the tool mask third")
        tokenizer = getattr(self, "_tokenizer", None)  # needed only where steps are cut
        self._steps = Steps(completion_ids_list, self._tool_mask, estimator, self._cut, tokenizer)
        functions, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs = [self._steps.wrapped(i, f, names[i]) for i, f in enumerate(functions)]
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        self._process = self._steps.agree(names)
        self._shown_steps = sorted({*self._shown_steps, *self._process})
        for index in self._shown_steps:  # also in a batch without any, or the table would keep those of the last one
            self._log_completion_extra(f"{names[index]}/steps", self._steps.of(index))
        self._rewards_per_func = rewards_per_func.clone()
        self._rewards_per_func[:, self._process] = torch.nan
        return rewards_per_func

    def _cut(self, token_ids, trainable):
        """The steps of one completion, with the options of the config."""
        step_function = self._option("step_function")
        separator = self._option("step_separator") or "\n"
        return segment(
            token_ids, trainable, self._tokenizer, separator, import_path(step_function) if step_function else None
        )

    def _generate_and_score_completions(self, inputs):
        self._rewards_per_func = None
        exact = self._kl_choice[1] == "exact"
        self._log_prob_calls = [] if exact else None
        try:
            output = super()._generate_and_score_completions(inputs)
            calls = self._log_prob_calls
        finally:
            self._log_prob_calls = None
        if exact:
            # TRL has just run the reference over this batch; the loss needs its hidden states, not another pass.
            found = [hidden for logps, hidden in calls if logps is output["ref_per_token_logps"]]
            if len(found) != 1:
                raise UpstreamChanged("scoring does not return the log-probs of the reference as computed")
            output["ref_hidden_states"] = found[0].clone()
        if self._option("advantage_estimator") is not None:
            self._replace_advantages(output)
        return output

    def _replace_advantages(self, output):
        """Puts our advantages in place of TRL's: `(B,)` or `(B, T)`, local rows."""
        if self._rewards_per_func is None:
            raise UpstreamChanged("_calculate_rewards is not called while scoring")
        mode, name = "train" if self.model.training else "eval", self.args.advantage_estimator
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        local_mask = output["completion_mask"] * output.get("tool_mask", 1)
        beta = self.beta  # `_kl_of_sampler` may adapt it, for the next batch
        local_kl = self._kl_of_sampler(output, local_mask) if self._kl_choice[0] == "reward" else None

        # Gather first, then compute: the estimators see the rows of all processes and know no ranks.
        completion_mask = self._gathered(local_mask)
        returns = self._returns(self._rewards_per_func)
        rewards, scored = reward_at_end(returns, completion_mask)
        options = dict(self._option("advantage_kwargs") or {})
        if local_kl is not None:
            kl_penalty = beta * self._gathered(local_kl)
            rewards = rewards - kl_penalty
            if name in ADVANTAGE_ESTIMATORS:
                options["kl_penalty"] = kl_penalty
        steps = self._steps_of_all(local_mask)
        outcome, by_step = (rewards, scored), name in PROCESS_ESTIMATORS
        if steps is not None:
            rewards, scored = (steps.rewards, steps.scored) if by_step else steps.added_to(*outcome)
        batch = (rewards, scored, completion_mask, num_generations)
        advantages = self._advantages(*batch, options)
        if by_step:
            weights = self.args.process_weight, self.args.outcome_weight
            advantages, share = mixed(advantages, *outcome, completion_mask, num_generations, *weights)
            self._metrics[mode]["process/advantage_share"].append(share)
            scored = scored | outcome[1]
        if steps is not None:
            for metric, value in step_metrics(steps, advantages, completion_mask, num_generations).items():
                self._metrics[mode][metric].append(value)

        rows, width = output["completion_ids"].shape
        start = self.accelerator.process_index * rows
        local = advantages[start : start + rows].to(local_mask.device, torch.float32)
        output["advantages"] = local if local.dim() == 1 else local[:, :width]
        self._log_advantages(mode, advantages, returns, scored, completion_mask, num_generations)
        if "kl_penalty" in options and name.startswith("reinforce_plus_plus"):
            centred = self._advantages(*batch, {**options, "norm": "center"})
            ratio = advantages.norm() / centred.norm() if centred.any() else torch.ones(())  # 1/σ
            self._metrics[mode]["kl/effective_beta"].append(beta * ratio.item())

    def _steps_of_all(self, local_mask) -> StepRewards | None:
        """The step rewards of all processes, if there are any."""
        if not self._process and self.args.advantage_estimator not in PROCESS_ESTIMATORS:
            return None
        if self.args.reward_clip_range is not None and len(self._process) == len(self.reward_func_names):
            raise ValueError(
                "reward_clip_range clips the reward of a completion, but every reward function returned step rewards. "
                "Remove it."
            )
        rewards, marks = self._steps.token_rewards(self._process, self.reward_weights, local_mask.size(1))
        device = local_mask.device
        rewards = self._gathered(rewards.to(device, torch.float32 if device.type == "mps" else torch.float64))
        marks = self._gathered(marks.to(device))
        return StepRewards(rewards.double(), marks == 2, marks > 0)

    def _gathered(self, local: torch.Tensor) -> torch.Tensor:
        """`(B, T_local)` of this process to `(N, T)` of all, padded with 0, where the statistics are taken."""
        padded = self.accelerator.pad_across_processes(local, dim=1)
        gathered = self.accelerator.gather(padded)
        # The statistics are in float64, which Apple's accelerator does not have.
        return gathered.cpu() if gathered.device.type == "mps" else gathered

    def _returns(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the rewards of each completion, `(N,)` float64, NaN where no function scored it."""
        rewards_per_func = rewards_per_func.cpu() if rewards_per_func.device.type == "mps" else rewards_per_func
        infinite = rewards_per_func.isinf().nonzero()
        if len(infinite):
            row, column = infinite[0].tolist()
            raise ValueError(
                f"Reward function {self.reward_func_names[column]!r} returned {rewards_per_func[row, column].item()} "
                f"for completion {row}; a reward is a finite number, or None for a completion that cannot be scored."
            )
        weights = self.reward_weights.to(rewards_per_func.device, torch.float64)
        returns = (rewards_per_func.double() * weights).nansum(1)
        if (clip_range := self._option("reward_clip_range")) is not None:
            returns = returns.clamp(*clip_range)
        return returns.masked_fill(rewards_per_func.isnan().all(1), torch.nan)

    def _advantages(self, rewards, scored, completion_mask, num_generations, options) -> torch.Tensor:
        """The estimator's result, `(N,)` or `(N, T)`, checked."""
        name = self.args.advantage_estimator
        estimator = lookup(name, ADVANTAGE_ESTIMATORS)
        advantages = estimator(rewards, scored, completion_mask, num_generations, **options)
        if name in ADVANTAGE_ESTIMATORS:
            return advantages
        if not isinstance(advantages, torch.Tensor) or advantages.shape not in (rewards.shape, rewards.shape[:1]):
            shape = tuple(advantages.shape) if isinstance(advantages, torch.Tensor) else type(advantages).__name__
            raise ValueError(
                f"advantage_estimator={name!r} returned {shape}; it must return a tensor of shape (N,) or (N, T), "
                f"here {tuple(rewards.shape[:1])} or {tuple(rewards.shape)}."
            )
        if advantages.dim() == 2:
            self.args._check_per_token_advantages()
            advantages = advantages.where(completion_mask.bool(), 0.0)
        if not advantages.isfinite().all():
            raise ValueError(f"advantage_estimator={name!r} returned a NaN or infinite advantage.")
        return advantages

    def _kl_of_sampler(self, output, mask) -> torch.Tensor:
        """The KL estimate of the policy that sampled, a constant: `(B, T)`, nats, 0 at untrainable tokens."""
        sampler = output.get("old_per_token_logps")
        if sampler is None:  # TRL leaves it out where it equals the policy that the loss will see first
            sampler = self._policy_logps(output)
        reference = output.pop("ref_per_token_logps")  # the loss does without
        estimator = lookup(self._kl_choice[1], KL_ESTIMATORS)
        per_token_kl = kl_in_loss(estimator, sampler, reference, sampler, mask, bias_correction=False)
        self._log_kl(per_token_kl, sampler, reference, sampler, mask)
        return per_token_kl

    def _policy_logps(self, output) -> torch.Tensor:
        """Log-probs of the sampled tokens under the current policy, `(B, T)`, without graph."""
        taken = inspect.signature(_GRPOTrainer._get_per_token_logps_and_entropies).parameters
        train, args = self.model.training, self.args
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            return self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
                **{name: value for name, value in output.items() if name in taken},  # images and their like
            )[0]

    # The loss

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._log_prob_calls is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._kl_choice[1] != "exact":
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            self._log_prob_calls.append((result[0], None))
            return result
        with last_hidden_states(self.accelerator.unwrap_model(model)) as collected:
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        width = result[0].size(1)
        # The state before a token predicts it.
        self._log_prob_calls.append((result[0], torch.cat(collected)[:, -width - 1 : -1]))
        return result

    def _compute_loss(self, model, inputs):
        placement, name = self._kl_choice
        if placement is None:
            return super()._compute_loss(model, inputs)
        beta, mask = self.beta, inputs["completion_mask"] * inputs.get("tool_mask", 1)
        calls: Any = [] if placement == "loss" else None
        # A KL in the reward has acted already.
        in_loss = BetaTimes(beta if placement == "loss" else 0.0, lambda: self._kl_penalty(name, inputs, mask))
        self.beta, self._log_prob_calls = in_loss, calls
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta, self._log_prob_calls = beta, None
        if placement == "loss":
            if len(in_loss.penalties) != 1 or len(calls) != 1:
                raise UpstreamChanged("the loss does not multiply beta by the KL per token exactly once")
            logps = calls[0][0].detach()
            old = inputs.get("old_per_token_logps")
            old = logps if old is None else old
            self._log_kl(in_loss.penalties[0], logps, inputs["ref_per_token_logps"], old, mask)
        return loss

    def _kl_penalty(self, name, inputs, mask) -> torch.Tensor:
        """The KL of each token as a term of the loss, `(B, T)`, with graph."""
        logps, hidden = self._log_prob_calls[-1]
        if name == "exact":
            head, ref_head = self._head(None), self._head(self.ref_model)
            with self.accelerator.autocast():
                return exact_kl(hidden, head, inputs["ref_hidden_states"], ref_head, mask, self.temperature)
        old = inputs.get("old_per_token_logps")
        return kl_in_loss(
            lookup(name, KL_ESTIMATORS),
            logps,
            inputs["ref_per_token_logps"],
            logps.detach() if old is None else old,
            mask,
            self.args.use_bias_correction_kl,
        )

    def _head(self, model):
        """The LM head of a reference, or, with PEFT and by default, of the policy."""
        return lm_head(self.accelerator.unwrap_model(self.model if model is None else model))

    # The adaptive beta, and logging

    def _adapt_beta(self, sums):
        """
        Moves `beta` once per optimizer step, or per generation batch with the KL in the reward.

        Args:
            sums (`torch.Tensor` of shape `(4,)`):
                Of all processes: KL, trainable tokens, completions that have any, completions.
        """
        self._kl_window = self._kl_window + sums
        if self._kl_choice[0] == "loss" and not self.accelerator.sync_gradients:
            return  # beta is constant inside an accumulation window
        (kl, tokens, sequences, completions), self._kl_window = self._kl_window.tolist(), 0.0
        count = sequences if self.args.kl_target_unit == "sequence" else tokens
        if count:
            horizon = {"horizon": self.args.kl_horizon} if self.args.kl_horizon else {}
            self.beta = adapted_beta(self.beta, kl / count, self.args.kl_target, completions, **horizon)

    # Interruptions

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self._is_ours:
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        return resumable(sampler) if self._is_ours else sampler

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with keeping_dtypes(model or self.model) if self._is_ours else nullcontext():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model, trial):
        if self._is_ours:
            folder = begin_checkpoint(self, trial)
            if self._option("kl_target") is not None and self.args.should_save:  # before the state makes it whole
                (folder / _CONTROLLER_FILE).write_text(json.dumps({"beta": self.beta}))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._option("kl_target") is not None and checkpoint is not None:
            path = Path(checkpoint, _CONTROLLER_FILE)
            if path.exists():
                self.beta = json.loads(path.read_text())["beta"]
            else:
                warnings.warn(f"{checkpoint} holds no adaptive beta; it starts at {self.beta}.", stacklevel=2)

    def _log_kl(self, per_token_kl, logps, ref_logps, old_logps, mask):
        mode, trainable = "train" if self.model.training else "eval", mask.bool()
        logps, ref_logps, old_logps = (x.float().where(trainable, 0.0) for x in (logps, ref_logps, old_logps))
        weight = (logps - old_logps).clamp(-SATURATION, SATURATION).exp()
        means = {
            "kl": per_token_kl.detach(),
            **{f"kl/{k.__name__}": weight * k(logps, ref_logps) for k in (k1, k2, k3)},
            "kl/saturated": ((logps - ref_logps).abs() > SATURATION).float(),
        }
        counts = [trainable.sum(), trainable.any(1).sum(), mask.new_tensor(len(mask))]
        local = torch.stack([x.sum().float() for x in (*means.values(), *counts)])
        sums = self.accelerator.reduce(local, reduction="sum")
        metrics = self._metrics[mode]
        if self._kl_choice[0] == "loss":
            metrics["kl"].pop()  # TRL's own k3
        for name, total in zip(means, sums.tolist(), strict=False):
            metrics[name].append(total / max(sums[-3].item(), 1.0))
        if self._option("kl_target") is not None:
            metrics["kl/beta"].append(self.beta)
            if mode == "train":
                self._adapt_beta(torch.stack([sums[0], *sums[-3:]]))

    def _log_advantages(self, mode, advantages, returns, scored, completion_mask, num_generations):
        # TRL has logged its own advantages for these rows; the completions table shows one number per row.
        mask = completion_mask.to(torch.float64)
        per_token = advantages.double() if advantages.dim() == 2 else advantages.double()[:, None].expand_as(mask)
        per_row = (per_token * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        logged = self._logs["advantages"]
        for _ in range(min(len(per_row), len(logged))):
            logged.pop()
        logged.extend(per_row.tolist())

        weights = mask * scored.any(1, keepdim=True)
        mean = weighted_mean(per_token, weights)
        metrics = self._metrics[mode]
        metrics["advantages/mean"].append(mean.item())
        metrics["advantages/std"].append(math.sqrt(weighted_mean((per_token - mean).square(), weights).item()))
        if num_generations > 1 and len(self._process) < len(self.reward_func_names):
            groups = returns.view(-1, num_generations)
            equal = nearly_equal(groups.nan_to_num(), ~groups.isnan(), dim=1)
            metrics["advantages/frac_zero_variance_groups"].append(equal.double().mean().item())

    def create_model_card(self, *args, **kwargs):
        rows = rows_of(self._option("advantage_estimator"))
        with model_card_with_options(self, rows, ("beta", "loss_type", "num_generations")):
            super().create_model_card(*args, **kwargs)
