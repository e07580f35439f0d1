from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from capfinder.etl import identities, spill
from capfinder.etl.identities import CONFLICT, DUPLICATE, IDENTITY, KEEP, Identities


def records(choose, identity, content=None):
    made = np.zeros(len(choose), IDENTITY)
    made["choose"], made["identity"] = choose, identity
    if content is not None:
        made["content"] = np.array(content, np.uint64)[:, None]
    return made


small = st.integers(0, 3)


@given(st.lists(st.tuples(small, small), min_size=1, max_size=30))
def test_reads_are_ordered_by_hash_then_identity(pairs):
    hashes, ids = np.array(pairs, np.uint64).T
    order = identities.hash_order(hashes, ids)
    assert [pairs[i] for i in order] == sorted(pairs)


reads = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 1), st.integers(0, 3), st.integers(0, 2)),
    min_size=1,
    max_size=30,
)


def verdicts(rows):
    """The rows in hash order and the verdict on each."""
    read, label, content, run = (np.array(column) for column in zip(*rows, strict=True))
    made = records(read // 2, read, content)  # two reads share each choosing hash
    order = identities.hash_order(made["choose"], made["identity"])
    found = identities.find_duplicates(made[order], label[order], run[order])
    return [rows[i] for i in order], found.tolist()


@given(reads, st.randoms(use_true_random=False))
def test_of_duplicates_one_is_kept_by_content_and_of_conflicts_none(rows, random):
    ordered, found = verdicts(rows)
    for read in {row[0] for row in rows}:
        mine = [(row, v) for row, v in zip(ordered, found, strict=True) if row[0] == read]
        if len({row[1] for row, _ in mine}) > 1:
            assert {verdict for _, verdict in mine} == {CONFLICT}
        else:
            assert sorted(v for _, v in mine) == [KEEP] + [DUPLICATE] * (len(mine) - 1)
            (kept,) = (row for row, verdict in mine if verdict == KEEP)
            assert kept[2:] == min(row[2:] for row, _ in mine)
    mixed = random.sample(rows, len(rows))
    assert sorted(zip(*verdicts(mixed), strict=True)) == sorted(zip(ordered, found, strict=True))


def test_parts_come_in_the_order_of_the_hash_without_what_was_excluded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(spill, "BUFFER_BYTES", 500)
    rng = np.random.default_rng(1)
    choose = rng.integers(0, 2**64, 200, np.uint64)
    held = Identities(tmp_path, parts=7)
    for start in range(0, 200, 30):
        held.add(records(choose[start : start + 30], np.arange(start, min(start + 30, 200))))
    assert len(held) == 200
    assert list(tmp_path.iterdir())
    held.exclude(np.array([3, 5], np.uint64))
    held.exclude(np.array([8], np.uint64))
    for _ in range(2):  # they can be gone through again
        parts, found = zip(*held, strict=True)
        assert list(parts) == sorted(parts)
        every = np.concatenate(found)
        kept = [i for i in np.argsort(choose).tolist() if i not in (3, 5, 8)]
        assert every["identity"].tolist() == kept
