"""The reward that a preference-trained policy implies, as a reward function."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import selective_log_softmax, use_adapter


class ImplicitReward:
    r"""
    Implicit reward of completions, \\(\beta\,(\log\pi - \log\pi_{\mathrm{ref}})\\), per sequence and per token.

    It leaves out \\(\beta\log Z(x)\\), which depends on the prompt: completions of one prompt can be compared by it,
    those of different prompts cannot. Of the two completions of a pair it is what TRL logs as
    `rewards/chosen` and `rewards/rejected`.

    An instance is a reward function for TRL's trainers: it takes `prompts` and `completions`, plain or conversational,
    and scores the tokens in `completion_ids` if the trainer gives them.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template if prompts are conversational.
        beta (`float`):
            Unit of the reward, per nat.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference. `None`: of a PEFT model its adapter `"ref"`, or without one the base model.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions per forward pass.

    Raises:
        `ValueError`: If there is no reference.
    """

    def __init__(self, model: Any, processing_class: Any, beta: float, ref_model: Any = None, batch_size: int = 16):
        if ref_model is None and not is_peft_model(model):
            raise ValueError("The implicit reward needs a reference: pass ref_model, or a PEFT model as model.")
        self.model = model
        self.ref_model = ref_model
        self.processing_class = processing_class
        self.beta = beta
        self.batch_size = batch_size
        self.__name__ = "implicit_reward"  # under which TRL logs it

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float]:
        """Reward of each completion: the sum of [`per_token`]."""
        return [rewards.sum().item() for rewards in self.per_token(prompts, completions, completion_ids)]

    @torch.no_grad()
    def per_token(
        self, prompts: list, completions: list, completion_ids: list[list[int]] | None = None
    ) -> list[torch.Tensor]:
        """
        Reward of each token of each completion.

        Args:
            prompts, completions (`list`):
                Plain strings or conversations. A plain completion is taken to be finished: the end-of-sequence token
                is scored too, as in DPO training.
            completion_ids (`list[list[int]]`, *optional*):
                Tokens of the completions, where they are known.

        Returns:
            `list[torch.Tensor]`: One tensor per completion, of shape `(tokens,)`, float32, on the CPU.
        """
        if completion_ids is None:
            rows = [self._tokens(*texts) for texts in zip(prompts, completions, strict=True)]
        else:
            rows = [(self._prompt_ids(prompt), list(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        rewards: list[torch.Tensor] = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            with _in_eval_mode(self.model):
                policy = self._log_probs(self.model, batch)
            if self.ref_model is not None:
                with _in_eval_mode(self.ref_model):
                    reference = self._log_probs(self.ref_model, batch)
            else:
                adapter = "ref" if "ref" in self.model.peft_config else None
                with _in_eval_mode(self.model), use_adapter(self.model, adapter):
                    reference = self._log_probs(self.model, batch)
            rewards += [self.beta * (p - r) for p, r in zip(policy, reference, strict=True)]
        return rewards

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.processing_class(prompt)["input_ids"]
        return self.processing_class.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]

    def _tokens(self, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        """Prompt and completion as DPO training tokenises them: together, then cut where the prompt ends."""
        if isinstance(prompt, str):
            end = self.processing_class.eos_token
            text = prompt + completion + ("" if completion.endswith(end) else end)
            ids = self.processing_class(text)["input_ids"]
        else:
            ids = self.processing_class.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
        cut = 0
        for a, b in zip(self._prompt_ids(prompt), ids, strict=False):
            if a != b:
                break
            cut += 1
        return ids[:cut], ids[cut:]

    def _log_probs(self, model: Any, batch: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        ids = [torch.tensor(prompt + completion) for prompt, completion in batch]
        input_ids = pad_sequence(ids, batch_first=True).to(model.device)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(model.device)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        per_token_logps = selective_log_softmax(logits.float(), input_ids[:, 1:]).cpu()
        ends = [(len(prompt), len(prompt) + len(completion)) for prompt, completion in batch]
        return [row[max(start - 1, 0) : end - 1] for row, (start, end) in zip(per_token_logps, ends, strict=True)]


@contextlib.contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
