"""The model card of a run: the method that our options select, its paper, and the options themselves."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..papers import PAPERS
from .foreign import options_set

TAG = "trl-ext"


@contextmanager
def model_card_with_options(trainer: Any, rows: Iterable[Any], also: Iterable[str] = ()) -> Iterator[None]:
    """
    Around TRL's `create_model_card`: names the method and its paper, and lists the options that select it.

    With no row and no option of ours changed from its default, the card is TRL's.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer whose card is written.
        rows (`Iterable`):
            Rows of our tables that the options select, with `method`, the name in the card, and `paper`, a key of
            [`~trl_ext.papers.PAPERS`]. The first with a method names the card; without one TRL's name stands.
        also (`Iterable[str]`, *optional*):
            Fields of TRL's config to list with ours, such as `beta`.
    """
    rows, options = list(rows), dict(sorted(options_set(trainer.args).items()))
    for name in ("callback_paths", "log_style"):  # not a part of the method
        options.pop(name, None)
    if not rows and not options:
        yield
        return
    options |= {name: getattr(trainer.args, name) for name in also}
    shown: dict[str, Any] = {"_tag_names": [*type(trainer)._tag_names, TAG]}
    if row := next((row for row in rows if row.method), None):
        shown |= {"_name": row.method, "_paper": PAPERS[row.paper].for_card() if row.paper else {}}
    before = {name: vars(trainer)[name] for name in shown if name in vars(trainer)}
    vars(trainer).update(shown)
    try:
        yield
    finally:
        for name in shown:
            del vars(trainer)[name]
        vars(trainer).update(before)
    if trainer.is_world_process_zero():
        _add_section(os.path.join(trainer.args.output_dir, "README.md"), options)


def add_model_tag(trainer: Any) -> None:
    """Tags the model as trained with us; PEFT writes the tags of the model into the card of an adapter."""
    trainer.model.add_model_tags([TAG])


def replace_card_of_adapter(trainer: Any, checkpoint: Path) -> None:
    """
    Puts the card of the run in place of the empty template that PEFT writes into a checkpoint; PEFT then adds its own
    facts to it, as it does in the folder of the run.
    """
    card, template = Path(trainer.args.output_dir, "README.md"), checkpoint / "README.md"
    if trainer.args.should_save and template.exists() and card.exists():
        shutil.copyfile(card, template)
        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(checkpoint))


def _add_section(path: str, options: dict[str, Any]) -> None:
    with open(path, encoding="utf-8") as file:
        before, heading, after = file.read().partition("### Framework versions")
    lines = "".join(f"- `{name}`: `{value}`\n" for name, value in options.items())
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{before}### Options of trl_ext {__version__}\n\n{lines}\n{heading}{after}")
