"""What every architecture's hyperparameters share: allowed ranges and parsing from JSON values."""

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from capfinder.allowed import shown
from capfinder.errors import SettingsError

T = TypeVar("T")
MOST_LAYERS = 64  # of any kind: a list with more is a slip


def hyperparameter(
    default: Any, *, low: float, high: float, meaning: str, per: str | None = None
) -> Any:
    """A dataclass field with its range (both ends allowed) and meaning.

    A tuple has one value per layer; tuples with the same `per` must be of one length."""
    metadata = {"low": low, "high": high, "meaning": meaning, "per": per}
    return dataclasses.field(default=default, metadata=metadata)


def learning_rate(default: float) -> Any:
    """The one hyperparameter that all architectures have."""
    return hyperparameter(default, low=1e-8, high=1.0, meaning="Adam's step size at the start")


def parse(cls: type[T], overrides: Mapping[str, Any], *, model_type: str) -> T:
    """`cls` with checked `overrides` over its defaults; lists become tuples.

    Raises: SettingsError that names the key, the value, what is allowed and the nearest key."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, field in fields.items():
        if "meaning" not in field.metadata or isinstance(field.default, bool):
            raise SettingsError(
                f"{cls.__module__}.{cls.__name__}.{name}: must be a number or a tuple of numbers, "
                "declared by hyperparameter(...) with its range (0 to 1 for a switch)"
            )
    values = {}
    for key, value in overrides.items():
        if key not in fields:
            near = get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
            raise SettingsError(
                f"model_params.{key}: {model_type} has no such hyperparameter{hint}"
            )
        values[key] = _checked(fields[key], value)
    parsed = cls(**values)
    _check_lengths(parsed, fields)
    return parsed


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    if not isinstance(field.default, tuple):
        return _checked_number(field, value, type(field.default))
    wanted = type(field.default[0])
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MOST_LAYERS:
        raise SettingsError(
            f"model_params.{field.name}: {shown(value)} is not a list of one or more numbers, "
            f"{MOST_LAYERS} at most "
            f"({field.metadata['meaning']})"
        )
    return tuple(_checked_number(field, one, wanted) for one in value)


def _checked_number(field: dataclasses.Field[Any], value: Any, wanted: type) -> Any:
    low, high = field.metadata["low"], field.metadata["high"]
    allowed_types = (int, float) if wanted is float else (int,)
    is_number = isinstance(value, allowed_types) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        kind = "a number" if wanted is float else "a whole number"
        raise SettingsError(
            f"model_params.{field.name}: {shown(value)} is not {kind} from {low:g} to {high:g} "
            f"({field.metadata['meaning']})"
        )
    return wanted(value)


def _check_lengths(parsed: Any, fields: Mapping[str, dataclasses.Field[Any]]) -> None:
    for per in {field.metadata["per"] for field in fields.values()} - {None}:
        lengths = {
            name: len(getattr(parsed, name))
            for name, field in fields.items()
            if field.metadata["per"] == per
        }
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise SettingsError(
                f"model_params: {found}; give each of them one value per {per}, all equally many"
            )
