"""What is known of an advantage estimator: one row of the table in `functional.advantages`."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Estimator(NamedTuple):
    """
    One row of `ADVANTAGE_ESTIMATORS`: every fact about a method.

    Args:
        function (`Callable`):
            Function of a [`RewardBatch`] and options given by name.
        per_token (`bool`, *optional*, defaults to `False`):
            Whether it returns `(N, T)`, else `(N,)`. `None`: either, as its shape tells.
        siblings (`bool`, *optional*, defaults to `False`):
            Whether it compares completions of a prompt, and needs `num_generations` ≥ 2.
        steps (`str`, *optional*, defaults to `"refused"`):
            Step rewards: `"refused"`, `"added"` to the token rewards, or `"needed"`.
        baseline (`bool`, *optional*, defaults to `False`):
            Whether it needs the reward of a greedy answer.
        values (`bool`, *optional*, defaults to `False`):
            Whether it needs a critic.
        on_policy (`bool`, *optional*, defaults to `False`):
            Whether it is derived for completions of the very policy that learns.
        kl_placement (`str`, *optional*):
            Where its paper puts the KL, `"loss"` or `"reward"`.
        completions (`Callable`, *optional*):
            Function of its options: how many completions of a prompt it needs.
        std (`Callable`, *optional*):
            What it divides by, a function of the same arguments: turns β into `kl/effective_beta`.
        metrics (`Callable`, *optional*):
            Function of batch, advantages and options: further numbers to log.
        within (`Callable`, *optional*):
            For a trainer that sees one prompt at a time: what is computed of its completions. The function itself, if
            nothing crosses prompts; else a function of the batch to token rewards, `(N, T)`, NaN in rows that take no
            part. `None`: not available there.
        across (`str`, *optional*):
            Entry whose function is then applied to these token rewards, with the options and `num_generations=1`, over
            all rows of an optimizer step. `None`: nothing crosses prompts.
        method, paper (`str`, *optional*):
            Its name in a model card, and key in `trl_ext.papers.PAPERS`. Empty: those of TRL's trainer.

    Example:

    >>> Estimator(len, siblings=True).steps
    'refused'
    """

    function: Callable[..., torch.Tensor]
    per_token: bool | None = False
    siblings: bool = False
    steps: str = "refused"
    baseline: bool = False
    values: bool = False
    on_policy: bool = False
    kl_placement: str | None = None
    completions: Callable[..., int] | None = None
    std: Callable[..., torch.Tensor] | None = None
    metrics: Callable[..., dict[str, float]] | None = None
    within: Callable[..., torch.Tensor] | None = None
    across: str | None = None
    method: str = ""
    paper: str = ""
