"""An LSTM layer with Keras's weights: fused gates, one scan over time, a gradient of its own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from capfinder.models import initial


@dataclasses.dataclass(frozen=True)
class Form:
    """How the same numbers are computed, to within rounding."""

    input_product: str  # "inside" the scan, step by step, or "before" it, for all steps at once
    unroll: int  # steps of the scan in a turn of its loop


# By platform, as benchmarks/layers.py measured: cpu. The others follow from what is known of them,
# no measurement: a GPU is better off with few large products.
FORMS = {"cpu": Form("inside", 1), "gpu": Form("before", 1), "tpu": Form("before", 1)}


def own_form() -> Form:
    """The form for the platform that JAX computes on."""
    return FORMS.get(jax.default_backend(), FORMS["gpu"])


def _bias_with_open_forget_gate(key: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, but ones for the forget gate: a new cell remembers. Source: Jozefowicz et al. 2015."""
    units = shape[0] // 4
    bias = np.zeros(shape, dtype)
    bias[units : 2 * units] = 1
    return bias


class Lstm(nn.Module):
    """x: (T, B, C) -> hidden states (T, B, H): time comes first, as the scan wants it.

    Weights as in keras.layers.LSTM: kernel (C, 4H), recurrent_kernel (H, 4H), bias (4H,), gates in
    the order input, forget, cell, output. The cell state stays in `param_dtype`: summing over
    many steps in half precision would lose what each adds.
    Source: Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000."""

    units: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gates = 4 * self.units
        kernel = self.param(
            "kernel", initial.glorot_uniform, (x.shape[-1], gates), self.param_dtype
        )
        recurrent_kernel = self.param(
            "recurrent_kernel", initial.orthogonal, (self.units, gates), self.param_dtype
        )
        bias = self.param("bias", _bias_with_open_forget_gate, (gates,), self.param_dtype)
        return lstm(
            own_form(),
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            recurrent_kernel.astype(self.dtype),
            bias,
        )


# The gradient by hand: autodiff adds to the weights' gradients in every step of the scan; here they
# are one product each over all steps, after it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lstm(
    form: Form, x: jax.Array, kernel: jax.Array, recurrent_kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    """x (T, B, C), kernel (C, 4H), recurrent_kernel (H, 4H), bias (4H,) -> hidden (T, B, H).

    x and the kernels in one type, bias in that of gates and cell state."""

    def step(carry: Any, x_t: jax.Array) -> Any:
        hidden, _, cell, _ = _cell(form, kernel, recurrent_kernel, bias, carry, x_t)
        return (hidden, cell), hidden

    start, inputs = _start(form, x, kernel, recurrent_kernel, bias)
    return jax.lax.scan(step, start, inputs, unroll=form.unroll)[1]


def _start(
    form: Form, x: jax.Array, kernel: jax.Array, recurrent_kernel: jax.Array, bias: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Hidden and cell state before the first step, and what the scan goes through."""
    shape = (x.shape[1], recurrent_kernel.shape[0])
    inputs = x if form.input_product == "inside" else _wide(x @ kernel, bias)
    return (jnp.zeros(shape, x.dtype), jnp.zeros(shape, bias.dtype)), inputs


def _wide(product: jax.Array, bias: jax.Array) -> jax.Array:
    return product.astype(bias.dtype) + bias


def _cell(
    form: Form,
    kernel: jax.Array,
    recurrent_kernel: jax.Array,
    bias: jax.Array,
    carry: tuple[jax.Array, jax.Array],
    x_t: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step: the hidden state (B, H), and what its gradient needs: gates after their activation
    (B, 4H), the cell state and its tanh (B, H)."""
    hidden, cell = carry
    product = hidden @ recurrent_kernel
    if form.input_product == "inside":
        gates = _wide(x_t @ kernel + product, bias)
    else:
        gates = x_t + product.astype(bias.dtype)
    gates = _activated(gates)
    into, forget, new, out = jnp.split(gates, 4, axis=-1)
    cell = forget * cell + into * new
    squashed = jnp.tanh(cell)
    return (out * squashed).astype(hidden.dtype), gates, cell, squashed


def _activated(gates: jax.Array) -> jax.Array:
    """Sigmoid of the input, forget and output gates, tanh of the new values: (B, 4H) -> (B, 4H).

    One tanh for all, as sigmoid(x) = (1 + tanh(x / 2)) / 2: no copying of parts."""
    is_new = jnp.arange(4).repeat(gates.shape[-1] // 4) == 2
    half = jnp.where(is_new, 1, 0.5).astype(gates.dtype)
    return jnp.tanh(gates * half) * half + (1 - half)


def _forward(
    form: Form, x: jax.Array, kernel: jax.Array, recurrent_kernel: jax.Array, bias: jax.Array
) -> Any:
    def step(carry: Any, x_t: jax.Array) -> Any:
        hidden, gates, cell, squashed = _cell(form, kernel, recurrent_kernel, bias, carry, x_t)
        return (hidden, cell), (hidden, (*carry, gates, squashed))

    start, inputs = _start(form, x, kernel, recurrent_kernel, bias)
    _, (hidden, steps) = jax.lax.scan(step, start, inputs, unroll=form.unroll)
    return hidden, (x, kernel, recurrent_kernel, *steps)


def _backward(form: Form, saved: Any, gradient: jax.Array) -> Any:
    """Source: backpropagation through time, e.g. Graves & Schmidhuber 2005, appendix."""
    x, kernel, recurrent_kernel, hidden_before, cell_before, gates, squashed = saved
    wide = gates.dtype

    def step(carry: Any, at_t: Any) -> Any:
        to_hidden, to_cell = carry
        gradient_t, cell, gates_t, squashed_t = at_t
        into, forget, new, out = jnp.split(gates_t, 4, axis=-1)
        to_hidden = to_hidden.astype(wide) + gradient_t.astype(wide)
        to_cell = to_cell + to_hidden * out * (1 - squashed_t * squashed_t)
        to_gates = jnp.concatenate(
            (
                to_cell * new * into * (1 - into),
                to_cell * cell * forget * (1 - forget),
                to_cell * into * (1 - new * new),
                to_hidden * squashed_t * out * (1 - out),
            ),
            axis=-1,
        )
        narrow = to_gates.astype(x.dtype)
        return (narrow @ recurrent_kernel.T, to_cell * forget), narrow

    start = (jnp.zeros_like(hidden_before[0]), jnp.zeros_like(cell_before[0]))
    _, to_gates = jax.lax.scan(
        step, start, (gradient, cell_before, gates, squashed), reverse=True, unroll=form.unroll
    )
    flat = to_gates.reshape(-1, to_gates.shape[-1])  # (T B, 4H)

    def weights(inputs: jax.Array) -> jax.Array:
        product = jnp.matmul(
            inputs.reshape(-1, inputs.shape[-1]).T, flat, preferred_element_type=wide
        )
        return product.astype(x.dtype)

    return (
        to_gates @ kernel.T,
        weights(x),
        weights(hidden_before),
        flat.sum(0, dtype=wide),
    )


lstm.defvjp(_forward, _backward)
