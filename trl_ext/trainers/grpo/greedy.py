"""
A greedy answer to each prompt of a generation batch, for estimators whose baseline is its reward.

The answers leave no trace: neither in the random state, so that the samples are those of a run without them, nor in
the metrics, the logs, the completions table and the count of tokens, which are about the samples.
"""

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from ...upstream import UpstreamChanged
from ..foreign import overriding_class, without_super

# One answer, whose every token is the likeliest. The model's own settings would fill in what is left out.
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "min_p": None}


class Answers(NamedTuple):
    """Return, float64, NaN where not scored, and length of the greedy answer to the prompt of each row, `(N,)`."""

    returns: torch.Tensor
    lengths: torch.Tensor


class Greedy:
    """The innermost override of TRL's generation, so that a subclass that sets its own sampling cannot undo it."""

    model: Any
    num_generations: int
    num_generations_eval: int
    _greedy: "GreedyBaseline | None" = None  # while it asks for answers; else the samples are TRL's own

    @property
    def _group_size(self) -> int:
        """Completions per prompt, in training or evaluation."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _generate_single_turn(self, *args, **kwargs):
        with nullcontext() if self._greedy is None else self._greedy.decoding():
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]


class GreedyBaseline:
    """
    Asks the policy of a trainer for greedy answers, and has them scored.

    Args:
        trainer ([`Greedy`]):
            Trainer after its construction.
        base (`type`):
            Our trainer class, whose methods a subclass may override.
        option (`str`):
            What needs the answers, in the words of a sentence.
    """

    def __init__(self, trainer: Any, base: type, option: str):
        self.trainer, self.base, self.option = trainer, base, option
        self._decoded = False  # whether TRL's generation was reached

    def answers(self, inputs: list, prompts: list, scored: Callable) -> Answers:
        """
        The answers to the prompts of all processes.

        Args:
            inputs, prompts (`list`):
                Rows of the data, and their prompts, of this process.
            scored (`Callable`):
                Function of rows, prompts and what `_generate` returned for them to their returns, of all processes.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        asked, places = layout(len(prompts), trainer._group_size, accelerator.num_processes)
        own = asked[accelerator.process_index]
        inputs, prompts = [inputs[i] for i in own], [prompts[i] for i in own]
        with self._without_trace():
            self._decoded = False
            generated = trainer._generate(prompts)
            self._check_decoded()
            returns = scored(inputs, prompts, generated)
            lengths = accelerator.gather(torch.tensor([len(ids) for ids in generated[1]], device=accelerator.device))
        return Answers(returns[places], lengths[places])

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        """With scratch copies of what TRL notes of a batch, one answer per prompt, and the random state put back."""
        trainer, device = self.trainer, self.trainer.accelerator.device
        scratch: dict[str, Any] = {
            "_metrics": {mode: defaultdict(list) for mode in trainer._metrics},
            "_logs": {k: defaultdict(deque) if isinstance(v, dict) else deque() for k, v in trainer._logs.items()},
            "_pending_extra_logs": defaultdict(list),
            "_pending_metrics": defaultdict(list),
        }
        with (
            _replaced(trainer, num_generations=1, num_generations_eval=1, _greedy=self, **scratch),
            _replaced(trainer.state, num_input_tokens_seen=trainer.state.num_input_tokens_seen),
            torch.random.fork_rng([device] if device.type == "cuda" else []),  # dropout draws; so may rewards
        ):
            yield

    def _check_decoded(self) -> None:
        """A subclass that generates in a way of its own would sample what should be greedy."""
        if self._decoded:
            return
        for method in ("_generate_single_turn", "_generate"):
            if overriding_class(self.trainer, self.base, method) is not None:
                raise without_super(self.trainer, self.base, method, self.option)
        raise UpstreamChanged("_generate does not call _generate_single_turn")

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around TRL's generation of one turn."""
        trainer, self._decoded = self.trainer, True
        if trainer.use_vllm:
            engine = trainer.vllm_generation
            others = {name: value for name, value in engine.generation_kwargs.items() if name != "temperature"}
            with _replaced(engine, temperature=0.0, generation_kwargs=others):
                yield
            return
        config = copy.deepcopy(trainer.generation_config)
        config.update(**_GREEDY)
        with _replaced(trainer, generation_config=config, generation_kwargs=trainer.generation_kwargs | _GREEDY):
            yield


def layout(rows: int, size: int, processes: int) -> tuple[list[list[int]], list[int]]:
    """
    Which prompts each process answers, and where the answer to the prompt of a row is.

    A process answers the prompts of which it has a row. It knows without asking how many the others answer, and goes
    on with its last one until all have answered equally many: rewards are gathered, so all must score equally many
    rows. Where a group lies on two processes both answer, and the first one's answer counts.

    Args:
        rows (`int`):
            Rows of a process, as many on each.
        size (`int`):
            Rows of a prompt, adjacent.
        processes (`int`):
            Number of processes.

    Returns:
        `tuple`: For each process, the rows of its own to answer; and for each row of all processes, the index of its
        prompt's answer among the gathered ones.

    Example:

    >>> layout(3, 2, 2)  # prompts of the rows: 0 0 1 | 1 2 2
    ([[0, 2], [0, 1]], [0, 0, 1, 1, 3, 3])
    """
    firsts = [[i for i in range(rows) if i == 0 or (rank * rows + i) % size == 0] for rank in range(processes)]
    most = max(len(own) for own in firsts)
    asked = [own + own[-1:] * (most - len(own)) for own in firsts]
    answer_of: dict[int, int] = {}  # group → place
    for place, row in enumerate(rank * rows + i for rank, own in enumerate(asked) for i in own):
        answer_of.setdefault(row // size, place)
    return asked, [answer_of[row // size] for row in range(rows * processes)]


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """`owner` with these attributes inside the block, and with its own afterwards."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
