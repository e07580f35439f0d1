"""Reads of CSV files, parsed as the ETL parses them, block by block in the order of the input."""

import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capfinder.etl.csv_files import HEAD_BYTES, Block, read_blocks
from capfinder.etl.csv_reader import Reject, parse_signals, scan_block
from capfinder.etl.stream import BLOCK_BYTES, map_in_order, merge
from capfinder.evaluation.predictions import NO_LABEL


@dataclass(frozen=True)
class Reads:
    """What a block of the file number `file` holds: of n good reads read_ids (n,) 'S', labels (n,)
    int32 as in the file (predictions.NO_LABEL for none), lines (n,) int64, signals (n, T) in the
    storage dtype; the rejects; how many bytes of the file, as it lies on disk, that took."""

    file: int
    read_ids: np.ndarray
    labels: np.ndarray
    lines: np.ndarray
    signals: np.ndarray
    rejects: list[Reject]
    disk_bytes: int


def check_headers(paths: Sequence[Path]) -> None:
    """Raises: InputError for the first file that isn't one of cap signals, before hours of work."""
    for path in paths:
        next(read_blocks(path, block_bytes=HEAD_BYTES), None)


def read(paths: Sequence[Path], *, target_length: int, dtype: str) -> Generator[Reads]:
    """All files, one after the other. Reading and parsing go on, on threads, while the caller works
    on what it got: some blocks a thread, then they wait.

    Raises: InputError when a file can't be read."""

    def blocks() -> Generator[tuple[int, Block, int]]:
        for number, path in enumerate(paths):
            seen = 0
            for block, position in read_blocks(path, block_bytes=BLOCK_BYTES):
                yield number, block, position - seen
                seen = position

    parse = functools.partial(_parse, target_length=target_length, dtype=dtype)
    yield from map_in_order(parse, merge([blocks]))


def _parse(item: tuple[int, Block, int], *, target_length: int, dtype: str) -> Reads:
    file, block, disk_bytes = item
    rows, rejects, _ = scan_block(block, cap_class=None, no_label=NO_LABEL)
    signals = parse_signals(
        block.data,
        rows.start - block.offset,
        rows.end - block.offset,
        target_length=target_length,
        dtype=dtype,
    )
    reads = Reads(
        file, rows.read_id, rows.cap_class, rows.line, signals.fitted, rejects, disk_bytes
    )
    return without(reads, signals.problems) if signals.problems else reads


def without(reads: Reads, problems: dict[int, str]) -> Reads:
    """Some of the reads become rejects: why, by their index."""
    kept = np.ones(len(reads.lines), bool)
    kept[list(problems)] = False
    more = [
        Reject(int(reads.lines[index]), reads.read_ids[index].decode(), reason)
        for index, reason in problems.items()
    ]
    return Reads(
        reads.file,
        reads.read_ids[kept],
        reads.labels[kept],
        reads.lines[kept],
        reads.signals[kept],
        sorted(reads.rejects + more),
        reads.disk_bytes,
    )
