"""GRPO with selectable advantages and KL: options of TRL's own config, each `None` (TRL's own code) by default."""

import inspect
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_config import GRPOConfig as _GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer as _GRPOTrainer

from ..functional.kl import KL_ESTIMATORS
from ..functional.reductions import nearly_equal, reward_at_end, weighted_mean
from ..lookup import import_path, lookup
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


class _One(int):
    """1, for TRL's check that a group has at least two completions: our estimators decide that themselves."""

    def __lt__(self, other: int) -> bool:
        return False


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
            Estimator of KL(policy‖reference) per token: `"k1"`, `"k2"`, `"k3"`, or a dotted path to a function of
            `(per_token_logps, ref_per_token_logps)`. `None`: TRL's own, or, with `kl_placement`, the one that is right
            there (`"k1"` in the reward).
        kl_placement (`str`, *optional*):
            `"reward"`: `beta` · KL is subtracted from the reward of every token before the advantages. `None`: TRL's
            own, in the loss.
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
        metadata={"help": "Estimator of KL(policy||reference) per token. Default: TRL's own."},
    )
    kl_placement: str | None = field(
        default=None,
        metadata={"help": "Where the KL penalty acts: 'reward'. Default: TRL's own, in the loss."},
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
        self._check_kl()
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

    def _check_kl(self):
        if self.kl_estimator is None and self.kl_placement is None:
            if self.advantage_estimator == "reinforce_plus_plus" and self.beta != 0.0:
                warnings.warn(
                    "REINFORCE++ (arXiv 2501.03262, Eq. 4) puts k1 in the reward; with kl_placement unset the KL "
                    "stays in TRL's loss.",
                    stacklevel=4,
                )
            return
        if self.beta == 0.0:
            raise ValueError(
                "kl_estimator/kl_placement have no effect with beta=0.0: TRL loads no reference model. Set beta > 0 "
                "or remove them."
            )
        if self.beta < 0.0:
            raise ValueError(f"beta must be positive, got {self.beta}.")
        if self.kl_placement != "reward":
            raise ValueError(f"kl_placement must be 'reward', got {self.kl_placement!r}.")
        if self.advantage_estimator is None:
            raise ValueError(
                "kl_placement='reward' changes the advantages, so advantage_estimator must be set; 'group_relative' "
                "is TRL's own normalisation."
            )

    @property
    def _rollouts_reused(self) -> bool:
        """Whether a completion is trained on after the policy that sampled it has changed (TRL's own test)."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) != 0


class GRPOTrainer(_GRPOTrainer):
    """
    TRL's [`~trl.GRPOTrainer`] with the options of [`GRPOConfig`]. Takes the same arguments.

    Logged in addition, when `advantage_estimator` is set: `advantages/mean` and `advantages/std` over the trainable
    tokens of the scored completions of all processes, and `advantages/frac_zero_variance_groups`, the fraction of
    prompts whose scored completions all have the same reward. With `kl_placement="reward"`: `kl`, the mean over the
    trainable tokens of all processes of the log-ratio, sampling policy over reference, in nats.
    """

    reward_funcs: list  # TRL's
    beta: float  # TRL's: loads the reference, computes its log-probs, and weights the KL in the loss
    # Of the batch being scored
    _rewards_per_func: torch.Tensor | None = None  # (N, functions), all processes; NaN for process functions
    _tool_mask: list[list[int]] | None = None  # of this process: 0 for tokens of tools
    _steps: Steps  # of this process
    _process: list[int] = []  # indices of the reward functions that returned step rewards
    _shown_steps: list[int] = []  # those whose step rewards are in the completions table

    def __init__(self, *args, **kwargs):
        given = inspect.signature(_GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        if getattr(given.get("args"), "process_reward_model", None) is not None:
            del given["self"]
            args, kwargs = (), with_process_reward_model(given)
        super().__init__(*args, **kwargs)
        for path in self._option("callbacks") or []:
            self.add_callback(import_path(path)())

    def _option(self, name: str) -> Any:
        # TRL's plain config, or a trainer built without one, has none of our fields.
        return getattr(getattr(self, "args", None), name, None)

    def _generate(self, *args, **kwargs):
        generated = super()._generate(*args, **kwargs)
        self._tool_mask = generated[2]
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        estimator = self._option("advantage_estimator")
        lengths = [len(mask) for mask in self._tool_mask or completion_ids_list]
        if lengths != [len(ids) for ids in completion_ids_list]:
            raise RuntimeError(_moved("_generate does not return the tool mask third"))
        self._steps = Steps(completion_ids_list, self._tool_mask, estimator, self._cut, self._tokenizer)
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
        if self._option("advantage_estimator") is None:
            return super()._generate_and_score_completions(inputs)
        self._rewards_per_func = None
        output = super()._generate_and_score_completions(inputs)
        if self._rewards_per_func is None:
            raise RuntimeError(_moved("_calculate_rewards is not called while scoring"))
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        local_mask = output["completion_mask"] * output.get("tool_mask", 1)
        local_kl = self._kl_of_sampler(output, local_mask) if self._option("kl_placement") == "reward" else None

        # Gather first, then compute: the estimators see the rows of all processes and know no ranks.
        completion_mask = self._gathered(local_mask)
        returns = self._returns(self._rewards_per_func)
        rewards, scored = reward_at_end(returns, completion_mask)
        options = dict(self._option("advantage_kwargs") or {})
        if local_kl is not None:
            kl_penalty = self.beta * self._gathered(local_kl)
            rewards = rewards - kl_penalty
            if self.args.advantage_estimator in ADVANTAGE_ESTIMATORS:
                options["kl_penalty"] = kl_penalty
        steps = self._steps_of_all(local_mask)
        outcome, by_step = (rewards, scored), self.args.advantage_estimator in PROCESS_ESTIMATORS
        if steps is not None:
            rewards, scored = (steps.rewards, steps.scored) if by_step else steps.added_to(*outcome)
        advantages = self._advantages(rewards, scored, completion_mask, num_generations, options)
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
        return output

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
        trainable = mask.bool()
        estimator = lookup(self._option("kl_estimator") or "k1", KL_ESTIMATORS)
        logps = sampler.float().where(trainable, 0.0)
        ref_logps = output.pop("ref_per_token_logps").float().where(trainable, 0.0)
        per_token_kl = estimator(logps, ref_logps).where(trainable, 0.0)
        totals = self.accelerator.reduce(torch.stack([per_token_kl.sum(), trainable.sum().float()]), reduction="sum")
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["kl"].append((totals[0] / totals[1].clamp(min=1.0)).item())
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

    def _compute_loss(self, model, inputs):
        if self._option("kl_placement") != "reward":
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0  # the KL acted on the rewards already
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta

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


def _moved(what: str) -> str:
    import trl

    return (
        f"TRL {trl.__version__} is not laid out as trl_ext expects: {what}. Install a TRL version that trl_ext was "
        "tested with (see constraints.txt), or report this."
    )
