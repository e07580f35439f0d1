"""What cnn_lstm and attention_cnn_lstm have in common: convolutions that shorten the signal, then
LSTM layers that read it. Flax and Keras forms stand side by side, with the same names."""

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from math import log2
from typing import Any

import jax
from flax import linen as nn

from capfinder.models import search
from capfinder.models.chunks import in_chunks
from capfinder.models.hyperparameters import hyperparameter, learning_rate
from capfinder.models.layers import BatchNorm, Conv, Dropout, Lstm, max_pool, precision

POOL = 2  # samples per maximum after each convolution


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Tuples have one value per layer."""

    conv_filters: tuple[int, ...] = hyperparameter(
        (32, 64, 64, 64), low=1, high=4096, per="convolution", meaning="filters of each convolution"
    )
    conv_kernels: tuple[int, ...] = hyperparameter(
        (7, 5, 5, 3),
        low=1,
        high=999,
        per="convolution",
        meaning="samples that each convolution sees",
    )
    conv_dropouts: tuple[float, ...] = hyperparameter(
        (0.1, 0.1, 0.1, 0.1),
        low=0,
        high=0.95,
        per="convolution",
        meaning="share dropped after each",
    )
    lstm_units: tuple[int, ...] = hyperparameter(
        (64, 64), low=1, high=4096, per="LSTM layer", meaning="units of each LSTM layer"
    )
    lstm_dropouts: tuple[float, ...] = hyperparameter(
        (0.1, 0.1), low=0, high=0.95, per="LSTM layer", meaning="share dropped after each"
    )
    dense_units: int = hyperparameter(64, low=1, high=4096, meaning="units of the dense layer")
    dense_dropout: float = hyperparameter(0.2, low=0, high=0.95, meaning="share dropped after it")
    learning_rate: float = learning_rate(1e-3)


def minimum_length(h: Hyperparameters) -> int:
    """The shortest signal that leaves one position after every convolution's pooling."""
    return POOL ** len(h.conv_filters)


def conv_blocks(
    module: nn.Module, x: jax.Array, h: Hyperparameters, *, train: bool, dtype: Any
) -> jax.Array:
    """Convolution, maximum over 2, dropout, norm, for each layer: (B, T, C) -> (B, T', filters).

    Call it inside a compact module, which it is given; its layers become that module's own."""

    def blocks(x: jax.Array) -> jax.Array:
        shapes = zip(h.conv_filters, h.conv_kernels, h.conv_dropouts, strict=True)
        for layer, (filters, kernel, dropout) in enumerate(shapes):
            x = nn.relu(Conv(filters, kernel, name=f"conv_{layer}", **precision(dtype))(x))
            pooled = max_pool(x, POOL)  # T halves
            x = Dropout(dropout, deterministic=not train)(pooled)
            norm = BatchNorm(not train, name=f"conv_norm_{layer}", **precision(dtype))
            x = norm(x, undropped=pooled)
        return x

    return in_chunks(module, blocks, x, train=train)


def lstm_blocks(
    x: jax.Array, h: Hyperparameters, *, return_sequences: bool, train: bool, dtype: Any
) -> jax.Array:
    """LSTM, dropout, norm, for each layer: (B, T, C) -> (B, T, H), or (B, H) of the last position.

    Call it inside a compact module; its layers become that module's own."""
    x = x.swapaxes(0, 1)  # time first, for all of the layers
    last = len(h.lstm_units) - 1
    for layer, (units, dropout) in enumerate(zip(h.lstm_units, h.lstm_dropouts, strict=True)):
        hidden = Lstm(units, name=f"lstm_{layer}", **precision(dtype))(x)
        if layer == last and not return_sequences:
            hidden = hidden[-1]
        x = Dropout(dropout, deterministic=not train)(hidden)
        norm = BatchNorm(not train, name=f"lstm_norm_{layer}", **precision(dtype))
        x = norm(x, undropped=hidden)
    return x.swapaxes(0, 1) if return_sequences else x


def keras_conv_blocks(x: Any, h: Hyperparameters, layers: Any) -> Any:
    """`conv_blocks` in Keras layers."""
    shapes = zip(h.conv_filters, h.conv_kernels, h.conv_dropouts, strict=True)
    for layer, (filters, kernel, dropout) in enumerate(shapes):
        x = layers.Conv1D(filters, kernel, padding="same", activation="relu", name=f"conv_{layer}")(
            x
        )
        x = layers.MaxPooling1D(POOL)(x)
        x = layers.Dropout(dropout)(x)
        x = layers.BatchNormalization(epsilon=BatchNorm.epsilon, name=f"conv_norm_{layer}")(x)
    return x


def keras_lstm_blocks(x: Any, h: Hyperparameters, *, return_sequences: bool, layers: Any) -> Any:
    """`lstm_blocks` in Keras layers."""
    last = len(h.lstm_units) - 1
    for layer, (units, dropout) in enumerate(zip(h.lstm_units, h.lstm_dropouts, strict=True)):
        sequences = return_sequences or layer < last
        x = layers.LSTM(units, return_sequences=sequences, name=f"lstm_{layer}")(x)
        x = layers.Dropout(dropout)(x)
        x = layers.BatchNormalization(epsilon=BatchNorm.epsilon, name=f"lstm_norm_{layer}")(x)
    return x


def from_keras(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The fields of `Hyperparameters` that nodes of a Keras model tell; None: they have no LSTM."""
    kinds = ("Conv1D", "MaxPooling1D", "LSTM", "Dense")
    convs, pools, lstms, dense = ([one for one in layers if one.kind == kind] for kind in kinds)
    if not lstms:
        return None
    return {
        "conv_filters": [conv.settings["filters"] for conv in convs],
        "conv_kernels": [conv.settings["kernel_size"][0] for conv in convs],
        "conv_dropouts": [
            pool.dropout if pool else 0.0 for _, pool in zip_longest(convs, pools[: len(convs)])
        ],
        "lstm_units": [lstm.settings["units"] for lstm in lstms],
        "lstm_dropouts": [lstm.dropout for lstm in lstms],
        "dense_units": dense[0].settings["units"],
        "dense_dropout": dense[0].dropout,
    }


def suggest(
    trial: Any, *, target_length: int, most_convolutions: int, most_lstms: int, widest: int
) -> dict[str, Any]:
    """Draws every field of `Hyperparameters`, no deeper than the signal's length allows.

    Layer i has 32 to 32 * 2^(i + 1) filters, at most `widest`."""
    depth = trial.suggest_int(
        "conv_layers", 1, max(1, min(most_convolutions, int(log2(target_length)) - 1))
    )
    pooled_length = max(1, target_length // POOL**depth)
    lstm_depth = trial.suggest_int("lstm_layers", 1, min(most_lstms, int(log2(pooled_length)) + 1))
    return {
        "conv_filters": tuple(
            trial.suggest_int(f"conv_filters_{i}", 32, min(widest, 32 * 2 ** (i + 1)), step=32)
            for i in range(depth)
        ),
        "conv_kernels": tuple(
            trial.suggest_categorical(f"conv_kernels_{i}", search.KERNELS) for i in range(depth)
        ),
        "conv_dropouts": tuple(
            search.suggest_dropout(trial, f"conv_dropouts_{i}", 0.1) for i in range(depth)
        ),
        "lstm_units": tuple(
            trial.suggest_int(f"lstm_units_{i}", 32, widest, step=32) for i in range(lstm_depth)
        ),
        "lstm_dropouts": tuple(
            search.suggest_dropout(trial, f"lstm_dropouts_{i}", 0.1) for i in range(lstm_depth)
        ),
        "dense_units": trial.suggest_int("dense_units", 16, widest, step=16),
        "dense_dropout": search.suggest_dropout(trial, "dense_dropout", 0.1),
        "learning_rate": trial.suggest_categorical("learning_rate", (1e-2, 1e-3, 1e-4)),
    }


def trial_parameters(h: Hyperparameters) -> dict[str, Any]:
    """The trial's parameters that make `suggest` draw these hyperparameters."""
    return search.flatten(
        dataclasses.asdict(h), {"conv_layers": "conv_filters", "lstm_layers": "lstm_units"}
    )
