"""What is written down of exported files, and what a later export may rely on."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class ExportedFile:
    """One file, or one directory, that was reloaded and compared with the trained model."""

    name: str  # as in export_params.formats
    path: Path
    difference: float  # of a probability from the trained model's, the largest
    reader: str  # what reloaded it, with its version
    opset: int | None  # of ONNX alone

    @property
    def size(self) -> int:
        """Bytes."""
        return size_of(self.path)

    def as_row(self) -> dict[str, Any]:
        """For JSON; without its path, which each place has in its own way."""
        row = {
            "name": self.name,
            "bytes": self.size,
            "max_abs_difference": self.difference,
            "reader": self.reader,
        }
        return row if self.opset is None else {**row, "opset": self.opset}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a directory."""
    members = path.rglob("*") if path.is_dir() else [path]
    return sum(member.stat().st_size for member in members if member.is_file())


def missing(
    rows: Iterable[Mapping[str, Any]],
    formats: Sequence[str],
    *,
    input_length: int,
    output_dir: Path,
) -> list[str]:
    """Those of `formats` of which run.json's `exports` name no file that is there and takes signals
    of that length."""
    there = {
        row.get("name")
        for row in rows
        if row.get("input_length") == input_length
        and isinstance(row.get("path"), str)
        and (output_dir / row["path"]).exists()
    }
    return [name for name in formats if name not in there]
