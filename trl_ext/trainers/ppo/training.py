"""The critic's own optimizer, schedule, clipping and all-reduce."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from ...sharded import parted, whole
from ..gathering import copies, overwrite
from .critic import Critic


class CriticTraining:
    """
    Trains a critic beside the policy: the same kind of optimizer and schedule, another learning rate.

    Args:
        critic ([`Critic`]):
            Critic, sharded if it will be.
        trainer ([`~transformers.Trainer`]):
            Says which optimizer.
        learning_rate (`float`):
            The critic's.
    """

    def __init__(self, critic: Critic, trainer: Any, learning_rate: float):
        self.critic, self.args, self.accelerator = critic, trainer.args, trainer.accelerator
        cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
        # Matrices decay. What FSDP has divided and what it has not cannot stand in one group.
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        parameters = [*critic.named_parameters().values()]
        self._copied: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # what is trained → where it is read
        if critic.of_policy and trainer.is_deepspeed_enabled:  # which holds them in parts, or rounded
            whole_ones = (torch.nn.Parameter(copy.to(self.accelerator.device)) for copy in copies(parameters))
            self._copied = dict(zip(whole_ones, parameters, strict=True))
            parameters = [*self._copied]
        for parameter in parameters:
            groups.setdefault((parameter.dim() > 1, isinstance(parameter, DTensor)), []).append(parameter)
        decay = trainer.args.weight_decay
        given = [
            {"params": params, "weight_decay": decay if matrix else 0.0} for (matrix, _), params in groups.items()
        ]
        self.optimizer = cls(given, **{**options, "lr": learning_rate})
        self.parameters = [parameter for params in groups.values() for parameter in params]
        self.scheduler: Any = None

    def start(self, num_training_steps: int) -> None:
        """A schedule for one call of `train`."""
        args = self.args
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

    def step(self) -> dict[str, float]:
        """Averages the gradients over the processes, clips, steps; what to log."""
        gradients = [self._averaged(parameter) for parameter in self.parameters]
        norm = self._clip(gradients)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self._hand_over()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"value/grad_norm": norm, "value/lr": rate}

    def _averaged(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The gradient of all processes. One without a gradient gets 0: every process makes the same calls."""
        read = self._copied.get(parameter, parameter)
        gradient = torch.zeros_like(parameter) if read.grad is None else read.grad.to(parameter.dtype)
        read.grad = None
        if self.accelerator.num_processes > 1 and not isinstance(parameter, DTensor):
            gradient = self.accelerator.reduce(gradient, reduction="mean")
        parameter.grad = gradient
        return gradient

    def _hand_over(self) -> None:
        if self._copied:
            overwrite([*self._copied.values()], [copy.detach() for copy in self._copied])

    def _clip(self, gradients: list[torch.Tensor]) -> float:
        """The norm of all gradients together, before they are scaled to at most `max_grad_norm`."""
        kinds = [[g for g in gradients if isinstance(g, DTensor) == divided] for divided in (False, True)]
        norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
        norm = torch.stack(norms).norm().item()
        limit = self.args.max_grad_norm
        if limit and norm > limit > 0:
            for gradient in gradients:
                gradient.mul_(limit / (norm + 1e-6))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Entered by all processes alike; the same on each."""
        optimizer = self.optimizer.state_dict()
        state = {
            index: {name: whole(x) if isinstance(x, torch.Tensor) else x for name, x in entries.items()}
            for index, entries in optimizer["state"].items()
        }
        copied = {"copies": [copy.detach().cpu() for copy in self._copied]} if self._copied else {}
        return {"optimizer": {**optimizer, "state": state}, "scheduler": self.scheduler.state_dict(), **copied}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        optimizer = state["optimizer"]
        divided = {index: p for index, p in enumerate(self.parameters) if isinstance(p, DTensor)}
        for index, parameter in divided.items():
            entries = optimizer["state"].get(index, {})
            for name, x in entries.items():
                if isinstance(x, torch.Tensor) and x.shape == parameter.shape:
                    entries[name] = parted(x, parameter)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        for copy, saved in zip(self._copied, state.get("copies", []), strict=bool(self._copied)):
            copy.data.copy_(saved)
        self._hand_over()
