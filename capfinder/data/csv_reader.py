"""Rows of cap-signal CSV files: blocks of whole lines in, identities, rejects and signals out.

Two steps, both vectorised over a block: `scan_block` finds each row's identity and checks the bytes
of its signal without parsing a number, `parse_signals` parses the numbers of chosen rows. Rows that
don't have the usual form (`id,0,"1.0,2.0"`) take a slower way, one at a time, to the same result or
to the reason why they are rejects.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from capfinder.data.csv_files import HEAD_BYTES, MAX_ROW_BYTES, Block

MAX_READ_ID_BYTES = 128  # a UUID has 36
MAX_CLASS_DIGITS = 9  # fits in int32

BAD_UTF8 = "bad UTF-8"
BAD_CLASS = "bad cap_class"
BAD_READ_ID = "bad read_id"
EMPTY_SIGNAL = "empty signal"
FIELD_COUNT = "wrong field count"
NOT_A_NUMBER = "not a number"
NOT_FINITE = "not finite"
OTHER_CLASS = "class differs from file"
TOO_LONG = "line too long"
TRUNCATED = "truncated line"

_COMMA, _QUOTE, _RETURN, _ZERO, _NEWLINE = b',"\r0\n'
_IS_SPECIAL = bytes(byte not in b"0123456789+-.eE," for byte in range(256))  # bytes.translate's
_IS_UNUSUAL_IN_ID = np.array([byte <= 32 or byte >= 127 or byte == _QUOTE for byte in range(256)])
_NUMBER = re.compile(rb"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_QUOTED = re.compile(rb'"([^"]*(?:""[^"]*)*)"')
_GATHER_ROWS = 1 << 15


class Reject(NamedTuple):
    """A row that can't be used; `line` counts from 1, the header's."""

    line: int
    read_id: str
    reason: str


@dataclass(frozen=True)
class Rows:
    """Identities of n good rows: read_id (n,) 'S', cap_class (n,) int32, line (n,) int64, start and
    end (n,) int64 (bytes of the signal's text in the decompressed file), content (n, 2) uint64
    (SHA-256 of the line, its first 128 bits)."""

    read_id: np.ndarray
    cap_class: np.ndarray
    line: np.ndarray
    start: np.ndarray
    end: np.ndarray
    content: np.ndarray


@dataclass(frozen=True)
class Signals:
    """Parsed numbers of n rows: row i is values[starts[i] : starts[i] + lengths[i]]; `problems`
    has the reason why a row can't be used, by its index."""

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    problems: dict[int, str]


def scan_block(block: Block, *, cap_class: int | None) -> tuple[Rows, list[Reject], int]:
    """The good rows of a block, its rejects and how many rows it has; blank lines are no rows.

    cap_class: the file's class, rows of another are rejects; None: any class will do."""
    if block.is_head:
        reject = Reject(block.line, _guess_read_id(block.data), TOO_LONG)
        return _rows(block, *[np.zeros((6, 0), np.int64)] * 2), [reject], 1
    starts, ends, lines = _line_bounds(block)
    fields, is_usual = _usual_fields(block.data, starts, ends)
    rejects = []
    for index in np.flatnonzero(~is_usual).tolist():
        start, end = int(starts[index]), int(ends[index])
        row = block.data[start:end]
        outcome = _row_fields(row, is_whole=end < len(block.data))
        if isinstance(outcome, str):
            rejects.append(Reject(int(lines[index]), _guess_read_id(row), outcome))
        else:
            fields[:, index] = outcome
            fields[[0, 1, 3, 4], index] += start
            is_usual[index] = True
    bounds = np.stack([lines, starts, ends])[:, is_usual]
    fields = fields[:, is_usual]
    if cap_class is not None and (others := fields[2] != cap_class).any():
        rejects += [
            Reject(line, block.data[a:b].decode(), OTHER_CLASS)
            for line, a, b in zip(
                bounds[0, others].tolist(),
                fields[0, others].tolist(),
                fields[1, others].tolist(),
                strict=True,
            )
        ]
        bounds, fields = bounds[:, ~others], fields[:, ~others]
    return _rows(block, bounds, fields), sorted(rejects), len(starts)


def _line_bounds(block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends (without the line end) and numbers of the lines that aren't blank."""
    buffer = np.frombuffer(block.data, np.uint8)
    newlines = np.flatnonzero(buffer == _NEWLINE)
    starts = np.concatenate([[0], newlines + 1])
    ends = np.append(newlines, len(buffer))
    has_return = (ends > starts) & (buffer[ends - 1] == _RETURN)
    ends = ends - has_return
    filled = ends > starts
    return starts[filled], ends[filled], (block.line + np.arange(len(starts)))[filled]


def _usual_fields(
    data: bytes, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(5, n) read_id's start and end, cap_class, signal's start and end; and (n,) which rows have
    the usual form, so that these hold."""
    buffer = np.frombuffer(data, np.uint8)
    special = np.flatnonzero(np.frombuffer(data.translate(_IS_SPECIAL), np.bool_))
    found = buffer[special]
    quotes = np.append(special[found == _QUOTE], len(data))
    opening, closing = quotes[np.searchsorted(quotes, starts)], ends - 1
    usual = (opening > starts + 3) & (closing > opening + 1) & (ends - starts <= MAX_ROW_BYTES)
    opening, closing = np.where(usual, opening, 0), np.where(usual, closing, 0)
    first, last = np.where(usual, opening + 1, 0), np.where(usual, closing - 1, 0)
    usual &= (buffer[opening - 1] == _COMMA) & (buffer[closing] == _QUOTE)
    comma, labels = _labels(buffer, starts, opening - 1, usual)
    usual &= (comma > starts) & (comma - starts <= MAX_READ_ID_BYTES)
    unusual = special[_IS_UNUSUAL_IN_ID[found]]
    usual &= np.searchsorted(unusual, starts) == np.searchsorted(unusual, comma)
    usual[usual] = ~(_gather(buffer, starts[usual], comma[usual]) == _COMMA).any(axis=1)
    # The signal: only bytes that numbers have, no comma at either end, no two together.
    usual &= np.searchsorted(special, first) == np.searchsorted(special, closing)
    usual &= (buffer[first] != _COMMA) & (buffer[last] != _COMMA)
    is_comma = buffer == _COMMA
    pairs = np.flatnonzero(is_comma[1:] & is_comma[:-1])
    usual &= np.searchsorted(pairs, opening) == np.searchsorted(pairs, closing)
    return np.stack([starts, comma, labels, first, closing]), usual


def _labels(
    buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For `rows`, the comma before the 1 to MAX_CLASS_DIGITS digits that stop at `ends` (-1: there
    are none such), and the number that the digits make."""
    comma = np.full(len(starts), -1)
    labels = np.zeros(len(starts), np.int64)
    is_open = rows.copy()
    for place in range(MAX_CLASS_DIGITS + 1):
        at = ends - 1 - place
        is_open &= at >= starts
        if not is_open.any():
            break
        byte = buffer[np.where(is_open, at, 0)]
        if place:
            comma = np.where(is_open & (byte == _COMMA), at, comma)
        digit = byte - np.uint8(_ZERO)  # wraps around below "0"
        is_open &= digit <= 9
        labels += np.where(is_open, digit.astype(np.int64) * 10**place, 0)
    return comma, labels


def _row_fields(row: bytes, *, is_whole: bool) -> tuple[int, int, int, int, int] | str:
    """As `_usual_fields` for one row of any form, or why it is a reject."""
    if len(row) > MAX_ROW_BYTES:
        return TOO_LONG
    try:
        row.decode()
    except UnicodeDecodeError:
        return BAD_UTF8
    bounds = _split_fields(row)
    if isinstance(bounds, str):
        return bounds
    if not is_whole and (len(bounds) < 3 or bounds[2][0] == bounds[2][1]):
        return TRUNCATED
    if len(bounds) != 3:
        return FIELD_COUNT
    read_id, label, signal = (row[start:end] for start, end in bounds)
    name = read_id.decode()
    if not 0 < len(read_id) <= MAX_READ_ID_BYTES or not name.isprintable():
        return BAD_READ_ID
    if '"' in name or name != name.strip():
        return BAD_READ_ID
    if not (label.isdigit() and len(label) <= MAX_CLASS_DIGITS):
        return BAD_CLASS
    problem = _signal_problem(signal)
    return problem or (*bounds[0], int(label), *bounds[2])


def _split_fields(row: bytes) -> list[tuple[int, int]] | str:
    """Where each field's text lies in a row, without its quotes, or what is wrong with them."""
    bounds = []
    at = -1
    while at < len(row):
        at += 1
        if row[at : at + 1] == b'"':
            quoted = _QUOTED.match(row, at)
            if quoted is None:
                return TRUNCATED
            bounds.append(quoted.span(1))
            at = quoted.end()
            if row[at : at + 1] not in (b",", b""):
                return FIELD_COUNT
        else:
            end = row.find(b",", at)
            bounds.append((at, len(row) if end < 0 else end))
            at = bounds[-1][1]
    return bounds


def _signal_problem(signal: bytes) -> str:
    if not signal:
        return EMPTY_SIGNAL
    for number in signal.split(b","):
        if not _NUMBER.fullmatch(number):
            name = number.lstrip(b"+-").lower()
            return NOT_FINITE if name in (b"nan", b"inf", b"infinity") else NOT_A_NUMBER
    return ""


def _guess_read_id(row: bytes) -> str:
    """What seems to be the read_id of a bad row, fit to be shown."""
    text = row[:HEAD_BYTES].split(b",", 1)[0].strip(b' "')[:MAX_READ_ID_BYTES]
    return "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace"))


def _rows(block: Block, bounds: np.ndarray, fields: np.ndarray) -> Rows:
    view = memoryview(block.data)
    # SHA-256 has its own processor instructions: 1,280 MB/s a core where BLAKE2b reaches 510.
    digests = b"".join(
        [
            hashlib.sha256(view[start:end]).digest()
            for start, end in zip(bounds[1].tolist(), bounds[2].tolist(), strict=True)
        ]
    )
    ids = _gather(np.frombuffer(block.data, np.uint8), fields[0], fields[1])
    return Rows(
        read_id=ids.reshape(-1).view(f"S{ids.shape[1]}"),
        cap_class=fields[2].astype(np.int32),
        line=bounds[0].copy(),
        start=fields[3] + block.offset,
        end=fields[4] + block.offset,
        content=np.frombuffer(digests, "<u8").reshape(-1, 4)[:, :2].astype(np.uint64),
    )


def _gather(buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n, widest) uint8 the bytes starts..ends of each row, then zeros; in steps that bound the
    memory of the indices."""
    width = int((ends - starts).max(initial=1))
    places = np.arange(width)
    gathered = np.zeros((len(starts), width), np.uint8)
    for at in range(0, len(starts), _GATHER_ROWS):
        part = slice(at, at + _GATHER_ROWS)
        where = starts[part, None] + places
        inside = where < ends[part, None]
        gathered[part] = np.where(inside, buffer[np.where(inside, where, 0)], 0)
    return gathered


def parse_signals(texts: Sequence[bytes | memoryview], *, dtype: str) -> Signals:
    """Parses signals that `scan_block` found good; values have `dtype`.

    Equal to float(text) for float64, to numpy.float32(float(text)) for float32, and that rounded
    once more for float16. Numbers beyond the dtype's range are "not finite"."""
    # One column of numbers that end with a comma. Measured, MB/s a core: 371 so, 225 by polars'
    # str.split and cast, both exact. With the bytes that `scan_block` allows, null is "no number",
    # inf is "too large", and NaN can only be the mark between two rows.
    column = pl.read_csv(
        b",nan,".join(texts),
        has_header=False,
        separator=";",
        eol_char=",",
        quote_char=None,
        schema={"value": pl.Float64},
        ignore_errors=True,
    )["value"]
    is_broken = column.is_null().to_numpy() if column.null_count() else None
    numbers = column.to_numpy()
    is_mark = np.isnan(numbers)
    if is_broken is not None:
        is_mark &= ~is_broken
    marks = np.flatnonzero(is_mark)
    if len(marks) != len(texts) - 1:
        raise ValueError(f"{len(texts)} signals gave {len(marks) + 1}: not from scan_block")
    starts = np.concatenate([[0], marks + 1])
    lengths = np.append(marks, len(numbers)) - starts
    with np.errstate(over="ignore"):
        values = numbers if dtype == "float64" else numbers.astype(np.float32).astype(dtype)
    is_bad = ~np.isfinite(values) & ~is_mark
    problems = {int(np.searchsorted(marks, place)): NOT_FINITE for place in np.flatnonzero(is_bad)}
    if is_broken is not None:
        problems |= {
            int(np.searchsorted(marks, p)): NOT_A_NUMBER for p in np.flatnonzero(is_broken)
        }
    return Signals(values, starts, lengths, problems)
