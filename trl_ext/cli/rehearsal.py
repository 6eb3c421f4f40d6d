"""What `--dry_run` shows: options, model, data, the first prompt as the model sees it, rewards, batch arithmetic."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch

from ..lookup import import_path
from ..trainers.foreign import Options
from ..trainers.grpo.steps import segment, step_texts
from ..trainers.input_checks import require_columns

LIMIT = 1000  # rows that are read where the trainer turns every row into tokens before it trains
SHORT = 64  # tokens of a completion
SAMPLES = 8  # completions
_GENERATES = ("grpo", "ppo", "rloo")
_COLUMNS = {**{command: ["prompt"] for command in (*_GENERATES, "distillation")}, "dpo": ["chosen", "rejected"]}


class Rehearsal:
    """
    Gathers lines while a script goes as far as its first step.

    Args:
        command (`str`):
            Command of `trl-ext`.
        processes (`int`):
            Workers that it would start.
    """

    def __init__(self, command: str, processes: int):
        self.command, self.processes, self.split = command, processes, "train"
        self.lines = [f"Dry run of `trl-ext {command}`: nothing is trained, and nothing is saved.", ""]
        self._rows: int | None = None
        self._first: dict[str, Any] | None = None
        self._output_dir = ""

    def say(self, name: str, text: str) -> None:
        """One line, or several below each other, under a name."""
        head, *rest = text.splitlines() or [""]
        self.lines += [f"{name:<12}{head}", *(f"{'':<12}{line}" for line in rest)]

    def begin(self, config: Any, resume: Any) -> None:
        """What the options are."""
        self._output_dir = config.output_dir
        ours = getattr(config, "options_for_our_trainer", None)
        chosen = {} if ours is None else ours()
        text = ", ".join(f"{name}={value!r}" for name, value in chosen.items()) or "none set: training is TRL's own"
        self.say("Options", f"of trl_ext: {text}")
        if resume:
            self.say("Resume", f"from {resume}")

    # Data

    def opened(self, found: Any) -> Any:
        """What `load_dataset` has opened; its first rows where each would be turned into tokens."""
        train = found
        if isinstance(found, dict):
            if self.split not in found:
                raise ValueError(f"The data set has no split {self.split!r}; it has {sorted(found)}.")
            train = found[self.split]
        self._first = next(iter(train), None)
        if self._first is None:
            raise ValueError(f"The data set has no row in its split {self.split!r}.")
        require_columns(train, "train_dataset", _COLUMNS.get(self.command, []))
        self._rows = len(train) if hasattr(train, "__len__") else None
        known = "a stream" if self._rows is None else f"{self._rows:,} rows"
        if self.command not in _GENERATES:
            known += f", of which the first {LIMIT:,} are read" if (self._rows or math.inf) > LIMIT else ""
            found = _first_rows(found)
        self.say("Data", f"{known}; columns {', '.join(self._first)}")
        self.say("Row 1", "\n".join(f"{name}: {_short(value)}" for name, value in self._first.items()))
        return found

    # The trainer

    def rehearse(self, trainer: Any) -> None:
        """What the trainer makes of them."""
        if self._rows is not None and self._rows <= LIMIT:
            self._rows = len(trainer.train_dataset)  # others where pairs are taken apart, or rows are left out
        self.say("Model", _model(trainer))
        trainer.model.train()
        if self.command in _GENERATES:
            self._sample(trainer)
        else:
            self._show_tokens(trainer)
            self._loss(trainer)
        self.say("Batch", "\n".join(self.batch(trainer)))
        self.lines += ["", f"Ready. Without --dry_run the same command trains, and writes to {self._output_dir}."]

    def _sample(self, trainer: Any) -> None:
        """One batch of short completions, with their rewards and advantages."""
        group = trainer.num_generations
        wanted = min(SAMPLES, trainer.args.generation_batch_size)  # so many does TRL keep for its table
        rows = [*itertools.islice(trainer.train_dataset, max(1, wanted // group))]
        limit = min(trainer.max_completion_length, SHORT)
        trainer.generation_config.max_new_tokens = limit
        output = trainer._generate_and_score_completions([row for row in rows for _ in range(group)])
        tokenizer = getattr(trainer, "_tokenizer", trainer.processing_class)
        prompt = output["prompt_ids"][0][output["prompt_mask"][0].bool()].tolist()
        ids = output["completion_ids"][0][output["completion_mask"][0].bool()].tolist()
        self.say("Prompt 1", f"{len(prompt)} tokens, as the model sees them:\n{tokenizer.decode(prompt)!r}")
        cut_off = f", cut off at {limit} in this dry run" if len(ids) == limit < trainer.max_completion_length else ""
        self.say("Answer 1", f"{len(ids)} tokens{cut_off}, sampled:\n{tokenizer.decode(ids)!r}")
        if (options := Options(trainer.args)).advantage_estimator is not None:
            finder = options.step_ends_function
            cut = segment(ids, None, tokenizer, options.step_separator, import_path(finder) if finder else None)
            where = finder or f"step_separator {options.step_separator!r}"
            self.say("Steps", f"{len(cut)}, cut by {where}:\n{' | '.join(map(repr, step_texts(ids, cut, tokenizer)))}")
        for name, rewards in trainer._logs["rewards"].items():
            self.say("Rewards", f"{name}: {_numbers(rewards)}")
        self.say("Advantages", _numbers(trainer._logs["advantages"]))

    def _show_tokens(self, trainer: Any) -> None:
        """The first row as token ids, read back."""
        row = next(iter(trainer.train_dataset))
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        for name, value in row.items():
            if name.endswith("ids") and value and isinstance(value[0], int):
                self.say("As tokens", f"{name}, {len(value)} tokens:\n{_short(tokenizer.decode(value), 600)}")

    def _loss(self, trainer: Any) -> None:
        """The loss of the first micro-batch, before any update."""
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        self.say("Loss", f"{loss.item():.4g}, of the first micro-batch")

    # Arithmetic

    def batch(self, trainer: Any) -> list[str]:
        """What makes up an optimizer step, and how far the data go."""
        args, processes = trainer.args, self.processes
        accumulation, generated = args.gradient_accumulation_steps, self.command in _GENERATES
        per_step, passes = args.per_device_train_batch_size * processes * accumulation, 1.0
        noun, group = ("completions", trainer.num_generations) if generated else ("rows", 1)
        lines = [
            f"{per_step} {noun} per optimizer step = {args.per_device_train_batch_size} per device × "
            f"{_count(processes, 'process', 'processes')} × {_count(accumulation, 'accumulation step')}"
        ]
        if generated:
            size = args.per_device_train_batch_size * processes * args.steps_per_generation
            passes = args.steps_per_generation * trainer.num_iterations / accumulation
            lines.append(
                f"{size} completions per generation batch = {_count(size // group, 'prompt')} × "
                f"{_count(group, 'generation')}, used for {_count(passes, 'optimizer step')}"
            )
            per_step = size // group
        if self._rows is not None:
            lines.append(_course(args, self._rows, per_step, passes, "prompts" if generated else "rows"))
        return lines


def _course(args: Any, rows: int, per_batch: int, passes: float, noun: str) -> str:
    """How many steps there are, and how many epochs, with `per_batch` rows used for `passes` optimizer steps."""
    if args.max_steps > 0:
        used = args.max_steps / passes * per_batch
        return f"{args.max_steps} optimizer steps use {used:,.0f} of {rows:,} {noun}: {used / rows:.3g} epochs"
    steps = math.floor(rows / per_batch * passes * args.num_train_epochs)
    return f"{args.num_train_epochs:g} epochs of {rows:,} {noun} are about {steps:,} optimizer steps"


def _count(number: float, noun: str, plural: str = "") -> str:
    return f"{number:g} {noun if number == 1 else plural or noun + 's'}"


def _model(trainer: Any) -> str:
    parameters = [*trainer.model.parameters()]
    numbers = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    kind = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    first = parameters[0]
    return f"{kind}, {numbers[0]:,} parameters, {numbers[1]:,} of them trained; {first.dtype} on {first.device}"


def _first_rows(found: Any) -> Any:
    """Each split with its first rows."""
    if isinstance(found, dict):
        return type(found)({name: _first_rows(split) for name, split in found.items()})
    return found.take(min(LIMIT, len(found)) if hasattr(found, "__len__") else LIMIT)


def _short(value: Any, length: int = 160) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


def _numbers(values: Iterable[float | None]) -> str:
    return ", ".join("none" if value is None or math.isnan(value) else f"{value:.3g}" for value in values)
