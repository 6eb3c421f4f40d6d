"""What preference training does to the policy's own samples: the true KL, length and reward, as a callback."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Trainer, TrainerCallback

from ..generation import bare_generation_config, undisturbed
from .taps import overridden


class PolicySamples(TrainerCallback):
    r"""
    Sample completions from the policy during training and log what they are like.

    The log-ratios of the pairs are not a KL: their completions were not sampled from the policy. Here they are, so
    that \\(\mathbb E_{y\sim\pi}[\log\pi(y) - \log\pi_{\mathrm{ref}}(y)]\\) is
    \\(\mathrm{KL}(\pi\|\pi_{\mathrm{ref}})\\) of whole completions. Logged at the first and the last
    step and every `steps` steps:

    | name | meaning |
    |---|---|
    | `policy_samples/kl` | mean over the prompts of that log-ratio, nats |
    | `policy_samples/kl_stderr` | its standard error, nats |
    | `policy_samples/kl_per_token` | its sum over all completions by their tokens, nats |
    | `policy_samples/length` | mean number of tokens, the end of the sequence included |
    | `policy_samples/truncated` | share of completions without an end |
    | `policy_samples/reward` | mean of `reward_func` |

    Does not change the training run. Every process samples the same completions.

    Args:
        trainer ([`DPOTrainer`], *optional*):
            Trainer that the callback is added to. `callback_paths` in the config sets it; in Python:
            `trainer.add_callback(PolicySamples(trainer))`.
        reward_func (`Callable`, *optional*):
            Reward function as TRL's GRPO takes it: keyword arguments `prompts`, `completions`, `completion_ids` and
            the other columns of the data, to a list of numbers.
        steps (`int`, *optional*, defaults to `50`):
            Optimiser steps between two measurements.
        num_prompts (`int`, *optional*, defaults to `64`):
            The first so many prompts of the evaluation data, or without any of the training data.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Length at which a completion is cut; `policy_samples/kl` is then that of the first so many tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
    """

    def __init__(
        self,
        trainer: Any = None,
        reward_func: Callable[..., list[float]] | None = None,
        steps: int = 50,
        num_prompts: int = 64,
        max_new_tokens: int = 128,
        seed: int = 0,
    ):
        self.trainer = trainer
        self.reward_func = reward_func
        self.steps = steps
        self.num_prompts = num_prompts
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self._logged_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer is None:
            raise ValueError("PolicySamples needs its trainer: trainer.add_callback(PolicySamples(trainer)).")
        if trainer.ref_model is None and not is_peft_model(trainer.accelerator.unwrap_model(trainer.model)):
            raise ValueError(
                "PolicySamples needs the reference during training; without an adapter neither "
                "precompute_ref_log_probs nor a loss without reference keeps it. Pass ref_model, or remove the "
                "callback."
            )
        self._log(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self._log(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._log(state)

    def _log(self, state):
        if self._logged_at != state.global_step:
            self._logged_at = state.global_step
            control = self.trainer.control
            due = control.should_log
            # Not the trainer's own `log`, which would flush the averages of the current logging period.
            Trainer.log(self.trainer, self.measure())
            control.should_log = due  # logging clears it, and the training metrics of this step would never be logged

    @property
    def _tokenizer(self):
        return getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The numbers of the table above, now."""
        trainer = self.trainer
        data = trainer.eval_dataset or trainer.train_dataset
        if isinstance(data, dict):
            data = next(iter(data.values()))
        rows = list(itertools.islice(data, self.num_prompts))
        size = 2 * trainer.args.per_device_eval_batch_size
        log_ratios, completions = [], []
        # `ld_alpha` weighs no sample
        with overridden(trainer, ld_alpha=None), undisturbed(trainer.model, trainer.accelerator.device, self.seed):
            for start in range(0, len(rows), size):
                prompts = [row["prompt_ids"] for row in rows[start : start + size]]
                batch = self._sample(prompts)
                log_ratios.append(self._log_ratios(prompts, batch))
                completions += batch
        return self._summary(rows, completions, torch.cat(log_ratios).double())

    def _summary(self, rows, completions, log_ratios) -> dict[str, float]:
        count = len(completions)
        tokenizer = self._tokenizer
        metrics = {
            "policy_samples/kl": log_ratios.mean().item(),
            "policy_samples/kl_stderr": log_ratios.std().item() / math.sqrt(count) if count > 1 else math.nan,
            "policy_samples/kl_per_token": log_ratios.sum().item() / sum(map(len, completions)),
            "policy_samples/length": sum(map(len, completions)) / count,
            "policy_samples/truncated": sum(ids[-1] != tokenizer.eos_token_id for ids in completions) / count,
        }
        if self.reward_func is not None:
            columns = {name: [row[name] for row in rows] for name in rows[0] if not name.endswith("_ids")}
            prompts = columns.pop("prompt")
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            if not isinstance(prompts[0], str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            rewards = self.reward_func(prompts=prompts, completions=texts, completion_ids=completions, **columns)
            metrics["policy_samples/reward"] = sum(rewards) / count
        return metrics

    def _sample(self, prompts: list[list[int]]) -> list[list[int]]:
        """One completion per prompt, from the whole distribution of the policy at temperature 1 and nothing else."""
        trainer = self.trainer
        end, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        device = trainer.accelerator.device
        ids = [torch.tensor(prompt) for prompt in prompts]
        mask = [torch.ones_like(row) for row in ids]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left").to(device)
        attention_mask = pad_sequence(mask, batch_first=True, padding_side="left").to(device)
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=end,
            pad_token_id=pad,
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer.accelerator.autocast(), bare_generation_config(model):
            output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
        completions = output[:, input_ids.size(1) :].tolist()
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions]

    def _log_ratios(self, prompts, completions) -> torch.Tensor:
        """log π − log π_ref of each completion, nats, `(B,)`."""
        trainer = self.trainer
        device = trainer.accelerator.device
        pairs = list(zip(prompts, completions, strict=True))
        ids = [torch.tensor(prompt + completion) for prompt, completion in pairs]
        scored = [torch.tensor([0] * len(prompt) + [1] * len(completion)) for prompt, completion in pairs]
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id).to(device),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
        }
        mask = pad_sequence(scored, batch_first=True).to(device)
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        with trainer.accelerator.autocast():
            logps = trainer.model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(1)
        reference = trainer.compute_ref_log_probs(
            trainer.ref_model or trainer.model, {**inputs, "completion_mask": mask}
        )
        return (logps - torch.cat(reference)).cpu()
