"""
The parts of TRL's asynchronous engine that trl_ext depends on beyond names and parameters, and quick checks of them.

`trl-ext env --check` and the contract tests run them after those of `upstream`. Only the checks load the engine.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from .upstream import UpstreamChanged, trl_class


@functools.cache
def check_columns() -> None:
    """
    Two numbers for each token in place of one log-prob pass through packing, padding and collation as they are.

    Raises:
        `UpstreamChanged`: If they do not.
    """
    import numpy as np
    from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
    from trl.experimental.async_grpo.packing import TreeRow

    row, columns = TreeRow(), np.array([[0.0, np.nan], [-1.5, 2.0]], np.float32)
    sample = {"input_ids": np.array([5, 6]), "completion_mask": np.array([0, 1]), "old_log_probs": columns}
    row.add({**sample, "advantage": 0.0, "group_id": 0, "metrics": {}})
    try:
        found = DataCollatorForRollout(0, 1).torch_call([[row]])["old_log_probs"].tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    if found != [[[-1.5, 2.0]]]:
        raise UpstreamChanged(f"two numbers per token do not pass through a packed row of samples ({found})")


def check_one_forward() -> None:
    """TRL's loss runs the model once. Raises `UpstreamChanged` otherwise."""
    from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer

    theirs: Any = trl_class(AsyncGRPOTrainer)
    tree = ast.parse(textwrap.dedent(inspect.getsource(theirs.compute_loss)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "model"]
    if len(calls) != 1:
        raise UpstreamChanged(f"AsyncGRPOTrainer.compute_loss runs the model {len(calls)} times, expected once")


def check_rollout_process() -> None:
    """The rollout process makes its loop by what the worker holds as `_loop_cls`. Raises `UpstreamChanged` if not."""
    from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, _child_main

    if not hasattr(AsyncRolloutWorker, "_loop_cls") or "self._loop_cls" not in inspect.getsource(AsyncRolloutWorker):
        raise UpstreamChanged("AsyncRolloutWorker has no _loop_cls that it hands to its process")
    if "loop_cls(" not in inspect.getsource(_child_main):
        raise UpstreamChanged("the rollout process does not make its loop by the class that it is given")


CHECKS: dict[str, Callable[[], None]] = {
    "asynchronous GRPO: two numbers per token reach the loss": check_columns,
    "asynchronous GRPO: the loss runs the model once": check_one_forward,
    "asynchronous GRPO: the rollout process makes its loop by the worker's _loop_cls": check_rollout_process,
}
