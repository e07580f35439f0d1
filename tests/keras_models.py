"""Small classifiers in Keras, written as others would, with Keras's own names for the layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from capfinder import libraries
from tests.small_models import CLASSES, LENGTH


def with_weights(model: Any, seed: int = 0) -> Any:
    """As after a training: none is left at the value that it starts from."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        name, shape = weight.path.split("/")[-1], tuple(weight.shape)
        if name == "moving_variance":
            weight.assign(rng.uniform(0.5, 2, shape))
            continue
        spread = 2.5 / np.sqrt(np.prod(shape[:-1])) if "kernel" in name else 0.3
        weight.assign(rng.normal(1.0 if name == "gamma" else 0.0, spread, shape))
    return model


def stack(
    layers: Any,
    *,
    conv: dict[str, Any] | None = None,
    norm: dict[str, Any] | None = None,
    lstm: dict[str, Any] | None = None,
    after_conv: Sequence[Any] = (),
    before_head: Sequence[Any] = (),
    head: dict[str, Any] | None = None,
) -> list[Any]:
    """A cnn_lstm of one convolution and two LSTM layers, or something that is nearly one."""
    conv = {"padding": "same", "activation": "relu"} | (conv or {})
    return [
        layers.Conv1D(4, 5, **conv),
        *after_conv,
        layers.MaxPooling1D(2),
        layers.Dropout(0.2),
        layers.BatchNormalization(**(norm or {})),
        layers.LSTM(4, return_sequences=True),
        layers.Dropout(0.3),
        layers.BatchNormalization(),
        layers.LSTM(4, **(lstm or {})),
        layers.BatchNormalization(),
        layers.Dense(4, activation="relu"),
        layers.Dropout(0.5),
        *before_head,
        layers.Dense(CLASSES, **({"activation": "softmax"} | (head or {}))),
    ]


def chain(stacked: Sequence[Any], length: int = LENGTH) -> Any:
    """The functional model of layers one after another."""
    library = libraries.keras()
    signal = x = library.Input((length, 1))
    for layer in stacked:
        x = layer(x)
    return library.Model(signal, x)
