"""Batches for training and evaluation, from a cache of plain arrays that lies beside the shards.

The cache is mapped into memory, so data sets larger than memory can be used, and TensorFlow is
imported only to build it. Which record stands where in an epoch is decided in order.py.
"""

import fcntl
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from capfinder import files, log
from capfinder.data import augment as time_warping
from capfinder.data import records
from capfinder.data.order import epoch_order, epoch_shape
from capfinder.errors import InputError

__all__ = ["EvaluationBatches", "Split", "TrainBatches", "epoch_order", "open_split"]

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Split:
    """One split in stored order, its arrays mapped from disk.

    signal (N, T) storage dtype; cap_class (N,) int32; length (N,) int32, samples before fitting;
    read_id (N,) UTF-8 bytes; shard_lengths: records of each shard."""

    signal: np.ndarray
    cap_class: np.ndarray
    length: np.ndarray
    read_id: np.ndarray
    shard_lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.cap_class)


def open_split(directory: Path, split: str) -> Split:
    """Opens `split` of the dataset version in `directory`; builds its cache first when absent.

    Raises: InputError when the shards don't hold what the version's manifest says."""
    manifest = files.read_json(directory / "manifest.json")
    prefix = f"{records.DATASET_NAME}-{split}."
    shards = sorted(
        (shard for shard in manifest["shards"] if shard["name"].startswith(prefix)),
        key=lambda shard: shard["name"],
    )
    shard_lengths = tuple(int(shard["num_examples"]) for shard in shards)
    cache = directory.parent.parent / "cache" / manifest["fingerprint"] / split
    opened = _open_cache(cache, shard_lengths)
    if opened is not None:
        return opened
    cache.parent.mkdir(parents=True, exist_ok=True)
    with (cache.parent / f"{split}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it: wait and use that
        opened = _open_cache(cache, shard_lengths)
        if opened is not None:
            return opened
        files.remove_partial(cache.parent, f"{split}-")
        found = [path.name for path in records.shard_paths(directory, split)]
        if found != [shard["name"] for shard in shards]:
            raise InputError(
                f"{directory}: holds {len(found)} shards of split {split!r}, its manifest.json "
                f"lists {len(shards)}. Copy the dataset version again, or remove it."
            )
        _build_cache(cache, directory, split, sum(shard_lengths))
    opened = _open_cache(cache, shard_lengths)
    assert opened is not None
    return opened


def _open_cache(cache: Path, shard_lengths: tuple[int, ...]) -> Split | None:
    """None when the cache is absent or can't be what was built."""
    try:
        arrays = [
            np.load(cache / f"{name}.npy", mmap_mode="r")
            for name in ("signal", "cap_class", "length", "read_id")
        ]
    except (OSError, ValueError):
        return None
    if any(len(array) != sum(shard_lengths) for array in arrays):
        return None
    signal, cap_class, length, read_id = arrays
    return Split(signal, cap_class, length, read_id, shard_lengths)


def _build_cache(cache: Path, directory: Path, split: str, total: int) -> None:
    """Reads the shards once, a block in memory at a time."""
    target_length, dtype = records.signal_spec(directory)
    create = functools.partial(np.lib.format.open_memmap, mode="w+")
    with (
        files.atomic_directory(cache) as partial,
        log.progress(f"Reading {split}", total=total, unit="reads") as bar,
    ):
        signal = create(partial / "signal.npy", dtype=dtype, shape=(total, target_length))
        cap_class = create(partial / "cap_class.npy", dtype=np.int32, shape=(total,))
        length = create(partial / "length.npy", dtype=np.int32, shape=(total,))
        read_id = create(partial / "read_id.npy", dtype="S1", shape=(total,))
        done = 0
        for block in records.read_blocks(directory, split):
            end = done + len(block.lengths)
            if end > total:
                done = end
                break
            if block.read_ids.dtype.itemsize > read_id.dtype.itemsize:
                # Rare: identifiers mostly have one width. The old file stays open, unnamed.
                (partial / "read_id.npy").unlink()
                wider = create(partial / "read_id.npy", dtype=block.read_ids.dtype, shape=(total,))
                wider[:done] = read_id[:done]
                read_id = wider
            signal[done:end] = block.signals
            cap_class[done:end] = block.cap_classes
            length[done:end] = block.lengths
            read_id[done:end] = block.read_ids
            bar.advance(end - done)
            done = end
        if done != total:
            found = f"more than {total:,}" if done > total else f"{done:,}"
            raise InputError(
                f"{directory}: the shards of split {split!r} hold {found} records, manifest.json "
                f"says {total:,}. Copy the dataset version again, or remove it."
            )
        for array in (signal, cap_class, length, read_id):
            array.flush()


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
    signal = signal.astype(jnp.promote_types(signal.dtype, jnp.float32))
    if augmented:
        stretch = time_warping.stretches(key, example, version)
        signal = time_warping.time_warp(signal, length, stretch)
    return {"signal": signal[:, :, None], "cap_class": cap_class}


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
    is, 3r + 1 and 3r + 2 its other versions. `residency` says where the signals lie, on the device
    or in the mapped file; the batches are the same."""

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        augment: bool,
        residency: Literal["device", "host"],
    ) -> None:
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
        if residency == "device":
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

        signal (B, T, 1) float32, or float64 for float64 storage under x64; cap_class (B,) int32."""
        order = self.order(epoch).astype(np.int32)
        key = time_warping.epoch_key(self._seed, epoch)
        augmented = self._augmented
        if self._on_device is None:
            # JAX doesn't wait for a step: the host gathers the next batch while the device works.
            for example in order[start_step:]:
                yield _make_batch(*self._gather_on_host(example), key, augmented=augmented)
            return
        on_device = jax.device_put(order)
        for step in range(start_step, len(order)):
            yield _gather_batch(
                self._on_device, on_device, np.int32(step), key, augmented=augmented
            )

    def _gather_on_host(self, example: np.ndarray) -> tuple[np.ndarray, ...]:
        record, version = np.divmod(example, np.int32(self._versions))
        by_place = np.argsort(record)  # read from the disk in its order, then put back in place
        signal = np.empty((len(record), self._split.signal.shape[1]), self._split.signal.dtype)
        signal[by_place] = self._split.signal[record[by_place]]
        return signal, self._split.cap_class[record], self._split.length[record], example, version


class EvaluationBatches:
    """Every record of a split exactly once, in stored order; iterable again and again.

    signal (B, T, 1), cap_class (B,) int32, weight (B,) float32: the last batch is filled up with
    zeros whose weight is 0. B = min(batch_size, number of records)."""

    def __init__(self, split: Split, *, batch_size: int) -> None:
        self._split = split
        self.num_examples = len(split)
        self.batch_size = max(1, min(batch_size, len(split)))

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        dtype = np.promote_types(self._split.signal.dtype, np.float32)
        for start in range(0, self.num_examples, self.batch_size):
            part = slice(start, start + self.batch_size)
            cap_class = self._split.cap_class[part]
            signal = self._split.signal[part, :, None].astype(dtype)
            missing = self.batch_size - len(cap_class)
            yield {
                "signal": jnp.asarray(np.pad(signal, ((0, missing), (0, 0), (0, 0)))),
                "cap_class": jnp.asarray(np.pad(cap_class, (0, missing))),
                "weight": jnp.asarray(np.arange(self.batch_size) < len(cap_class), jnp.float32),
            }
