"""An implicit process-reward model that learns while the policy does (PRIME): a second adapter and its rewards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl.trainer.utils import use_adapter

from ...functional.advantages import Estimator
from ...functional.process_rewards import implicit_reward_loss
from ...sharded import whole
from ..foreign import Options
from ..gathering import copies, is_sharded, overwrite, settle
from ..input_checks import is_number, warn_user
from ..shared_prefix import INSTEAD_OF_FSDP1, flat_sharding
from .checks import estimator_row, names_of

ADAPTER = "implicit_prm"
_STATE_FILE = "implicit_prm.pt"
_SATURATED = 20.0  # where the slope of the loss is e⁻²⁰


@dataclass(frozen=True)
class ImplicitPRMOptions:
    """
    The option `implicit_prm`.

    Args:
        beta (`float`, *optional*, defaults to `0.05`):
            Unit of the reward per nat of log-ratio.
        learning_rate (`float`, *optional*):
            Learning rate of the model, constant. `None`: that of the policy.
        max_grad_norm (`float`, *optional*, defaults to `10.0`):
            Norm to which its gradient is clipped.
        threshold (`float`, *optional*, defaults to `0.5`):
            A completion whose weighted reward is greater is right.
    """

    beta: float = 0.05
    learning_rate: float | None = None
    max_grad_norm: float = 10.0
    threshold: float = 0.5

    @classmethod
    def of(cls, given: Any) -> "ImplicitPRMOptions":
        """From a mapping, or nothing. Raises `ValueError` in one sentence."""
        names = [field.name for field in fields(cls)]
        if not isinstance(given, dict | None) or not set(given or {}) <= {*names}:
            raise ValueError(f"implicit_prm must be a mapping with some of {names}, got {given!r}.")
        options = cls(**given or {})
        for name, value in asdict(options).items():
            positive = name == "threshold" or (isinstance(value, int | float) and value > 0)
            if not (is_number(value) and positive) and not (name == "learning_rate" and value is None):
                kind = "a number" if name == "threshold" else "a positive number"
                raise ValueError(f"{name} of implicit_prm must be {kind}, got {value!r}.")
        return options


def _takes_dense_rewards(row: Estimator) -> bool:
    """A greedy answer has none, so that it would be no baseline for them."""
    return row.steps != "refused" and not row.baseline


def check_implicit_prm(options: Any) -> None:
    """Refuses what cannot be honoured, before a model loads. `options`: a config seen through `Options`."""
    if options.implicit_prm is None:
        return
    ImplicitPRMOptions.of(options.implicit_prm)
    name = options.advantage_estimator
    if name is None or not _takes_dense_rewards(estimator_row(name)):
        raise ValueError(
            f"implicit_prm gives one reward per token, which advantage_estimator={name!r} cannot use. Use "
            f"{names_of(lambda row: _takes_dense_rewards(row) and not row.values)}; its paper uses 'prime'."
        )
    if options._makes_critic:
        raise ValueError("implicit_prm is not available with a critic. Use trl_ext.GRPOConfig.")
    if flat_sharding(options):
        raise ValueError(
            "implicit_prm trains a second adapter, which FSDP1 keeps as a part of one flat row of numbers. "
            f"{INSTEAD_OF_FSDP1}."
        )


NEEDS_ADAPTER = (
    "implicit_prm trains a second adapter beside yours, of the same kind, under the name 'implicit_prm'. Pass a "
    "peft_config of LoRA or its like (--use_peft), and no adapter of that name."
)


def check_adapter(given: dict[str, Any], options: Any) -> None:
    """Refuses a model without adapter before it loads. `given`: the arguments of the trainer."""
    peft_config = given.get("peft_config")
    missing = peft_config is None and isinstance(given.get("model"), str)
    if options.implicit_prm is not None and (missing or getattr(peft_config, "is_prompt_learning", False)):
        raise ValueError(NEEDS_ADAPTER)


class ImplicitPRM:
    r"""
    \\(\\varphi\\), an adapter beside the policy's, of which it starts as a copy; the reference is their base without
    any adapter. It is frozen but for its own update, so that the policy's optimizer, DDP and gradient norm do not know
    it. Where processes share the weights, each trains a whole copy of the adapter in step with the others.

    Args:
        trainer ([`GRPOTrainer`]):
            Trainer after its construction.
        options ([`ImplicitPRMOptions`]):
            The option.
    """

    def __init__(self, trainer: Any, options: ImplicitPRMOptions):
        self.trainer, self.options, self.model = trainer, options, trainer.model
        config = copy.deepcopy(self.model.peft_config["default"])
        config.inference_mode, config.modules_to_save, config.bias = False, None, "none"
        config.lora_dropout = 0.0
        config.init_lora_weights = True  # PiSSA and its like would change the base model once more
        with torch.random.fork_rng():  # what is drawn is overwritten, and must not be missing in the policy's run
            self.model.add_adapter(ADAPTER, config)
        self.model.set_adapter("default")
        for name, parameter in self.model.named_parameters():
            if f".{ADAPTER}." in name:
                theirs = self.model.get_parameter(name.replace(f".{ADAPTER}.", ".default."))
                parameter.data = theirs.data.float().clone()
        # DeepSpeed also rounds what it does not train itself, with ZeRO-2 too.
        self._sharded, self._warned = is_sharded(trainer) or trainer.is_deepspeed_enabled, False
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those of the adapter as the model has them now: an engine puts others in their place."""
        settle(self.trainer)
        return {name: p for name, p in self.model.named_parameters() if f".{ADAPTER}." in name}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the parameters, or of whole copies. First asked for in training: the engine is there, and resumed."""
        if self._optimizer is None:
            own, rate = [*self.parameters.values()], self.options.learning_rate
            if self._sharded:
                own = [torch.nn.Parameter(x.to(self.trainer.accelerator.device)) for x in copies(own)]
            rate = self.trainer.args.learning_rate if rate is None else rate
            self._optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
        return self._optimizer

    @property
    def _trained(self) -> list[torch.nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer, and the adapter where checkpoints of an engine hold only that of the policy."""
        weights = {"weights": [p.detach().cpu() for p in self._trained]} if self._sharded else {}
        return {**self.optimizer.state_dict(), **weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._sharded and "weights" not in state:
            raise ValueError(
                f"{_STATE_FILE} of the checkpoint was written by a run on another engine and does not hold the "
                "implicit reward model. Resume with the engine that wrote it."
            )
        for parameter, saved in zip(self._trained, state.get("weights", self._trained), strict=True):
            parameter.data.copy_(saved)
        self._hand_over()
        self.optimizer.load_state_dict({name: state[name] for name in ("state", "param_groups")})

    def _hand_over(self) -> None:
        if self._sharded:
            overwrite([*self.parameters.values()], [p.detach() for p in self._trained])

    def rewards(
        self, output: dict, mask: torch.Tensor, success: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """
        Token rewards of the completions of this process, `(B, T)`, after an update on their outcomes; what to log.

        Args:
            output (`dict`):
                What TRL has scored.
            mask (`torch.Tensor` of shape `(B, T)`):
                Trainable tokens.
            success (`torch.Tensor` of shape `(B,)`):
                1 for a right completion, 0 for a wrong one, NaN for one that was not scored.
        """
        reference = self._logps(output, None)
        metrics = self._update(output, mask, success, reference) if self.model.training else {}
        log_ratios = (self._logps(output, ADAPTER) - reference).where(mask.bool(), 0.0)
        rewards = self.options.beta * log_ratios
        return rewards, {**metrics, **self._agreement(rewards.sum(1), mask, success)}

    def _logps(self, output: dict, adapter: str | None) -> torch.Tensor:
        """Log-probs of the completions under an adapter, or under the base, `(B, T)`, without gradient."""
        if adapter is None and "ref" not in self.model.peft_config and "ref_per_token_logps" in output:
            return output["ref_per_token_logps"]
        with torch.no_grad(), use_adapter(self.model, adapter):
            return torch.cat([self._forward(rows) for rows in self._micro_batches(output)])

    def _micro_batches(self, output: dict) -> list[dict]:
        args = self.trainer.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        parts = zip(*(output[name].split(size) for name in names), strict=True)
        return [dict(zip(names, part, strict=True)) for part in parts]

    def _forward(self, rows: dict) -> torch.Tensor:
        ids, mask = (torch.cat([rows[f"prompt_{x}"], rows[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        count = rows["completion_ids"].size(1)
        logps, *_ = self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, count)
        return logps

    def _update(self, output: dict, mask: torch.Tensor, success: torch.Tensor, reference: torch.Tensor) -> dict:
        """One step on the mean loss over the scored completions of all processes."""
        accelerator, scored = self.trainer.accelerator, ~success.isnan()
        count = accelerator.reduce(scored.sum().float(), reduction="sum").item()
        if count == 0:
            return {}
        total, done = torch.zeros((), device=mask.device), 0
        trained = self._trained
        with torch.enable_grad(), self._reducing(), use_adapter(self.model, ADAPTER):  # backward too: layers run again
            for rows in self._micro_batches(output):
                part = slice(done, done := done + len(rows["completion_ids"]))
                losses = implicit_reward_loss(
                    self._forward(rows) - reference[part], mask[part], success[part].nan_to_num(), self.options.beta
                )
                loss = losses.where(scored[part], 0.0).sum() / count
                loss.backward()
                total += loss.detach()
        every = zip(trained, self.parameters.values(), strict=True)
        for parameter, own in every:  # every process makes the same calls
            gradient, own.grad = own.grad, None
            if isinstance(own, DTensor):  # FSDP2 has averaged it
                gradient = whole(torch.zeros_like(own) if gradient is None else gradient) * accelerator.num_processes
            else:
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                gradient = accelerator.reduce(gradient, reduction="sum")
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(trained, self.options.max_grad_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._hand_over()
        loss = accelerator.reduce(total, reduction="sum").item()
        return {f"{ADAPTER}/loss": loss, f"{ADAPTER}/grad_norm": norm}

    @contextmanager
    def _reducing(self) -> Iterator[None]:
        """FSDP2 averages the gradients of a backward pass inside, also where it accumulates those of the policy."""
        divided = isinstance(self.model, FSDPModule)
        if divided:
            self.model.set_requires_gradient_sync(True)
        try:
            yield
        finally:
            if divided:
                self.model.set_requires_gradient_sync(self.trainer.accelerator.sync_gradients)

    def _agreement(self, sums: torch.Tensor, mask: torch.Tensor, success: torch.Tensor) -> dict[str, float]:
        """How the sums of the token rewards go with the outcomes, over all processes."""
        scored = ~success.isnan()
        right = ((sums > 0) == success.bool()) & scored
        numbers = [right, scored, (sums.abs() > _SATURATED) & scored, sums, mask.bool()]
        totals = torch.stack([x.sum().float() for x in numbers])
        agreeing, known, saturated, reward, tokens = self.trainer.accelerator.reduce(totals, reduction="sum").tolist()
        if saturated > known / 2 and not self._warned:
            self._warned = True
            warn_user(
                f"The implicit process-reward model is certain of {saturated:g} of {known:g} completions (|sum of "
                f"rewards| > {_SATURATED:g}) and hardly learns from them: beta or learning_rate of implicit_prm is "
                "too large."
            )
        found = {f"{ADAPTER}/reward": reward / max(tokens, 1.0)}
        if known:
            found |= {f"{ADAPTER}/accuracy": agreeing / known, f"{ADAPTER}/saturated": saturated / known}
        return found


class WithImplicitPRM:
    """The overrides of GRPO's trainer for the option `implicit_prm`; each is TRL's own where it is off."""

    model: Any
    args: Any
    _metrics: dict
    _scoring: Any
    _prm: ImplicitPRM | None = None

    def _take_over(self, options: Options) -> None:
        if options.implicit_prm is None:
            return
        config = self.model.peft_config.get("default") if is_peft_model(self.model) else None
        if config is None or config.is_prompt_learning or ADAPTER in self.model.peft_config:
            raise ValueError(NEEDS_ADAPTER)
        self._prm = ImplicitPRM(self, ImplicitPRMOptions.of(options.implicit_prm))

    def _extras(self, rollout: Any, output: dict, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """What else the estimator is given, of all processes: arguments of [`Scoring.batch`]. For subclasses."""
        if self._prm is None:
            return {}
        scoring = self._scoring
        returns = scoring.returns(rollout)
        success = (returns > self._prm.options.threshold).double().masked_fill(returns.isnan(), torch.nan)
        own = scoring.local(success, output)
        rewards, metrics = self._prm.rewards(output, mask, own)
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return {"of_tokens": scoring.gathered(rewards)}

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._prm is not None and self.args.should_save:
            torch.save(self._prm.state_dict(), Path(output_dir, _STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self._prm is None or checkpoint is None:
            return
        path = Path(checkpoint, _STATE_FILE)
        if not path.exists():
            warn_user(f"{checkpoint} has no {_STATE_FILE}: the optimizer of the implicit reward model starts anew.")
            return
        self._prm.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
