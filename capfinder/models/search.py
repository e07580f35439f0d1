"""Search spaces: a parameter of layer i is called `<hyperparameter>_<i>` in a trial, so that
trials of different depth share what they have in common.

A trial is anything with Optuna's suggest_int, suggest_float and suggest_categorical."""

from collections.abc import Mapping
from typing import Any

KERNELS = (3, 5, 7)  # samples
RATE_DIGITS = 12


def suggest_dropout(trial: Any, name: str, low: float) -> float:
    """A rate from `low` to 0.5 in steps of 0.1, or of the user's range, free of the steps' rounding
    error: 0.3, not 0.30000000000000004."""
    return round(trial.suggest_float(name, low, 0.5, step=0.1), RATE_DIGITS)


def flatten(values: Mapping[str, Any], depths: Mapping[str, str]) -> dict[str, Any]:
    """Hyperparameters -> trial parameters: a tuple becomes `<name>_0`, `<name>_1`, ...

    depths: the trial parameter for a number of layers -> a tuple with one value for each."""
    flat: dict[str, Any] = {depth: len(values[name]) for depth, name in depths.items()}
    for name, value in values.items():
        if isinstance(value, tuple):
            flat.update({f"{name}_{i}": one for i, one in enumerate(value)})
        else:
            flat[name] = value
    return flat
