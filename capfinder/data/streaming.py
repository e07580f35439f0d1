"""Records of a split in its shards, in the order that a training asks for them, read ahead."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from capfinder.data.cache import ShardedSplit
from capfinder.data.record_kernels import as_bytes, copy_rows
from capfinder.data.records import Block

Columns = tuple[np.ndarray, ...]  # equally many rows each
Item = TypeVar("Item")


class _Run:
    """Examples that are read together: example (n,) ids, and their rows as far as they are there:
    signal (n, T), length (n,)."""

    def __init__(self, split: ShardedSplit, example: np.ndarray, versions: int, rows: Columns):
        self.example = example
        self.signal, self.length = (column[: len(example)] for column in rows)
        record = example.astype(np.int64) // versions
        self._place = np.argsort(record)
        self._record = record[self._place]
        borders = np.cumsum(split.shard_lengths)
        self.shards = set(np.searchsorted(borders, self._record, side="right").tolist())

    def take(self, block: Block, first: int) -> None:
        """What it needs of the records from `first` on."""
        here = slice(*np.searchsorted(self._record, (first, first + len(block.lengths))))
        rows, places = self._record[here] - first, self._place[here]
        copy_rows(as_bytes(block.signals), rows, as_bytes(self.signal), places)
        self.length[places] = block.lengths[rows]


# In place of tf.data, which would cost half of the speed. Training batches of 1,024 from 240,000
# records of 500 float16 samples, examples per CPU second in one run: 188,000 to 229,000 so,
# 102,000 to 116,000 with TFRecordDataset, batch, map(parse_example, decode_raw), prefetch for the
# shards.
def read_runs(split: ShardedSplit, runs: Sequence[np.ndarray], versions: int) -> Iterator[Columns]:
    """(signal, length, example) of each run of example ids. The arrays are used again: what is
    yielded holds until the next one is asked for.

    A window's records lie in a few shards that follow one another in the epoch's permuted order;
    a shard at the border of two windows serves both at once. So each is read about once when
    classes have one size. (The windows of a class that is k times smaller than the largest span k
    times as many shards, and are read as often as it goes round.)"""
    size = max(map(len, runs), default=0)
    # One is in use while the next is read, and the one after that as far as it is met with.
    memory = [
        (np.empty((size, split.row[0]), split.row[1]), np.empty(size, np.int32))
        for _ in range(min(3, len(runs)))
    ]
    coming = [_Run(split, runs[0], versions, memory[0])] if runs else []
    met: set[int] = set()
    for number in range(len(runs)):
        if number + 1 < len(runs):
            rows = memory[(number + 1) % 3]
            coming.append(_Run(split, runs[number + 1], versions, rows))
        unread = coming[0].shards - met
        for shard in sorted(unread):
            first = sum(split.shard_lengths[:shard])
            for block in split.shard_blocks(shard):
                for run in coming:
                    if shard in run.shards:
                        run.take(block, first)
                first += len(block.lengths)
        done = coming.pop(0)
        met = unread & coming[0].shards if coming else set()
        yield done.signal, done.length, done.example


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before is used."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            yield item
    finally:  # perhaps while the interpreter ends, too late to wait for a thread
        pool.shutdown(wait=False)


def rebatch(parts: Iterable[Columns], size: int) -> Iterator[Columns]:
    """The rows of consecutive parts, copied, `size` at a time; the last ones may be fewer."""
    rest: Columns | None = None
    for part in parts:
        at, end = 0, len(part[0])
        if rest is not None:
            at = min(size - len(rest[0]), end)
            rest = tuple(np.concatenate((a, b[:at])) for a, b in zip(rest, part, strict=True))
            if len(rest[0]) < size:
                continue
            yield rest
        whole = at + (end - at) // size * size
        for start in range(at, whole, size):
            yield tuple(column[start : start + size].copy() for column in part)
        rest = tuple(column[whole:].copy() for column in part) if whole < end else None
    if rest is not None:
        yield rest
