import numpy as np
import pytest

from capfinder.errors import StageFailedError
from capfinder.etl import spill
from capfinder.etl.leaks import LeakCheck


def check(tmp_path, entries, *, may_repeat=False):
    """entries: (split, first word, second word)."""
    gathered = LeakCheck(tmp_path, what="read_id", entries=len(entries), may_repeat=may_repeat)
    for split, first, second in entries:
        gathered.add(split, np.array([first], np.uint64), np.array([second], np.uint64))
    gathered.check()


def test_the_leak_check_finds_a_read_in_two_splits_or_twice_in_one(tmp_path, monkeypatch):
    apart = [(0, 2**63 + 5, 1), (0, 7, 1), (1, 7, 2), (2, 8, 1)]
    for buffer_bytes in (0, spill.BUFFER_BYTES):
        monkeypatch.setattr(spill, "BUFFER_BYTES", buffer_bytes)
        check(tmp_path, apart)
        with pytest.raises(StageFailedError, match=r"1 read_ids are twice .* in train and test"):
            check(tmp_path, [*apart, (2, 2**63 + 5, 1)])
        with pytest.raises(StageFailedError, match=r"2 read_ids are twice .* in validation and"):
            check(tmp_path, [*apart, (1, 7, 2), (1, 8, 1)])
        with pytest.raises(StageFailedError, match=r"1 read_ids are twice .* in train\."):
            check(tmp_path, [*apart, (0, 7, 1)])


def test_a_group_may_come_again_in_its_own_split_alone(tmp_path):
    check(tmp_path, [(0, 7, 7), (0, 7, 7), (1, 8, 8)], may_repeat=True)
    with pytest.raises(StageFailedError, match="in train and validation"):
        check(tmp_path, [(0, 7, 7), (0, 7, 7), (1, 7, 7)], may_repeat=True)


def test_a_million_entries_with_one_leak(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "BUFFER_BYTES", 1 << 20)
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 2**64, (2, 1_000_000), np.uint64)
    gathered = LeakCheck(tmp_path, what="read_id", entries=len(first))
    gathered.add(0, first[:600_000], second[:600_000])
    gathered.add(2, first[599_999:], second[599_999:])
    with pytest.raises(StageFailedError, match="1 read_ids are twice"):
        gathered.check()
    assert list(tmp_path.iterdir()) == []
