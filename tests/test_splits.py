import itertools
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder.errors import InputError
from capfinder.etl import splits

groups_and_cuts = st.tuples(
    st.lists(st.integers(0, 4), min_size=1, max_size=40), st.lists(st.integers(0, 40), max_size=4)
)


@given(groups_and_cuts)
def test_ranks_run_on_from_part_to_part(groups_and_cuts):
    groups, cuts = groups_and_cuts
    before = np.zeros(5, np.int64)
    parts = np.split(np.array(groups), sorted(min(cut, len(groups)) for cut in cuts))
    ranks = np.concatenate([splits.running_ranks(part, before) for part in parts])
    assert ranks.tolist() == [groups[:i].count(group) for i, group in enumerate(groups)]
    assert before.tolist() == [groups.count(group) for group in range(5)]


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


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=4))
def test_a_split_by_rank_is_exact(counts):
    labels = np.repeat(np.arange(len(counts)), [sum(parts) for parts in counts])
    ranks = np.concatenate([np.arange(sum(parts)) for parts in counts])
    split = splits.split_of_rank(ranks, labels, counts)
    for label, parts in enumerate(counts):
        of_class = split[labels == label]
        assert tuple(np.bincount(of_class, minlength=3)) == parts
        assert (np.diff(of_class) >= 0).all()


def by_group(group, labels, counts, kind="parent_read", has_test_dir=False):
    """Split (n,) of reads (n,) by their group and class."""
    entries, size = np.unique(np.stack([group, labels]), axis=1, return_counts=True)
    assigned = splits.split_groups(*entries, size, counts, has_test_dir=has_test_dir, kind=kind)
    return assigned[group]


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
        (1, "file", "class 1 has a single run, class 2 has a single run; 3 or more are needed"),
        (2, "file", "class 1 has 2 runs, class 2 has a single run; 3 or more are needed"),
        (2, "parent_read", "class 1 has 2 parent reads, class 2 has a single parent read; 3 or"),
    ],
)
def test_too_few_groups_are_an_error_that_names_every_such_class(groups, kind, message):
    group = np.concatenate([np.arange(10), 10 + np.arange(10) % groups, [12] * 10])
    labels = np.repeat([0, 1, 2], 10)
    with pytest.raises(InputError, match=message):
        by_group(group, labels, [(6, 2, 2)] * 3, kind)


def taken_in_turn(sizes, target):
    taken, gap = [], target
    for i, size in enumerate(sizes):
        if abs(gap - size) < abs(gap):
            taken.append(i)
            gap -= size
    return taken


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 400))
def test_groups_are_taken_as_one_at_a_time_would(sizes, target):
    assert splits._taken(np.array(sizes, np.int64), target).tolist() == taken_in_turn(sizes, target)


def test_a_million_groups_are_split_in_a_moment():
    sizes = np.random.default_rng(1).integers(1, 9, 1_000_000)
    total = int(sizes.sum())
    counts = [(total - 2 * (total // 10), total // 10, total // 10)]
    parts = splits.split_groups(
        np.arange(len(sizes)),
        np.zeros(len(sizes), np.int64),
        sizes,
        counts,
        has_test_dir=False,
        kind="parent_read",
    )
    assert np.abs(np.bincount(parts, sizes) - counts[0]).max() <= sizes.max()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_reads_are_placed_as_their_standing_in_their_class_says(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ranks = np.concatenate([np.arange(size) for size in sizes])
    position = splits.position_of_rank(ranks, labels, np.array(sizes))
    by_standing = sorted(
        range(len(labels)),
        key=lambda i: (Fraction(2 * int(ranks[i]) + 1, 2 * sizes[labels[i]]), labels[i]),
    )
    assert np.argsort(position).tolist() == by_standing
    assert sorted(position.tolist()) == list(range(len(labels)))
    if len(set(sizes)) == 1:
        assert labels[by_standing].tolist() == list(range(len(sizes))) * sizes[0]


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 7))
def test_shards_cover_all_and_begin_with_a_whole_round_of_classes(count, per_shard, num_classes):
    bounds = splits.shard_bounds(count, reads_per_shard=per_shard, num_classes=num_classes)
    assert bounds[0] == 0
    assert bounds[-1] == count
    sizes = np.diff(bounds)
    assert (sizes > 0).all()
    assert all(bound % num_classes == 0 for bound in bounds[:-1])
    assert sizes.max() <= per_shard + 2 * num_classes
