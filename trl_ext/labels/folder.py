"""The folder of labelled answers: one file per chunk, so that a run that was stopped goes on; joined at the end."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import SamplingConfig


class LabelFolder:
    """
    `config.json`, `chunks/000000.jsonl` and so on, and, once all of them are there, `train.jsonl`.

    A file is written beside its place and renamed, so that there is none that is half-written; whichever of several
    processes finishes last joins them, and none waits for another.

    Args:
        config ([`SamplingConfig`]):
            Options; its `output_dir` is the folder.
        rows (`list[dict[str, Any]]`):
            The data.

    Raises:
        `ValueError`: If the folder was labelled with another option, or other data.
    """

    made = "labelled"  # what was done with the answers in it
    unread: tuple[str, ...] = ("output_dir",)  # options on which the chunks do not depend

    def __init__(self, config: SamplingConfig, rows: list[dict[str, Any]]):
        self.path, self.rows, self.size = Path(config.output_dir), rows, config.chunk_size
        self.num_chunks = -(-len(rows) // self.size)
        data = hashlib.sha256("\n".join(map(json.dumps, rows)).encode()).hexdigest()
        ours = {name: value for name, value in asdict(config).items() if name not in self.unread} | {"data": data}
        if self.config_file.exists():
            theirs = json.loads(self.config_file.read_text(encoding="utf-8"))
            self._refuse_another(theirs, ours)
        else:
            self.chunk_file(0).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.config_file, json.dumps(ours, indent=1))

    def _refuse_another(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        for name in [*ours, *theirs]:
            if theirs.get(name) == ours.get(name):
                continue
            if name == "data":
                raise ValueError(
                    f"{self.path} was {self.made} with other data; choose another output_dir, or delete it."
                )
            raise ValueError(
                f"{self.path} was {self.made} with {name}={theirs.get(name)!r}, got {ours.get(name)!r}; choose "
                "another output_dir, or delete it."
            )

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def joined_file(self) -> Path:
        """What `trl-ext` trains on."""
        return self.path / "train.jsonl"

    def chunk_file(self, chunk: int) -> Path:
        return self.path / "chunks" / f"{chunk:06d}.jsonl"

    def missing(self) -> list[int]:
        """Chunks that are to be labelled."""
        return [chunk for chunk in range(self.num_chunks) if not self.chunk_file(chunk).exists()]

    def rows_of(self, chunk: int) -> list[dict[str, Any]]:
        """Rows of the data in a chunk."""
        return self.rows[chunk * self.size : (chunk + 1) * self.size]

    def write(self, chunk: int, labelled: list[dict[str, Any]]) -> None:
        """Writes the labelled answers of a chunk."""
        write_whole(self.chunk_file(chunk), "".join(json.dumps(row) + "\n" for row in labelled))

    def join(self) -> bool:
        """Joins the chunks, if none is missing; returns whether."""
        if self.missing():
            return False
        files = map(self.chunk_file, range(self.num_chunks))
        write_whole(self.joined_file, self.joined("".join(file.read_text(encoding="utf-8") for file in files)))
        return True

    def joined(self, lines: str) -> str:
        """The joined file, of the lines of all chunks."""
        return lines


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)
