"""The text of predictions_*.csv, a row a read: byte for byte what csv.writer and "%.6f" make of it.

Compiled, as csv.writer and a format string a number take 8 us a row with Python's lock held: a
quarter of a core at the speed at which reads are parsed. This takes 0.3."""

import csv
import io
from collections.abc import Sequence

import numpy as np

from capfinder.compiled import helper, inlined, kernel

NO_LABEL = -(2**31)  # a cap_class that is unknown: the column stays empty

_COMMA, _QUOTE, _RETURN, _NEWLINE, _MINUS, _POINT, _ZERO = b',"\r\n-.0'
_DECIMALS = 6
_SCALE = 10**_DECIMALS
_PROBABILITY_BYTES = _DECIMALS + 2  # "0.123456"
_INTEGER_BYTES = 20
_SPLITTER = 2.0**27 + 1  # cuts a float64 in two halves of 26 bits


def header(num_classes: int, more: Sequence[str] = ()) -> bytes:
    """more: names of further columns at the end."""
    columns = [f"p_{number}" for number in range(num_classes)]
    names = ["read_id", "cap_class", "predicted_cap_class", "predicted_cap", *columns, *more]
    return (",".join(names) + "\r\n").encode()


def lines(
    read_ids: np.ndarray,
    cap_classes: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    more: np.ndarray | None = None,
) -> bytes:
    """A line a read. read_ids (n,) 'S' UTF-8; cap_classes (n,) integers, NO_LABEL where unknown;
    probabilities (n, C) float64 in 0..1: the predicted class is the highest, the first of several;
    more (n, k) 'S' UTF-8: further columns."""
    count, num_classes = probabilities.shape
    if len(class_names) != num_classes:  # the compiled loop would read beyond their end
        raise ValueError(f"{num_classes} columns of probabilities, {len(class_names)} class names")
    if more is None:
        more = np.zeros((count, 0), "S1")
    names = [_field(name) for name in class_names]
    starts = np.cumsum([0, *map(len, names)])
    row_bytes = 2 * read_ids.itemsize + 2 + 2 * _INTEGER_BYTES + max(map(len, names)) + 5
    row_bytes += num_classes * (1 + _PROBABILITY_BYTES)
    row_bytes += more.shape[1] * (2 * more.itemsize + 3)
    out = np.empty(count * row_bytes, np.uint8)
    size = _put_rows(
        _letters(read_ids),
        cap_classes.astype(np.int64),
        probabilities.argmax(axis=1),
        np.frombuffer(b"".join(names), np.uint8).copy(),
        starts,
        np.ascontiguousarray(probabilities, np.float64),
        _letters(more),
        out,
    )
    return out[:size].tobytes()


def _letters(texts: np.ndarray) -> np.ndarray:
    """'S' of any shape -> uint8 with an axis more."""
    letters = np.frombuffer(texts.tobytes(), np.uint8)
    return letters.reshape(*texts.shape, texts.itemsize)


def _field(text: str) -> bytes:
    """As csv.writer has it, in quotes where it needs them."""
    stream = io.StringIO()
    csv.writer(stream).writerow([text, ""])
    return stream.getvalue().removesuffix(",\r\n").encode()


@kernel
def _put_rows(
    read_ids: np.ndarray,
    cap_classes: np.ndarray,
    predicted: np.ndarray,
    names: np.ndarray,
    starts: np.ndarray,
    probabilities: np.ndarray,
    more: np.ndarray,
    out: np.ndarray,
) -> int:
    """All lines to `out`; how many bytes that are. names: of all classes, one after the other;
    class c's from starts[c] to starts[c + 1]. read_ids (n, width), more (n, k, width) uint8."""
    at = 0
    for row in range(len(read_ids)):
        at = _put_text(out, at, read_ids[row])
        out[at] = _COMMA
        at += 1
        if cap_classes[row] != NO_LABEL:
            at = _put_integer(out, at, cap_classes[row])
        out[at] = _COMMA
        guess = predicted[row]
        at = _put_integer(out, at + 1, guess)
        out[at] = _COMMA
        at += 1
        for k in range(starts[guess], starts[guess + 1]):
            out[at] = names[k]
            at += 1
        for column in range(probabilities.shape[1]):
            out[at] = _COMMA
            at = _put_probability(out, at + 1, probabilities[row, column])
        for column in range(more.shape[1]):
            out[at] = _COMMA
            at = _put_text(out, at + 1, more[row, column])
        out[at], out[at + 1] = _RETURN, _NEWLINE
        at += 2
    return at


@helper
def _put_text(out: np.ndarray, at: int, text: np.ndarray) -> int:
    """text: padded with zeros, as numpy keeps it."""
    size = len(text)
    while size > 0 and text[size - 1] == 0:
        size -= 1
    is_quoted = False
    for k in range(size):
        is_quoted |= text[k] in (_COMMA, _QUOTE, _RETURN, _NEWLINE)
    if is_quoted:
        out[at] = _QUOTE
        at += 1
    for k in range(size):
        if text[k] == _QUOTE:
            out[at] = _QUOTE
            at += 1
        out[at] = text[k]
        at += 1
    if is_quoted:
        out[at] = _QUOTE
        at += 1
    return at


@helper
def _put_integer(out: np.ndarray, at: int, value: int) -> int:
    if value < 0:
        out[at] = _MINUS
        at, value = at + 1, -value
    size, rest = 1, value // 10
    while rest > 0:
        size, rest = size + 1, rest // 10
    for k in range(size):
        out[at + size - 1 - k] = _ZERO + value % 10
        value //= 10
    return at + size


@helper
def _put_probability(out: np.ndarray, at: int, value: float) -> int:
    """value in 0..1 -> "0.123456"."""
    millionths = _millionths(value)
    out[at] = _ZERO + millionths // _SCALE
    out[at + 1] = _POINT
    for k in range(_DECIMALS):
        out[at + 1 + _DECIMALS - k] = _ZERO + millionths % 10
        millionths //= 10
    return at + 2 + _DECIMALS


@inlined
def _millionths(value: float) -> int:
    """value * 10**6 rounded to the nearest integer, a tie to the even one: exact, as "%.6f" is.

    Source: T. J. Dekker 1971, A floating-point technique for extending the available precision: the
    product of each half and 10**6, of 14 bits without its twos, is exact; so are the differences.
    """
    cut = _SPLITTER * value
    high = cut - (cut - value)
    low = value - high
    whole = int(value * _SCALE)
    beyond_half = (high * _SCALE - whole - 0.5) + low * _SCALE
    return whole + (beyond_half > 0 or (beyond_half == 0 and whole % 2 == 1))
