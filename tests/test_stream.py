import functools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder.etl import stream
from capfinder.etl.stream import map_in_order, merge


def numbers(name, count):
    for number in range(count):
        yield name, number


def streams(counts):
    return [functools.partial(numbers, name, count) for name, count in enumerate(counts)]


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("etl")]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), max_size=9))
def test_merging_loses_nothing_and_keeps_each_stream_in_order(counts):
    merged = list(merge(streams(counts)))
    assert sorted(merged) == [item for each in streams(counts) for item in each()]
    for name, count in enumerate(counts):
        assert [number for own, number in merged if own == name] == list(range(count))
    assert reader_threads() == []


def test_an_error_in_a_stream_is_raised_and_ends_the_others():
    def broken():
        yield "broken", 0
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(merge([*streams([10_000]), broken]))
    assert reader_threads() == []


def test_who_stops_early_leaves_no_thread_and_closes_the_streams():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    items = merge([endless])
    assert next(items) == 0
    items.close()
    assert closed.is_set()
    assert reader_threads() == []


def test_a_slow_taker_bounds_what_is_read_ahead():
    read = []

    def counted():
        for number in range(10_000):
            read.append(number)
            yield number

    items = merge([counted])
    assert next(items) == 0
    time.sleep(0.2)
    assert len(read) <= 2 * stream.worker_count() + 2
    items.close()


@given(st.lists(st.integers()), st.integers(1, 4), st.integers(1, 3))
def test_results_come_in_the_order_of_the_items(items, workers, ahead):
    assert list(map_in_order(str, items, workers=workers, ahead=ahead)) == [str(i) for i in items]


def test_a_failure_is_raised_in_its_place():
    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(map_in_order(lambda number: 1 // number, [1, 1, 0, 1]))
    assert reader_threads() == []
