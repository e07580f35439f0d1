"""search_params: the user's ranges in place of an architecture's own.

Works on anything with suggest_int, suggest_float and suggest_categorical; no Optuna in here."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from capfinder.errors import SettingsError

LAYER_INDEX = re.compile(r"_\d+$")  # conv_filters_2 is conv_filters of layer 2
MOST_STEPS = 10**6  # from low to high


@dataclass(frozen=True)
class Range:
    """Whole or real numbers from low to high, both allowed."""

    kind: type  # int or float
    low: float
    high: float
    step: float | None  # None: any real number
    log: bool

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if (self.kind is int and value != int(value)) or not self.low <= value <= self.high:
            return False
        return self.step is None or _divides(self.step, value - self.low)

    def __str__(self) -> str:
        step = f" in steps of {self.step:g}" if self.step not in (None, 1) else ""
        return f"{self.low:g} to {self.high:g}{step}"


@dataclass(frozen=True)
class Choices:
    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.values))


Space = Range | Choices


def _divides(step: float, distance: float) -> bool:
    return abs(distance / step - round(distance / step)) < 1e-8


class SearchTrial:
    """A trial whose parameters are drawn from the user's ranges where search_params has some."""

    def __init__(self, trial: Any, overrides: Mapping[str, Mapping[str, Any]]) -> None:
        self._trial, self._overrides = trial, overrides

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return self._suggest(name, Range(int, low, high, step, log))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self._suggest(name, Range(float, low, high, step, log))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._suggest(name, Choices(tuple(choices)))

    def _suggest(self, name: str, space: Space) -> Any:
        pattern = find_override(name, self._overrides)
        if pattern is not None:
            space = _apply(f"search_params.{pattern}", self._overrides[pattern], space)
        return _draw(self._trial, name, space)


def _draw(trial: Any, name: str, space: Space) -> Any:
    if isinstance(space, Choices):
        return trial.suggest_categorical(name, space.values)
    if space.kind is int:
        low, high, step = int(space.low), int(space.high), int(space.step or 1)
        return trial.suggest_int(name, low, high, step=step, log=space.log)
    return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)


def find_override(name: str, overrides: Mapping[str, Any]) -> str | None:
    """The key of search_params that rules `name`: itself, else the first pattern that fits.

    A pattern may leave out the layer: conv_filters and *_filters both fit conv_filters_2."""
    return _find(name, tuple(overrides))


@functools.lru_cache(maxsize=10_000)  # asked for every draw, of few names
def _find(name: str, patterns: tuple[str, ...]) -> str | None:
    if name in patterns:
        return name
    without_layer = LAYER_INDEX.sub("", name)
    for pattern in patterns:
        if fnmatchcase(name, pattern) or fnmatchcase(without_layer, pattern):
            return pattern
    return None


def _apply(key: str, override: Mapping[str, Any], space: Space) -> Space:
    """The override's range; the rest is as in `space`, its step only where it still fits."""
    if "choices" in override:
        return Choices(tuple(override["choices"]))
    if isinstance(space, Choices):
        kind = int if all(isinstance(value, int) for value in space.values) else float
        space = Range(kind, min(space.values), max(space.values), 1 if kind is int else None, False)
    low, high = override.get("low", space.low), override.get("high", space.high)
    log = override.get("log", space.log and "step" not in override)
    if low > high:
        raise SettingsError(f"{key}: low={low:g} is above high={high:g}")
    if log and low <= 0:
        raise SettingsError(f"{key}: low={low:g} must be above 0 where log is true")
    step = override.get("step")
    if step is None and space.step is not None and not log:
        fits = _divides(space.step, low - space.low) and _divides(space.step, high - low)
        step = space.step if fits else None
    if space.kind is int:
        step = step or 1
        if any(value != int(value) for value in (low, high, step)):
            raise SettingsError(f"{key}: low, high and step must be whole numbers")
    if "step" in override and (high - low) / step > MOST_STEPS:
        raise SettingsError(f"{key}: step={step:g} is too small from low={low:g} to high={high:g}")
    if step is not None:
        high = low + math.floor((high - low) / step + 1e-8) * step  # the last value on the grid
    return Range(space.kind, low, high, step, bool(log))


class OutsideError(Exception):
    """Values that the search space doesn't hold."""


class GivenTrial:
    """A trial that gives known values. Raises: OutsideError for one that isn't in its range."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return self._take(name, Range(int, low, high, step, log))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self._take(name, Range(float, low, high, step, log))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._take(name, Choices(tuple(choices)))

    def _take(self, name: str, space: Space) -> Any:
        if name not in self._parameters:
            raise OutsideError(f"{name} is missing")
        if self._parameters[name] not in space:
            raise OutsideError(f"{name}={self._parameters[name]} is not {space}")
        return self._parameters[name]


def first_trial(
    hyperparameters: Any,
    overrides: Mapping[str, Mapping[str, Any]],
    *,
    architecture: Any,
    target_length: int,
) -> dict[str, Any]:
    """The trial's parameters that give `hyperparameters`.

    Raises: OutsideError with the reason when the search space doesn't hold them."""
    parameters: dict[str, Any] = architecture.trial_parameters(hyperparameters)
    given = SearchTrial(GivenTrial(parameters), overrides)
    if architecture.search_space(given, target_length=target_length) != hyperparameters:
        raise OutsideError("no trial gives exactly these values")
    return parameters
