"""Values that anybody may have written: what isn't as it should be counts as not there."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from capfinder.allowed import is_number


def part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """values[name]; {} when it isn't a mapping."""
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def parts(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The mappings in the list values[name]."""
    found = values.get(name)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def text(values: Mapping[str, Any], name: str) -> str:
    """values[name]; "" when it isn't a text."""
    found = values.get(name)
    return found if isinstance(found, str) else ""


def texts(values: Mapping[str, Any], name: str) -> list[str]:
    """values[name]; [] when one of them isn't a text: without it, others would take its place."""
    found = values.get(name)
    if isinstance(found, list) and all(isinstance(each, str) for each in found):
        return found
    return []


def is_share(value: object) -> TypeGuard[float]:
    """Whether it is from 0 to 1."""
    return isinstance(value, int | float) and is_number(value) and 0 <= value <= 1


def shares(values: Mapping[str, Any], name: str) -> list[float]:
    """values[name]; [] when one of them isn't a share."""
    found = values.get(name)
    return found if isinstance(found, list) and all(map(is_share, found)) else []


def plain(value: object) -> str:
    """A text, a number (six digits of a fraction) or a list of them; "" for anything else."""
    found = [_one(each) for each in (value if isinstance(value, list | tuple) else [value])]
    return ", ".join(found) if all(found) else ""


def _one(value: object) -> str:
    if isinstance(value, str):
        return value
    if not is_number(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
