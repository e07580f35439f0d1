"""Finds what is wrong with search_params before a trial starts, and names it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from capfinder.allowed import MOST, is_number, meant, shown
from capfinder.errors import SettingsError
from capfinder.models.hyperparameters import MOST_LAYERS
from capfinder.stages.search_params import LAYER_INDEX, SearchTrial, find_override

OVERRIDE_KEYS = ("low", "high", "step", "log", "choices")
MOST_PROBES = 1000


def check(
    overrides: Mapping[str, Any], *, architecture: Any, model_type: str, target_length: int
) -> None:
    """Checks search_params before a trial starts, at the ends of every parameter's range.

    Raises: SettingsError that names the key, what is wrong and the nearest name."""
    for key, override in overrides.items():
        _check_shape(f"search_params.{key}", override)

    def space(trial: Any) -> Any:
        return architecture.search_space(trial, target_length=target_length)

    def overridden(trial: Any) -> Any:
        drawn = space(SearchTrial(trial, overrides))
        shortest = architecture.minimum_length(drawn)
        if target_length < shortest:
            raise SettingsError(
                f"search_params: they allow a model that needs signals of {shortest} samples, "
                f"shared_params.target_length is {target_length}"
            )
        return drawn

    def check_limits(name: str, values: tuple[Any, ...]) -> None:
        _check_limits(name, values, overrides, architecture.Hyperparameters)

    usual = explore(space)
    reached = explore(overridden, check_limits) if overrides else {}
    for pattern in overrides:
        names = [
            name for name in {**usual, **reached} if find_override(name, {pattern: None}) == pattern
        ]
        if not names:
            known = sorted({LAYER_INDEX.sub("", name) for name in usual})
            hint = meant(pattern, [*usual, *known]) or f"known: {', '.join(known)}"
            raise SettingsError(
                f"search_params.{pattern}: fits no parameter of {model_type}; {hint}"
            )


def _check_shape(key: str, override: Any) -> None:
    if not isinstance(override, Mapping) or not override:
        raise SettingsError(
            f'{key}={shown(override)}: must be {{"low": ..., "high": ...}} (also "step" or "log") '
            'or {"choices": [...]}'
        )
    for name in override:
        if name not in OVERRIDE_KEYS:
            hint = meant(name, OVERRIDE_KEYS) or f"known: {', '.join(OVERRIDE_KEYS)}"
            raise SettingsError(f"{key}.{name}: no such key; {hint}")
    if "choices" in override:
        choices = override["choices"]
        if len(override) > 1:
            raise SettingsError(f"{key}: choices stand alone, without low, high, step or log")
        if (
            not isinstance(choices, list | tuple)
            or not choices
            or not all(map(_is_number, choices))
        ):
            raise SettingsError(f"{key}.choices={shown(choices)}: must be a list of numbers")
        return
    for name in ("low", "high", "step"):
        if name in override and not _is_number(override[name]):
            raise SettingsError(f"{key}.{name}={shown(override[name])}: must be a number")
    if not isinstance(override.get("log", False), bool):
        raise SettingsError(f"{key}.log={shown(override['log'])}: must be true or false")
    if override.get("step", 1) <= 0:
        raise SettingsError(f"{key}.step={override['step']:g}: must be above 0")
    if override.get("log") and "step" in override:
        raise SettingsError(f"{key}: has step or log, not both")


def _is_number(value: Any) -> bool:
    return is_number(value) and abs(value) <= MOST


def _check_limits(
    name: str, values: Iterable[Any], overrides: Mapping[str, Any], hyperparameters: type
) -> None:
    """The architecture's own limits; a number of layers, which has none, is 1 to MOST_LAYERS."""
    pattern = find_override(name, overrides)
    if pattern is None:
        return
    fields = {field.name: field for field in dataclasses.fields(hyperparameters)}
    field = fields.get(name) or fields.get(LAYER_INDEX.sub("", name))
    low = field.metadata["low"] if field else 1
    high = field.metadata["high"] if field else MOST_LAYERS
    default = field.default if field else 1
    whole = isinstance(default[0] if isinstance(default, tuple) else default, int)
    for value in values:
        if not low <= value <= high or (whole and not isinstance(value, int)):
            kind = "a whole number" if whole else "a number"
            raise SettingsError(
                f"search_params.{pattern}: {name}={value:g} must be {kind} of at least "
                f"{low:g} and at most {high:g}"
            )


def explore(
    space: Callable[[Any], Any], check: Callable[[str, tuple[Any, ...]], None] | None = None
) -> dict[str, set[Any]]:
    """Every parameter that `space` can ask for, with the ends of its ranges or all its choices.

    check: told of both before one of them is drawn, as a model of a million layers takes forever.

    Some are only asked for at certain values of others, so each in turn goes to its other end
    while the rest stay low, and while they stay high, until nothing new comes up."""
    found: dict[str, set[Any]] = {}
    waiting: list[tuple[str | None, bool]] = [(None, False), (None, True)]
    for _ in range(MOST_PROBES):
        if not waiting:
            break
        name, high = waiting.pop()
        probe = _Probe(name, high, check)
        try:
            space(probe)
        except (ValueError, ArithmeticError):
            raise SettingsError(
                f"search_params: a model with {probe.drawn} can't be built for signals of "
                "shared_params.target_length"
            ) from None
        for new in probe.drawn.keys() - found.keys():
            waiting += [(new, False), (new, True)]
        for parameter, values in probe.offered.items():
            found.setdefault(parameter, set()).update(values)
    return found


class _Probe:
    """A trial that takes the end of every range: `high` or low, `flipped` the other one."""

    def __init__(
        self,
        flipped: str | None,
        high: bool,
        check: Callable[[str, tuple[Any, ...]], None] | None,
    ) -> None:
        self._flipped, self._high, self._check = flipped, high, check
        self.drawn: dict[str, Any] = {}
        self.offered: dict[str, tuple[Any, ...]] = {}

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return self.suggest_categorical(name, (low, high))

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return self.suggest_categorical(name, (low, high))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.offered[name] = tuple(choices)
        if self._check is not None:
            self._check(name, self.offered[name])
        last = self._high != (name == self._flipped)
        self.drawn[name] = choices[-1 if last else 0]
        return self.drawn[name]
