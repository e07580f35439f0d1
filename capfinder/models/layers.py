"""Building blocks that several architectures share; each has an exact counterpart in Keras.

Initialisers are Keras's defaults (Glorot uniform, zeros), so that the Keras twin of a model, if
it were trained, would start from the same distribution."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from capfinder.models import initial
from capfinder.models.convolution import Conv
from capfinder.models.dropout import Dropout
from capfinder.models.lstm import Lstm
from capfinder.models.normalization import BatchNorm
from capfinder.models.pooling import max_pool, max_pool_same

__all__ = [
    "HEAD",
    "BatchNorm",
    "Conv",
    "Dense",
    "Dropout",
    "Lstm",
    "PositionDense",
    "classifier_head",
    "freeze",
    "keras_classifier_head",
    "max_pool",
    "max_pool_same",
    "param_dtype",
    "precision",
    "weighted_average",
]

HEAD = "head"  # the layer that gives the scores, one for each class

Dense = functools.partial(nn.Dense, kernel_init=initial.glorot_uniform, bias_init=initial.zeros)


def param_dtype(dtype: Any) -> Any:
    """The type parameters and statistics are kept in when the model computes in `dtype`."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def precision(dtype: Any) -> dict[str, Any]:
    """The two dtype arguments that every layer with parameters takes."""
    return {"dtype": dtype, "param_dtype": param_dtype(dtype)}


class PositionDense(nn.Module):
    """A dense layer over channels whose bias differs from position to position.

    x: (B, T, C) -> (B, T, features). Keras: EinsumDense("btc,co->bto", bias_axes="to")."""

    features: int
    bias_init: Any = initial.zeros
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", initial.glorot_uniform, (x.shape[-1], self.features), self.param_dtype
        )
        bias = self.param("bias", self.bias_init, (x.shape[1], self.features), self.param_dtype)
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


def weighted_average(x: jax.Array, scores: jax.Array) -> jax.Array:
    """Average over time weighted by the softmax of `scores`: (B, T, C), (B, T, 1) -> (B, C).

    Keras: Softmax(axis=1), then Dot(axes=1)."""
    weights = jax.nn.softmax(scores.astype(param_dtype(x.dtype)), axis=1)
    return jnp.einsum("btc,bto->bc", x, weights.astype(x.dtype))


def freeze(x: jax.Array, frozen: bool) -> jax.Array:
    """What a trunk hands to the head; no gradient comes back to one that is frozen.

    Its gradients are exactly 0 then, and so is what Adam makes of them: it stays to the bit."""
    return jax.lax.stop_gradient(x) if frozen else x


def classifier_head(
    x: jax.Array,
    units: Sequence[int],
    dropout: float,
    *,
    num_classes: int,
    train: bool,
    dtype: Any,
) -> jax.Array:
    """Dense layers with relu and dropout, then one score a class: (B, C) -> (B, num_classes).

    The scores leave in `param_dtype`, whatever the model computes in. Call it inside a compact
    module; its layers become that module's own."""
    for layer, width in enumerate(units):
        x = nn.relu(Dense(width, name=f"dense_{layer}", **precision(dtype))(x))
        x = Dropout(dropout, deterministic=not train)(x)
    logits = Dense(num_classes, name=HEAD, **precision(dtype))(x)
    return logits.astype(param_dtype(dtype))


def keras_classifier_head(
    x: Any, units: Sequence[int], dropout: float, *, num_classes: int, layers: Any
) -> Any:
    """`classifier_head` in Keras layers."""
    for layer, width in enumerate(units):
        x = layers.Dense(width, activation="relu", name=f"dense_{layer}")(x)
        x = layers.Dropout(dropout)(x)
    return layers.Dense(num_classes, name=HEAD)(x)
