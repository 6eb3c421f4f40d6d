"""Options of every command as a user means them: data in a file, and the last checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from trl.scripts.utils import DatasetConfig, TrlParser

from ..trainers.interruptions import whole_checkpoint
from ..trainers.places import builder_of, check_file, check_place
from ..trainers.written import wants_last


class ParserAsMeant(TrlParser):
    """TRL's parser, for TRL's scripts in the workers."""

    def parse_args_into_dataclasses(self, *args, **kwargs):
        parsed = super().parse_args_into_dataclasses(*args, **kwargs)
        as_meant(parsed)
        return parsed


def as_meant(parts: tuple) -> None:
    """
    Puts in place what the parsed dataclasses of a command mean.

    `dataset_name: rows.jsonl`, or `path: rows.jsonl` in `datasets`, is the file of that name, which TRL would look for
    on the hub. `resume_from_checkpoint: last`, or `true`, is the last whole checkpoint of `output_dir`.

    Args:
        parts (`tuple`):
            Dataclasses of a script. They are changed.

    Raises:
        `ValueError`: If there is no such file, folder or checkpoint. Nobody has asked the hub by then.
    """
    script, mixture = (_with(parts, name) for name in ("dataset_name", "datasets"))
    if mixture is not None:
        mixture.datasets = [_from_file(dataset) for dataset in mixture.datasets]
    if script is not None and isinstance(script.dataset_name, str):
        check_place("dataset_name", script.dataset_name)
        if mixture is not None and not mixture.datasets and builder_of(script.dataset_name):
            _replace_name(script, mixture, _with(parts, "eval_strategy"))
    model = _with(parts, "model_name_or_path")
    if model is not None and isinstance(model.model_name_or_path, str):
        check_place("model_name_or_path", model.model_name_or_path, of_data=False)
    config = _with(parts, "resume_from_checkpoint")
    if config is not None:
        config.resume_from_checkpoint = _checkpoint(config.resume_from_checkpoint, config.output_dir)


def _with(parts: tuple, name: str) -> Any:
    return next((part for part in parts if hasattr(part, name)), None)


def _from_file(dataset: DatasetConfig) -> DatasetConfig:
    """The same with the file as `data_files`, if its path is that of a file."""
    builder = builder_of(dataset.path)
    if builder is None or dataset.data_files is not None:
        return dataset
    check_place("datasets", dataset.path)
    return replace(dataset, path=builder, data_files=dataset.path)


def _replace_name(script: Any, mixture: Any, config: Any) -> None:
    """Puts the file that `dataset_name` names where TRL reads files from."""
    check_file(script.dataset_name, script.dataset_config, script.dataset_train_split)
    if config is not None and config.eval_strategy != "no" and mixture.test_split_size is None:
        raise ValueError(
            f"eval_strategy={getattr(config.eval_strategy, 'value', config.eval_strategy)!r} needs rows of its own, "
            f"which the file {script.dataset_name!r} does not have. Set test_split_size, such as 0.1, or give a "
            "folder with train.jsonl and test.jsonl."
        )
    mixture.datasets = [_from_file(DatasetConfig(script.dataset_name))]
    mixture.streaming = mixture.streaming or script.dataset_streaming
    script.dataset_name = None


def _checkpoint(wanted: Any, output_dir: str) -> Any:
    """The folder to go on from, `None` for a new run."""
    if not wants_last(wanted):
        if isinstance(wanted, str) and not Path(wanted).is_dir():
            raise ValueError(
                f"resume_from_checkpoint: there is no folder {wanted!r}. Write 'last' for the last checkpoint of "
                f"{output_dir!r}."
            )
        return wanted
    found = whole_checkpoint(True, output_dir)
    if not isinstance(found, str):
        raise ValueError(
            f"There is no checkpoint in {output_dir!r} to go on from. Start without resume_from_checkpoint; a run "
            "saves one every save_steps steps."
        )
    return found
