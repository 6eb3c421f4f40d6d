"""A reference that follows the policy: refreshed from it between two batches, with an adapter as well as without."""

import copy
import inspect
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl.trainer.utils import use_adapter

from ..upstream import trl_class
from .foreign import Options
from .gathering import copies, is_sharded, load_whole, mix, overwrite, save_whole, settle
from .reference import FILE
from .reference_checks import ADAPTER, check_policy, refreshes

STATE_FILE = "reference.json"


class Reference:
    """
    Parameters that a reference is made of, and the first policy.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer after TRL's construction.
        keeps_first (`bool`):
            Whether the policy of now is kept, in main memory, to be read with [`of_first`].
    """

    def __init__(self, trainer: Any, keeps_first: bool):
        self.trainer = trainer
        policy = [policy for policy, _ in self.pairs()]
        self._first = [*copies(policy)] if keeps_first else None

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """Each parameter of the policy that is copied, and the reference's in its place."""
        raise NotImplementedError

    def refresh(self, alpha: float) -> None:
        """reference ← (1 − alpha) · reference + alpha · policy."""
        settle(self.trainer)
        policy, reference = map(list, zip(*self.pairs(), strict=True))
        mix(policy, reference, alpha)

    def save(self, folder: Path) -> None:
        """Writes what of the reference the `Trainer` does not. Entered by all processes alike."""

    def load(self, folder: Path) -> None:
        """The counterpart."""

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Gives the model to call for the reference's log-probs."""
        raise NotImplementedError

    @contextmanager
    def of_first(self) -> Iterator[Any]:
        """As [`active`], with the first policy in the reference's place until the end of the block."""
        self._exchange()
        try:
            with self.active() as model:
                yield model
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        assert self._first is not None
        settle(self.trainer)
        reference = [reference for _, reference in self.pairs()]
        now = [*copies(reference)]
        overwrite(reference, self._first)
        self._first = now


class AdapterReference(Reference):
    """
    The adapter `ref` beside the policy's `default`, frozen, of which it starts as a copy. TRL reads the reference's
    log-probs with an adapter of that name where there is one, else from the base model alone, which is not the first
    policy where an adapter was given, or where its initialisation changes the base (PiSSA, OLoRA).
    """

    def __init__(self, trainer: Any, keeps_first: bool):
        model = self._model = trainer.accelerator.unwrap_model(trainer.model)
        if ADAPTER in model.peft_config:  # TRL's copy of an adapter that was given: with dropout, in 4-bit not rounded
            model.delete_adapter(ADAPTER)
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        for name, value in {"lora_dropout": 0.0, "init_lora_weights": True}.items():
            if hasattr(config, name):  # PiSSA and its like would change the base model once more
                setattr(config, name, value)
        with torch.random.fork_rng():  # what is drawn is overwritten, and must not be missing elsewhere
            model.add_adapter(ADAPTER, config)
        model.set_adapter("default")
        for policy, reference in self.pairs():
            reference.requires_grad_(False)
            reference.data = policy.detach().clone()
        super().__init__(trainer, keeps_first)

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        named = dict(self._model.named_parameters())
        of_policy = {name: name.split(".") for name in named if "default" in name.split(".")}
        twins = {name: ".".join(ADAPTER if x == "default" else x for x in parts) for name, parts in of_policy.items()}
        return [(named[name], named[twin]) for name, twin in twins.items()]

    def save(self, folder: Path) -> None:
        if is_sharded(self.trainer):  # of a divided model, the adapter that is trained is saved alone
            weights = {str(i): kept for i, kept in enumerate(copies([r for _, r in self.pairs()]))}
            if self.trainer.args.should_save:
                save_file(weights, folder / FILE)

    def load(self, folder: Path) -> None:
        if is_sharded(self.trainer):
            if not (folder / FILE).exists():
                raise ValueError(
                    f"{folder} was written by a run on another engine and does not hold the reference in {FILE}. "
                    "Resume with the engine that wrote it."
                )
            settle(self.trainer)
            weights, references = load_file(folder / FILE), [reference for _, reference in self.pairs()]
            overwrite(references, [weights[str(i)] for i in range(len(references))])

    @contextmanager
    def active(self) -> Iterator[Any]:
        with use_adapter(self._model, ADAPTER):
            yield self.trainer.model


class ModelReference(Reference):
    """The model that TRL keeps as the reference beside a policy without an adapter."""

    def __init__(self, trainer: Any, keeps_first: bool):
        unwrap = trainer.accelerator.unwrap_model
        self._model, self._reference = unwrap(trainer.model), unwrap(trainer.ref_model)
        whole = [[getattr(p, "ds_shape", p.shape) for p in m.parameters()] for m in (self._model, self._reference)]
        if whole[0] != whole[1]:
            raise ValueError(
                "ref_refresh_* copies the policy into the reference, but ref_model has other parameters than the "
                "policy. Pass a model of the policy's architecture, or none."
            )
        super().__init__(trainer, keeps_first)

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        return [*zip(self._model.parameters(), self._reference.parameters(), strict=True)]

    def save(self, folder: Path) -> None:
        save_whole(self.trainer, self._reference, folder / FILE)

    def load(self, folder: Path) -> None:
        load_whole(self.trainer, self._reference, folder / FILE)

    @contextmanager
    def active(self) -> Iterator[Any]:
        yield self.trainer.ref_model


class MovingReference:
    """
    When the reference is refreshed, and what goes on from one refresh to the next.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer after TRL's construction.
        options ([`Options`]):
            Its config, with `ref_refresh_steps` or `ref_refresh_kl` set.
        samples (`bool`):
            Whether it trains on samples of the policy.
    """

    def __init__(self, trainer: Any, options: Options, samples: bool):
        self.trainer, self.steps, self.kl = trainer, options.ref_refresh_steps, options.ref_refresh_kl
        self.alpha = 1.0 if options.ref_refresh_alpha is None else options.ref_refresh_alpha
        self.empties_optimizer = bool(options.ref_refresh_optimizer)
        adapter, total = is_peft_model(trainer.model), options.ref_total_kl
        self.measures_total: bool = adapter and samples if total is None else total
        self.reference = (AdapterReference if adapter else ModelReference)(trainer, self.measures_total)
        self.last_step, self.refreshes = 0, 0
        self.kls: list[float] = []  # as logged since the last generation batch began
        self._kl_is_logged = False

    def refresh_if_due(self) -> None:
        """Called where everything that the reference says of the next batch is still to be computed."""
        step, kls, self.kls = self.trainer.state.global_step, self.kls, []
        since = step - self.last_step
        enough = self.steps is not None and since >= self.steps
        too_far = self.kl is not None and len(kls) > 0 and sum(kls) / len(kls) > self.kl
        if since > 0 and (enough or too_far):
            self.reference.refresh(self.alpha)
            if self.empties_optimizer:
                self.trainer.optimizer.state.clear()
            self.last_step, self.refreshes = step, self.refreshes + 1

    def observe(self, kls: list[float]) -> None:
        """What a training step has logged as `kl`; the first begins with a generation batch and ends with a loss."""
        self.kls += kls
        self._kl_is_logged |= bool(kls)
        if self.kl is not None and not self._kl_is_logged:
            raise ValueError(
                f"ref_refresh_kl reads the metric 'kl', which {type(self.trainer).__name__} does not log. Use "
                "ref_refresh_steps."
            )

    def log(self) -> None:
        """The state after an optimizer step; one value each, so that TRL's mean over a log interval is the last."""
        metrics = self.trainer._metrics["train"]
        metrics["ref/refreshes"] = [float(self.refreshes)]
        metrics["ref/age"] = [float(self.trainer.state.global_step - self.last_step)]

    # In checkpoints

    def save(self, folder: Path) -> None:
        self.reference.save(folder)
        if self.trainer.args.should_save:
            state = {"last_step": self.last_step, "refreshes": self.refreshes, "kls": self.kls}
            (folder / STATE_FILE).write_text(json.dumps(state))

    def load(self, checkpoint: str | os.PathLike) -> None:
        path = Path(checkpoint, STATE_FILE)
        if path.exists():
            vars(self).update(json.loads(path.read_text()))
            self.reference.load(path.parent)
        else:
            self.last_step = self.trainer.state.global_step
            warnings.warn(
                f"{checkpoint} has no {STATE_FILE}, as it was written without ref_refresh_*: the run goes on with its "
                "own first reference, and counts from here.",
                stacklevel=3,
            )


class _Steps(TrainerCallback):
    """Tells a [`MovingReference`] of the ends of optimizer steps; and of their starts, if it is refreshed there."""

    def __init__(self, moving: MovingReference, refreshes: bool):
        self._moving, self._refreshes = moving, refreshes

    def on_train_begin(self, args, state, *others, **kwargs):
        # a second call of `train` counts from 0
        self._moving.last_step = min(self._moving.last_step, state.global_step)

    def on_step_begin(self, *args, **kwargs):
        if self._refreshes:
            self._moving.refresh_if_due()

    def on_step_end(self, *args, **kwargs):
        self._moving.log()


class MovesReference:
    """
    Gives a trainer the object that moves its reference, where the options ask for one. A trainer on samples of the
    policy says itself when a batch of them begins; others refresh at the start of an optimizer step. Stands before
    TRL's trainer among the bases.
    """

    _moving: MovingReference | None = None  # None: the reference is TRL's
    _samples = False

    def __init__(self, *args, **kwargs):
        given = inspect.signature(trl_class(type(self)).__init__).bind_partial(self, *args, **kwargs).arguments
        options = Options(given.get("args"))
        if refreshes(options):
            check_policy(options, given)
        super().__init__(*args, **kwargs)
        if refreshes(options):
            self._moving = MovingReference(self, options, self._samples)
            self.add_callback(_Steps(self._moving, refreshes=not self._samples))  # type: ignore[attr-defined]
