"""Batches for training and evaluation: from arrays on the device or on disk, or from the shards.

Which record stands where in an epoch is decided in order.py, so the batches are the same, bit for
bit, wherever the signals lie. What streams holds some hundred megabytes however large the split.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from capfinder.data import augment as time_warping
from capfinder.data.cache import ShardedSplit, Split, open_shards, open_split
from capfinder.data.order import epoch_order, epoch_shape, window_slots
from capfinder.data.record_kernels import as_bytes, copy_rows
from capfinder.data.records import Block

__all__ = [
    "EvaluationBatches",
    "ShardedSplit",
    "Split",
    "TrainBatches",
    "epoch_order",
    "open_shards",
    "open_split",
]

Batch = dict[str, jax.Array]
Columns = tuple[np.ndarray, ...]  # equally many rows each
Item = TypeVar("Item")

# Of signals that are read from the shards as one run; three are held. A window of order.py takes
# less up to 1,000 float16 samples; a larger one is read in several passes.
_RUN_BYTES = 1 << 28


@jax.jit
def _as_input(signal: jax.Array) -> jax.Array:
    """(B, T) in the storage dtype -> (B, T, 1) as models take it."""
    return signal.astype(jnp.promote_types(signal.dtype, jnp.float32))[:, :, None]


@functools.partial(jax.jit, static_argnames="augmented")
def _make_batch(
    signal: jax.Array,
    cap_class: jax.Array,
    length: jax.Array,
    example: jax.Array,
    version: jax.Array,
    key: jax.Array,
    *,
    augmented: bool,
) -> Batch:
    """A batch from its records' arrays: signal (B, T) storage dtype, the others (B,); key: of the
    epoch. The device does this, wherever the records came from."""
    signal = _as_input(signal)
    if augmented:
        stretch = time_warping.stretches(key, example, version)
        signal = time_warping.time_warp(signal[:, :, 0], length, stretch)[:, :, None]
    return {"signal": signal, "cap_class": cap_class}


@functools.partial(jax.jit, static_argnames="augmented")
def _gather_batch(
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    order: jax.Array,
    step: jax.Array,
    key: jax.Array,
    *,
    augmented: bool,
) -> Batch:
    """Batch `step` of order (steps, B) from (signal, cap_class, length) of the whole split."""
    example = order[step]
    record, version = jnp.divmod(example, time_warping.VERSIONS if augmented else 1)
    signal, cap_class, length = (array[record] for array in arrays)
    return _make_batch(signal, cap_class, length, example, version, key, augmented=augmented)


class TrainBatches:
    """Class-balanced batches of a split, in an order of their own every epoch (`epoch_order`).

    With `augment`, each record r also comes squished and expanded: example 3r is the record as it
    is, 3r + 1 and 3r + 2 its other versions. `residency` says where the signals lie: on the device,
    in the mapped files of a Split ("host"), or in the shards of a ShardedSplit ("stream")."""

    def __init__(
        self,
        split: Split | ShardedSplit,
        *,
        batch_size: int,
        seed: int,
        augment: bool,
        residency: Literal["device", "host", "stream"],
    ) -> None:
        if isinstance(split, ShardedSplit) != (residency == "stream"):
            raise ValueError(f"a {type(split).__name__} doesn't go with residency {residency!r}")
        self._split = split
        self._seed = seed
        self._augmented = augment
        self._versions = time_warping.VERSIONS if augment else 1
        # An example's versions are neighbours before the shuffle, so that windows mix them.
        self._cap_class = np.repeat(split.cap_class, self._versions)
        self._shard_lengths = [self._versions * length for length in split.shard_lengths]
        self.num_examples = len(self._cap_class)
        self.steps_per_epoch, self.batch_size = epoch_shape(self._cap_class, batch_size)
        self._on_device: tuple[jax.Array, jax.Array, jax.Array] | None = None
        if isinstance(split, Split) and residency == "device":
            self._on_device = jax.device_put((split.signal, split.cap_class, split.length))

    def order(self, epoch: int) -> np.ndarray:
        """Example ids (steps, B) int64 of an epoch."""
        return epoch_order(
            self._cap_class,
            self._shard_lengths,
            seed=self._seed,
            epoch=epoch,
            batch_size=self.batch_size,
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches from `start_step` on.

        signal (B, T, 1) float32, or float64 for float64 storage under x64; cap_class (B,) int32.
        Raises: InputError when a shard that is streamed is damaged."""
        order = self.order(epoch).astype(np.int32)
        key = time_warping.epoch_key(self._seed, epoch)
        augmented = self._augmented
        if self._on_device is not None:
            on_device = jax.device_put(order)
            for step in range(start_step, len(order)):
                yield _gather_batch(
                    self._on_device, on_device, np.int32(step), key, augmented=augmented
                )
            return
        # JAX doesn't wait for a step: the host gathers the next batch while the device works.
        for signal, length, example in self._from_host(order, start_step):
            record, version = np.divmod(example, np.int32(self._versions))
            cap_class = self._split.cap_class[record]
            yield _make_batch(signal, cap_class, length, example, version, key, augmented=augmented)

    def _from_host(self, order: np.ndarray, start_step: int) -> Iterator[Columns]:
        """(signal, length, example) of each batch."""
        split, versions = self._split, self._versions
        if isinstance(split, Split):
            for example in order[start_step:]:
                yield *_gather(split, example // np.int32(versions)), example
            return
        # A run ends where a window does, or in the same few places within each.
        window = window_slots(self._cap_class)
        pieces = -(-window * split.row_bytes // _RUN_BYTES)
        starts = [
            at + window * k // pieces for at in range(0, order.size, window) for k in range(pieces)
        ]
        examples = order.reshape(-1)
        first = start_step * self.batch_size
        runs = [examples[max(a, first) : b] for a, b in itertools.pairwise((*starts, order.size))]
        runs = [run for run in runs if len(run)]
        yield from _rebatch(_ahead(_read_runs(split, runs, versions)), self.batch_size)


def _gather(split: Split, record: np.ndarray) -> Columns:
    """(signal, length) of the records (n,)."""
    by_place = np.argsort(record)  # read from the disk in its order, then put back in place
    signal = np.empty((len(record), split.row[0]), split.row[1])
    rows = record[by_place].astype(np.int64)
    copy_rows(as_bytes(split.signal), rows, as_bytes(signal), by_place)
    return signal, split.length[record]


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
def _read_runs(split: ShardedSplit, runs: Sequence[np.ndarray], versions: int) -> Iterator[Columns]:
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


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before is used."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            yield item
    finally:  # perhaps while the interpreter ends, too late to wait for a thread
        pool.shutdown(wait=False)


def _rebatch(parts: Iterable[Columns], size: int) -> Iterator[Columns]:
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


class EvaluationBatches:
    """Every record of a split exactly once, in stored order; iterable again and again.

    signal (B, T, 1), cap_class (B,) int32, weight (B,) float32: the last batch is filled up with
    zeros whose weight is 0. B = min(batch_size, number of records)."""

    def __init__(self, split: Split | ShardedSplit, *, batch_size: int) -> None:
        self._split = split
        self.num_examples = len(split)
        self.batch_size = max(1, min(batch_size, len(split)))

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        columns = ((block.signals, block.cap_classes) for block in _ahead(self._split.blocks()))
        for signal, cap_class in _rebatch(columns, self.batch_size):
            count = len(cap_class)
            missing = (0, self.batch_size - count)
            if count < self.batch_size:
                signal, cap_class = np.pad(signal, (missing, (0, 0))), np.pad(cap_class, missing)
            yield {
                "signal": _as_input(signal),
                "cap_class": jnp.asarray(cap_class, jnp.int32),
                "weight": jnp.asarray(np.arange(self.batch_size) < count, jnp.float32),
            }
