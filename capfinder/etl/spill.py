"""Fixed-width records sorted into numbered parts: in memory up to a bound, beyond it in files.

What a stage of the ETL knows of every read goes through here, so that memory doesn't grow with the
number of reads. Parts are taken whole, one at a time: whoever adds records sees to it that a part
stays small."""

from collections import Counter
from pathlib import Path

import numpy as np

BUFFER_BYTES = 1 << 25  # records kept in memory before all are added to their parts' files


class Spill:
    """Parts of records of one dtype; files are named `directory`/`name`-<part>."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype) -> None:
        self._directory, self._name, self.dtype = directory, name, dtype
        self._waiting: dict[int, list[np.ndarray]] = {}
        self._bytes = 0
        self.counts: Counter[int] = Counter()

    def add(self, part: np.ndarray, records: np.ndarray) -> None:
        """Adds records (n,), each to the part whose number >= 0 is in part (n,)."""
        if not len(records):
            return
        order = np.argsort(part, kind="stable")
        numbers, starts = np.unique(part[order], return_index=True)
        for number, group in zip(
            numbers.tolist(), np.split(records[order], starts[1:]), strict=True
        ):
            self._waiting.setdefault(number, []).append(group)
            self.counts[number] += len(group)
        self._bytes += records.nbytes
        if self._bytes > BUFFER_BYTES:
            self._flush()

    def __len__(self) -> int:
        """Records in all parts."""
        return self.counts.total()

    def parts(self) -> list[int]:
        """Numbers of the parts that hold records, ascending."""
        return sorted(part for part, count in self.counts.items() if count)

    def read(self, part: int) -> np.ndarray:
        """The part's records in the order they were added."""
        pieces = list(self._waiting.get(part, ()))
        if self._path(part).exists():
            pieces.insert(0, np.fromfile(self._path(part), self.dtype))
        return np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def take(self, part: int) -> np.ndarray:
        """As `read`; the part is empty after that, its file gone."""
        records = self.read(part)
        self._path(part).unlink(missing_ok=True)
        self._bytes -= sum(piece.nbytes for piece in self._waiting.pop(part, ()))
        self.counts.pop(part, None)
        return records

    def _path(self, part: int) -> Path:
        return self._directory / f"{self._name}-{part}"

    def _flush(self) -> None:
        for part, pieces in self._waiting.items():
            with self._path(part).open("ab") as stream:
                for piece in pieces:
                    stream.write(piece.tobytes())
        self._waiting, self._bytes = {}, 0


def part_of_hash(hashes: np.ndarray, parts: int) -> np.ndarray:
    """Part (n,) int64 of each hash (n,) uint64 when `parts` parts follow each other by hash."""
    return ((hashes >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)
