import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder.etl import spill
from capfinder.etl.spill import Spill, part_of_hash

RECORD = np.dtype([("number", "<i8"), ("text", "S5")])


def records(numbers):
    made = np.zeros(len(numbers), RECORD)
    made["number"] = numbers
    made["text"] = [f"t{number}".encode() for number in numbers]
    return made


batches = st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=8)


@pytest.mark.parametrize("buffer_bytes", [0, 100, 1 << 20])
@given(batches=batches)
def test_a_part_gives_its_records_in_order_from_memory_or_files(
    tmp_path_factory, batches, buffer_bytes
):
    directory = tmp_path_factory.mktemp("spill")
    held = Spill(directory, "part", RECORD)
    expected: dict[int, list[int]] = {}
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "BUFFER_BYTES", buffer_bytes)
        for batch in batches:
            numbers = list(range(count, count + len(batch)))
            held.add(np.array(batch, np.int64), records(numbers))
            for part, number in zip(batch, numbers, strict=True):
                expected.setdefault(part, []).append(number)
            count += len(batch)
    assert len(held) == count
    assert held.parts() == sorted(expected)
    for part, numbers in expected.items():
        assert held.read(part).tobytes() == held.read(part).tobytes() == records(numbers).tobytes()
        assert held.take(part).tobytes() == records(numbers).tobytes()
        assert len(held.take(part)) == 0
    assert len(held) == 0
    assert list(directory.iterdir()) == []


def test_what_passes_the_bound_goes_to_files(tmp_path, monkeypatch):
    held = Spill(tmp_path, "part", RECORD)
    held.add(np.array([3, 4]), records([1, 2]))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(spill, "BUFFER_BYTES", 2 * RECORD.itemsize)
    held.add(np.array([4]), records([3]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-3", "part-4"]
    held.add(np.array([4]), records([4]))
    assert held.take(4)["number"].tolist() == [2, 3, 4]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.integers(1, 1000))
def test_parts_follow_each_other_by_hash(hashes, parts):
    hashes = np.sort(np.array(hashes, np.uint64))
    part = part_of_hash(hashes, parts)
    assert (np.diff(part) >= 0).all()
    assert ((part >= 0) & (part < parts)).all()
    edges = np.array([0, 2**64 - 1], np.uint64)
    assert part_of_hash(edges, parts).tolist() == [0, parts - 1]
