"""The proof that nothing is in two splits, over tens of millions of reads in bounded memory."""

from pathlib import Path

import numpy as np

from capfinder.data.records import SPLITS
from capfinder.errors import StageFailedError
from capfinder.etl.spill import Spill, part_of_hash

_ENTRY = np.dtype([("first", "<u8"), ("second", "<u8"), ("split", "i1")])
_ENTRIES_PER_PART = 1 << 18


class LeakCheck:
    """Gathers what each split holds, by hashes of 128 bits; `check` then compares.

    what: such as "read_id"; may_repeat: it may come again in its own split (a parent read does)."""

    def __init__(self, scratch: Path, *, what: str, entries: int, may_repeat: bool = False) -> None:
        self._what, self._may_repeat = what, may_repeat
        self._parts = max(1, -(-entries // _ENTRIES_PER_PART))
        self._spill = Spill(scratch, f"leak-check-{what}", _ENTRY)

    def add(self, split: int, first: np.ndarray, second: np.ndarray) -> None:
        """Entries (n,) of a split (index into SPLITS), each two uint64 words of one hash."""
        entries = np.empty(len(first), _ENTRY)
        entries["first"], entries["second"], entries["split"] = first, second, split
        self._spill.add(part_of_hash(first, self._parts), entries)

    def check(self) -> None:
        """Raises: StageFailedError when something is in two splits, or twice in one."""
        twice, where = 0, set()
        for part in self._spill.parts():
            entries = self._spill.take(part)
            entries = entries[np.lexsort((entries["second"], entries["first"]))]
            is_same = (np.diff(entries["first"]) == 0) & (np.diff(entries["second"]) == 0)
            pairs = np.stack([entries["split"][:-1], entries["split"][1:]], axis=1)[is_same]
            if self._may_repeat:
                pairs = pairs[pairs[:, 0] != pairs[:, 1]]
            twice += len(pairs)
            where |= {SPLITS[split] for split in np.unique(pairs).tolist()}
        if twice:
            raise StageFailedError(
                f"{twice:,} {self._what}s are twice in the dataset, in "
                f"{' and '.join(split for split in SPLITS if split in where)}. It can't be used; "
                "please report this."
            )
