"""CNN-LSTM, the default: convolutions shorten the signal, LSTM layers read it.

The released Capfinder classifier has this shape: convolutions 64/128/32, LSTMs 64/128/128/32."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from capfinder.models import trunk
from capfinder.models.layers import classifier_head, freeze, keras_classifier_head

minimum_length = trunk.minimum_length
trial_parameters = trunk.trial_parameters


@dataclasses.dataclass(frozen=True)
class Hyperparameters(trunk.Hyperparameters):
    """Convolutions, LSTM layers and the dense layer before the scores."""


class CnnLstm(nn.Module):
    """signal: (B, T, 1) z-scored current -> logits: (B, num_classes), no softmax."""

    hyperparameters: Hyperparameters
    num_classes: int
    dtype: Any
    frozen_trunk: bool = False

    @nn.compact
    def __call__(self, signal: jax.Array, *, train: bool) -> jax.Array:
        h = self.hyperparameters
        how = {"train": train and not self.frozen_trunk, "dtype": self.dtype}
        x = trunk.conv_blocks(self, signal.astype(self.dtype), h, **how)  # (B, T', filters)
        x = trunk.lstm_blocks(x, h, return_sequences=False, **how)  # (B, H)
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
    return CnnLstm(hyperparameters, num_classes, jnp.dtype(dtype), frozen_trunk)


def search_space(trial: Any, *, target_length: int) -> Hyperparameters:
    """Draws every hyperparameter. The deepest and the widest of these models take hours on a CPU:
    search_params narrows the space."""
    return Hyperparameters(
        **trunk.suggest(
            trial, target_length=target_length, most_convolutions=99, most_lstms=99, widest=128
        )
    )


def keras_twin(
    hyperparameters: Hyperparameters, *, num_classes: int, layers: Any
) -> Callable[[Any], Any]:
    """The same network in Keras's own layers: signal (B, T, 1) -> logits (B, num_classes)."""
    h = hyperparameters

    def twin(signal: Any) -> Any:
        x = trunk.keras_conv_blocks(signal, h, layers)
        x = trunk.keras_lstm_blocks(x, h, return_sequences=False, layers=layers)
        return keras_classifier_head(
            x, (h.dense_units,), h.dense_dropout, num_classes=num_classes, layers=layers
        )

    return twin


def from_keras(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The inverse, as far as layers tell: hyperparameters of a model that is made of these."""
    if any(one.kind in ("EinsumDense", "MultiHeadAttention") for one in layers):
        return None
    return trunk.from_keras(layers)
