"""Labels that the ETL would take for mistakes: none at all, or -99, the number of an unknown cap.

They are put aside, so that the ETL's own scanner reads the rest of the rows at its full speed."""

from dataclasses import replace

import numpy as np

from capfinder.compiled import helper, kernel
from capfinder.etl.csv_files import Block
from capfinder.etl.csv_reader import MAX_CLASS_DIGITS, MAX_READ_ID_BYTES, Rows
from capfinder.etl.kernels import line_bounds
from capfinder.evaluation.predictions import NO_LABEL

_QUOTE, _COMMA, _MINUS, _ZERO = b'",-0'
_MOST_BYTES = MAX_READ_ID_BYTES + 2


class SetAside:
    """The labels taken out of one block: of the lines (k,) the labels (k,), NO_LABEL for none."""

    def __init__(self, lines: np.ndarray, labels: np.ndarray) -> None:
        self._lines, self._labels = lines, labels

    def put_back(self, rows: Rows) -> np.ndarray:
        """(n,) int64 label of each row as it is in the file."""
        labels = rows.cap_class.astype(np.int64)
        if len(self._lines):
            place = np.searchsorted(self._lines, rows.line).clip(max=len(self._lines) - 1)
            is_here = self._lines[place] == rows.line
            labels[is_here] = self._labels[place[is_here]]
        return labels


def set_aside(block: Block) -> tuple[Block, SetAside]:
    """The block with 0 where a label was empty or a negative number, and what was there."""
    none = np.zeros(0, np.int64)
    if block.is_head:
        return block, SetAside(none, none)
    buffer = np.frombuffer(block.data, np.uint8)
    bounds = line_bounds(buffer)
    places, labels = _unusual_labels(buffer, bounds)
    unusual = np.flatnonzero(places[0] >= 0)
    if not len(unusual):
        return block, SetAside(none, none)
    data = _with_zeros(buffer, np.ascontiguousarray(places[:, unusual])).tobytes()
    return replace(block, data=data), SetAside(bounds[2, unusual] + block.line, labels[unusual])


@kernel
def _unusual_labels(buffer: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bounds (3, n) of lines -> places (2, n) int64, start and end of the label's field with its
    quotes, -1 where it is no empty one and no negative number; labels (n,) int64."""
    count = bounds.shape[1]
    places, labels = np.full((2, count), -1, np.int64), np.zeros(count, np.int64)
    for row in range(count):
        end = bounds[1, row]
        start = _after_id(buffer, bounds[0, row], end)
        is_quoted = start < end and buffer[start] == _QUOTE
        at = start + is_quoted
        is_negative = at < end and buffer[at] == _MINUS
        first = at + is_negative
        stop, label = first, 0
        while stop < end and stop - first < MAX_CLASS_DIGITS and 48 <= buffer[stop] <= 57:
            label = 10 * label + int(np.int64(buffer[stop])) - 48
            stop += 1
        after = stop + is_quoted
        if after >= end or buffer[after] != _COMMA or (is_quoted and buffer[stop] != _QUOTE):
            continue
        if is_negative != (stop > first):  # digits alone, or a minus alone
            continue
        places[0, row], places[1, row] = start, after
        labels[row] = -label if is_negative else NO_LABEL
    return places, labels


@helper
def _after_id(buffer: np.ndarray, at: int, end: int) -> int:
    """Where the field behind the read_id begins; the line's end when that is nowhere near."""
    is_quoted = buffer[at] == _QUOTE
    stop = min(end, at + _MOST_BYTES)
    at += is_quoted
    while at < stop and buffer[at] != (_QUOTE if is_quoted else _COMMA):
        at += 1
    at += is_quoted
    return at + 1 if at < end and buffer[at] == _COMMA else end


@kernel
def _with_zeros(buffer: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The bytes with "0" instead of those at places (2, k), start and end of each."""
    count = places.shape[1]
    out = np.empty(len(buffer) + count, np.uint8)
    read = written = 0
    for k in range(count):
        size = places[0, k] - read
        out[written : written + size] = buffer[read : places[0, k]]
        out[written + size] = _ZERO
        read, written = places[1, k], written + size + 1
    rest = len(buffer) - read
    out[written : written + rest] = buffer[read:]
    return out[: written + rest]
