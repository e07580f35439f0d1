"""Small models of every architecture with weights as after a training, for the tests of export."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from capfinder import models
from tests.sizes import TINY

LENGTH, CLASSES = 48, 3


@dataclass(frozen=True)
class SmallModel:
    """A model, signals with and without padding, and the Flax model's probabilities for them."""

    model_type: str
    hyperparameters: Any
    module: nn.Module
    variables: dict[str, Any]
    signals: np.ndarray  # (6, LENGTH, 1)
    expected: np.ndarray  # (6, CLASSES)

    def probabilities(self, variables: Any, signal: Any) -> jax.Array:
        return jax.nn.softmax(self.module.apply(variables, signal, train=False))


def small_model(model_type: str, *, seed: int = 0, dtype: str = "float32") -> SmallModel:
    hyperparameters = models.parse_hyperparameters(model_type, TINY[model_type])
    module = models.architecture(model_type).build(
        hyperparameters, num_classes=CLASSES, dtype=np.dtype(dtype)
    )
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(6, LENGTH, 1)).astype(dtype)
    signals[0, :20] = 0  # as short reads are padded
    signals[0, -7:] = 0
    signals[1, -30:] = 0
    signals[2] = 0
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), signals, train=False))

    def values(path: Any, leaf: Any) -> np.ndarray:
        """No weight is left at the value that it starts from on both sides."""
        name = path[-1].key
        if name == "var":
            return rng.uniform(0.5, 2, leaf.shape).astype(leaf.dtype)
        centre = 1.0 if name == "scale" else 0.0
        spread = 1.5 / np.sqrt(np.prod(leaf.shape[:-1])) if "kernel" in name else 0.3
        return rng.normal(centre, spread, leaf.shape).astype(leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(values, shapes)
    small = SmallModel(model_type, hyperparameters, module, variables, signals, signals)
    expected = np.asarray(jax.jit(small.probabilities)(variables, signals))
    return SmallModel(model_type, hyperparameters, module, variables, signals, expected)
