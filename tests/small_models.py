"""Small models of every architecture with weights as after a training, for the tests of export.

Widths repeat, since Keras on JAX compiles an initialiser for each new shape."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from capfinder import models

LENGTH, CLASSES = 48, 3
_TRUNK = {
    "conv_filters": (4, 4),
    "conv_kernels": (5, 5),
    "conv_dropouts": (0.1, 0.1),
    "lstm_units": (4, 4),
    "lstm_dropouts": (0.1, 0.1),
    "dense_units": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "cnn_lstm": _TRUNK,
    "attention_cnn_lstm": _TRUNK,
    "encoder": {
        "d_model": 4,
        "num_heads": 2,
        "head_size": 2,
        "num_blocks": 1,
        "feed_forward_units": 8,
        "mlp_units": (4,),
    },
    "resnet": {
        "stem_filters": 4,
        "stage_filters": (4, 8),
        "stage_kernels": (3, 3),
        "stage_blocks": (1, 2),
        "dense_units": 4,
    },
}


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
    hyperparameters = models.parse_hyperparameters(model_type, OVERRIDES[model_type])
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
