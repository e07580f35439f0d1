"""Rows of cap-signal CSV files: blocks of whole lines in, identities, rejects and signals out.

Two steps, both compiled: `scan_block` finds each row's identity and checks the bytes of its signal
without parsing a number, `parse_signals` parses the numbers of chosen rows. Rows that don't have
the usual form (`id,0,"1.0,2.0"`) take a slower way, one at a time, to the same result or to the
reason why they are rejects.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capfinder.errors import InputError
from capfinder.etl import kernels, number_kernels
from capfinder.etl.csv_files import HEAD_BYTES, MAX_ROW_BYTES, Block, line_of
from capfinder.etl.preprocess import fit_length

MAX_READ_ID_BYTES = 128  # a UUID has 36
MAX_CLASS_DIGITS = 9  # fits in int32
MOST_QUOTED = 40  # bytes of a field in a message

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

_NUMBER = re.compile(rb"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_QUOTED = re.compile(rb'"([^"]*(?:""[^"]*)*)"')
# From this magnitude on a number is infinite once rounded to the dtype (a tie rounds up): half a
# step beyond the largest; for float16, what float32 rounds to half a step beyond 65504.
_LIMITS = {"float16": 65520 - 2.0**-9, "float32": 2.0**128 - 2.0**103, "float64": float("inf")}


class Reject(NamedTuple):
    """A row that can't be used; `line` counts from 1, the header's."""

    line: int
    read_id: str
    reason: str


@dataclass(frozen=True)
class Rows:
    """Identities of n good rows: read_id (n,) 'S', cap_class (n,) int32, line (n,) int64; begin
    (n,) int64 where the read_id's text starts, start and end (n,) int64 of the signal's text, all
    bytes of the decompressed file; samples (n,) int32 numbers in the signal; content (n, 2) uint64
    hash of the line without its end (128 bits, not cryptographic: kernels.content_hash)."""

    read_id: np.ndarray
    cap_class: np.ndarray
    line: np.ndarray
    begin: np.ndarray
    start: np.ndarray
    end: np.ndarray
    samples: np.ndarray
    content: np.ndarray


@dataclass(frozen=True)
class Signals:
    """Parsed numbers of n rows. fitted (n, target_length): cut or zero-padded as
    preprocess.fit_length does it; lengths (n,) int32 before that; total, squares (n,) float64: sums
    of all samples and of their squares; problems: why a row can't be used (its fitted, total and
    squares are 0), by its index."""

    fitted: np.ndarray
    lengths: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    problems: dict[int, str]


def scan_block(
    block: Block, *, cap_class: int | None, no_label: int | None = None
) -> tuple[Rows, list[Reject], int]:
    """The good rows of a block, its rejects and how many rows it has; blank lines are no rows.

    cap_class: the file's class, rows of another are rejects; None: any class will do.
    no_label: what an empty cap_class counts as, a negative int32; negative numbers, as for a cap
    that isn't known, will do as well then. None: both are rejects."""
    data = block.data
    if block.is_head:
        reject = Reject(block.line, _guess_read_id(data), TOO_LONG)
        none = np.zeros((6, 0), np.int64)
        return _rows(block, none[0], none, np.zeros((0, 2), np.uint64)), [reject], 1
    buffer = _readable(data)
    bounds = kernels.line_bounds(buffer)
    fields, content = kernels.usual_rows(
        buffer, bounds, MAX_READ_ID_BYTES, MAX_CLASS_DIGITS, MAX_ROW_BYTES, no_label or 0
    )
    lines = bounds[2] + block.line
    rejects = []
    for index in np.flatnonzero(fields[5] == 0).tolist():
        start, end = int(bounds[0, index]), int(bounds[1, index])
        row = data[start:end]
        outcome = _row_fields(row, is_whole=end < len(data), no_label=no_label)
        if isinstance(outcome, str):
            rejects.append(Reject(int(lines[index]), _guess_read_id(row), outcome))
        else:
            fields[:, index] = outcome
            fields[[0, 1, 3, 4], index] += start
    is_good = fields[5] > 0
    if cap_class is not None:
        others = np.flatnonzero(is_good & (fields[2] != cap_class))
        rejects += [
            Reject(line, data[start:end].decode(), OTHER_CLASS)
            for line, (start, end) in zip(
                lines[others].tolist(), fields[:2, others].T.tolist(), strict=True
            )
        ]
        is_good[others] = False
    rows = _rows(block, lines[is_good], fields[:, is_good], content[is_good])
    return rows, sorted(rejects), bounds.shape[1]


def _readable(data: bytes | memoryview) -> np.ndarray:
    """(size,) uint8, read-only whatever the data are: kernels are compiled for that alone."""
    buffer = np.frombuffer(data, np.uint8)
    buffer.flags.writeable = False
    return buffer


def _rows(block: Block, lines: np.ndarray, fields: np.ndarray, content: np.ndarray) -> Rows:
    return Rows(
        read_id=kernels.texts(_readable(block.data), fields[0], fields[1]),
        cap_class=fields[2].astype(np.int32),
        line=lines,
        begin=fields[0] + block.offset,
        start=fields[3] + block.offset,
        end=fields[4] + block.offset,
        samples=fields[5].astype(np.int32),
        content=content,
    )


def parse_signals(
    data: bytes | memoryview,
    starts: np.ndarray,
    ends: np.ndarray,
    *,
    target_length: int,
    dtype: str,
) -> Signals:
    """Parses and fits the signals data[starts[i] : ends[i]] (n,) that `scan_block` found good.

    A value is float(text) for float64, numpy.float32(float(text)) for float32, and that rounded
    once more for float16. Numbers beyond the dtype's range are "not finite"."""
    count = len(starts)
    computed = "float64" if dtype == "float64" else "float32"
    fitted = np.zeros((count, target_length), computed)
    lengths, sums = np.empty(count, np.int32), np.empty((2, count))
    outcomes = np.empty(count, np.uint8)
    number_kernels.parse_rows(
        _readable(data),
        np.ascontiguousarray(starts, np.int64),
        np.ascontiguousarray(ends, np.int64),
        _LIMITS[dtype],
        fitted,
        lengths,
        sums,
        outcomes,
    )
    for index in np.flatnonzero(outcomes == number_kernels.SLOW).tolist():
        text = bytes(data[starts[index] : ends[index]])
        values = np.array([float(number) for number in text.split(b",")])
        if (np.abs(values) >= _LIMITS[dtype]).any():
            outcomes[index] = number_kernels.NOT_FINITE
            continue
        fitted[index] = fit_length(values.astype(computed), target_length)
        with np.errstate(over="ignore"):
            sums[:, index] = values.sum(), (values * values).sum()
    is_bad = outcomes >= number_kernels.NOT_FINITE
    fitted[is_bad], sums[:, is_bad] = 0, 0
    problems = {
        index: NOT_A_NUMBER if outcomes[index] == number_kernels.NOT_A_NUMBER else NOT_FINITE
        for index in np.flatnonzero(is_bad).tolist()
    }
    return Signals(fitted.astype(dtype, copy=False), lengths, sums[0], sums[1], problems)


def _row_fields(
    row: bytes, *, is_whole: bool, no_label: int | None = None
) -> tuple[int, ...] | str:
    """The fields of kernels.usual_rows for one row of any form, or why it is a reject."""
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
    cap_class = _cap_class(label, no_label)
    if cap_class is None:
        return BAD_CLASS
    problem = _signal_problem(signal)
    return problem or (*bounds[0], cap_class, *bounds[2], signal.count(b",") + 1)


def _cap_class(label: bytes, no_label: int | None) -> int | None:
    """None: it isn't one."""
    digits = label if no_label is None else label.removeprefix(b"-")
    if digits.isdigit() and len(digits) <= MAX_CLASS_DIGITS:
        return int(label)
    return None if label else no_label


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


def explained(path: Path, reject: Reject) -> str:
    """The reason for a reject with what the row has instead, for a message. The file is read once
    more up to the row: what a field holds isn't carried along with every reject."""
    with contextlib.suppress(InputError):
        return reject.reason + _evidence(line_of(path, reject.line), reject.reason)
    return reject.reason


def _evidence(row: bytes, reason: str) -> str:
    """What in a row gave that reason and what was expected; '' where nothing is to be quoted."""
    bounds = _split_fields(row)
    if isinstance(bounds, str) or len(bounds) != 3:
        return ""
    _, label, signal = (row[start:end] for start, end in bounds)
    if reason == BAD_CLASS:
        return f" {_quoted(label)}, expected a whole number from 0 to {10**MAX_CLASS_DIGITS - 1}"
    if reason == OTHER_CLASS:
        return f" (cap_class {_quoted(label)}; a file holds one class, that of its first good row)"
    if reason not in (NOT_A_NUMBER, NOT_FINITE):
        return ""
    bad = [number for number in signal.split(b",") if not _NUMBER.fullmatch(number)]
    expected = ", expected numbers with commas between them" if reason == NOT_A_NUMBER else ""
    return f" ({_quoted(bad[0])} in timeseries{expected})" if bad else ""


def _quoted(field: bytes) -> str:
    more = "..." if len(field) > MOST_QUOTED else ""
    return repr(field[:MOST_QUOTED].decode("utf-8", "replace")) + more


def _guess_read_id(row: bytes) -> str:
    """What seems to be the read_id of a bad row, fit to be shown."""
    text = row[:HEAD_BYTES].split(b",", 1)[0].strip(b' "')[:MAX_READ_ID_BYTES]
    return "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace"))
