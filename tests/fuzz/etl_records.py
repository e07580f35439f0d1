"""TFRecord files of tf.train.Example, read with nothing but the formats' definitions."""

import struct
from collections.abc import Iterator
from pathlib import Path

Value = bytes | int


def read_examples(path: Path) -> Iterator[dict[str, Value]]:
    """Each record's features, one value a feature. The checksums are others' to test."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield dict(_features(data[at + 12 : at + 12 + size]))
        at += 12 + size + 4


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, at = _varint(message, at)
        if key & 7 == 2:
            yield key >> 3, message[at : at + value]
            at += value
        else:
            assert key & 7 == 0, key
            yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _features(example: bytes) -> Iterator[tuple[str, Value]]:
    ((_, features),) = _fields(example)
    assert isinstance(features, bytes)
    for _, entry in _fields(features):
        assert isinstance(entry, bytes)
        (_, name), (_, feature) = _fields(entry)
        assert isinstance(name, bytes) and isinstance(feature, bytes)
        ((kind, values),) = _fields(feature)
        assert isinstance(values, bytes)
        ((_, value),) = _fields(values)
        if kind == 3 and isinstance(value, bytes):  # packed integers
            value, _ = _varint(value, 0)
        yield name.decode(), value
