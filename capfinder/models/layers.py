"""Building blocks that several architectures share; each has an exact counterpart in Keras.

Initialisers are Keras's defaults (Glorot uniform, zeros), so that the Keras twin of a model, if
it were trained, would start from the same distribution."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from capfinder.errors import SettingsError
from capfinder.models.lstm import Lstm

__all__ = [
    "BatchNorm",
    "Conv",
    "Dense",
    "Lstm",
    "PositionDense",
    "classifier_head",
    "keras_classifier_head",
    "max_pool",
    "param_dtype",
    "precision",
    "weighted_average",
]

glorot = nn.initializers.glorot_uniform()
Dense = functools.partial(nn.Dense, kernel_init=glorot)
Conv = functools.partial(nn.Conv, kernel_init=glorot)  # padding "SAME", as TensorFlow counts it


def param_dtype(dtype: Any) -> Any:
    """The type parameters and statistics are kept in when the model computes in `dtype`."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def precision(dtype: Any) -> dict[str, Any]:
    """The two dtype arguments that every layer with parameters takes."""
    return {"dtype": dtype, "param_dtype": param_dtype(dtype)}


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with running averages that are never late.

    x: (..., C) -> (..., C) in `dtype`; statistics are computed and kept in `param_dtype`, variance
    biased as in Keras. Two things set the averages apart from plain momentum, with which a network
    that has learnt its few reads by heart still guesses when it scores them:

    Weights: step t (from 1) enters with max(1 - momentum, forgetting / (t - 1 + forgetting)). That
    is 1 at the first step, so nothing is left of the initial 0 and 1, and then an average over
    about the last t / forgetting steps, until that is as long as momentum's. So the stored values
    are the averages themselves, and an export copies them.
    Dropout: `undropped` is what x was before dropout. The averages are of that, since that is what
    the layer meets when it scores; dropout at rate p divides the second moment by 1 - p.

    Measured: 50 simulated reads a class, batch 32, points of accuracy on them between running and
    batch statistics, the worst epoch of 3 to 24 (resnet 14, learning rate 3e-4). Plain momentum:
    cnn_lstm 57, resnet 75; forgetting 1: 19, 63; 4: 9, 35; 16: 8, 18; 64: 6, 12; 128: 6, 8. Yet
    larger values average over too few reads. With 4,000 reads and dropout 0.4 in cnn_lstm,
    held-out reads are scored 78 % right after 8 epochs, 60 % with averages of x after dropout.
    Source: Ioffe & Szegedy 2015; shift of the variance by dropout: Li et al. 2019."""

    use_running_average: bool
    momentum: float = 0.99
    forgetting: float = 128.0
    epsilon: float = 1e-3
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, undropped: jax.Array | None = None) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), self.param_dtype)
        if self.use_running_average:
            batch_mean, batch_var = mean.value, var.value
        else:
            batch_mean, batch_var = self._moments(x)
            if not self.is_initializing():
                seen = (batch_mean, batch_var) if undropped is None else self._moments(undropped)
                recent = self.forgetting / (steps.value + self.forgetting)
                weight = jnp.maximum(1 - self.momentum, recent).astype(self.param_dtype)
                mean.value += weight * (jax.lax.stop_gradient(seen[0]) - mean.value)
                var.value += weight * (jax.lax.stop_gradient(seen[1]) - var.value)
                steps.value += 1
        factor = scale * jax.lax.rsqrt(batch_var + self.epsilon)
        normal = (x.astype(self.param_dtype) - batch_mean) * factor + bias
        return normal.astype(self.dtype)

    def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes, wide = tuple(range(x.ndim - 1)), x.astype(self.param_dtype)
        return wide.mean(axes), wide.var(axes)


class PositionDense(nn.Module):
    """A dense layer over channels whose bias differs from position to position.

    x: (B, T, C) -> (B, T, features). Keras: EinsumDense("btc,co->bto", bias_axes="to")."""

    features: int
    bias_init: Any = nn.initializers.zeros
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", glorot, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (x.shape[1], self.features), self.param_dtype)
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


def weighted_average(x: jax.Array, scores: jax.Array) -> jax.Array:
    """Average over time weighted by the softmax of `scores`: (B, T, C), (B, T, 1) -> (B, C).

    Keras: Softmax(axis=1), then Dot(axes=1)."""
    weights = jax.nn.softmax(scores.astype(param_dtype(x.dtype)), axis=1)
    return jnp.einsum("btc,bto->bc", x, weights.astype(x.dtype))


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Maxima of adjoining windows, a shorter rest dropped: (B, T, C) -> (B, T // window, C).

    Reshape and max: 33 ms where reduce_window takes 78 (CPU, forward and backward).
    Raises: SettingsError when the signal is shorter than the window."""
    batch, length, channels = x.shape
    if length < window:
        raise SettingsError(
            f"The signal is too short: {length} samples are left where the model takes maxima "
            f"over {window}. Use fewer convolutions or a larger shared_params.target_length."
        )
    kept = length // window
    return x[:, : kept * window].reshape(batch, kept, window, channels).max(axis=2)


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
        x = nn.Dropout(dropout, deterministic=not train)(x)
    logits = Dense(num_classes, name="head", **precision(dtype))(x)
    return logits.astype(param_dtype(dtype))


def keras_classifier_head(
    x: Any, units: Sequence[int], dropout: float, *, num_classes: int, layers: Any
) -> Any:
    """`classifier_head` in Keras layers."""
    for layer, width in enumerate(units):
        x = layers.Dense(width, activation="relu", name=f"dense_{layer}")(x)
        x = layers.Dropout(dropout)(x)
    return layers.Dense(num_classes, name="head")(x)
