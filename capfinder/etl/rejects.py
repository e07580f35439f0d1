"""Rows that can't be used: counted by reason, kept with file, line and read_id, never lost."""

import csv
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from capfinder import files
from capfinder.errors import InputError
from capfinder.etl import csv_reader
from capfinder.etl.csv_reader import MAX_READ_ID_BYTES, Reject
from capfinder.etl.sources import Source
from capfinder.etl.spill import Spill

DUPLICATE_READ_ID = "duplicate read_id"
CONFLICTING_CLASSES = "conflicting classes"
REASONS = (
    csv_reader.BAD_UTF8,
    csv_reader.BAD_CLASS,
    csv_reader.BAD_READ_ID,
    csv_reader.EMPTY_SIGNAL,
    csv_reader.FIELD_COUNT,
    csv_reader.NOT_A_NUMBER,
    csv_reader.NOT_FINITE,
    csv_reader.OTHER_CLASS,
    csv_reader.TOO_LONG,
    csv_reader.TRUNCATED,
    DUPLICATE_READ_ID,
    CONFLICTING_CLASSES,
)
_RECORD = np.dtype([("line", "<i8"), ("reason", "u1"), ("read_id", f"S{MAX_READ_ID_BYTES}")])
_LINES_PER_PART = 1 << 19  # so that one part is at most 70 MB
_PARTS_PER_FILE = 1 << 40


class Rejects:
    """The rejects of all sources; beyond some memory they lie in `directory`."""

    def __init__(self, directory: Path, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._spill = Spill(directory, "rejects", _RECORD)
        self._first: list[Reject | None] = [None] * len(sources)
        self.per_file = [0] * len(sources)
        self.per_reason: Counter[str] = Counter()

    def add(self, file: int, rejects: Sequence[Reject]) -> None:
        if not rejects:
            return
        first = min(rejects)
        known = self._first[file]
        self._first[file] = first if known is None else min(first, known)
        self.per_file[file] += len(rejects)
        self.per_reason.update(reject.reason for reject in rejects)
        records = np.empty(len(rejects), _RECORD)
        records["line"] = [reject.line for reject in rejects]
        records["reason"] = [REASONS.index(reject.reason) for reject in rejects]
        records["read_id"] = [_cut(reject.read_id) for reject in rejects]
        self._spill.add(file * _PARTS_PER_FILE + records["line"] // _LINES_PER_PART, records)

    def are_too_many(self, file: int, rows: int, max_fraction: float, *, more: int = 0) -> bool:
        """Whether a file's rejects, `more` not added yet among them, pass the allowed share."""
        return self.per_file[file] + more > Fraction(repr(float(max_fraction))) * rows

    def check(self, file: int, rows: int, max_fraction: float, *, more: int = 0) -> None:
        """Raises: InputError when there are too many, showing the first."""
        first = self._first[file]
        if first is None or not self.are_too_many(file, rows, max_fraction, more=more):
            return
        path = self._sources[file].path
        raise InputError(
            f"{path}: {self.per_file[file] + more:,} of {rows:,} rows rejected "
            f"({max_fraction:.1%} allowed), first at line {first.line}, read_id {first.read_id}: "
            f"{csv_reader.explained(path, first)}. Correct the file or raise "
            "etl_params.max_reject_fraction."
        )

    def counts(self) -> dict[str, int]:
        """Rejects per reason, over all files."""
        return dict(sorted(self.per_reason.items()))

    def write(self, path: Path) -> None:
        """rejects.csv: every bad row's file, line, read_id and reason, in that order."""
        with (
            files.atomic_path(path) as partial,
            partial.open("w", encoding="utf-8", newline="") as stream,
        ):
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("file", "line", "read_id", "reason"))
            for part in self._spill.parts():
                name = self._sources[part // _PARTS_PER_FILE].name
                records = self._spill.read(part)
                for line, reason, read_id in sorted(records.tolist()):
                    writer.writerow((name, line, read_id.decode(), REASONS[reason]))


def _cut(read_id: str) -> bytes:
    """As much of it as a record holds, in whole characters."""
    return read_id.encode()[:MAX_READ_ID_BYTES].decode(errors="ignore").encode()
