"""Where reads come from: parent_read_id and pod5_file of the metadata files beside the data.

The table lies in files, sorted by a hash of the read_id, and is mapped: memory holds what the
system keeps of it. It takes 40 bytes a read there, and what its parent_read_id takes (36)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from capfinder import log
from capfinder.errors import InputError
from capfinder.etl import hashing, kernels, metadata
from capfinder.etl.spill import Spill, part_of_hash
from capfinder.log import logger
from capfinder.prediction.reads import Reads

COLUMNS = ("parent_read_id", "pod5_file")
# A read's hash (128 of its bits: two reads with one hash don't occur), its parent's text in the
# file of texts, the number of its pod5 file.
_ENTRY = np.dtype(
    [("first", "<u8"), ("second", "<u8"), ("begin", "<i8"), ("size", "<i4"), ("pod5", "<i4")]
)
_PARTS = 256  # sorted one at a time: 12 MB each of 100 million reads


@dataclass(frozen=True)
class Origins:
    """firsts (n,) uint64 and entries (n,) _ENTRY, sorted by hash; texts: all parent_read_ids, one
    after the other; pod5 (k,) 'S' names of files, the first one empty. All read-only."""

    firsts: np.ndarray
    entries: np.ndarray
    texts: np.ndarray
    pod5: np.ndarray

    def add_to(self, reads: Reads) -> Reads:
        """With COLUMNS of each read; empty where the metadata lack it."""
        at, is_known = self._places(reads.read_ids)
        begin = np.where(is_known, self.entries["begin"][at], 0)
        size = np.where(is_known, self.entries["size"][at], 0)
        number = np.where(is_known, self.entries["pod5"][at], 0)
        parents = kernels.texts(self.texts, begin, begin + size)
        return replace(reads, origins=np.stack([parents, self.pod5[number]], axis=1))

    def _places(self, read_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the entries each read's first one is, and whether there is one."""
        hashes = hashing.keyed_hash(read_ids, seed=0)[:, :2]
        at = np.searchsorted(self.firsts, hashes[:, 0])
        is_known = np.zeros(len(at), bool)
        inside = at < len(self.entries)
        found = self.entries[at[inside]]
        is_known[inside] = (found["first"] == hashes[inside, 0]) & (
            found["second"] == hashes[inside, 1]
        )
        return np.where(is_known, at, 0), is_known


def load(paths: Sequence[Path], directory: Path) -> Origins | None:
    """The table of these metadata files, made in files of an empty `directory`; None when none of
    them has a row with read_id and one of COLUMNS.

    A read that is there more than once gets its first row's; a field that is too long counts as
    empty.
    Raises: InputError for a file that can't be read as CSV."""
    spill = Spill(directory, "origins", _ENTRY)
    pod5: dict[bytes, int] = {b"": 0}
    usable = [path for path in paths if _has_columns(path)]
    if not usable:
        return None
    begin = cut = 0
    first_cut = ""
    with (directory / "texts").open("wb") as texts:
        for path in usable:
            rows = 0
            for read_ids, parents, sizes, files, is_cut in _batches(path):
                hashes = hashing.keyed_hash(read_ids, seed=0)
                entries = np.empty(len(read_ids), _ENTRY)
                entries["first"], entries["second"] = hashes[:, 0], hashes[:, 1]
                entries["begin"] = begin + np.cumsum(sizes) - sizes
                entries["size"] = sizes
                entries["pod5"] = [pod5.setdefault(name, len(pod5)) for name in files]
                texts.write(b"".join(parents))
                begin += int(sizes.sum())
                if is_cut.any() and not first_cut:
                    first_cut = f"{path}, row {rows + int(is_cut.argmax()) + 1:,} below the header"
                rows, cut = rows + len(read_ids), cut + int(is_cut.sum())
                spill.add(part_of_hash(entries["first"], _PARTS), entries)
        texts.write(b"\0")  # an empty file can't be mapped
    if cut:
        logger.warning(
            "%s: a read_id, parent_read_id or pod5_file of more than %d bytes is taken for empty "
            "(rows with one in all metadata__*.csv: %s). Correct the file.",
            first_cut,
            metadata.MOST_BYTES,
            f"{cut:,}",
        )
    count = len(spill)
    if not count:
        return None
    twice = _sort(spill, directory / "firsts", directory / "entries")
    logger.info(
        "Metadata of %s from %s", log.counted(count, "read"), log.counted(len(usable), "file")
    )
    if twice:
        logger.warning(
            "metadata__*.csv: %s rows are of a read_id that came before; the first row counts",
            f"{twice:,}",
        )
    return Origins(
        _mapped(directory / "firsts", np.dtype("<u8")),
        _mapped(directory / "entries", _ENTRY),
        _mapped(directory / "texts", np.dtype(np.uint8)),
        np.array(list(pod5)),
    )


def _sort(spill: Spill, firsts: Path, entries: Path) -> int:
    """All entries and their first words to two files, those of equal hash as they came; how many
    came for a second time."""
    twice = 0
    with firsts.open("wb") as words, entries.open("wb") as stream:
        for part in spill.parts():
            found = spill.take(part)
            found = found[np.lexsort((found["second"], found["first"]))]
            first, second = found["first"].copy(), found["second"]
            twice += int(((first[1:] == first[:-1]) & (second[1:] == second[:-1])).sum())
            words.write(first.tobytes())
            stream.write(found.tobytes())
    return twice


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Read-only; a plain array, as compiled kernels take no other. The file isn't empty."""
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _has_columns(path: Path) -> bool:
    import polars as pl  # slow to load, and needed where there are metadata alone

    try:
        names = pl.read_csv(path, n_rows=0, infer_schema=False).columns
    except (pl.exceptions.PolarsError, OSError):
        names = []
    if "read_id" in names and any(name in names for name in COLUMNS):
        return True
    logger.warning(
        "%s: has no columns read_id and %s; it is left alone", path, " or ".join(COLUMNS)
    )
    return False


_Batch: TypeAlias = tuple[np.ndarray, list[bytes], np.ndarray, list[bytes], np.ndarray]


def _batches(path: Path) -> Iterator[_Batch]:
    """read_id (n,) 'S', parent_read_id, its bytes (n,) and pod5_file of the rows, empty where
    there is none; whether one was too long (n,) bool."""
    import polars as pl

    try:
        for table in map(_texts, metadata.tables(path)):
            if len(table):
                is_long = metadata.is_too_long()
                batch = table.select(pl.when(~is_long).then(pl.all()).otherwise(pl.lit("")))
                read_ids, parents, files = (
                    batch[name].cast(pl.Binary).to_list() for name in table.columns
                )
                sizes = batch["parent_read_id"].str.len_bytes().to_numpy().astype(np.int64)
                is_cut = table.select(pl.any_horizontal(is_long)).to_series().to_numpy()
                yield np.array(read_ids), parents, sizes, files, is_cut
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"{path}: can't be read as CSV ({str(error).splitlines()[0]}). Correct the file or "
            "move it elsewhere."
        ) from None


def _texts(table: Any) -> Any:
    """read_id and COLUMNS of a polars table, "" where there is none."""
    import polars as pl

    return table.select(
        (pl.col(name) if name in table.columns else pl.lit("")).fill_null("").alias(name)
        for name in ("read_id", *COLUMNS)
    )
