"""The critic: a linear head on a second adapter of the policy's base model, or on a model of its own."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoModelForTokenClassification
from transformers.utils import logging
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from ...sharded import not_divided, whole
from ..gathering import copies, overwrite

ADAPTER = FOLDER = "critic"
_FILE = "critic.safetensors"


class Critic:
    """
    Values of states: a linear head, in float32, on the last hidden states of `model`.

    Args:
        model (`torch.nn.Module`):
            What the values are computed with.
        head (`torch.nn.Linear`):
            Hidden state → value. It is not a part of what is saved with, or divided like, the model.
    """

    of_policy = False  # whether its parameters are among those of the policy, and therefore in the policy's engine

    def __init__(self, model: Any, head: torch.nn.Linear):
        self.model, self.head = model, head

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What the critic's optimizer trains, in an order that is always the same."""
        raise NotImplementedError

    def active(self) -> AbstractContextManager[None]:
        """Around forward *and* backward: checkpointed layers are computed once more in backward."""
        return nullcontext()

    def shard(self, accelerator: Any) -> None:
        """Divides the critic among the processes as FSDP2 has divided the policy."""

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, count: int) -> torch.Tensor:
        """Values of the last `count` states, `(B, count)`, float32. A state is what follows the token at its place."""
        hidden = self._states(input_ids, attention_mask)[:, -count:]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)

    @contextmanager
    def without_checkpointing(self, kwargs: dict | None) -> Iterator[None]:
        with disable_gradient_checkpointing(self.model, kwargs):
            yield

    def save(self, folder: Path, is_writer: bool) -> None:
        """Writes what [`load`] reads. Entered by all processes; one writes."""
        named = self._of_file()
        weights = dict(zip(named, copies(named.values()), strict=True))
        if is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / _FILE)

    def load(self, folder: Path) -> None:
        self._put(load_file(folder / _FILE), self._of_file())

    def _of_file(self) -> dict[str, torch.nn.Parameter]:
        return self.named_parameters()

    @staticmethod
    def _put(weights: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
        if weights.keys() != into.keys():
            raise ValueError(
                f"The saved critic is another model; these differ: {sorted(weights.keys() ^ into.keys())}."
            )
        overwrite([*into.values()], [weights[name] for name in into])


class AdapterCritic(Critic):
    """
    The adapter `critic` beside the policy's adapter `default`, of which it starts as a copy. PEFT freezes an adapter
    that is not active, so that outside [`active`] optimizer, DDP and gradient norm of the policy do not know it.

    Args:
        model ([`~peft.PeftModel`]):
            Policy, not wrapped.
        device (`torch.device`):
            Where hidden states will be.
    """

    of_policy = True

    def __init__(self, model: Any, device: torch.device):
        config = model.peft_config.get("default")
        if config is None or config.is_prompt_learning:
            kind = "a PEFT model without the adapter 'default'" if config is None else type(config).__name__
            raise ValueError(
                f"The critic is a second adapter of the kind of yours, which {kind} cannot have. Pass value_model, or "
                "use LoRA."
            )
        if ADAPTER in model.peft_config:
            raise ValueError(
                f"The policy has an adapter {ADAPTER!r} already, which is the name of the critic's; rename it, or "
                "pass value_model."
            )
        config = copy.deepcopy(config)
        config.inference_mode, config.modules_to_save, config.bias = False, None, "none"
        config.lora_dropout = 0.0
        config.init_lora_weights = True  # PiSSA and its like would change the base model once more
        size = model.get_base_model().config.get_text_config().hidden_size
        with torch.random.fork_rng():  # what is drawn is overwritten, and must not be missing in the policy's run
            model.add_adapter(ADAPTER, config)
            head = torch.nn.Linear(size, 1, device=device, dtype=torch.float32)
        model.set_adapter("default")
        for name, parameter in model.named_parameters():
            if f".{ADAPTER}." in name:
                theirs = model.get_parameter(name.replace(f".{ADAPTER}.", ".default."))
                parameter.data = theirs.data.float().clone()
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        super().__init__(model, head)
        self._forward = self._backbone

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        adapter = {name: p for name, p in self.model.named_parameters() if f".{ADAPTER}." in name}
        return adapter | {f"head.{name}": p for name, p in self.head.named_parameters()}

    def active(self) -> AbstractContextManager[None]:
        return use_adapter(self.model, ADAPTER)

    def shard(self, accelerator: Any) -> None:
        # The adapter was divided with the policy, whose hooks have to run around whatever calls its layers.
        self.model.critic_states = self._backbone
        register_fsdp_forward_method(self.model, "critic_states")
        self._forward = self.model.critic_states

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self._forward(input_ids, attention_mask)

    def _backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        backbone = self.model.get_base_model().base_model
        return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


class ModelCritic(Critic):
    """
    A token-classification model with one label. Parameters of the head that the checkpoint does not have are zero, so
    that without a reward model the first values are 0.

    Args:
        path (`str`):
            Path or hub id: of the policy, a reward model, or another critic.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the device, and broadcasts the head.
        kwargs:
            For `from_pretrained`.
    """

    def __init__(self, path: str, accelerator: Any, **kwargs: Any):
        model, info = _quietly_loaded(path, **kwargs)
        heads = [(name, m) for name, m in model.named_children() if isinstance(m, torch.nn.Linear)]
        if len(heads) != 1 or model.base_model is model:
            raise ValueError(
                f"value_model {path!r} is a {type(model).__name__}, which has {len(heads)} linear heads; the critic "
                "needs a model with one."
            )
        ((name, head),) = heads
        missing = {key.rpartition(".")[2] for key in info["missing_keys"] if key.startswith(f"{name}.")}
        for part, parameter in head.named_parameters():
            if part in missing:
                torch.nn.init.zeros_(parameter)
        disable_dropout_in_model(model)
        for module in model.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        model.to(accelerator.device).train()
        super().__init__(model, head.float())
        for parameter in head.parameters():  # where one process alone has read the file
            parameter.data = broadcast(parameter.data)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())

    def shard(self, accelerator: Any) -> None:
        fsdp2_prepare_model(accelerator, self.model.base_model)

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        backbone = self.model.base_model
        return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def _of_file(self) -> dict[str, torch.nn.Parameter]:
        """The head, in float32; the rest is saved as transformers does it, to be loaded by anyone."""
        return dict(self.head.named_parameters())

    def save(self, folder: Path, is_writer: bool) -> None:
        super().save(folder, is_writer)
        weights = {name: whole(tensor.detach()) for name, tensor in self.model.state_dict().items()}
        if is_writer:
            self.model.save_pretrained(folder, state_dict=weights)

    def load(self, folder: Path) -> None:
        saved, _ = _quietly_loaded(str(folder), dtype=self.model.base_model.dtype)
        self._put(saved.state_dict(), self.model.state_dict())
        super().load(folder)


def _quietly_loaded(path: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A model with one label, and transformers' report of what was missing, which is not printed: it is expected."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(), not_divided():  # the policy's engine does not know it
            return AutoModelForTokenClassification.from_pretrained(
                path, num_labels=1, output_loading_info=True, **kwargs
            )
    finally:
        logging.set_verbosity(verbosity)
