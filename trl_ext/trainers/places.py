"""Names of data sets and models that are places on this disk: which file it is, and what is said if there is none."""

import difflib
import traceback
from pathlib import Path
from typing import Any

from datasets import load_dataset

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def builder_of(name: Any) -> str | None:
    """What `datasets` calls the format of a file of that name; `None` for anything but such a name."""
    return _BUILDERS.get(Path(name).suffix.lower()) if isinstance(name, str) else None


def check_place(option: str, name: str, of_data: bool = True) -> None:
    """
    Refuses the name of a data file, or a path that can be no name on the hub, where there is nothing.

    Args:
        option (`str`):
            Option that the name is the value of, for the sentence.
        name (`str`):
            The name.
        of_data (`bool`, *optional*, defaults to `True`):
            Of a data set; else of a model.

    Raises:
        `ValueError`: With the closest name that there is. Nobody has asked the hub by then.
    """
    path, is_file = Path(name), of_data and builder_of(name) is not None
    if path.exists() or not (is_file or name.startswith((".", "/", "~")) or name.count("/") > 1):
        return
    here = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), here, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"a path starts at {Path.cwd()}."
    raise ValueError(f"{option}: there is no {'file' if is_file else 'folder'} {name!r}; {hint}")


def check_file(name: str, config: str | None, split: str) -> None:
    """Refuses what says nothing of a single file: a configuration, and another split than `train`."""
    for option, value, allowed in (("dataset_config", config, None), ("dataset_train_split", split, "train")):
        if value != allowed:
            raise ValueError(
                f"{option}={value!r} is not read with a file, {name!r}, whose rows are one split 'train'. Remove it."
            )


def load_rows(name: str, config: str | None, split: str) -> Any:
    """One split of a data set: of the hub, of a folder, or the rows of a file."""
    check_place("dataset_name", name)
    if builder := builder_of(name):
        check_file(name, config, split)
        return load_dataset(builder, data_files=name, split="train")
    return load_dataset(name, name=config, split=split)


def unopened(error: BaseException) -> str | None:
    """What to say where the hub, or a file, could not be read; `None` for any other error."""
    if not isinstance(error, OSError) and not type(error).__module__.startswith(("datasets.", "huggingface_hub.")):
        return None
    reasons = [str(error), *([str(error.__cause__)] if type(error).__module__.startswith("datasets.") else [])]
    text = ": ".join(reason.splitlines()[0].rstrip(".") for reason in reasons if reason)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for function, argument, what in (
            ("load_dataset", "path", "the data set"),
            ("from_pretrained", "pretrained_model_name_or_path", "the model, or the tokenizer,"),
        ):
            if frame.f_code.co_name == function and argument in frame.f_locals:
                return f"{what} {frame.f_locals[argument]!r} cannot be opened: {text}."
    return None
