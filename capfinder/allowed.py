"""Kinds of values that a setting may take, each with the words that describe it."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

MOST = 2**31 - 1  # of whole numbers without a limit of their own: what is made of them has room
MOST_SHOWN = 200  # characters of a value in a message
MOST_TEXT_BYTES = 4095  # of a path that Linux takes
MOST_NAMES, MOST_NAME_LENGTH, MOST_DEPTH = 200, 100, 3  # of a group whose keys the user names
MOST_CLASS_DIGITS = 9  # as in the CSV files
_MOST_COUNTED = 10**15  # no more reads than that
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # in no path; what UTF-8 can't write
_ADDRESS = re.compile(r"\S+:([0-9]{1,5})")
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){2}")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.*")


@dataclass(frozen=True)
class Allowed:
    """What a setting may be: `convert` gives the value to use or raises ValueError, whose text, if
    any, says more than `text` does."""

    type: type
    text: str
    convert: Callable[[Any], Any]


def shown(value: Any) -> str:
    """A value for a message: as Python writes it, without the middle of a long one."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists within lists
        return f"({type(value).__name__} too long to be shown)"
    return shortened(text)


def shortened(text: str) -> str:
    """For a message: without the middle of a long one."""
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[: MOST_SHOWN // 2]}...{text[-MOST_SHOWN // 2 :]}"


def is_text(text: str) -> bool:
    """Whether a path and a file in UTF-8 can hold it."""
    return _NO_TEXT.search(text) is None


def is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MOST_COUNTED


def is_count_matrix(value: object, size: int) -> TypeGuard[list[list[int]]]:
    """Whether it is a list of `size` lists of so many counts."""

    def is_row(row: object) -> bool:
        return isinstance(row, list) and len(row) == size and all(map(is_count, row))

    return isinstance(value, list) and len(value) == size and all(map(is_row, value))


def is_number(value: Any) -> bool:
    """Whether it is one that a float64 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _real(value: Any) -> float:
    if not is_number(value):
        raise ValueError
    return float(value) + 0.0  # -0.0 becomes 0.0


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
        if at_most is None and result > MOST:
            raise ValueError(f"{MOST} is the most")
        return int(value)

    bound = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    return Allowed(int, f"a whole number {bound}", convert)


def meant(value: Any, known: Sequence[str]) -> str:
    """'did you mean X?' where a choice is near."""
    if not isinstance(value, str) or len(value) > MOST_NAME_LENGTH:
        return ""
    near = difflib.get_close_matches(value.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def one_of(*values: str) -> Allowed:
    def convert(value: Any) -> str:
        if value not in values:
            raise ValueError(meant(value, values))
        return str(value)

    return Allowed(str, " | ".join(values), convert)


def text(meaning: str = "text", *, most_bytes: int = MOST_TEXT_BYTES) -> Allowed:
    def convert(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        _check_text(value)
        if len(value.encode()) > most_bytes:
            raise ValueError(f"{most_bytes} bytes are the most")
        return value

    return Allowed(str, meaning, convert)


def _check_text(value: str) -> None:
    if not is_text(value):
        raise ValueError("it isn't text that UTF-8 can write")


def _address(value: Any) -> str:
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if found is None or not 0 < int(found[1]) < 65_536:
        raise ValueError
    _check_text(value)
    return str(value)


def _storage(value: Any) -> str:
    if not isinstance(value, str) or not _URL.fullmatch(value):
        raise ValueError
    _check_text(value)
    return value


def _version(value: Any) -> str:
    if value not in ("", "latest") and not (isinstance(value, str) and _VERSION.fullmatch(value)):
        raise ValueError
    return str(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def some_of(*values: str) -> Allowed:
    def convert(value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError
        unknown = [item for item in value if item not in values]
        if unknown or len(set(value)) != len(value):
            raise ValueError(meant(unknown[0], values) if unknown else "")
        return tuple(value)

    return Allowed(tuple, f"a list of some of {', '.join(values)}", convert)


def _flags(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError
    for item in value:
        if not isinstance(item, str) or not item.startswith("--"):
            raise ValueError
        _check_text(item)
    return tuple(value)


def _class_map(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise ValueError
    result: dict[str, int] = {}
    for key, item in value.items():
        digits = str(key)
        if not (digits.isascii() and digits.isdecimal()) or len(digits) > MOST_CLASS_DIGITS:
            raise ValueError
        if isinstance(item, bool) or not isinstance(item, int):
            raise ValueError
        result[str(int(digits))] = item
    if sorted(result.values()) != list(range(len(result))) or len(result) != len(value):
        raise ValueError
    return result


def _named_values(value: Any) -> dict[str, Any]:
    """The names are checked where they are known: by the architecture, before any stage starts."""
    if not isinstance(value, Mapping):
        raise ValueError
    if len(value) > MOST_NAMES:
        raise ValueError(f"{MOST_NAMES} names are the most")
    return {_checked_name(key): _plain_value(item, MOST_DEPTH) for key, item in value.items()}


def _checked_name(name: Any) -> str:
    """What a ConfigDict takes for one."""
    is_name = isinstance(name, str) and name and not name.startswith("_") and "." not in name
    if not is_name or len(name) > MOST_NAME_LENGTH or not is_text(name):
        raise ValueError(f"{shown(name)} is no name")
    return str(name)


def _plain_value(value: Any, depth: int) -> Any:
    """Lists become tuples and mappings plain dicts, so that values compare."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_text(value)
        return value
    if isinstance(value, int | float):
        if not is_number(value):
            raise ValueError(f"{shown(value)} is no number that JSON knows")
        return value
    if not depth:
        raise ValueError("it is nested too deep")
    if isinstance(value, Mapping):
        return {_checked_name(key): _plain_value(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain_value(item, depth - 1) for item in value)
    raise ValueError(f"{shown(value)} is no value that JSON knows")


BOOLEAN = Allowed(bool, "true | false", _boolean)
FLAGS = Allowed(tuple, 'a list of options such as ["--runner=FlinkRunner"]', _flags)
VERSION = Allowed(str, '"" | latest | X.Y.Z', _version)
CLASS_MAP = Allowed(dict, 'a mapping onto classes 0, 1, ... such as {"0": 0, "3": 1}', _class_map)
STORAGE = Allowed(str, "an Optuna storage URL", _storage)
ADDRESS = Allowed(str, "HOST:PORT", _address)
PROJECT = text(most_bytes=200)  # it is part of a directory's name
FRACTION = number(above=0, below=1)
RATE = number(above=0, at_most=10)


def named_values(text: str) -> Allowed:
    return Allowed(dict, text, _named_values)
