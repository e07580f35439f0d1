import hashlib
import itertools
from decimal import ROUND_FLOOR, Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder.data import splits
from capfinder.data.splits import CONFLICT, DUPLICATE, KEEP
from capfinder.errors import InputError


def names(count: int, prefix: str = "read") -> np.ndarray:
    return np.array([f"{prefix}{i}".encode() for i in range(count)])


def hashed(ids: np.ndarray, purpose: str = "choose", seed: int = 42) -> np.ndarray:
    return splits.keyed_hash(ids, seed=seed, purpose=purpose)


def shuffled(rng_seed: int, *arrays: np.ndarray) -> list[np.ndarray]:
    order = np.random.default_rng(rng_seed).permutation(len(arrays[0]))
    return [array[order] for array in arrays]


def test_the_hash_is_keyed_blake2b_of_64_bits():
    ids = names(3)
    expected = [
        int.from_bytes(
            hashlib.blake2b(value, digest_size=8, key=b"7", person=b"split").digest(), "big"
        )
        for value in ids.tolist()
    ]
    assert hashed(ids, "split", 7).tolist() == expected
    # Written down: other values would silently give other splits for the same seed.
    assert hashed(np.array([b"read0"])).tolist() == [11384056386028303324]


def test_hashes_of_another_seed_or_purpose_are_others():
    ids = names(500)
    kinds = [hashed(ids), hashed(ids, "split"), hashed(ids, "order"), hashed(ids, seed=43)]
    for one, two in itertools.combinations(kinds, 2):
        assert not (one == two).any()
        ranks = np.argsort(np.argsort(one)), np.argsort(np.argsort(two))
        assert abs(np.corrcoef(*ranks)[0, 1]) < 0.2


def test_equal_hashes_are_ordered_by_id():
    hashes = np.array([5, 1, 5, 5, 2], np.uint64)
    ids = np.array([b"c", b"z", b"a", b"b", b"y"])
    assert ids[splits.hash_order(hashes, ids)].tolist() == [b"z", b"y", b"a", b"b", b"c"]


reads = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 1), st.integers(0, 3), st.integers(0, 2)),
    min_size=1,
    max_size=30,
)


@given(reads, st.integers(0, 99))
def test_of_duplicates_one_is_kept_by_content_and_of_conflicts_none(rows, rng_seed):
    ids, labels, content, run = (np.array(column) for column in zip(*rows, strict=True))
    ids = np.array([f"r{i}".encode() for i in ids])
    content = np.stack([content, content], axis=1).astype(np.uint64)

    def find(ids, labels, content, run):
        return splits.find_duplicates(ids, hashed(ids), labels, content, run)

    verdict = find(ids, labels, content, run)
    for name in np.unique(ids):
        here = ids == name
        if len(np.unique(labels[here])) > 1:
            assert (verdict[here] == CONFLICT).all()
        else:
            assert sorted(verdict[here].tolist()) == [KEEP] + [DUPLICATE] * (here.sum() - 1)
            kept = np.flatnonzero(here & (verdict == KEEP))[0]
            keys = list(zip(content[here, 0].tolist(), run[here].tolist(), strict=True))
            assert (content[kept, 0], run[kept]) == min(keys)
    mixed = shuffled(rng_seed, ids, labels, content, run)
    kept = [
        sorted(
            zip(i[v == KEEP].tolist(), c[v == KEEP, 0].tolist(), r[v == KEEP].tolist(), strict=True)
        )
        for i, c, r, v in ((ids, content, run, verdict), (mixed[0], *mixed[2:], find(*mixed)))
    ]
    assert kept[0] == kept[1]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 200))
def test_a_quota_is_shared_as_evenly_as_the_runs_allow(available, quota):
    shares = splits.share_evenly(available, quota)
    assert sum(shares) == min(quota, sum(available))
    assert all(0 <= share <= have for share, have in zip(shares, available, strict=True))
    short = [share for share, have in zip(shares, available, strict=True) if share < have]
    # Who could give more gives as much as anybody, but for the one left over.
    assert all(max(shares) - share <= 1 for share in short)


@pytest.mark.parametrize(
    ("available", "quota", "expected"),
    [
        ([10, 10], 7, [4, 3]),
        ([2, 10, 10], 12, [2, 5, 5]),
        ([0, 3], 9, [0, 3]),
        ([5, 5, 5], 0, [0] * 3),
    ],
)
def test_shares_of_known_quotas(available, quota, expected):
    assert splits.share_evenly(available, quota) == expected


@given(st.integers(0, 99), st.integers(1, 60))
def test_the_lowest_hashes_of_each_run_are_chosen_whatever_the_order(rng_seed, quota):
    rng = np.random.default_rng(rng_seed)
    ids, labels, run = names(100), rng.integers(0, 2, 100), rng.integers(0, 3, 100)
    chosen = splits.choose(ids, hashed(ids), labels, run, [quota, quota // 2])
    for label, wanted in ((0, quota), (1, quota // 2)):
        assert chosen[labels == label].sum() == min(wanted, (labels == label).sum())
        for number in range(3):
            here = (labels == label) & (run == number)
            inside, outside = hashed(ids)[here & chosen], hashed(ids)[here & ~chosen]
            if len(inside) and len(outside):
                assert inside.max() < outside.min()
    mixed = shuffled(rng_seed, ids, labels, run)
    again = splits.choose(mixed[0], hashed(mixed[0]), *mixed[1:], [quota, quota // 2])
    assert set(mixed[0][again].tolist()) == set(ids[chosen].tolist())


fraction = st.decimals("0.01", "0.99", places=2)


@given(st.integers(0, 100_000), fraction, fraction, st.booleans())
def test_counts_are_exact_in_decimal(count, test_fraction, validation_fraction, has_test_dir):
    train, validation, test = splits.split_counts(
        count,
        train_test_fraction=float(test_fraction),
        train_val_fraction=float(validation_fraction),
        has_test_dir=has_test_dir,
    )
    fitted = count
    if not has_test_dir:
        fitted = int((test_fraction * count).to_integral_value(ROUND_FLOOR))
    expected = int((validation_fraction * fitted).to_integral_value(ROUND_FLOOR))
    assert (train, validation, test) == (expected, fitted - expected, count - fitted)


def test_binary_floats_take_no_read_away():
    assert int(0.29 * 100) == 28  # what a plain product gives
    counts = splits.split_counts(
        100, train_test_fraction=0.29, train_val_fraction=0.9, has_test_dir=False
    )
    assert counts == (26, 3, 71)
    assert Decimal("0.29") * 100 == 29


@given(st.integers(0, 99), st.lists(st.integers(3, 40), min_size=1, max_size=4))
def test_a_split_by_read_is_exact_and_hangs_on_nothing_but_the_reads(rng_seed, sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ids = names(len(labels))
    counts = [(size - 2, 1, 1) for size in sizes]
    split = splits.split_by_read(ids, hashed(ids, "split"), labels, counts)
    for label, parts in enumerate(counts):
        assert tuple(np.bincount(split[labels == label], minlength=3)) == parts
    mixed = shuffled(rng_seed, ids, labels)
    again = splits.split_by_read(mixed[0], hashed(mixed[0], "split"), mixed[1], counts)
    assert dict(zip(ids.tolist(), split.tolist(), strict=True)) == dict(
        zip(mixed[0].tolist(), again.tolist(), strict=True)
    )


def by_group(group, labels, counts, kind="parent_read", has_test_dir=False):
    hashes = hashed(names(int(group.max()) + 1, "parent"), "split")
    return splits.split_by_group(
        group, hashes, labels, counts, has_test_dir=has_test_dir, kind=kind
    )


@given(st.lists(st.integers(1, 30), min_size=3, max_size=40), st.integers(0, 99))
def test_no_group_crosses_splits_and_each_split_has_one(sizes, rng_seed):
    """Adversarial: reads of a group lie anywhere, groups are of any size."""
    group, labels = np.repeat(np.arange(len(sizes)), sizes), np.zeros(sum(sizes), int)
    order = np.random.default_rng(rng_seed).permutation(len(group))
    group = group[order]
    total = len(group)
    fitted = total * 4 // 5
    counts = [(fitted - fitted // 5, fitted // 5, total - fitted)]
    split = by_group(group, labels, counts)
    for number in range(len(sizes)):
        assert len(np.unique(split[group == number])) == 1
    found = np.bincount(split, minlength=3)
    assert (found > 0).all()
    # No more than the largest group off in any split.
    assert np.abs(found - counts[0]).max() <= 2 * max(sizes)


@given(st.lists(st.integers(1, 50), min_size=3, max_size=6))
def test_few_groups_meet_the_counts_as_nearly_as_any_assignment(sizes):
    group, total = np.repeat(np.arange(len(sizes)), sizes), sum(sizes)
    wanted = np.array([total - total // 3 - total // 5, total // 5, total // 3])
    split = by_group(group, np.zeros(total, int), [tuple(wanted)])
    best = min(
        np.abs(np.bincount(parts, sizes, minlength=3) - wanted).sum()
        for parts in itertools.product(range(3), repeat=len(sizes))
        if len(set(parts)) == 3
    )
    assert np.abs(np.bincount(split, minlength=3) - wanted).sum() == best


def test_a_group_with_reads_of_two_classes_stays_whole():
    group = np.array([0, 1, 2, 3, 4, 5] * 4)
    labels = np.repeat([0, 1], 12)
    split = by_group(group, labels, [(8, 2, 2), (8, 2, 2)])
    for number in range(6):
        assert len(np.unique(split[group == number])) == 1
    for label in (0, 1):
        assert set(split[labels == label].tolist()) == {0, 1, 2}


def test_groups_without_a_test_split_fill_the_other_two():
    group = np.repeat(np.arange(4), 5)
    split = by_group(group, np.zeros(20, int), [(15, 5, 0)], has_test_dir=True)
    assert np.bincount(split, minlength=3).tolist() == [15, 5, 0]


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        (1, "file", "class 1 has a single run, 3 or more are needed"),
        (2, "file", "class 1 has 2 runs, 3 or more are needed"),
        (2, "parent_read", "class 1 has 2 parent reads, 3 or more are needed"),
    ],
)
def test_too_few_groups_are_an_error_that_names_the_class(groups, kind, message):
    group = np.concatenate([np.arange(10), 10 + np.arange(10) % groups])
    labels = np.repeat([0, 1], 10)
    with pytest.raises(InputError, match=message):
        by_group(group, labels, [(6, 2, 2)] * 2, kind)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 99))
def test_equal_classes_are_stored_in_turn_and_shuffled(size, num_classes, rng_seed):
    labels = np.repeat(np.arange(num_classes), size)
    ids = names(len(labels))
    order = splits.stored_order(ids, hashed(ids, "order"), labels)
    assert labels[order].tolist() == list(range(num_classes)) * size
    mixed = shuffled(rng_seed, ids, labels)
    again = splits.stored_order(mixed[0], hashed(mixed[0], "order"), mixed[1])
    assert mixed[0][again].tolist() == ids[order].tolist()


def test_unequal_classes_are_stored_in_proportion():
    labels = np.repeat([0, 1], [90, 10])
    ids = names(100)
    order = splits.stored_order(ids, hashed(ids, "order"), labels)
    for start in range(0, 100, 10):
        assert (labels[order][start : start + 10] == 1).sum() == 1
    assert order.tolist() != sorted(order.tolist())


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 7))
def test_shards_cover_all_and_begin_with_a_whole_round_of_classes(count, per_shard, num_classes):
    bounds = splits.shard_bounds(count, reads_per_shard=per_shard, num_classes=num_classes)
    assert bounds[0] == 0
    assert bounds[-1] == count
    sizes = np.diff(bounds)
    assert (sizes > 0).all()
    assert all(bound % num_classes == 0 for bound in bounds[:-1])
    assert sizes.max() <= per_shard + 2 * num_classes
