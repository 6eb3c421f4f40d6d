"""The words of a command before anything parses them: `--config`, and the YAML file that it names."""

from typing import Any

import yaml

from .commands import TRAINING


def without_dry_run(argv: list[str]) -> tuple[list[str], bool]:
    """The words without `--dry_run`, and whether it was among them."""
    written = ("--dry_run", "--dry-run")
    for word in argv:
        if word.startswith(tuple(f"{option}=" for option in written)):
            raise ValueError("--dry_run takes no value; write it, or leave it out.")
    words = [word for word in argv if word not in written]
    command = next((word for word in words if not word.startswith("-")), None)
    if len(words) < len(argv) and command not in TRAINING:
        raise ValueError(f"--dry_run is for commands that train, not for `trl-ext {command}`.")
    return words, len(words) < len(argv)


def checked_words(argv: list[str]) -> list[str]:
    """
    The words with `--config=run.yaml` written as two, as TRL's parser wants it.

    Raises:
        `ValueError`: If `--config` has no value or occurs twice, or the file is no YAML or has keys that are no text.
    """
    words: list[str] = []
    for word in argv:
        words += ["--config", word.partition("=")[2]] if word.startswith("--config=") else [word]
    places = [place for place, word in enumerate(words) if word == "--config"]
    files = ["".join(words[place + 1 : place + 2]) for place in places]
    for file in files:
        if not file or file.startswith("--"):
            raise ValueError("--config has no value; write --config run.yaml.")
    if len(files) > 1:
        raise ValueError(f"--config is given {len(files)} times ({', '.join(files)}); a run has one YAML file.")
    for file in files:
        _check_file(file)
    return words


def _check_file(path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{place}: this is no YAML, {problem}.") from error
    if isinstance(config, dict):  # TRL says what is wrong with another file
        _check_keys(path, config)
        _check_keys(f"{path}, env", config.get("env"))


def _check_keys(place: str, mapping: Any) -> None:
    for key in mapping if isinstance(mapping, dict) else ():
        if not isinstance(key, str):
            raise ValueError(
                f"{place}: the key {key!r} is no text. Put it in quotes (YAML reads yes, no, on and off as booleans)."
            )
