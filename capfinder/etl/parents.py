"""Which molecule each read comes from: parent_read_id of metadata__*.csv beside the data."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from capfinder.errors import InputError
from capfinder.etl import hashing, metadata, sources
from capfinder.etl.sources import Source
from capfinder.etl.spill import Spill, part_of_hash

_PAIR = np.dtype([("choose", "<u8"), ("identity", "<u8"), ("group", "<u8")])


class Parents:
    """The parent of each read, in parts that follow each other by CHOOSE like the identities.

    A parent is known by the SPLIT word of its keyed hash."""

    def __init__(self, scratch: Path, found: Sequence[Source], *, parts: int, seed: int) -> None:
        """Reads the metadata files. Raises: InputError when there is none, or one is unusable."""
        directories = sorted({source.path.parent for source in found})
        self._sources = found
        self._where = " or ".join(str(directory) for directory in directories)
        self._spill = Spill(scratch, "parents", _PAIR)
        self._seen = self._lacking = 0
        self._example = ""
        for path in metadata_of(directories):
            for reads, parents in _read_pairs(path):
                hashes = hashing.keyed_hash(reads, seed=seed)
                pairs = np.empty(len(reads), _PAIR)
                pairs["choose"] = hashes[:, hashing.CHOOSE]
                pairs["identity"] = hashes[:, hashing.IDENTITY]
                pairs["group"] = hashing.keyed_hash(parents, seed=seed)[:, hashing.SPLIT]
                self._spill.add(part_of_hash(pairs["choose"], parts), pairs)

    def of(self, part: int, records: np.ndarray) -> np.ndarray:
        """group (n,) uint64 of the records (n,) of a part; 0 and counted when there is none.

        Raises: InputError for a read with two parents."""
        pairs = self._spill.read(part)
        pairs = pairs[np.lexsort((pairs["group"], pairs["identity"]))]
        keys, first = np.unique(pairs["identity"], return_index=True)
        is_other = (np.diff(pairs["identity"]) == 0) & (np.diff(pairs["group"]) != 0)
        twice = np.isin(records["identity"], pairs["identity"][1:][is_other])
        if twice.any():
            read_id = self._name(records[twice][:1])
            raise InputError(
                f"{self._where}: metadata__*.csv gives read_id {read_id} more than one "
                "parent_read_id. Correct it, or set split_params.group_by=read."
            )
        at = np.searchsorted(keys, records["identity"])
        is_known = at < len(keys)
        is_known[is_known] = keys[at[is_known]] == records["identity"][is_known]
        group = np.zeros(len(records), np.uint64)
        group[is_known] = pairs["group"][first[at[is_known]]]
        lacking = np.flatnonzero(~is_known)
        if len(lacking) and not self._lacking:
            self._example = self._name(records[lacking[:1]])
        self._seen += len(records)
        self._lacking += len(lacking)
        return group

    def _name(self, record: np.ndarray) -> str:
        """read_id of one record (1,)."""
        return next(sources.read_ids_of(self._sources[int(record["file"][0])], record))

    def check_complete(self) -> None:
        """Raises: InputError when `of` met reads without a parent."""
        if self._lacking:
            raise InputError(
                f"{self._where}: metadata__*.csv gives no parent_read_id for {self._lacking:,} "
                f"of {self._seen:,} reads, such as {self._example}. Complete it, or set "
                "split_params.group_by=read."
            )


def metadata_of(directories: Sequence[Path]) -> list[Path]:
    """The metadata files beside the data. Raises: InputError when there is none."""
    paths = sources.metadata_files(list(directories))
    if not paths:
        where = " or ".join(map(str, directories))
        raise InputError(
            f"split_params.group_by=parent_read: needs metadata__*.csv in {where}, found none. "
            "Add it, or split by read."
        )
    return paths


def _read_pairs(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """read_id (n,) 'S' and parent_read_id (n,) 'S', batch by batch."""
    import polars as pl  # slow to load, and needed where there are metadata alone

    columns = ["read_id", "parent_read_id"]
    try:
        for table in metadata.tables(path):
            batch = table.select(columns).drop_nulls()
            batch = batch.filter(batch["parent_read_id"] != "")
            batch = batch.filter(~pl.any_horizontal(metadata.is_too_long()))
            if len(batch):
                reads, parents = (
                    np.array(batch[name].cast(pl.Binary).to_list()) for name in columns
                )
                yield reads, parents
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: can't be read as CSV with the columns read_id and parent_read_id ({reason})"
        ) from None
