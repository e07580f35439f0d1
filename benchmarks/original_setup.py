"""Capfinder 0.4.3's models, by its own builders; for the Python of its own environment.

Importing it writes to ~/.capfinder, so HOME must be a scratch directory."""

import importlib
import math
from importlib.metadata import version
from typing import Any

BUILDERS = {
    "cnn_lstm": "capfinder.cnn_lstm_model:CapfinderHyperModel",
    "attention_cnn_lstm": "capfinder.attention_cnnlstm_model:CapfinderHyperModel",
    "encoder": "capfinder.encoder_model:CapfinderHyperModel",
    "resnet": "capfinder.resnet_model:ResNetTimeSeriesHyper",
}
VERSIONS = ("capfinder", "tensorflow-cpu", "jax", "keras", "numpy")


def build(model_type: str, values: dict[str, Any], *, target_length: int, num_classes: int) -> Any:
    """The compiled Keras model with these values of its hyperparameters.

    Raises: ValueError when its builder asked for others too, which would be left to chance."""
    from capfinder.ml_libs import HyperParameters

    module, name = BUILDERS[model_type].split(":")
    builder = getattr(importlib.import_module(module), name)
    chosen = HyperParameters()
    chosen.values.update(values)
    model = builder((target_length, 1), num_classes).build(chosen)
    if chosen.values != values:
        raise ValueError(f"{model_type} has hyperparameters {chosen.values}, given were {values}")
    return model


def parameters(model: Any) -> int:
    """Those that are trained."""
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in VERSIONS)
