"""Findings of Beam's workers as bytes that hold data alone: reading them can't run any code.

A finding is the length of a JSON text, the text, then the arrays that it refers to, each in NumPy's
own format."""

import dataclasses
import json
import struct
from typing import Any

import numpy as np

from capfinder import errors
from capfinder.data.records import ShardFile
from capfinder.etl.csv_reader import Reject, Signals
from capfinder.etl.plan import Shard
from capfinder.etl.scan import ScannedBlock
from capfinder.etl.shuffle import ParsedBlock, WrittenShard


@dataclasses.dataclass(frozen=True)
class RangeEnd:
    """Comes after a range's blocks. lines: that end in it; sha256: of the file, when the range is
    all of it."""

    lines: int
    sha256: str | None


KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ParsedBlock,
        RangeEnd,
        Reject,
        ScannedBlock,
        Shard,
        ShardFile,
        Signals,
        WrittenShard,
    )
}
_LENGTH = struct.Struct("<Q")
_MAX_TEXT_BYTES = 1 << 30


def write(stream: Any, finding: object) -> None:
    """finding: of KINDS, an error of ours, or JSON's own types, with arrays of any plain dtype."""
    arrays: list[np.ndarray] = []
    text = json.dumps(_as_json(finding, arrays)).encode()
    stream.write(_LENGTH.pack(len(text)))
    stream.write(text)
    for array in arrays:
        np.lib.format.write_array(stream, array, allow_pickle=False)


def read(stream: Any) -> Any:
    """Raises: EOFError after the last finding; ValueError for what `write` didn't write."""
    head = stream.read(_LENGTH.size)
    if not head:
        raise EOFError
    if len(head) < _LENGTH.size or _LENGTH.unpack(head)[0] > _MAX_TEXT_BYTES:
        raise ValueError("no finding")
    text = stream.read(_LENGTH.unpack(head)[0])
    try:
        return _from_json(json.loads(text), stream)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no finding ({error})") from None


def _as_json(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": None}
    if isinstance(value, errors.CapfinderError):
        return {"error": type(value).__name__, "message": str(value)}
    if isinstance(value, Reject):
        return {"kind": "Reject", "fields": value._asdict()}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: _as_json(getattr(value, name), arrays) for name in names}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, dict):
        return {"items": [[key, _as_json(item, arrays)] for key, item in value.items()]}
    if isinstance(value, list):
        return [_as_json(item, arrays) for item in value]
    return value


def _from_json(value: Any, stream: Any) -> Any:
    """Arrays come in the order in which they were met."""
    if isinstance(value, list):
        return [_from_json(item, stream) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return np.lib.format.read_array(stream, allow_pickle=False)
    if "error" in value:
        kind = getattr(errors, value["error"])
        return kind(value["message"]) if issubclass(kind, errors.CapfinderError) else None
    if "items" in value:
        return {key: _from_json(item, stream) for key, item in value["items"]}
    fields = {name: _from_json(item, stream) for name, item in value["fields"].items()}
    return KINDS[value["kind"]](**fields)
