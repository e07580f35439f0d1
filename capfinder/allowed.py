"""Kinds of values that a setting may take, each with the words that describe it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """What a setting may be: `convert` gives the value to use or raises ValueError."""

    type: type
    text: str
    convert: Callable[[Any], Any]


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    try:
        result = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(result):
        raise ValueError
    return result


def number(
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Allowed:
    bounds = [
        f"{word} {limit:g}"
        for word, limit in (
            ("above", above),
            ("at least", at_least),
            ("below", below),
            ("at most", at_most),
        )
        if limit is not None
    ]

    def convert(value: Any) -> float:
        result = _real(value)
        if (
            (above is not None and result <= above)
            or (below is not None and result >= below)
            or (at_least is not None and result < at_least)
            or (at_most is not None and result > at_most)
        ):
            raise ValueError
        return result

    return Allowed(float, " ".join(["a number", " and ".join(bounds)]).strip(), convert)


def integer(at_least: int, at_most: int | None = None) -> Allowed:
    def convert(value: Any) -> int:
        result = _real(value)
        if result != int(result) or result < at_least or (at_most is not None and result > at_most):
            raise ValueError
        return int(result)

    bound = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    return Allowed(int, f"a whole number {bound}", convert)


def one_of(*values: str) -> Allowed:
    def convert(value: Any) -> str:
        if value not in values:
            raise ValueError
        return str(value)

    return Allowed(str, " | ".join(values), convert)


def text(meaning: str = "text") -> Allowed:
    def convert(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        return value

    return Allowed(str, meaning, convert)


def _version(value: Any) -> str:
    parts = value.split(".") if isinstance(value, str) else []
    if value in ("", "latest") or (len(parts) == 3 and all(part.isdecimal() for part in parts)):
        return str(value)
    raise ValueError


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def some_of(*values: str) -> Allowed:
    def convert(value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError
        if any(item not in values for item in value) or len(set(value)) != len(value):
            raise ValueError
        return tuple(value)

    return Allowed(tuple, f"a list of some of {', '.join(values)}", convert)


def _flags(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError
    if not all(isinstance(item, str) and item.startswith("--") for item in value):
        raise ValueError
    return tuple(value)


def _class_map(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise ValueError
    result: dict[str, int] = {}
    for key, item in value.items():
        if not str(key).isdecimal() or isinstance(item, bool) or not isinstance(item, int):
            raise ValueError
        result[str(int(key))] = item
    if sorted(result.values()) != list(range(len(result))) or len(result) != len(value):
        raise ValueError
    return result


def _named_values(value: Any) -> dict[str, Any]:
    """The names are checked where they are known: by the architecture, before any stage starts."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError
    try:
        json.dumps(value, allow_nan=False)
    except TypeError:
        raise ValueError from None
    return {key: plain(item) for key, item in value.items()}


def plain(value: Any) -> Any:
    """Lists become tuples and mappings plain dicts, all the way down, so that values compare."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value


BOOLEAN = Allowed(bool, "true | false", _boolean)
FLAGS = Allowed(tuple, 'a list of options such as ["--runner=FlinkRunner"]', _flags)
VERSION = Allowed(str, '"" | latest | X.Y.Z', _version)
CLASS_MAP = Allowed(dict, 'a mapping onto classes 0, 1, ... such as {"0": 0, "3": 1}', _class_map)
FRACTION = number(above=0, below=1)
RATE = number(above=0, at_most=10)


def named_values(text: str) -> Allowed:
    return Allowed(dict, text, _named_values)
