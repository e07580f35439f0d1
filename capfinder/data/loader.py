"""Batches for training and evaluation: from arrays on the device or on disk, or from the shards.

Which record stands where in an epoch is decided in order.py, so the batches are the same, bit for
bit, wherever the signals lie. What streams holds some hundred megabytes however large the split.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from capfinder.data import augment as time_warping
from capfinder.data.cache import ShardedSplit, Split, open_shards, open_split
from capfinder.data.order import epoch_order, epoch_shape, window_slots
from capfinder.data.record_kernels import as_bytes, copy_rows
from capfinder.data.streaming import Columns, ahead, read_runs, rebatch

__all__ = [
    "EvaluationBatches",
    "ShardedSplit",
    "Split",
    "TrainBatches",
    "as_input",
    "epoch_order",
    "open_shards",
    "open_split",
]

Batch = dict[str, jax.Array]
Piece = dict[str, jax.Array]  # of some steps

# Of signals that are read from the shards as one run; three are held. A window of order.py takes
# less up to 1,000 float16 samples; a larger one is read in several passes.
_RUN_BYTES = 1 << 28


class Placement(Protocol):
    """Where batches go. One process of several gathers some of the rows; they make one array."""

    @property
    def num_devices(self) -> int: ...

    def rows(self, batch_size: int) -> slice:
        """Those of each batch that this process gathers."""

    def split(self, arrays: Any, *, axis: int) -> Any:
        """This process's rows, in NumPy, among its devices; `axis` is the one of rows."""

    def replicate(self, arrays: Any) -> Any:
        """The same arrays on every device."""


class OneDevice:
    """The device of the only process."""

    num_devices = 1

    def rows(self, batch_size: int) -> slice:
        return slice(0, batch_size)

    def split(self, arrays: Any, *, axis: int) -> Any:
        return jax.device_put(arrays)

    def replicate(self, arrays: Any) -> Any:
        return jax.device_put(arrays)


ONE_DEVICE = OneDevice()


@jax.jit
def as_input(signal: jax.Array) -> jax.Array:
    """(B, T) in the storage dtype -> (B, T, 1) as models take it."""
    return signal.astype(jnp.promote_types(signal.dtype, jnp.float32))[:, :, None]


def _materialise(resident: Any, piece: Piece) -> Batch:
    """The batch of one step, of a piece without its leading axis. The device does all this,
    wherever the records came from."""
    augmented = "key" in piece
    if resident:
        record = piece["example"] // time_warping.VERSIONS if augmented else piece["example"]
        piece = piece | {name: array[record] for name, array in resident.items()}
    signal = as_input(piece["signal"])
    if augmented:
        key = jax.random.wrap_key_data(piece["key"], impl=time_warping.GENERATOR)
        version = piece["example"] % time_warping.VERSIONS
        stretch = time_warping.stretches(key, piece["example"], version)
        signal = time_warping.time_warp(signal[:, :, 0], piece["length"], stretch)[:, :, None]
    return {"signal": signal, "cap_class": piece["cap_class"]}


@jax.jit
def _only_batch(resident: Any, piece: Piece) -> Batch:
    return _materialise(resident, {name: array[0] for name, array in piece.items()})


class TrainBatches:
    """Class-balanced batches of a split, in an order of their own every epoch (`epoch_order`).

    With `augment`, each record r also comes squished and expanded: example 3r is the record as it
    is, 3r + 1 and 3r + 2 its other versions. `residency` says where the signals lie: on the device,
    in the mapped files of a Split ("host"), or in the shards of a ShardedSplit ("stream"). `place`
    gives the placement of batches of a size.

    A jitted training takes `resident`, the arrays that stay on the device (() for none), and the
    `pieces`, and has `materialise` make a batch of each step: signal (B, T, 1) float32, or float64
    for float64 storage under x64; cap_class (B,) int32."""

    materialise = staticmethod(_materialise)  # one function for all, so that programs are shared

    def __init__(
        self,
        split: Split | ShardedSplit,
        *,
        batch_size: int,
        seed: int,
        augment: bool,
        residency: Literal["device", "host", "stream"],
        place: Callable[[int], Placement] = lambda batch_size: ONE_DEVICE,
    ) -> None:
        if isinstance(split, ShardedSplit) != (residency == "stream"):
            raise ValueError(f"a {type(split).__name__} doesn't go with residency {residency!r}")
        self._split = split
        self.residency = residency
        self._seed = seed
        self._augmented = augment
        self._versions = time_warping.VERSIONS if augment else 1
        # An example's versions are neighbours before the shuffle, so that windows mix them.
        self._cap_class = np.repeat(split.cap_class, self._versions)
        self._shard_lengths = [self._versions * length for length in split.shard_lengths]
        self.num_examples = len(self._cap_class)
        self.steps_per_epoch, self.batch_size = epoch_shape(self._cap_class, batch_size)
        self.placement = place(self.batch_size)
        self._coming: tuple[int, Future[np.ndarray]] | None = None
        self.resident: Any = ()
        if isinstance(split, Split) and residency == "device":
            arrays = {"signal": split.signal, "cap_class": split.cap_class}
            arrays |= {"length": split.length} if augment else {}
            self.resident = self.placement.replicate(arrays)

    def order(self, epoch: int) -> np.ndarray:
        """Example ids (steps, B) int64 of an epoch."""
        return epoch_order(
            self._cap_class,
            self._shard_lengths,
            seed=self._seed,
            epoch=epoch,
            batch_size=self.batch_size,
        )

    def _order_ahead(self, epoch: int) -> np.ndarray:
        """As `order`; a thread makes that of the next epoch meanwhile, or the device would wait for
        it: 40 ms for 300,000 examples."""
        if self._coming is not None and self._coming[0] == epoch:
            order = self._coming[1].result()
        else:
            order = self.order(epoch)
        pool = ThreadPoolExecutor(1)
        self._coming = (epoch + 1, pool.submit(self.order, epoch + 1))
        pool.shutdown(wait=False)
        return order

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches from `start_step` on. Raises: as `pieces`."""
        for piece in self.pieces(epoch, start_step):
            yield _only_batch(self.resident, piece)

    def pieces(self, epoch: int, start_step: int = 0, *, size: int = 1) -> Iterator[Piece]:
        """What the epoch's batches from `start_step` on are made of, up to `size` steps a piece:
        arrays whose leading axis is the steps. Pieces end at multiples of `size` steps of the
        epoch, and at its end.

        Raises: InputError when a shard that is streamed is damaged."""
        order = self._order_ahead(epoch).astype(np.int32)
        ends = range((start_step // size + 1) * size, len(order) + size, size)
        borders = [start_step, *(min(end, len(order)) for end in ends)]
        counts = [end - start for start, end in itertools.pairwise(borders) if start < end]
        key = np.asarray(jax.random.key_data(time_warping.epoch_key(self._seed, epoch)))
        x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]

        def place(columns: dict[str, np.ndarray]) -> Piece:
            with jax.enable_x64(x64):  # a thread doesn't inherit it
                piece: Piece = self.placement.split(columns, axis=1)
                if self._augmented:
                    keys = np.broadcast_to(key, (len(columns["example"]), *key.shape))
                    piece |= self.placement.replicate({"key": keys})
            return piece

        own = order[:, self.placement.rows(self.batch_size)]
        if self.resident:
            for start, count in zip(borders, counts, strict=False):
                yield place({"example": own[start : start + count]})
            return
        # JAX doesn't wait for a step: a thread gathers the next piece while the device works.
        steps = self._from_host(own, start_step)
        yield from ahead(place(self._joined(steps, count)) for count in counts)

    def _joined(self, steps: Iterator[Columns], count: int) -> dict[str, np.ndarray]:
        """A piece of the next steps' rows: as many arrays as the device needs of them."""
        parts = zip(*itertools.islice(steps, count), strict=True)
        signal, length, example = (np.stack(part) for part in parts)
        cap_class = self._cap_class[example]
        if not self._augmented:
            return {"signal": signal, "cap_class": cap_class}
        return {"signal": signal, "cap_class": cap_class, "length": length, "example": example}

    def _from_host(self, own: np.ndarray, start_step: int) -> Iterator[Columns]:
        """(signal, length, example) of each step; own (steps, rows): this process's examples."""
        split, versions = self._split, self._versions
        if isinstance(split, Split):
            for example in own[start_step:]:
                yield *_gather(split, example // np.int32(versions)), example
            return
        # A run ends where a window does, or in the same few places within each.
        window = max(1, window_slots(self._cap_class) * own.shape[1] // self.batch_size)
        parts = -(-window * split.row_bytes // _RUN_BYTES)
        starts = [
            at + window * k // parts for at in range(0, own.size, window) for k in range(parts)
        ]
        examples = own.reshape(-1)
        first = start_step * own.shape[1]
        runs = [examples[max(a, first) : b] for a, b in itertools.pairwise((*starts, own.size))]
        runs = [run for run in runs if len(run)]
        yield from rebatch(ahead(read_runs(split, runs, versions)), own.shape[1])


def _gather(split: Split, record: np.ndarray) -> Columns:
    """(signal, length) of the records (n,)."""
    by_place = np.argsort(record)  # read from the disk in its order, then put back in place
    signal = np.empty((len(record), split.row[0]), split.row[1])
    rows = record[by_place].astype(np.int64)
    copy_rows(as_bytes(split.signal), rows, as_bytes(signal), by_place)
    return signal, split.length[record]


class EvaluationBatches:
    """Every record of a split exactly once, in stored order; iterable again and again.

    signal (B, T, 1), cap_class (B,) int32, weight (B,) float32: the last batch is filled up with
    zeros whose weight is 0. B = min(batch_size, number of records), or as many more as devices
    take to share it evenly."""

    def __init__(
        self,
        split: Split | ShardedSplit,
        *,
        batch_size: int,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self._split = split
        self._placement = placement
        self.num_examples = len(split)
        share = max(1, -(-min(batch_size, len(split)) // placement.num_devices))
        self.batch_size = share * placement.num_devices

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        columns = ((block.signals, block.cap_classes) for block in ahead(self._split.blocks()))
        for signal, cap_class in rebatch(columns, self.batch_size):
            count = len(cap_class)
            missing = (0, self.batch_size - count)
            if count < self.batch_size:
                signal, cap_class = np.pad(signal, (missing, (0, 0))), np.pad(cap_class, missing)
            batch = {
                "signal": signal,
                "cap_class": cap_class.astype(np.int32),
                "weight": (np.arange(self.batch_size) < count).astype(np.float32),
            }
            rows = self._placement.rows(self.batch_size)
            batch = self._placement.split({name: batch[name][rows] for name in batch}, axis=0)
            yield batch | {"signal": as_input(batch["signal"])}
