"""Reads of CSV files, parsed as the ETL parses them, block by block in the order of the input."""

import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from capfinder.etl.csv_files import HEAD_BYTES, Block, read_blocks
from capfinder.etl.csv_reader import Reject, parse_signals, scan_block
from capfinder.etl.stream import BLOCK_BYTES, map_in_order, merge
from capfinder.evaluation import likeness
from capfinder.evaluation.predictions import NO_LABEL


class Position(NamedTuple):
    """The byte `offset` of the (decompressed) file number `file`, where line number `line` begins;
    offset 0: the file's beginning, header and all."""

    file: int = 0
    offset: int = 0
    line: int = 1


BEGINNING = Position()


@dataclass(frozen=True)
class Reads:
    """What a block of the file number `file` holds.

    Of n good reads: read_ids (n,) 'S'; labels (n,) int32 as in the file (predictions.NO_LABEL for
    none); lines (n,) int64; signals (n, T) in the storage dtype; figures (n, 4) float64: samples,
    their sum, the sum of their squares, and how many of those that the model sees lie beyond
    likeness.LIMIT; origins (n, k) 'S': further columns of predictions.csv. The rejects. Where the
    next block begins; how many bytes of the file, as it lies on disk, were read until here."""

    file: int
    read_ids: np.ndarray
    labels: np.ndarray
    lines: np.ndarray
    signals: np.ndarray
    figures: np.ndarray
    origins: np.ndarray
    rejects: list[Reject]
    following: Position
    disk_bytes: int


PER_READ = ("read_ids", "labels", "lines", "signals", "figures", "origins")
# What is done with the reads of a block once they are parsed, on several threads.
Step: TypeAlias = Callable[[Reads], Reads]
_Item: TypeAlias = tuple[int, Block, int, Position]


def check_headers(paths: Sequence[Path]) -> None:
    """Raises: InputError for the first file that isn't one of cap signals, before hours of work."""
    for path in paths:
        next(read_blocks(path, block_bytes=HEAD_BYTES), None)


def read(
    paths: Sequence[Path],
    *,
    target_length: int,
    dtype: str,
    begin: Position = BEGINNING,
    steps: Sequence[Step] = (),
) -> Generator[Reads]:
    """All files, one after the other, from `begin` on, each block through the `steps`. Reading and
    parsing go on, on threads, while the caller works on what it got: some blocks a thread, then
    they wait.

    Raises: InputError when a file can't be read."""

    def blocks() -> Generator[_Item]:
        for file in range(begin.file, len(paths)):
            start = (begin.offset, begin.line) if file == begin.file and begin.offset else None
            yield from _with_following(
                file, read_blocks(paths[file], block_bytes=BLOCK_BYTES, begin=start)
            )

    parse = functools.partial(_parse, target_length=target_length, dtype=dtype, steps=steps)
    yield from map_in_order(parse, merge([blocks]))


def _with_following(file: int, found: Iterable[tuple[Block, int]]) -> Generator[_Item]:
    waiting: tuple[Block, int] | None = None
    for block, disk_bytes in found:
        if waiting is not None:
            yield file, *waiting, Position(file, block.offset, block.line)
        waiting = block, disk_bytes
    if waiting is not None:
        yield file, *waiting, Position(file + 1)


def _parse(item: _Item, *, target_length: int, dtype: str, steps: Sequence[Step]) -> Reads:
    file, block, disk_bytes, following = item
    rows, rejects, _ = scan_block(block, cap_class=None, no_label=NO_LABEL)
    signals = parse_signals(
        block.data,
        rows.start - block.offset,
        rows.end - block.offset,
        target_length=target_length,
        dtype=dtype,
    )
    beyond = likeness.beyond(signals.fitted)
    reads = Reads(
        file,
        rows.read_id,
        rows.cap_class,
        rows.line,
        signals.fitted,
        np.stack([signals.lengths, signals.total, signals.squares, beyond], axis=1),
        np.zeros((len(rows.line), 0), "S1"),
        rejects,
        following,
        disk_bytes,
    )
    reads = without(reads, signals.problems)
    for step in steps:
        reads = step(reads)
    return reads


def without(reads: Reads, problems: Mapping[int, str]) -> Reads:
    """Some of the reads become rejects: why, by their index."""
    if not problems:
        return reads
    kept = np.ones(len(reads.lines), bool)
    kept[list(problems)] = False
    more = [
        Reject(int(reads.lines[index]), reads.read_ids[index].decode(), reason)
        for index, reason in problems.items()
    ]
    arrays = {name: getattr(reads, name)[kept] for name in PER_READ}
    return replace(reads, **arrays, rejects=sorted(reads.rejects + more))
