"""Pass two: chosen rows are parsed, fitted and brought into their order within bounded memory.

First each row goes to the bucket file of its shard, in whatever order it comes; then one bucket at
a time is read, put in order and written as a shard."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capfinder import log
from capfinder.data import records
from capfinder.data.csv_files import read_ranges
from capfinder.data.csv_reader import parse_signals
from capfinder.data.plan import Plan
from capfinder.data.preprocess import fit_rows
from capfinder.data.scan import MEGABYTE, Identities, Progress
from capfinder.data.sources import Source
from capfinder.data.stream import BLOCK_BYTES, map_in_order
from capfinder.errors import StageFailedError

MAX_GAP_BYTES = 1 << 16  # between two chosen rows: reading on is cheaper than a seek below this
BUFFER_BYTES = 1 << 26  # rows kept in memory before they are added to the bucket files


@dataclass(frozen=True)
class Parsed:
    """Rows of one block: index (k,) into the rows asked for, signals (k, T) in the storage dtype,
    lengths (k,) before fitting, and the reason of each that can't be used."""

    index: np.ndarray
    signals: np.ndarray
    lengths: np.ndarray
    problems: dict[int, str]


def parse_rows(
    identities: Identities,
    rows: np.ndarray,
    sources: Sequence[Source],
    *,
    target_length: int,
    dtype: str,
) -> Iterator[Parsed]:
    """Parses the rows (m,) of `identities`, block by block, in the order of the files.

    Raises: InputError when a file has changed since it was scanned."""
    order = np.lexsort((identities.start[rows], identities.file[rows]))
    file, start = identities.file[rows][order], identities.start[rows][order]
    end = identities.end[rows][order]
    is_break = (np.diff(file) != 0) | (np.diff(start // BLOCK_BYTES) != 0)
    is_break |= start[1:] - end[:-1] > MAX_GAP_BYTES
    bounds = np.concatenate([[0], np.flatnonzero(is_break) + 1, [len(rows)]]).tolist()
    blocks = [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]

    def read() -> Iterator[tuple[slice, bytes]]:
        for number in np.unique(file).tolist():
            here = [block for block in blocks if file[block.start] == number]
            ranges = [(int(start[b.start]), int(end[b.stop - 1])) for b in here]
            sources[number].check_unchanged()
            for block, data in zip(here, read_ranges(sources[number].path, ranges), strict=True):
                if len(data) != end[block.stop - 1] - start[block.start]:
                    break  # a file that was cut: said below
                yield block, data
            sources[number].check_unchanged()

    def parse(item: tuple[slice, bytes]) -> Parsed:
        block, data = item
        view, starts, ends = memoryview(data), start[block], end[block]
        base = starts[0]
        texts = [
            view[a:b] for a, b in zip((starts - base).tolist(), (ends - base).tolist(), strict=True)
        ]
        signals = parse_signals(texts, dtype=dtype)
        fitted = fit_rows(
            signals.values, signals.starts, signals.lengths, target_length=target_length
        )
        return Parsed(order[block], fitted, signals.lengths, signals.problems)

    total = -(-int((end - start).sum()) // MEGABYTE)
    with log.progress("Parsing chosen reads", total=total, unit="MB") as bar:
        progress = Progress(bar)
        for parsed in map_in_order(parse, read()):
            yield parsed
            size = identities.end[rows[parsed.index]] - identities.start[rows[parsed.index]]
            progress.advance(int(size.sum()))


class Buckets:
    """One file of fixed-width rows per shard, written through a buffer of bounded size."""

    def __init__(self, directory: Path, *, target_length: int, dtype: str) -> None:
        self._directory = directory
        self._row = np.dtype([("read", "<i8"), ("length", "<i8"), ("signal", dtype, target_length)])
        self._waiting: dict[int, list[np.ndarray]] = {}
        self._bytes = 0

    def _path(self, shard: int) -> Path:
        return self._directory / f"bucket-{shard:05d}"

    def add(self, shard: np.ndarray, read: np.ndarray, parsed: Parsed) -> None:
        """Keeps the rows of `parsed`; shard (k,) where each goes, read (k,) its number."""
        rows = np.empty(len(shard), self._row)
        rows["read"], rows["length"], rows["signal"] = read, parsed.lengths, parsed.signals
        order = np.argsort(shard, kind="stable")
        numbers, starts = np.unique(shard[order], return_index=True)
        for number, part in zip(numbers.tolist(), np.split(rows[order], starts[1:]), strict=True):
            self._waiting.setdefault(number, []).append(part)
        self._bytes += rows.nbytes
        if self._bytes > BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        for number, parts in self._waiting.items():
            with self._path(number).open("ab") as stream:
                for part in parts:
                    stream.write(part.tobytes())
        self._waiting, self._bytes = {}, 0

    def take(self, shard: int) -> np.ndarray:
        """The shard's rows, in the order they came; its file is gone after that."""
        self.flush()
        rows = np.fromfile(self._path(shard), self._row)
        self._path(shard).unlink()
        return rows


def write_shards(
    directory: Path, buckets: Buckets, plan: Plan, identities: Identities
) -> dict[str, list[int]]:
    """Writes every shard of the plan; returns their sizes in bytes, per split."""
    sizes: dict[str, list[int]] = {split: [] for split in records.SPLITS}
    with log.progress("Writing shards", total=len(plan.row), unit="reads") as bar:
        for number, shard in enumerate(plan.shards):
            rows = buckets.take(number)
            rows = rows[np.argsort(plan.place[rows["read"]])]
            reads = plan.row[rows["read"]]
            if not np.array_equal(plan.place[rows["read"]], np.arange(shard.num_examples)):
                raise StageFailedError(
                    f"{directory}: shard {number} got {len(rows)} rows, {shard.num_examples} were "
                    "planned. Please report this."
                )
            size = records.write_shard(
                directory / records.shard_name(shard.split, shard.index, shard.num_shards),
                signals=rows["signal"],
                cap_classes=identities.label[reads],
                read_ids=[read_id.decode() for read_id in identities.read_id[reads].tolist()],
                lengths=rows["length"],
            )
            sizes[shard.split].append(size)
            bar.advance(len(rows))
    return sizes
