"""Which good reads are used, in which split, shard and place: decided before any is parsed."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capfinder.data import splits
from capfinder.data.records import SPLITS
from capfinder.data.scan import Identities
from capfinder.errors import InputError

SHARD_BYTES = 64_000_000  # one shard at a time is in memory
RECORD_EXTRA_BYTES = 128  # of a record, beside its signal


@dataclass(frozen=True)
class SplitRules:
    """The settings that decide selection and splits; examples_per_class None: the smallest class's
    size, or no limit with keep_all."""

    num_classes: int
    examples_per_class: int | None
    train_test_fraction: float
    train_val_fraction: float
    keep_all: bool
    group_by: str
    seed: int


@dataclass(frozen=True)
class Shard:
    split: str
    index: int
    num_shards: int
    num_examples: int


@dataclass(frozen=True)
class Plan:
    """The m reads used: row (m,) index into the identities, split (m,) index into SPLITS, shard
    (m,) index into `shards`, place (m,) in the shard; group (m,) the group that must not cross
    splits, None when split by read."""

    row: np.ndarray
    split: np.ndarray
    shard: np.ndarray
    place: np.ndarray
    group: np.ndarray | None
    shards: list[Shard]
    examples_per_class: dict[int, int]
    warnings: list[str]


@dataclass(frozen=True)
class Groups:
    """What must not cross splits: kind "parent_read" or "file"; names (g,) 'S', of_read (n,) index
    into them of each of the identities."""

    kind: str
    names: np.ndarray
    of_read: np.ndarray


def make_plan(
    identities: Identities,
    *,
    is_usable: np.ndarray,
    is_test: np.ndarray,
    run: np.ndarray,
    groups: Groups | None,
    rules: SplitRules,
    record_bytes: int,
) -> Plan:
    """Of the n identities: is_usable (n,) bool; is_test (n,) bool: from the separate test
    directory, so in the test split; run (n,) rank of the file's run. groups None: split by read.

    Raises: InputError when a class has too few reads or groups for its splits."""
    fitted = np.flatnonzero(is_usable & ~is_test)
    tested = np.flatnonzero(is_usable & is_test)
    ids, labels = identities.read_id[fitted], identities.label[fitted]
    quota, warnings = _quota(np.bincount(labels, minlength=rules.num_classes), rules)
    chosen = fitted[splits.choose(ids, identities.hash[fitted], labels, run[fitted], quota)]
    counts = [
        splits.split_counts(
            reads,
            train_test_fraction=rules.train_test_fraction,
            train_val_fraction=rules.train_val_fraction,
            has_test_dir=bool(is_test.any()),
        )
        for reads in quota
    ]
    split = _split(identities, chosen, counts, groups, rules.seed, bool(is_test.any()))
    row = np.concatenate([chosen, tested])
    split = np.concatenate([split, np.full(len(tested), splits.TEST, np.int8)])
    _check_counts(split, identities.label[row], rules.num_classes)
    group = None
    if groups is not None:
        _check_apart(groups, chosen, tested)
        group = groups.of_read[row]
    shard, place, shards = _place(identities, row, split, rules, record_bytes)
    return Plan(row, split, shard, place, group, shards, dict(enumerate(quota)), warnings)


def _split(
    identities: Identities,
    chosen: np.ndarray,
    counts: Sequence[tuple[int, int, int]],
    groups: Groups | None,
    seed: int,
    has_test_dir: bool,
) -> np.ndarray:
    ids, labels = identities.read_id[chosen], identities.label[chosen]
    if groups is None:
        hashes = splits.keyed_hash(ids, seed=seed, purpose="split")
        return splits.split_by_read(ids, hashes, labels, counts)
    used, group = np.unique(groups.of_read[chosen], return_inverse=True)
    hashes = splits.keyed_hash(groups.names[used], seed=seed, purpose="split")
    return splits.split_by_group(
        group, hashes, labels, counts, has_test_dir=has_test_dir, kind=groups.kind
    )


def _quota(available: np.ndarray, rules: SplitRules) -> tuple[list[int], list[str]]:
    """Reads to use of each class, and what to say about it."""
    smallest = int(available.argmin())
    limit = rules.examples_per_class
    if rules.keep_all:
        return [int(have) if limit is None else min(int(have), limit) for have in available], []
    wanted = int(available.min()) if limit is None else limit
    if wanted <= available.min():
        return [wanted] * rules.num_classes, []
    have = int(available.min())
    return [have] * rules.num_classes, [
        f"etl_params.examples_per_class={wanted}, but class {smallest} has only {have:,} good "
        f"reads: {have:,} of each class are used."
    ]


def _check_counts(split: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    for label in range(num_classes):
        train, validation, test = np.bincount(split[labels == label], minlength=3).tolist()
        if min(train, validation, test) < 1:
            raise InputError(
                f"class {label} gets {train} reads for training, {validation} for validation and "
                f"{test} for testing; each needs at least one. Add reads, raise "
                "etl_params.examples_per_class, or change shared_params.train_test_fraction or "
                "train_val_fraction."
            )


def _check_apart(groups: Groups, chosen: np.ndarray, tested: np.ndarray) -> None:
    both = np.intersect1d(groups.of_read[chosen], groups.of_read[tested])
    if len(both):
        raise InputError(
            f"split_params.group_by={groups.kind}: {len(both):,} of them, such as "
            f"{groups.names[both[0]].decode()}, are both in etl_params.caps_data_dir and in "
            "split_params.test_caps_data_dir. Remove them from one of the two."
        )


def _place(
    identities: Identities,
    row: np.ndarray,
    split: np.ndarray,
    rules: SplitRules,
    record_bytes: int,
) -> tuple[np.ndarray, np.ndarray, list[Shard]]:
    shard, place = np.zeros(len(row), np.int64), np.zeros(len(row), np.int64)
    ids, labels = identities.read_id[row], identities.label[row]
    hashes = splits.keyed_hash(ids, seed=rules.seed, purpose="order")
    shards: list[Shard] = []
    for number, name in enumerate(SPLITS):
        members = np.flatnonzero(split == number)
        order = members[splits.stored_order(ids[members], hashes[members], labels[members])]
        bounds = splits.shard_bounds(
            len(order),
            reads_per_shard=max(1, SHARD_BYTES // (record_bytes + RECORD_EXTRA_BYTES)),
            num_classes=rules.num_classes,
        )
        for index, (start, end) in enumerate(itertools.pairwise(bounds)):
            shard[order[start:end]] = len(shards)
            place[order[start:end]] = np.arange(end - start)
            shards.append(Shard(name, index, len(bounds) - 1, end - start))
    return shard, place, shards
