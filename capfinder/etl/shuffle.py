"""Pass two: chosen rows are parsed, fitted and brought into their order within bounded memory.

First each row goes to the bucket of its shard, in whatever order it comes; then one bucket at a
time is read, put in order and written as a shard."""

import functools
import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import log
from capfinder.data import records
from capfinder.data.records import ShardFile
from capfinder.errors import InputError, StageFailedError
from capfinder.etl import kernels, scan
from capfinder.etl.csv_files import read_ranges
from capfinder.etl.csv_reader import Signals, parse_signals
from capfinder.etl.plan import Plan, Shard
from capfinder.etl.sources import Source
from capfinder.etl.spill import Spill
from capfinder.etl.stream import BLOCK_BYTES, map_in_order, merge

MAX_GAP_BYTES = 1 << 16  # between two chosen rows: reading on is cheaper than a seek below this
SHARD_WRITERS = 2  # each holds some copies of a shard in memory


@dataclass(frozen=True)
class ParsedBlock:
    """Rows that lie near each other in a file: plan.CHOSEN records (k,), their read_ids (k,) 'S'
    and signals."""

    rows: np.ndarray
    read_ids: np.ndarray
    signals: Signals


def parse_block(
    rows: np.ndarray, data: bytes, *, id_bytes: int, target_length: int, dtype: str
) -> ParsedBlock:
    """rows (k,): records of plan.CHOSEN in the order of their file, of which `data` holds the bytes
    from the first one's read_id to the last one's signal."""
    base = int(rows["begin"][0])
    begins = rows["begin"] - base
    signals = parse_signals(
        data, rows["start"] - base, rows["end"] - base, target_length=target_length, dtype=dtype
    )
    texts = kernels.texts(np.frombuffer(data, np.uint8), begins, begins + rows["id_bytes"])
    return ParsedBlock(rows, texts.astype(f"S{id_bytes}"), signals)


def parse_rows(
    plan: Plan, sources: Sequence[Source], *, target_length: int, dtype: str
) -> Iterator[ParsedBlock]:
    """Parses the chosen rows, block by block, in the order of each file.

    Raises: InputError when a file has changed since it was scanned."""

    def blocks(source: Source, parts: Sequence[int]) -> Generator[tuple[np.ndarray, bytes]]:
        source.check_unchanged()
        near = (rows for part in parts for rows in near_rows(plan.rows.read(part)))
        yield from read_groups(source.path, near)
        source.check_unchanged()

    def parse(item: tuple[np.ndarray, bytes]) -> ParsedBlock:
        rows, data = item
        return parse_block(
            rows, data, id_bytes=plan.id_bytes, target_length=target_length, dtype=dtype
        )

    total = len(plan.rows)
    with log.progress("Parsing chosen reads", total=total, unit="reads") as bar:
        by_file = itertools.groupby(plan.rows.parts(), scan.file_of_segment)
        streams = [functools.partial(blocks, sources[file], list(parts)) for file, parts in by_file]
        for parsed in map_in_order(parse, merge(streams)):
            yield parsed
            bar.advance(len(parsed.rows))


def near_rows(rows: np.ndarray) -> list[np.ndarray]:
    """Chosen rows of one file, put in its order, in groups that are worth one read each."""
    rows = rows[np.argsort(rows["begin"])]
    begin, end = rows["begin"], rows["end"]
    is_break = np.diff(begin // BLOCK_BYTES) != 0
    is_break |= begin[1:] - end[:-1] > MAX_GAP_BYTES
    return np.split(rows, np.flatnonzero(is_break) + 1)


def read_groups(path: Path, groups: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, bytes]]:
    """Each of the groups of near rows of a file with the bytes that `parse_block` wants.

    Raises: InputError when the file has been cut."""
    waiting: deque[np.ndarray] = deque()
    for data in read_ranges(path, _ranges(groups, waiting)):
        rows = waiting.popleft()
        if len(data) != rows["end"][-1] - rows["begin"][0]:
            raise InputError(f"{path}: changed while it was read. Run again when it is whole.")
        yield rows, data


def _ranges(groups: Iterator[np.ndarray], waiting: deque[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Bytes of each group of rows; the group waits in `waiting` for them."""
    for rows in groups:
        waiting.append(rows)
        yield int(rows["begin"][0]), int(rows["end"][-1])


def bucket_dtype(*, id_bytes: int, target_length: int, dtype: str) -> np.dtype:
    """Of a row on its way to a shard, fixed in width."""
    return np.dtype(
        [
            ("place", "<i4"),
            ("length", "<i4"),
            ("label", "<i4"),
            ("group", "<u8"),
            ("read_id", f"S{id_bytes}"),
            ("signal", dtype, target_length),
        ]
    )


def bucket_rows(parsed: ParsedBlock, row: np.dtype) -> np.ndarray:
    """(k,) of the `bucket_dtype` row."""
    rows = np.empty(len(parsed.rows), row)
    for name in ("place", "label", "group"):
        rows[name] = parsed.rows[name]
    rows["length"], rows["signal"] = parsed.signals.lengths, parsed.signals.fitted
    rows["read_id"] = parsed.read_ids
    return rows


class Buckets:
    """Rows on their way to the shards, in a Spill."""

    def __init__(self, directory: Path, *, id_bytes: int, target_length: int, dtype: str) -> None:
        self._row = bucket_dtype(id_bytes=id_bytes, target_length=target_length, dtype=dtype)
        self._spill = Spill(directory, "bucket", self._row)

    def add(self, parsed: ParsedBlock) -> None:
        self._spill.add(parsed.rows["shard"], bucket_rows(parsed, self._row))

    def take(self, shard: int) -> np.ndarray:
        """The shard's rows; its bucket is empty after that."""
        return self._spill.take(shard)


@dataclass(frozen=True)
class WrittenShard:
    """groups (k,) uint64: the different groups of its reads."""

    shard: Shard
    name: str
    file: ShardFile
    groups: np.ndarray


def write_shards(directory: Path, buckets: Buckets, plan: Plan) -> list[WrittenShard]:
    """Writes every shard of the plan, in order."""

    def rows_of_shards() -> Iterator[tuple[Shard, np.ndarray]]:
        for number, shard in enumerate(plan.shards):
            yield shard, buckets.take(number)

    def write(item: tuple[Shard, np.ndarray]) -> WrittenShard:
        return write_shard(directory, *item)

    written = []
    with log.progress("Writing shards", total=len(plan.rows), unit="reads") as bar:
        for each in map_in_order(write, rows_of_shards(), workers=SHARD_WRITERS, ahead=1):
            written.append(each)
            bar.advance(each.shard.num_examples)
    return written


def write_shard(directory: Path, shard: Shard, rows: np.ndarray) -> WrittenShard:
    """rows (k,): of the shard's bucket, in any order.

    Raises: StageFailedError when they aren't those planned."""
    order = np.argsort(rows["place"])
    if not np.array_equal(rows["place"][order], np.arange(shard.num_examples)):
        raise StageFailedError(
            f"{directory}: shard {shard.index} of {shard.split} got {len(rows)} rows, "
            f"{shard.num_examples} were planned. Please report this."
        )
    name = records.shard_name(shard.split, shard.index, shard.num_shards)
    file = records.write_shard(
        directory / name,
        signals=rows["signal"][order],
        cap_classes=rows["label"][order],
        read_ids=rows["read_id"][order],
        lengths=rows["length"][order],
    )
    return WrittenShard(shard, name, file, np.unique(rows["group"]))


class LocalPassTwo:
    """Pass two on the threads of this process: `parse` fills buckets that `write` empties."""

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Source],
        *,
        target_length: int,
        dtype: str,
        scratch: Path,
    ) -> None:
        self._plan, self._sources = plan, sources
        self._form: dict[str, Any] = {"target_length": target_length, "dtype": dtype}
        self._buckets = Buckets(scratch, id_bytes=plan.id_bytes, **self._form)

    def parse(self) -> Iterator[ParsedBlock]:
        """The chosen rows. Once a signal has a problem there is no use in buckets."""
        is_good = True
        for parsed in parse_rows(self._plan, self._sources, **self._form):
            yield parsed
            is_good = is_good and not parsed.signals.problems
            if is_good:
                self._buckets.add(parsed)

    def write(self, directory: Path) -> list[WrittenShard]:
        """Every shard, in order; after `parse` and none of its signals had a problem."""
        return write_shards(directory, self._buckets, self._plan)
