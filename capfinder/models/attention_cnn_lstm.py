"""CNN-LSTM with attention: as cnn_lstm, but every position of the signal has its say.

Where cnn_lstm hands on what the LSTM knows at the end, this weighs its states at all positions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from capfinder.models import trunk
from capfinder.models.layers import (
    PositionDense,
    classifier_head,
    freeze,
    keras_classifier_head,
    precision,
    weighted_average,
)

minimum_length = trunk.minimum_length
trial_parameters = trunk.trial_parameters


@dataclasses.dataclass(frozen=True)
class Hyperparameters(trunk.Hyperparameters):
    """Convolutions, LSTM layers and the dense layer before the scores."""


class AttentionCnnLstm(nn.Module):
    """signal: (B, T, 1) z-scored current -> logits: (B, num_classes), no softmax.

    Position t of the LSTM's output x weighs softmax_t(tanh(x_t W + b_t)).
    Source: additive attention, Bahdanau et al. 2015, with a bias of its own for each position."""

    hyperparameters: Hyperparameters
    num_classes: int
    dtype: Any
    frozen_trunk: bool = False

    @nn.compact
    def __call__(self, signal: jax.Array, *, train: bool) -> jax.Array:
        h = self.hyperparameters
        how = {"train": train and not self.frozen_trunk, "dtype": self.dtype}
        x = trunk.conv_blocks(self, signal.astype(self.dtype), h, **how)  # (B, T', filters)
        x = trunk.lstm_blocks(x, h, return_sequences=True, **how)  # (B, T', H)
        scores = nn.tanh(PositionDense(1, name="attention", **precision(self.dtype))(x))
        x = weighted_average(x, scores)  # (B, H)
        return classifier_head(
            freeze(x, self.frozen_trunk),
            (h.dense_units,),
            h.dense_dropout,
            num_classes=self.num_classes,
            train=train,
            dtype=self.dtype,
        )


def build(
    hyperparameters: Hyperparameters, *, num_classes: int, dtype: Any, frozen_trunk: bool = False
) -> nn.Module:
    """The module that computes in `dtype`, with float32 parameters (float64 for float64)."""
    return AttentionCnnLstm(hyperparameters, num_classes, jnp.dtype(dtype), frozen_trunk)


def search_space(trial: Any, *, target_length: int) -> Hyperparameters:
    """Draws every hyperparameter; fewer but wider layers than cnn_lstm's."""
    return Hyperparameters(
        **trunk.suggest(
            trial, target_length=target_length, most_convolutions=5, most_lstms=3, widest=256
        )
    )


def keras_twin(
    hyperparameters: Hyperparameters, *, num_classes: int, layers: Any
) -> Callable[[Any], Any]:
    """The same network in Keras's own layers: signal (B, T, 1) -> logits (B, num_classes)."""
    h = hyperparameters

    def twin(signal: Any) -> Any:
        x = trunk.keras_conv_blocks(signal, h, layers)
        x = trunk.keras_lstm_blocks(x, h, return_sequences=True, layers=layers)
        scores = layers.EinsumDense(
            "btc,co->bto",
            (x.shape[1], 1),
            bias_axes="to",
            activation="tanh",
            name="attention",
        )(x)
        weights = layers.Softmax(axis=1)(scores)
        x = layers.Flatten()(layers.Dot(axes=1)([weights, x]))
        return keras_classifier_head(
            x, (h.dense_units,), h.dense_dropout, num_classes=num_classes, layers=layers
        )

    return twin


def from_keras(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The inverse, as far as layers tell: hyperparameters of a model that is made of these."""
    kinds = {one.kind for one in layers}
    if "EinsumDense" not in kinds or "MultiHeadAttention" in kinds:
        return None
    return trunk.from_keras(layers)
