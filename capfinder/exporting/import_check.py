"""Whether an imported model gives the probabilities of the Keras model that it comes from."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from capfinder import libraries
from capfinder.exporting import fitting

_EACH = 8  # signals of a kind


def signals(length: int, *, seed: int = 0) -> np.ndarray:
    """(n, length, 1) float64, z-scored but for the last: noise; smooth ones; noise and smooth ones
    with padding at both ends; nothing but zeros."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2 * _EACH, length))
    walks = rng.normal(size=(2 * _EACH, length)).cumsum(axis=1)
    found = np.concatenate([noise, walks])
    found -= found.mean(axis=1, keepdims=True)
    found /= found.std(axis=1, keepdims=True) + 1e-9
    for row in found[::2]:
        first, last = np.sort(rng.integers(0, length + 1, 2))
        row[:first] = 0
        row[last:] = 0
    return np.concatenate([found, np.zeros((1, length))])[..., np.newaxis]


def probabilities(model: Any, found: np.ndarray) -> np.ndarray:
    """(n, C) of a Keras model for signals (n, T, 1)."""
    return np.asarray(model.predict(found, batch_size=len(found), verbose=0))


def in_precision(model: Any, dtype: str) -> Any:
    """The Keras model with the same weights, computing in `dtype`; itself when it does so."""
    description = json.loads(model.to_json())
    changed = _with_policy(description, dtype)
    if changed == description:
        return model
    again = libraries.keras().models.model_from_json(json.dumps(changed))
    again.set_weights([np.asarray(weight).astype(dtype) for weight in model.weights])
    return again


def _with_policy(node: Any, dtype: str) -> Any:
    if isinstance(node, list):
        return [_with_policy(child, dtype) for child in node]
    if not isinstance(node, dict):
        return node
    if node.get("class_name") == "DTypePolicy":
        return {**node, "config": {"name": dtype}}
    return {
        key: dtype if key == "dtype" and isinstance(value, str) else _with_policy(value, dtype)
        for key, value in node.items()
    }


def largest_difference(
    keras_model: Any,
    imported: Callable[[np.ndarray], np.ndarray],
    *,
    input_length: int,
    target_length: int,
    dtype: str,
) -> float:
    """Of a probability, between the Keras model for signals of `input_length` and
    imported(signals (n, target_length, 1)) -> (n, C); NaN when one of them gives no number."""
    given = signals(input_length).astype(dtype)
    expected = probabilities(in_precision(keras_model, dtype), given)
    found = imported(np.asarray(fitting.jax_fitted(given, target_length)))
    return float(np.max(np.abs(expected - found)))
