"""Compiled kernels over the lines of CSV files: where they end, what the usual ones hold, their
content hash. Text is always a read-only uint8 array, so that each is compiled once.

Eight bytes are looked at as one 64-bit word, and LLVM does four words in one vector register."""

from typing import Any

import numpy as np

from capfinder.compiled import helper, kernel
from capfinder.data.record_kernels import copy_texts

# Any: to numba these are integers like int, to mypy they aren't.
U8: Any = np.uint8
U64: Any = np.uint64
I64: Any = np.int64

_QUOTE, _COMMA, _RETURN, _NEWLINE, _MINUS = b'",\r\n-'
_PART = 128  # bytes: at most 255, so that a uint8 counts them
_STEP = 31  # words whose commas are counted byte by byte: 31 * 8 < 256


def each_byte(byte: int) -> np.uint64:
    return U64(byte * 0x0101010101010101)


_ONES, _LOW, HIGH_BITS, _CASE = each_byte(1), each_byte(127), each_byte(128), each_byte(32)
_FROM_PLUS, _ABOVE_NINE = each_byte(128 - ord("+")), each_byte(127 - ord("9"))
_COMMAS, _SLASHES, _ES = each_byte(_COMMA), each_byte(ord("/")), each_byte(ord("e"))


@helper
def load_word(buffer: np.ndarray, at: int) -> np.uint64:
    """Bytes at..at + 8, the first one lowest; LLVM makes one load of it."""
    i = U64(at)
    low = U64(buffer[i]) | U64(buffer[i + U64(1)]) << U64(8) | U64(buffer[i + U64(2)]) << U64(16)
    low |= U64(buffer[i + U64(3)]) << U64(24) | U64(buffer[i + U64(4)]) << U64(32)
    high = U64(buffer[i + U64(5)]) << U64(40) | U64(buffer[i + U64(6)]) << U64(48)
    return low | high | U64(buffer[i + U64(7)]) << U64(56)


@helper
def _count_in(part: np.ndarray, byte: int) -> int:
    """part: up to _PART bytes."""
    count = U8(0)
    for i in range(len(part)):
        count = U8(count + U8(part[i] == byte))
    return I64(count)


@helper
def commas_in(buffer: np.ndarray, start: int, end: int) -> int:
    count = 0
    for at in range(start, end, _PART):
        count += _count_in(buffer[at : min(at + _PART, end)], _COMMA)
    return count


@kernel
def line_bounds(buffer: np.ndarray) -> np.ndarray:
    """(3, n) int64: start, end (without the line end) and number (from 0) of the lines that aren't
    blank."""
    count = 1
    for at in range(0, len(buffer), _PART):
        count += _count_in(buffer[at : at + _PART], _NEWLINE)
    bounds = np.empty((3, count), np.int64)
    filled, line, start = 0, 0, 0
    for at in range(0, len(buffer) + 1, _PART):
        part = buffer[at : at + _PART]
        is_last = at + _PART > len(buffer)
        if not is_last and not _count_in(part, _NEWLINE):
            continue
        for i in range(at, at + len(part) + is_last):
            if i < len(buffer) and buffer[i] != _NEWLINE:
                continue
            end = i - (i > start and buffer[i - 1] == _RETURN)
            if end > start:
                bounds[0, filled], bounds[1, filled], bounds[2, filled] = start, end, line
                filled += 1
            start, line = i + 1, line + 1
    return bounds[:, :filled].copy()


@kernel
def usual_rows(
    buffer: np.ndarray,
    bounds: np.ndarray,
    max_id_bytes: int,
    max_digits: int,
    max_row_bytes: int,
    no_label: int,
) -> tuple[np.ndarray, np.ndarray]:
    """bounds (3, n) of lines -> fields (6, n) int64, content (n, 2) uint64.

    fields: start and end of read_id, cap_class, start and end of the signal, samples, which is 0
    (and the others nothing) where the line hasn't the usual form: printable ASCII as id, digits as
    label, either with or without quotes; a quoted signal with only bytes that numbers have, no
    comma at its ends, no two together. no_label: 0, or what an empty label counts as; then a minus
    before the digits is usual, too. content: `content_hash` of every line."""
    count = bounds.shape[1]
    fields = np.zeros((6, count), np.int64)
    content = np.empty((count, 2), np.uint64)
    for row in range(count):
        start, end = bounds[0, row], bounds[1, row]
        content[row, 0], content[row, 1] = content_hash(buffer, start, end, U64(0))
        if end - start > max_row_bytes:
            continue
        id_start, id_end, at = _id_field(buffer, start, end, max_id_bytes)
        label, at = _label_field(buffer, at, end, max_digits, no_label)
        if at + 2 >= end or buffer[at] != _QUOTE or buffer[end - 1] != _QUOTE:
            continue
        fields[0, row], fields[1, row], fields[2, row] = id_start, id_end, label
        fields[3, row], fields[4, row] = at + 1, end - 1
        fields[5, row] = _samples(buffer, at + 1, end - 1)
    return fields, content


@helper
def _id_field(buffer: np.ndarray, at: int, end: int, max_bytes: int) -> tuple[int, int, int]:
    """Start and end of the id's text, start of the next field (the line's end: not usual)."""
    is_quoted = buffer[at] == _QUOTE
    start = at + is_quoted
    stop = start
    while stop < end and stop - start <= max_bytes:
        byte = buffer[stop]
        if byte <= 32 or byte >= 127 or byte in (_QUOTE, _COMMA):
            break
        stop += 1
    after = stop + is_quoted
    if after >= end or buffer[after] != _COMMA or not 0 < stop - start <= max_bytes:
        return start, stop, end
    if is_quoted and buffer[stop] != _QUOTE:
        return start, stop, end
    return start, stop, after + 1


@helper
def _label_field(
    buffer: np.ndarray, at: int, end: int, max_digits: int, no_label: int
) -> tuple[int, int]:
    """The number that the label makes, start of the next field (the line's end: not usual)."""
    is_quoted = at < end and buffer[at] == _QUOTE
    start = at + is_quoted
    is_negative = no_label != 0 and start < end and buffer[start] == _MINUS
    start += is_negative
    stop, label = start, I64(0)
    while stop < end and stop - start <= max_digits and 48 <= buffer[stop] <= 57:
        label = 10 * label + I64(buffer[stop]) - 48
        stop += 1
    after = stop + is_quoted
    if after >= end or buffer[after] != _COMMA or stop - start > max_digits:
        return label, end
    if is_quoted and buffer[stop] != _QUOTE:
        return label, end
    if stop == start:
        return no_label, end if no_label == 0 or is_negative else after + 1
    return -label if is_negative else label, after + 1


@helper
def _samples(buffer: np.ndarray, start: int, end: int) -> int:
    """Numbers between the commas of start..end, 0 when a byte is in the wrong place.

    A byte's top bit says what is true of it: no sum of two bytes here carries into the next."""
    if buffer[start] == _COMMA or buffer[end - 1] == _COMMA:
        return 0
    samples, wrong = I64(1), U64(0)
    words = (end - start) // 8
    for first in range(0, words, _STEP):
        commas = U64(0)
        for word in range(first, min(first + _STEP, words)):
            here = load_word(buffer, start + 8 * word)
            before = load_word(buffer, start + 8 * word - 1)
            is_in_range = (here + _FROM_PLUS) & ~(here + _ABOVE_NINE)  # + , - . / 0 to 9
            is_allowed = is_in_range & ((here ^ _SLASHES) + _LOW)
            is_allowed |= ~(((here | _CASE) ^ _ES) + _LOW)  # e E
            is_comma = ~((here ^ _COMMAS) + _LOW) & HIGH_BITS
            is_pair = is_comma & ~((before ^ _COMMAS) + _LOW)
            wrong |= ~is_allowed | here | is_pair
            commas += is_comma >> U64(7)
        samples += I64(commas * _ONES >> U64(56))
    is_wrong = wrong & HIGH_BITS != U64(0)
    for at in range(start + 8 * words, end):
        byte = buffer[at]
        is_allowed = (43 <= byte <= 57 and byte != 47) or byte | 32 == 101
        is_wrong |= not is_allowed or (byte == _COMMA and buffer[at - 1] == _COMMA)
        samples += byte == _COMMA
    return 0 if is_wrong else samples


def texts(buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) 'S' the bytes starts..ends (n,) of each row."""
    width = int((ends - starts).max(initial=1))
    copied = np.zeros((len(starts), width), np.uint8)
    copy_texts(buffer, np.ascontiguousarray(starts), np.ascontiguousarray(ends), copied)
    return copied.reshape(-1).view(f"S{width}")


@kernel
def content_hash(
    buffer: np.ndarray, start: int, end: int, seed: np.uint64
) -> tuple[np.uint64, np.uint64]:
    """MurmurHash3 x64 128 of start..end: tells texts apart, but not against someone who makes two
    alike on purpose (not cryptographic).

    Source: A. Appleby, MurmurHash3_x64_128, public domain."""
    first, second = seed, seed
    blocks = (end - start) // 16
    for block in range(blocks):
        first ^= _scramble_first(load_word(buffer, start + 16 * block))
        first = (_left(first, 27) + second) * U64(5) + U64(0x52DCE729)
        second ^= _scramble_second(load_word(buffer, start + 16 * block + 8))
        second = (_left(second, 31) + first) * U64(5) + U64(0x38495AB5)
    rest = start + 16 * blocks
    second ^= _scramble_second(_partial_word(buffer, min(rest + 8, end), end))
    first ^= _scramble_first(_partial_word(buffer, rest, min(rest + 8, end)))
    first ^= U64(end - start)
    second ^= U64(end - start)
    first += second
    second += first
    first, second = _avalanche(first), _avalanche(second)
    first += second
    return first, second + first


@helper
def _partial_word(buffer: np.ndarray, start: int, end: int) -> np.uint64:
    word = U64(0)
    for at in range(start, end):
        word |= U64(buffer[at]) << U64(8 * (at - start))
    return word


@helper
def _left(word: np.uint64, bits: int) -> np.uint64:
    return word << U64(bits) | word >> U64(64 - bits)


@helper
def _scramble_first(word: np.uint64) -> np.uint64:
    return _left(word * U64(0x87C37B91114253D5), 31) * U64(0x4CF5AD432745937F)


@helper
def _scramble_second(word: np.uint64) -> np.uint64:
    return _left(word * U64(0x4CF5AD432745937F), 33) * U64(0x87C37B91114253D5)


@helper
def _avalanche(word: np.uint64) -> np.uint64:
    word = (word ^ word >> U64(33)) * U64(0xFF51AFD7ED558CCD)
    word = (word ^ word >> U64(33)) * U64(0xC4CEB9FE1A85EC53)
    return word ^ word >> U64(33)
