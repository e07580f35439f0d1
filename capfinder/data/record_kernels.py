"""TFRecord framing and tf.train.Example, compiled: what records.py writes and reads shards with.

A TFRecord file is a run of frames: length (uint64), its masked CRC-32C (uint32), the data, its
masked CRC-32C, all little-endian. The data is a tf.train.Example in protocol buffer encoding; each
of its features is five messages, one within the other, around the bytes of the value:

    Features.feature {key, value: Feature {bytes_list | int64_list: List {value}}}

Kernels hold no lock, so threads run them side by side. Arithmetic is in int64 throughout: numba
turns a mix of int64 and uint64 into floats.
"""

import math

import numpy as np

from capfinder.compiled import helper, kernel
from capfinder.data.crc32c import crc32c

BYTES_LIST, INT64_LIST = 1, 3  # the fields of tf.train.Feature
FRAME_BYTES = 16  # of a record beside its data
# Beside the read_id and the signal: four features' keys and sizes, two varints, the frame.
MAX_OVERHEAD_BYTES = 200

# What `find_records` found at its end, and what that says of the next record.
WHOLE, BAD_LENGTH, BAD_DATA = range(3)
PROBLEMS = ("", "the checksum of its length doesn't match", "its checksum doesn't match")

_CAP_CLASS, _LENGTH, _READ_ID, _SIGNAL = (
    np.frombuffer(name, np.uint8) for name in (b"cap_class", b"length", b"read_id", b"signal")
)
_WORD = 0xFFFFFFFF


def as_bytes(array: np.ndarray) -> np.ndarray:
    """(n, bytes of a row) uint8: the same memory where the rows are contiguous, else a copy."""
    array = np.ascontiguousarray(array)
    width = array.itemsize * math.prod(array.shape[1:])
    return array.reshape(-1).view(np.uint8).reshape(len(array), width)


@helper
def _masked(crc: int) -> int:
    """As TFRecord stores it, so that the CRC of data that holds CRCs isn't degenerate."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & _WORD


@helper
def _put_word(out: np.ndarray, at: int, value: int) -> int:
    for k in range(4):
        out[at + k] = value >> 8 * k & 255
    return at + 4


@helper
def _word(data: np.ndarray, at: int) -> int:
    value = 0
    for k in range(4):
        value |= int(np.int64(data[at + k])) << 8 * k
    return value


@helper
def _varint_size(value: int) -> int:
    size = 1
    while value > 127:
        value >>= 7
        size += 1
    return size


@helper
def _put_varint(out: np.ndarray, at: int, value: int) -> int:
    while value > 127:
        out[at] = value & 127 | 128
        value >>= 7
        at += 1
    out[at] = value
    return at + 1


@helper
def _varint(data: np.ndarray, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends); the end is -1 when there is no varint below 2**63 before `end`."""
    value, shift = 0, 0
    while at < end and shift < 63:
        byte = int(np.int64(data[at]))
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    return value, -1


@helper
def _put(out: np.ndarray, at: int, source: np.ndarray) -> int:
    target = out[at : at + len(source)]  # so that the compiler sees a plain copy
    for k in range(len(source)):
        target[k] = source[k]
    return at + len(source)


@helper
def _message_size(size: int) -> int:
    """Of a field that holds `size` bytes: tag, length, bytes."""
    return 1 + _varint_size(size) + size


@helper
def _feature_size(name: np.ndarray, size: int) -> int:
    """Of one feature in Features.feature, without its own tag and length."""
    return 2 + len(name) + _message_size(_message_size(_message_size(size)))


@helper
def _put_head(out: np.ndarray, at: int, name: np.ndarray, kind: int, size: int) -> int:
    """A feature up to where the `size` bytes of its value follow."""
    value = _message_size(size)
    out[at] = 1 << 3 | 2
    at = _put_varint(out, at + 1, _feature_size(name, size))
    out[at] = 1 << 3 | 2
    out[at + 1] = len(name)
    at = _put(out, at + 2, name)
    out[at] = 2 << 3 | 2
    at = _put_varint(out, at + 1, _message_size(value))
    out[at] = kind << 3 | 2
    at = _put_varint(out, at + 1, value)
    out[at] = 1 << 3 | 2
    return _put_varint(out, at + 1, size)


@kernel
def encode_records(
    out: np.ndarray,
    signals: np.ndarray,
    cap_classes: np.ndarray,
    lengths: np.ndarray,
    read_ids: np.ndarray,
) -> int:
    """Writes n framed records into `out` and returns their size in bytes.

    out uint8, with room for n x (signal + read_id + MAX_OVERHEAD_BYTES); signals (n, bytes) uint8;
    cap_classes, lengths (n,) int64 >= 0; read_ids (n, bytes) uint8, filled up with zeros."""
    at = 0
    signal_bytes = signals.shape[1]
    for row in range(len(signals)):
        id_bytes = read_ids.shape[1]
        while id_bytes > 0 and read_ids[row, id_bytes - 1] == 0:
            id_bytes -= 1
        class_bytes, length_bytes = _varint_size(cap_classes[row]), _varint_size(lengths[row])
        features = _message_size(_feature_size(_CAP_CLASS, class_bytes))
        features += _message_size(_feature_size(_LENGTH, length_bytes))
        features += _message_size(_feature_size(_READ_ID, id_bytes))
        features += _message_size(_feature_size(_SIGNAL, signal_bytes))
        size = _message_size(features)

        _put_word(out, _put_word(out, at, size & _WORD), size >> 32)
        at += 12
        out[at] = 1 << 3 | 2
        at = _put_varint(out, at + 1, features)
        at = _put_head(out, at, _CAP_CLASS, INT64_LIST, class_bytes)
        at = _put_varint(out, at, cap_classes[row])
        at = _put_head(out, at, _LENGTH, INT64_LIST, length_bytes)
        at = _put_varint(out, at, lengths[row])
        at = _put_head(out, at, _READ_ID, BYTES_LIST, id_bytes)
        at = _put(out, at, read_ids[row, :id_bytes])
        at = _put_head(out, at, _SIGNAL, BYTES_LIST, signal_bytes)
        at = _put(out, at, signals[row]) + 4
    # The checksums last: bytes that were written just before are slow to read back.
    start = 0
    while start < at:
        end = start + 12 + (_word(out, start) | _word(out, start + 4) << 32)
        _put_word(out, start + 8, _masked(crc32c(out, start, start + 8)))
        start = _put_word(out, end, _masked(crc32c(out, start + 12, end)))
    return at


@kernel
def find_records(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[int, int, int, int]:
    """Goes through the frames in `data` and verifies both checksums of each.

    Fills starts and ends with where each record's data lies, as long as they have room. Returns
    (records, bytes they take, WHOLE | BAD_LENGTH | BAD_DATA, bytes the next record takes; 0 when
    not even its length is there)."""
    count, at = 0, 0
    while count < len(starts):
        if at + 12 > len(data):
            return count, at, WHOLE, 0
        if _masked(crc32c(data, at, at + 8)) != _word(data, at + 8):
            return count, at, BAD_LENGTH, 0
        size = int(_word(data, at) | _word(data, at + 4) << 32)
        if size < 0 or size > 1 << 62:
            return count, at, BAD_LENGTH, 0
        end = at + 12 + size
        if end + 4 > len(data):
            return count, at, WHOLE, size + FRAME_BYTES
        if _masked(crc32c(data, at + 12, end)) != _word(data, end):
            return count, at, BAD_DATA, 0
        starts[count], ends[count] = at + 12, end
        count += 1
        at = end + 4
    return count, at, WHOLE, 0


@helper
def _value(data: np.ndarray, at: int, end: int, name: np.ndarray, kind: int) -> tuple[int, int]:
    """Where the value of the feature `name`, which begins at `at`, lies; (-1, -1) when something
    else is there."""
    if at >= end or data[at] != 1 << 3 | 2:
        return -1, -1
    size, at = _varint(data, at + 1, end)
    stop = at + size
    if at < 0 or size > end - at or size < 2 + len(name):
        return -1, -1
    if data[at] != 1 << 3 | 2 or data[at + 1] != len(name):
        return -1, -1
    at += 2
    for k in range(len(name)):
        if data[at + k] != name[k]:
            return -1, -1
    at += len(name)
    for field in (2, kind, 1):
        if at >= stop or data[at] != field << 3 | 2:
            return -1, -1
        size, at = _varint(data, at + 1, stop)
        if at < 0 or size != stop - at:
            return -1, -1
    return at, stop


@kernel
def decode_records(
    data: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    signals: np.ndarray,
    cap_classes: np.ndarray,
    lengths: np.ndarray,
    id_starts: np.ndarray,
    id_ends: np.ndarray,
) -> int:
    """Takes the records at starts, ends (n,) apart, as long as `encode_records` could have made
    them; returns how many.

    Fills signals (n, bytes) uint8, cap_classes and lengths (n,) int64, and where the read_ids
    lie."""
    for row in range(len(starts)):
        at, end = starts[row], ends[row]
        if at >= end or data[at] != 1 << 3 | 2:
            return row
        size, at = _varint(data, at + 1, end)
        if at < 0 or size != end - at:
            return row
        at, stop = _value(data, at, end, _CAP_CLASS, INT64_LIST)
        if at < 0:
            return row
        cap_classes[row], at = _varint(data, at, stop)
        if at != stop:
            return row
        at, stop = _value(data, at, end, _LENGTH, INT64_LIST)
        if at < 0:
            return row
        lengths[row], at = _varint(data, at, stop)
        if at != stop:
            return row
        id_starts[row], id_ends[row] = _value(data, at, end, _READ_ID, BYTES_LIST)
        if id_starts[row] < 0:
            return row
        at, stop = _value(data, id_ends[row], end, _SIGNAL, BYTES_LIST)
        if at < 0 or stop != end or stop - at != signals.shape[1]:
            return row
        _put(signals[row], 0, data[at:stop])
    return len(starts)


@kernel
def copy_texts(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
    """data[starts[i]:ends[i]] to row i of out (n, bytes) uint8, which is zero and wide enough."""
    for row in range(len(starts)):
        _put(out[row], 0, data[starts[row] : ends[row]])


@kernel
def copy_rows(source: np.ndarray, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
    """Row rows[i] of source (m, bytes) uint8 to row places[i] of out (n, bytes) uint8."""
    for k in range(len(rows)):
        _put(out[places[k]], 0, source[rows[k]])
