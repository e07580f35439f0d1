"""Which reads are used and which split each goes to: pure functions of content and seed.

Every choice hangs on keyed hashes of the read_id, the parent's id or the run's content, never on
the order or the names of files. In all functions, arrays are (n,), one entry a read."""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from capfinder.errors import InputError

HASH = {"name": "blake2b-64", "version": 1}
TRAIN, VALIDATION, TEST = range(3)  # as in records.SPLITS
KEEP, DUPLICATE, CONFLICT = range(3)
MAX_GROUPS_TRIED = 10  # all 3**n assignments of a class's groups are compared up to here


def keyed_hash(ids: np.ndarray, *, seed: int, purpose: str) -> np.ndarray:
    """64-bit keyed BLAKE2b (n,) uint64 of ids (n,) 'S'. Hashes for different purposes (at most 16
    bytes) are independent of each other."""
    keyed = hashlib.blake2b(digest_size=8, key=str(seed).encode(), person=purpose.encode())

    def digest(value: bytes) -> bytes:
        state = keyed.copy()
        state.update(value)
        return state.digest()

    digests = b"".join([digest(value) for value in ids.tolist()])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def hash_order(hashes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Indices that sort by hash, equal hashes by id."""
    order = np.argsort(hashes, kind="stable")
    is_equal = np.diff(hashes[order]) == 0
    if is_equal.any():
        tied = np.append(is_equal, False) | np.insert(is_equal, 0, False)
        among = order[tied]
        order[tied] = among[np.lexsort((ids[among], hashes[among]))]
    return order


def find_duplicates(
    ids: np.ndarray,
    hashes: np.ndarray,
    cap_class: np.ndarray,
    content: np.ndarray,
    run_rank: np.ndarray,
) -> np.ndarray:
    """KEEP, DUPLICATE or CONFLICT (n,) int8. Of rows with one id and class, that with the lowest
    content (n, 2), then run, is kept; where classes differ, none is."""
    verdict = np.full(len(ids), KEEP, np.int8)
    order = hash_order(hashes, ids)
    is_same = (np.diff(hashes[order]) == 0) & (ids[order][1:] == ids[order][:-1])
    if not is_same.any():
        return verdict
    is_member = np.append(is_same, False) | np.insert(is_same, 0, False)
    members = np.sort(order[is_member])
    keys = (run_rank[members], content[members, 1], content[members, 0], ids[members])
    members = members[np.lexsort(keys)]
    is_first = np.insert(ids[members][1:] != ids[members][:-1], 0, True)
    verdict[members[~is_first]] = DUPLICATE
    starts, labels = np.flatnonzero(is_first), cap_class[members]
    differ = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    verdict[members[differ[np.cumsum(is_first) - 1]]] = CONFLICT
    return verdict


def share_evenly(available: Sequence[int], quota: int) -> list[int]:
    """How much each gives so that the sum is `quota`: equal shares, but none more than it has;
    what can't be divided comes from the first ones."""
    shares = [0] * len(available)
    left = min(quota, sum(available))
    while left:
        open_ = [i for i, have in enumerate(available) if shares[i] < have]
        step = min(left // len(open_), min(available[i] - shares[i] for i in open_))
        for i in open_ if step else open_[:left]:
            shares[i] += max(step, 1)
            left -= max(step, 1)
    return shares


def choose(
    ids: np.ndarray,
    hashes: np.ndarray,
    cap_class: np.ndarray,
    run_rank: np.ndarray,
    quota: Sequence[int],
) -> np.ndarray:
    """Whether a read is used (n,) bool: quota[c] reads of class c, shared evenly over its runs,
    in each run those with the lowest hashes."""
    order = hash_order(hashes, ids)
    chosen = np.zeros(len(ids), np.bool_)
    for label, wanted in enumerate(quota):
        of_class = order[cap_class[order] == label]
        by_run = of_class[np.argsort(run_rank[of_class], kind="stable")]
        available = np.unique(run_rank[of_class], return_counts=True)[1]
        starts = np.cumsum(available) - available
        shares = share_evenly(available.tolist(), wanted)
        for start, share in zip(starts.tolist(), shares, strict=True):
            chosen[by_run[start : start + share]] = True
    return chosen


def split_counts(
    reads: int, *, train_test_fraction: float, train_val_fraction: float, has_test_dir: bool
) -> tuple[int, int, int]:
    """Reads of a class for train, validation and test, exact in decimal arithmetic."""
    fitted = reads if has_test_dir else _floor(train_test_fraction, reads)
    train = _floor(train_val_fraction, fitted)
    return train, fitted - train, reads - fitted


def _floor(fraction: float, count: int) -> int:
    """0.29 x 100 is 29, not the 28.999... that binary floats give."""
    return math.floor(Fraction(repr(float(fraction))) * count)


def split_by_read(
    ids: np.ndarray,
    hashes: np.ndarray,
    cap_class: np.ndarray,
    counts: Sequence[tuple[int, int, int]],
) -> np.ndarray:
    """TRAIN, VALIDATION or TEST (n,) int8; counts[c]: reads of class c for each."""
    assigned = np.zeros(len(ids), np.int8)
    order = hash_order(hashes, ids)
    for label, parts in enumerate(counts):
        assigned[order[cap_class[order] == label]] = np.repeat(np.arange(3, dtype=np.int8), parts)
    return assigned


def split_by_group(
    group: np.ndarray,
    group_hashes: np.ndarray,
    cap_class: np.ndarray,
    counts: Sequence[tuple[int, int, int]],
    *,
    has_test_dir: bool,
    kind: str,
) -> np.ndarray:
    """As `split_by_read` with whole groups, the counts met as nearly as the groups allow, but at
    least one group in each split (none in TEST when that has a directory of its own).

    group: (n,) index into group_hashes (g,); kind: what a group is, for messages. A group with
    reads of several classes goes where the first of these classes sends it.
    Raises: InputError for a class with fewer groups than there are splits to fill."""
    to_fill = [TRAIN, VALIDATION] if has_test_dir else [TRAIN, VALIDATION, TEST]
    assigned = np.full(len(group_hashes), -1, np.int8)
    for label, targets in enumerate(counts):
        members, sizes = np.unique(group[cap_class == label], return_counts=True)
        if len(members) < len(to_fill):
            raise InputError(
                f"split_params.group_by={kind}: class {label} has {_count(len(members), kind)}, "
                f"{len(to_fill)} or more are needed, one per split. Add data, or split by read."
            )
        order = np.argsort(group_hashes[members], kind="stable")
        members, sizes = members[order], sizes[order]
        is_free = assigned[members] < 0
        taken = [int(sizes[assigned[members] == split].sum()) for split in range(3)]
        wanted = [max(targets[split] - taken[split], 0) for split in to_fill]
        needed = [taken[split] == 0 for split in to_fill]
        parts = _assign(sizes[is_free], wanted, needed)
        if parts is None:
            raise InputError(
                f"split_params.group_by={kind}: class {label} can't have a {kind} in each split, "
                "as it shares them with other classes. Split by read."
            )
        assigned[members[is_free]] = np.array(to_fill, np.int8)[parts]
    return assigned[group]


def _count(count: int, kind: str) -> str:
    noun = {"file": "run", "parent_read": "parent read"}[kind]
    return f"a single {noun}" if count == 1 else f"{count} {noun}s"


def _assign(sizes: np.ndarray, wanted: list[int], needed: list[bool]) -> np.ndarray | None:
    """Part (g,) of each group so that the parts' sums come near `wanted` and each needed part has
    a group; None when there are too few groups. Equal outcomes: the groups' order decides."""
    if len(sizes) < sum(needed):
        return None
    if not len(sizes):
        return np.zeros(0, np.int64)
    if len(sizes) <= MAX_GROUPS_TRIED:
        return _best_assignment(sizes, wanted, needed)
    parts = np.zeros(len(sizes), np.int64)
    for part in range(len(wanted) - 1, 0, -1):  # train takes what is left
        gap, reserved = wanted[part], sum(needed[:part])
        free = np.flatnonzero(parts == 0)
        if needed[part] and not (np.abs(gap - sizes[free]) < gap).any():
            parts[free[np.argmin(sizes[free])]] = part
            continue
        for i in free.tolist():
            if abs(gap - int(sizes[i])) < abs(gap) and (parts == 0).sum() > reserved:
                parts[i] = part
                gap -= int(sizes[i])
    return parts


def _best_assignment(sizes: np.ndarray, wanted: list[int], needed: list[bool]) -> np.ndarray | None:
    tried = np.indices([len(wanted)] * len(sizes)).reshape(len(sizes), -1)  # (g, assignments)
    gaps = np.zeros(tried.shape[1], np.int64)
    for part, target in enumerate(wanted):
        is_in = tried == part
        gaps += np.abs(sizes @ is_in - target)
        if needed[part]:
            gaps[~is_in.any(axis=0)] = np.iinfo(np.int64).max // 2
    best = int(np.argmin(gaps))
    return None if gaps[best] >= np.iinfo(np.int64).max // 2 else tried[:, best]


def stored_order(ids: np.ndarray, hashes: np.ndarray, cap_class: np.ndarray) -> np.ndarray:
    """Indices in the order in which a split is written: each class shuffled by hash, the classes
    interleaved (c0, c1, c2, c0, ... when equal in size, in proportion otherwise)."""
    order = hash_order(hashes, ids)
    place = np.empty(len(ids))
    for label in np.unique(cap_class):
        of_class = order[cap_class[order] == label]
        place[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    return np.lexsort((cap_class, place))


def shard_bounds(reads: int, *, reads_per_shard: int, num_classes: int) -> list[int]:
    """Where shards begin and, last, end; each but the last a multiple of num_classes long."""
    rounds = -(-reads // num_classes)
    shards = min(rounds, -(-reads // reads_per_shard))
    return [min(reads, rounds * i // shards * num_classes) for i in range(shards)] + [reads]
