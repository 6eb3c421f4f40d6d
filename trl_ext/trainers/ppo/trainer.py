"""PPO: our GRPO trainer, whose advantages come from a critic that is trained beside the policy."""

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import ProcessorMixin
from trl.trainer.utils import get_config_model_id

from ...functional.reductions import aggregated
from ...functional.rewards import RewardBatch, reward_at_end
from ...functional.values import clipped_value_loss, lambda_returns
from ...upstream import trl_class
from ..foreign import Options
from ..gathering import settle
from ..grpo.scoring import Rollout, Scoring
from ..grpo.trainer import GRPOTrainer
from .config import PPOConfig as PPOConfig
from .critic import FOLDER, AdapterCritic, Critic, ModelCritic
from .training import CriticTraining

_STATE_FILE = "critic_training.pt"
_SCORE, _LOSS = "_generate_and_score_completions", "_compute_loss"


class ValueScoring(Scoring):
    """`Scoring` with the fields of [`PPOConfig`] as options of the estimator."""

    def __init__(self, trainer: Any, options: Options, base: type):
        super().__init__(trainer, options, base)
        taken = ("gamma", "lam", "whiten_advantages", "whiten_rewards")
        self._kwargs = {name: getattr(options, name) for name in taken}

    def batch(  # type: ignore[override]
        self, rollout: Rollout, local_mask: torch.Tensor, num_generations: int, *, truncated: torch.Tensor, **extras
    ) -> RewardBatch:
        """As the parent's; `truncated`, `(N,)`, says which completions were cut off."""
        batch = super().batch(rollout, local_mask, num_generations, **extras)
        if self.options.missing_eos_penalty is not None:
            penalty, _ = reward_at_end(-self.options.missing_eos_penalty * truncated.to(batch.outcome), batch.mask)
            batch = dataclasses.replace(batch, outcome=batch.outcome + penalty.where(batch.scorable[:, None], 0.0))
            rollout.batch = batch
        return batch

    def targets(self, batch: RewardBatch) -> torch.Tensor:
        """What the critic learns from a batch, `(N, T)`."""
        options, lam = self.options, self.options.critic_lam
        return lambda_returns(
            batch,
            gamma=options.gamma,
            lam=options.lam if lam is None else lam,
            whiten_rewards=options.whiten_rewards,
        )


class PPOTrainer(GRPOTrainer):
    """
    [`GRPOTrainer`] with a critic: data, rewards, tools, vLLM, KL, PEFT and resuming are inherited. Takes the same
    arguments, with a [`PPOConfig`].

    The critic has its own parameters, backward, optimizer, clipping and all-reduce; given the advantages, the policy's
    training is that of `GRPOTrainer`, bit for bit. Logged in addition: `value/loss` and `value/clipped` (share of the
    tokens whose value has moved by more than `cliprange_value`), means over trainable tokens; `value/grad_norm` before
    clipping, `value/lr`; `value/mean`, `value/return_mean` and `value/explained_variance`, see
    [`~trl_ext.functional.values.value_metrics`].
    """

    critic: Critic
    _training: CriticTraining | None = None  # of the critic; None before `train`

    def __init__(self, *args, **kwargs):
        given = inspect.signature(trl_class(GRPOTrainer).__init__).bind(self, *args, **kwargs).arguments
        del given["self"]
        given["args"] = given.get("args") or self._default_args(given["model"])
        if not isinstance(given["args"], PPOConfig):
            raise ValueError(f"PPOTrainer needs a PPOConfig, got {type(given['args']).__name__}.")
        self._options = Options(given["args"])
        super().__init__(**given)
        self._refuse_engines_and_images()
        self.critic = self._make_critic()

    @staticmethod
    def _default_args(model: Any) -> PPOConfig:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return PPOConfig(f"{name.split('/')[-1]}-PPO")

    def _refuse_engines_and_images(self):
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("The critic reads text only; use GRPOTrainer with a group or batch estimator for images.")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("The critic is sharded by FSDP2 only; set fsdp_version: 2, or use DDP.")

    def _make_critic(self) -> Critic:
        options, policy = self._options, self.model
        if is_peft_model(policy) and options.value_model is None:
            return AdapterCritic(policy, self.accelerator.device)
        kwargs = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
        path = options.value_model or get_config_model_id(policy.config)
        critic = ModelCritic(path, self.accelerator, trust_remote_code=self.args.trust_remote_code, **kwargs)
        sizes = [model.get_input_embeddings().num_embeddings for model in (critic.model, policy)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"value_model {path!r} has {sizes[0]} tokens, the policy {sizes[1]}: the critic reads the policy's "
                "tokens."
            )
        if self.args.gradient_checkpointing:
            critic.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        return critic

    def _take_over(self, options: Options):
        self.critic = None  # type: ignore[assignment]
        super()._take_over(options)
        self._scoring = ValueScoring(self, options, GRPOTrainer)
        self._needed.add(_LOSS, "the critic of PPOTrainer")

    # One generation batch

    def _replace_advantages(self, scoring, rollout, output):
        super()._replace_advantages(scoring, rollout, output)
        batch = rollout.batch
        output["old_values"] = scoring.local(batch.values[:, :-1], output)
        output["returns"] = scoring.local(scoring.targets(batch), output)
        output["value_mask"] = scoring.local(batch.trainable, output).bool()

    def _extras(self, rollout, output, mask):
        """Values of all processes, in the last column those of cut-off completions; and which these are."""
        gathered, values = self._scoring.gathered, self._old_values(output)  # type: ignore[union-attr]
        length = output["completion_mask"].sum(1, keepdim=True)
        last = output["completion_ids"].gather(1, (length - 1).clamp(min=0))
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
        truncated = (length == 0) | ~torch.isin(last, ends)
        end = values.gather(1, length).where(truncated & bool(self._options.bootstrap_truncated), 0.0)
        whole = torch.cat([gathered(values[:, :-1].contiguous()), gathered(end)], dim=1)
        return {"values": whole, "truncated": gathered(truncated)[:, 0]}

    @torch.no_grad()
    def _old_values(self, output: dict) -> torch.Tensor:
        """Values of the states before each token and of the one after the last, `(B, T + 1)`."""
        args, critic = self.args, self.critic
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        ids, mask, count = _critic_inputs(output)
        kwargs = args.gradient_checkpointing_kwargs
        with critic.active(), critic.without_checkpointing(kwargs), self.accelerator.autocast():
            parts = zip(ids.split(size), mask.split(size), strict=True)
            return torch.cat([critic.values(*part, count) for part in parts])

    # The loss

    def _compute_loss(self, model, inputs):
        self._train_critic(inputs)  # first: its gradients are gone when the policy's are clipped
        return super()._compute_loss(model, inputs)

    def _train_critic(self, inputs: dict):
        """Loss and gradient of the critic, and, at the end of an accumulation window, its step."""
        training, cliprange = self.model.training, self._options.cliprange_value
        old, learns = inputs["old_values"], inputs["value_mask"]
        with self.critic.active():
            with self.accelerator.autocast():
                ids, mask, count = _critic_inputs(inputs)
                values = self.critic.values(ids, mask, count)[:, :-1].where(learns, 0.0)
            per_token = clipped_value_loss(values, old, inputs["returns"], cliprange).where(learns, 0.0)
            loss = self._aggregated(per_token, inputs)
            if training:
                loss.backward()
                settle(self)
        moved = ((values - old).abs() > cliprange) & learns if cliprange is not None else torch.zeros_like(learns)
        sums = torch.stack([x.detach().sum().float() for x in (per_token, moved, learns)])
        total, clipped, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics[self._mode]
        metrics["value/loss"].append(total / max(count, 1.0))
        if cliprange is not None:
            metrics["value/clipped"].append(clipped / max(count, 1.0))
        if training and self.accelerator.sync_gradients:
            for name, value in self._training.step().items():  # type: ignore[union-attr]
                metrics[name].append(value)

    def _aggregated(self, per_token: torch.Tensor, inputs: dict) -> torch.Tensor:
        """One loss per token as one number, as TRL does it for the policy's."""
        training = self.model.training
        return aggregated(
            per_token,
            inputs["completion_mask"] * inputs.get("tool_mask", 1),
            self.loss_type,
            num_items=inputs["num_items_in_batch"],
            max_completion_length=self.max_completion_length,
            num_processes=self.accelerator.num_processes,
            accumulation=self.current_gradient_accumulation_steps if training else 1,
            steps_per_generation=self.args.steps_per_generation if training else 1,
        )

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step < self._options.critic_warmup_steps:
            for parameter in self.model.parameters():
                parameter.grad = None  # not 0, with which AdamW would decay the weights and count moments
        return loss

    def create_scheduler(self, num_training_steps, *args, **kwargs):
        """The policy has been prepared, and divided, when this is called."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self._training is None:
            if self.is_fsdp_enabled:
                self.critic.shard(self.accelerator)
            rate = self._options.critic_learning_rate
            self._training = CriticTraining(self.critic, self, 10 * self.args.learning_rate if rate is None else rate)
        self._training.start(num_training_steps)
        return scheduler

    # Interruptions

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        self.critic.save(Path(output_dir or self.args.output_dir, FOLDER), self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._training.state_dict()  # type: ignore[union-attr]
        if self.args.should_save:
            torch.save(state, Path(output_dir, FOLDER, _STATE_FILE))

    @staticmethod
    def _critic_in(checkpoint) -> Path:
        folder = Path(checkpoint, FOLDER)
        if not folder.is_dir():
            raise ValueError(
                f"{checkpoint} holds no critic: PPOTrainer did not write it. To start from its policy, give it as the "
                "model."
            )
        return folder

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = self._critic_in(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.critic.load(folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:  # which reads the policy by itself
            self.critic.load(self._critic_in(checkpoint))
        path = Path(checkpoint, FOLDER, _STATE_FILE)
        if path.exists():
            self._training.load_state_dict(  # type: ignore[union-attr]
                torch.load(path, map_location="cpu", weights_only=True)
            )
        else:
            warnings.warn(f"{path} does not exist; the critic's optimizer starts anew.", stacklevel=2)


def _critic_inputs(batch: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and attention mask of prompts and completions, and the number of states to value."""
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    return ids, mask, batch["completion_ids"].size(1) + 1
