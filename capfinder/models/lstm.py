"""An LSTM layer with Keras's weights: fused gates, one scan over time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def _bias_with_open_forget_gate(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros, but ones for the forget gate: a new cell remembers. Source: Jozefowicz et al. 2015."""
    units = shape[0] // 4
    return jnp.zeros(shape, dtype).at[units : 2 * units].set(1)


class Lstm(nn.Module):
    """x: (B, T, C) -> hidden states (B, T, H), or the last one (B, H).

    Weights as in keras.layers.LSTM: kernel (C, 4H), recurrent_kernel (H, 4H), bias (4H,), gates in
    the order input, forget, cell, output. The cell state stays in `param_dtype`: summing over
    many steps in half precision would lose what each adds.
    Source: Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000."""

    units: int
    return_sequences: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gates = 4 * self.units
        kernel = self.param(
            "kernel", nn.initializers.glorot_uniform(), (x.shape[-1], gates), self.param_dtype
        )
        recurrent_kernel = self.param(
            "recurrent_kernel", nn.initializers.orthogonal(), (self.units, gates), self.param_dtype
        )
        bias = self.param("bias", _bias_with_open_forget_gate, (gates,), self.param_dtype)
        hidden, last = _scan(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            recurrent_kernel.astype(self.dtype),
            bias,
        )
        return hidden.swapaxes(0, 1) if self.return_sequences else last


def _scan(
    x: jax.Array, kernel: jax.Array, recurrent_kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All hidden states (T, B, H) and the last one (B, H).

    The input product is inside the scan: on CPU 127 ms where one product before it takes 175
    (128 -> 128 units, batch 256, forward and backward), since gates stay in the cache."""
    batch, units = x.shape[0], recurrent_kernel.shape[0]

    def step(
        carry: tuple[jax.Array, jax.Array], x_t: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, cell = carry
        gates = (x_t @ kernel + hidden @ recurrent_kernel).astype(bias.dtype) + bias
        into, forget, new, out = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(into) * jnp.tanh(new)
        hidden = (jax.nn.sigmoid(out) * jnp.tanh(cell)).astype(x.dtype)
        return (hidden, cell), hidden

    start = (jnp.zeros((batch, units), x.dtype), jnp.zeros((batch, units), bias.dtype))
    (last, _), hidden = jax.lax.scan(step, start, x.swapaxes(0, 1))
    return hidden, last
