"""Which record stands where in an epoch: one pure function of the seed and the epoch."""

from collections.abc import Sequence

import numpy as np

# Records of all classes that are shuffled among themselves: a reader that goes through the shards
# in their order needs memory for this many, 130 MB at 500 float16 samples, and no more.
_WINDOW_RECORDS = 2**17


def epoch_shape(cap_class: np.ndarray, batch_size: int) -> tuple[int, int]:
    """(steps, B) of an epoch; see `epoch_order`."""
    _, counts = np.unique(cap_class, return_counts=True)
    if not len(counts):
        raise ValueError("there are no records to order")
    size = min(batch_size, len(cap_class))
    return -(-len(counts) * int(counts.max()) // size), size


def window_slots(cap_class: np.ndarray) -> int:
    """Places of an epoch's order that use up one window of every class: a reader that takes so many
    at a time, from the first on, finds their records close together in the permuted shards."""
    num_classes = len(np.unique(cap_class))
    return num_classes * max(1, _WINDOW_RECORDS // num_classes)


def epoch_order(
    cap_class: np.ndarray,
    shard_lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
) -> np.ndarray:
    """Record ids (steps, B) int64 of one epoch, B = min(batch_size, number of records N).

    cap_class (N,) in stored order; shard_lengths sum to N. Classes differ by at most one in every
    batch. Per class, shards are permuted, then windows of records shuffled. An epoch is as long as
    it takes to show every record at least once: steps = ceil(n / B) with n = classes x size of the
    largest class, which is N when classes are equal. Then every record comes exactly once, but for
    those at the epoch's beginning that top up the last batch; smaller classes go round again.

    Depends on (seed, epoch) alone, on every platform: seeded raw draws, stable sorts."""
    if sum(shard_lengths) != len(cap_class):
        raise ValueError(f"{sum(shard_lengths)} records in shards, {len(cap_class)} labels")
    steps, size = epoch_shape(cap_class, batch_size)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    records = _by_permuted_shards(np.asarray(shard_lengths), rng)
    labels = cap_class[records]
    classes = np.unique(cap_class)
    window = window_slots(cap_class) // len(classes)
    slots = np.empty(steps * size, np.int64)
    # Slot g belongs to class g mod C, so that any run of slots is balanced to one. Which class
    # has the odd ones changes with the epoch.
    for turn, label in enumerate(classes[_permutation(len(classes), rng)]):
        own = _shuffle_windows(records[labels == label], window, rng)
        places = slots[turn :: len(classes)]
        places[:] = np.resize(own, len(places))  # repeats `own` from its start when it is short
    return slots.reshape(steps, size)


def _permutation(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.argsort(rng.random(count), kind="stable")


def _by_permuted_shards(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All record ids, shard after shard, the shards in random order."""
    permuted = _permutation(len(lengths), rng)
    starts = (np.cumsum(lengths) - lengths)[permuted]  # of each shard, in stored order
    ends = np.cumsum(lengths[permuted])  # of each shard, in the new order
    return np.arange(lengths.sum()) + np.repeat(
        starts - (ends - lengths[permuted]), lengths[permuted]
    )


def _shuffle_windows(records: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    keys = np.arange(len(records)) // size + rng.random(len(records))
    shuffled = np.empty_like(records)
    for start in range(0, len(records), size):
        part = slice(start, start + size)
        shuffled[part] = records[part][_stable_argsort(keys[part])]
    return shuffled


def _stable_argsort(keys: np.ndarray) -> np.ndarray:
    """Without equal keys any sort is the stable one, and numpy's default is thrice as fast."""
    order = np.argsort(keys)
    if (np.diff(keys[order]) == 0).any():
        order = np.argsort(keys, kind="stable")
    return order
