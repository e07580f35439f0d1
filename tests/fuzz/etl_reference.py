"""A slow reader of cap-signal CSV text, from the format's definition alone: bytes and float().

A line is a row unless it is empty; its end is \\n or \\r\\n. A row has three fields: read_id (1 to
128 bytes of printable UTF-8 without a quotation mark or white space at its ends), cap_class (1 to 9
digits), timeseries (finite decimal numbers with commas between them). A field that begins with a
quotation mark goes to the next single one. Without the line's end the last field may have been cut,
so there it must be closed or, not being quoted, have something in it."""

import math
from dataclasses import dataclass

import numpy as np

MAX_ROW_BYTES = 4096 * 4096
MAX_READ_ID_BYTES = 128
NUMBER_BYTES = frozenset(b"0123456789+-.eE")
NOT_FINITE_NAMES = ("nan", "inf", "infinity")


@dataclass(frozen=True)
class Row:
    """`line` counts from the block's first; text[begin:begin_end], text[start:end] are read_id and
    signal in the whole text. `reasons`: each that may be given for a reject; none: a good row.

    numbers: as float() reads them. only_parsing_shows: made of bytes that numbers have, yet not of
    numbers, or of too large ones."""

    line: int
    content: bytes
    read_id: str = ""
    cap_class: int = -1
    begin: int = 0
    start: int = 0
    end: int = 0
    numbers: tuple[float, ...] = ()
    reasons: frozenset[str] = frozenset()
    only_parsing_shows: bool = False


def read_rows(text: bytes, *, first_line: int, dtype: str) -> list[Row]:
    """Every row of `text`, good or not, for a dataset of `dtype`."""
    rows = []
    offset = 0
    pieces = text.split(b"\n")
    for number, piece in enumerate(pieces):
        content = piece[:-1] if piece.endswith(b"\r") else piece
        # A \r at the very end may belong to a \r\n that was cut in two: the row is whole then.
        has_end = number < len(pieces) - 1 or piece.endswith(b"\r")
        if content:
            rows.append(_read_row(content, first_line + number, offset, has_end, dtype))
        offset += len(piece) + 1
    return rows


def _read_row(content: bytes, line: int, offset: int, has_end: bool, dtype: str) -> Row:
    def reject(*reasons: str, only_parsing_shows: bool = False, **known: object) -> Row:
        return Row(
            line,
            content,
            reasons=frozenset(reasons),
            only_parsing_shows=only_parsing_shows,
            **known,  # type: ignore[arg-type]
        )

    if len(content) > MAX_ROW_BYTES:
        return reject("line too long")
    try:
        content.decode()
    except UnicodeDecodeError:
        return reject("bad UTF-8")
    fields, problems = split_fields(content)
    if problems:
        return reject(*problems)
    if not has_end and (len(fields) < 3 or fields[2][0] == fields[2][1]):
        return reject("truncated line")
    if len(fields) != 3:
        return reject("wrong field count")
    read_id, label, signal = (content[start:end] for start, end in fields)
    reasons = set()
    name = read_id.decode()
    if (
        not 0 < len(read_id) <= MAX_READ_ID_BYTES
        or not name.isprintable()
        or name != name.strip()
        or '"' in name
    ):
        reasons.add("bad read_id")
    if not 0 < len(label) <= 9 or not set(label) <= set(b"0123456789"):
        reasons.add("bad cap_class")
    numbers, problems, is_plain = read_numbers(signal, dtype)
    known = {
        "read_id": name,
        "cap_class": int(label) if "bad cap_class" not in reasons else -1,
        "begin": offset + fields[0][0],
        "start": offset + fields[2][0],
        "end": offset + fields[2][1],
        "numbers": tuple(numbers),
    }
    shows_late = bool(problems) and is_plain and not reasons
    reasons |= problems
    return reject(*reasons, only_parsing_shows=shows_late, **known)


def split_fields(content: bytes) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    """Where each field's text lies, without its quotation marks; or what may be said of them."""
    fields: list[tuple[int, int]] = []
    at = 0
    while True:
        if content[at : at + 1] != b'"':
            comma = content.find(b",", at)
            end = len(content) if comma < 0 else comma
            fields.append((at, end))
        else:
            close = at + 1
            while True:
                close = content.find(b'"', close)
                if close < 0:  # a doubled mark before that may be taken for the closing one
                    is_doubled = b'""' in content[at + 1 :]
                    return [], ("truncated line", "wrong field count")[: 1 + is_doubled]
                if content[close + 1 : close + 2] != b'"':
                    break
                close += 2
            fields.append((at + 1, close))
            end = close + 1
            if content[end : end + 1] not in (b"", b","):
                return [], ("wrong field count",)
        if end == len(content):
            return fields, ()
        at = end + 1


def read_numbers(signal: bytes, dtype: str) -> tuple[list[float], set[str], bool]:
    """The numbers, what may be said against them, and whether their bytes are those of numbers and
    none is empty."""
    if not signal:
        return [], {"empty signal"}, False
    numbers, problems, is_plain = [], set(), True
    for text in signal.split(b","):
        is_plain = is_plain and bool(text) and set(text) <= NUMBER_BYTES
        name = text.decode().strip("+-").lower()
        if name in NOT_FINITE_NAMES:
            problems.add("not finite")
            continue
        if not text or not set(text) <= NUMBER_BYTES:
            problems.add("not a number")
            continue
        try:
            number = float(text)
        except ValueError:
            problems.add("not a number")
            continue
        numbers.append(number)
        if not math.isfinite(stored(number, dtype)):
            problems.add("not finite")
    return numbers, problems, is_plain


def stored(number: float, dtype: str) -> float:
    """`number` as the dataset keeps it: float16 is rounded from float32."""
    with np.errstate(over="ignore"):
        if dtype == "float64":
            return number
        return float(np.float32(number).astype(dtype))


def fitted(numbers: tuple[float, ...], target_length: int, dtype: str) -> np.ndarray:
    """(target_length,): the centre of the signal, or the signal with zeros at both ends; what is
    odd is cut from, or added on, the right."""
    with np.errstate(over="ignore"):
        values = np.array(numbers, np.float64)
        if dtype != "float64":
            values = values.astype(np.float32).astype(dtype)
    surplus = len(values) - target_length
    if surplus >= 0:
        left = surplus // 2
        return values[left : left + target_length]
    left = -surplus // 2
    return np.concatenate([np.zeros(left, dtype), values, np.zeros(-surplus - left, dtype)]).astype(
        dtype
    )
