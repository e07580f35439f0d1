"""What the ETL knows of each read, in records of fixed width that spill to disk.

A read is known by hashes of its read_id; the text itself is read again where it is needed. Four
64-bit words of one keyed hash serve four purposes: CHOOSE, SPLIT and ORDER decide whether a read is
used, in which split and where, and CHOOSE with IDENTITY (128 bits) stand for the read_id."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from capfinder.etl import hashing
from capfinder.etl.csv_reader import Rows
from capfinder.etl.spill import Spill, part_of_hash

# file: index of the source; line: its number, from 1; begin and id_bytes: where the read_id's text
# lies in the decompressed file; start and end: the signal's text.
PLACE_IN_FILE = [
    ("file", "<i4"),
    ("line", "<i8"),
    ("begin", "<i8"),
    ("id_bytes", "u1"),
    ("start", "<i8"),
    ("end", "<i8"),
]
HASHES = [("choose", "<u8"), ("split", "<u8"), ("order", "<u8"), ("identity", "<u8")]
IDENTITY = np.dtype([*HASHES, *PLACE_IN_FILE, ("content", "<u8", 2)])

KEEP, DUPLICATE, CONFLICT = range(3)


def records_of(rows: Rows, hashes: np.ndarray, file: int) -> np.ndarray:
    """Records (n,) of IDENTITY of one file's rows; hashes (n, 4) of their read_ids."""
    records = np.empty(len(rows.line), IDENTITY)
    for name, column in (
        ("choose", hashing.CHOOSE),
        ("split", hashing.SPLIT),
        ("order", hashing.ORDER),
        ("identity", hashing.IDENTITY),
    ):
        records[name] = hashes[:, column]
    records["file"] = file
    records["id_bytes"] = np.char.str_len(rows.read_id)
    for name in ("line", "begin", "start", "end", "content"):
        records[name] = getattr(rows, name)
    return records


def hash_order(hashes: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Indices that sort by hash, equal hashes by identity; rows equal in both keep their order."""
    order = np.argsort(hashes)
    is_equal = np.diff(hashes[order]) == 0
    if is_equal.any():
        tied = np.append(is_equal, False) | np.insert(is_equal, 0, False)
        among = np.sort(order[tied])
        order[tied] = among[np.lexsort((identities[among], hashes[among]))]
    return order


def find_duplicates(records: np.ndarray, label: np.ndarray, run_rank: np.ndarray) -> np.ndarray:
    """KEEP, DUPLICATE or CONFLICT (n,) int8 for records in the order of `hash_order`.

    Of rows with one read_id and class (label (n,)), that with the lowest content, then run
    (run_rank (n,)), is kept; where classes differ, none is."""
    verdict = np.full(len(records), KEEP, np.int8)
    is_same = (np.diff(records["choose"]) == 0) & (np.diff(records["identity"]) == 0)
    if not is_same.any():
        return verdict
    members = np.flatnonzero(np.append(is_same, False) | np.insert(is_same, 0, False))
    read = np.cumsum(np.insert(~is_same, 0, True))[members]  # number of the read_id
    content = records["content"][members]
    place = records["line"][members], records["file"][members]  # for copies alike in all else
    order = np.lexsort((*place, run_rank[members], content[:, 1], content[:, 0], read))
    members, read = members[order], read[order]
    is_first = np.insert(read[1:] != read[:-1], 0, True)
    verdict[members[~is_first]] = DUPLICATE
    starts, labels = np.flatnonzero(is_first), label[members]
    differ = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    verdict[members[differ[np.cumsum(is_first) - 1]]] = CONFLICT
    return verdict


class Identities:
    """The good rows of all files, in parts that follow each other by CHOOSE."""

    def __init__(self, directory: Path, *, parts: int) -> None:
        self.parts = parts
        self._spill = Spill(directory, "identities", IDENTITY)
        self._excluded = np.zeros(0, np.uint64)

    def add(self, records: np.ndarray) -> None:
        self._spill.add(part_of_hash(records["choose"], self.parts), records)

    def __len__(self) -> int:
        return len(self._spill)

    def exclude(self, identities: np.ndarray) -> None:
        """Leaves out the reads of these IDENTITY words from now on."""
        self._excluded = np.union1d(self._excluded, identities)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number and records, in `hash_order`, of each part; duplicates are still among them."""
        for part in self._spill.parts():
            records = self._spill.read(part)
            if len(self._excluded):
                records = records[~np.isin(records["identity"], self._excluded)]
            yield part, records[hash_order(records["choose"], records["identity"])]
