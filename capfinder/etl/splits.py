"""Which reads are used, in which split and in which place: pure functions of content and seed.

Every choice is a rank by a keyed hash within a group (of a read in its run, of a chosen read in its
class, of a class's read in its split), never an order of files or rows. So the ETL can go through
hash-ordered parts of the reads, with a count per group for all that it has to remember."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from capfinder.errors import InputError

TRAIN, VALIDATION, TEST = range(3)  # as in records.SPLITS
MAX_GROUPS_TRIED = 10  # all 3**n assignments of a class's groups are compared up to here


def running_ranks(group: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Rank (n,) int64 of each entry in its group, in the order given; group (n,) in 0..g-1.

    before: (g,) int64 entries of each group in earlier calls; counted up here."""
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group, minlength=len(before))
    firsts = np.cumsum(counts) - counts  # of each group in `order`
    ranks = np.empty(len(group), np.int64)
    ranks[order] = np.arange(len(group)) - np.repeat(firsts - before, counts)
    before += counts
    return ranks


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


def split_of_rank(
    rank: np.ndarray, cap_class: np.ndarray, counts: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    """TRAIN, VALIDATION or TEST (n,) int8 of the chosen reads of each class by their rank (n,);
    counts[c]: reads of class c for each."""
    ends = np.cumsum(np.array(counts, np.int64), axis=1)[cap_class]  # (n, 3)
    return (rank[:, None] >= ends[:, :2]).sum(axis=1).astype(np.int8)


def split_groups(
    group: np.ndarray,
    cap_class: np.ndarray,
    size: np.ndarray,
    counts: Sequence[tuple[int, int, int]],
    *,
    has_test_dir: bool,
    kind: str,
) -> np.ndarray:
    """TRAIN, VALIDATION or TEST (g,) int8 of whole groups; the counts are met as nearly as the
    groups allow, with at least one group in each split (none in TEST when has_test_dir).

    Entry i says that group[i] (0..g-1, in the order of their hashes) has size[i] > 0 reads of
    cap_class[i]. A group with reads of several classes goes where the first of these sends it.
    kind: "file" or "parent_read", for messages.
    Raises: InputError that names the classes with fewer groups than there are splits to fill."""
    to_fill = [TRAIN, VALIDATION] if has_test_dir else [TRAIN, VALIDATION, TEST]
    order = np.lexsort((group, cap_class))
    group, size = group[order], size[order]
    ends = np.cumsum(np.bincount(cap_class, minlength=len(counts)))
    of_class = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    check_groups(
        [rows.stop - rows.start for rows in of_class], has_test_dir=has_test_dir, kind=kind
    )
    assigned = np.full(int(group.max()) + 1, -1, np.int8)
    for label, (targets, rows) in enumerate(zip(counts, of_class, strict=True)):
        members, sizes = group[rows], size[rows]
        known = assigned[members]
        taken = [int(sizes[known == split].sum()) for split in range(3)]
        wanted = [max(targets[split] - taken[split], 0) for split in to_fill]
        needed = [taken[split] == 0 for split in to_fill]
        parts = _assign(sizes[known < 0], wanted, needed)
        if parts is None:
            raise InputError(
                f"split_params.group_by={kind}: class {label} can't have a {kind} in each split, "
                "as it shares them with other classes. Split by read."
            )
        assigned[members[known < 0]] = np.array(to_fill, np.int8)[parts]
    return assigned


def check_groups(groups: Sequence[int], *, has_test_dir: bool, kind: str) -> None:
    """groups[c]: of class c. Raises: InputError that names the classes with fewer than there are
    splits to fill."""
    needed = 2 if has_test_dir else 3
    few = [
        f"class {label} has {_count(count, kind)}"
        for label, count in enumerate(groups)
        if count < needed
    ]
    if few:
        raise InputError(
            f"split_params.group_by={kind}: {', '.join(few)}; {needed} or more are needed, "
            "one per split. Add data, or split by read."
        )


def _count(count: int, kind: str) -> str:
    noun = {"file": "run", "parent_read": "parent read"}[kind]
    return f"a single {noun}" if count == 1 else f"{count} {noun}s"


def _assign(sizes: np.ndarray, wanted: list[int], needed: list[bool]) -> np.ndarray | None:
    """Part (g,) of each group so that the parts' sums come near `wanted` and each needed part has
    a group; None when there are too few groups. Equal outcomes: the groups' order decides."""
    if len(sizes) < sum(needed):
        return None
    if not len(sizes):
        return np.zeros(0, np.int8)
    if len(sizes) <= MAX_GROUPS_TRIED:
        return _best_assignment(sizes, wanted, needed)
    parts = np.zeros(len(sizes), np.int8)
    for part in range(len(wanted) - 1, 0, -1):  # train takes what is left
        free = np.flatnonzero(parts == 0)
        taken = _taken(sizes[free], wanted[part])[: len(free) - sum(needed[:part])]
        if needed[part] and not len(taken):
            taken = np.argmin(sizes[free], keepdims=True)
        parts[free[taken]] = part
    return parts


def _taken(sizes: np.ndarray, target: int) -> np.ndarray:
    """Indices of the groups taken when each, in turn, is taken if that brings the sum of their
    sizes nearer to `target`."""
    taken, at, gap = [np.zeros(0, np.int64)], 0, target
    while gap > 0:
        fitting = np.flatnonzero(sizes[at:] < 2 * gap)
        if not len(fitting):
            break
        at += int(fitting[0])
        run = sizes[at : at + gap]  # no more can fit: each has at least one read
        is_nearer = run < 2 * (gap - (np.cumsum(run) - run))
        count = len(run) if is_nearer.all() else int(np.argmin(is_nearer))
        taken.append(np.arange(at, at + count))
        gap -= int(run[:count].sum())
        at += count
    return np.concatenate(taken)


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


def position_of_rank(rank: np.ndarray, cap_class: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Position (n,) int64 in a split of the read that is number rank (n,) of its class.

    totals: (C,) reads of each class in the split. The classes are interleaved: c0, c1, c2, c0, ...
    when equal in size, in proportion otherwise. Read r of a class of n stands at (r + 1/2) / n;
    reads of equal standing come in the order of their classes."""
    position = np.zeros(len(rank), np.int64)
    standing = 2 * rank + 1  # over 2n
    own = totals[cap_class]
    for label, total in enumerate(totals.tolist()):
        # The reads of `label` that stand before: odd numbers q with q * own < standing * total, or
        # equal when its class comes first. Exact, as all are integers.
        reach = standing * total
        last = np.where(cap_class > label, reach // own, -(-reach // own) - 1)
        position += np.where(cap_class == label, rank, np.clip((last + 1) // 2, 0, total))
    return position


def shard_bounds(reads: int, *, reads_per_shard: int, num_classes: int) -> list[int]:
    """Where shards begin and, last, end; each but the last a multiple of num_classes long."""
    rounds = -(-reads // num_classes)
    shards = min(rounds, -(-reads // reads_per_shard))
    return [min(reads, rounds * i // shards * num_classes) for i in range(shards)] + [reads]
