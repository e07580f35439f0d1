"""Convolutions over time with Keras's weights, in the form that is fastest on the platform."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from capfinder.models import initial, windows


@dataclasses.dataclass(frozen=True)
class Form:
    """How the same numbers are computed, to within rounding.

    sums: one channel as a sum of shifted signals, which the compiler joins with what follows.
    outputs: by the kernel's width, the positions that one turn of Toom and Cook's method gives; a
    width without an entry is convolved as the compiler does it."""

    sums: bool = False
    outputs: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """In JSON's types, whose keys are text."""
        outputs = {str(width): outputs for width, outputs in self.outputs.items()}
        return {"sums": self.sums, "outputs": outputs}


# By platform, as benchmarks/layers.py measured: cpu. Elsewhere nothing was, and the compiler's own
# convolution is a good guess.
FORMS = {"cpu": Form(sums=True, outputs={5: 4, 7: 2})}
FEWEST_CHANNELS = 64  # in and out, from which a turn saves more than its sums cost
FEWEST_TURNS = 8  # else too much of the last one is padding


def own_form() -> Form:
    """The form for the platform that JAX computes on."""
    return FORMS.get(jax.default_backend(), Form())


class Conv(nn.Module):
    """x: (B, T, C) -> (B, T / stride, features), T / stride rounded up, padded with zeros as
    TensorFlow's "same".

    Weights as in keras.layers.Conv1D: kernel (width, C, features), bias (features,)."""

    features: int
    width: int
    stride: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            initial.glorot_uniform,
            (self.width, x.shape[-1], self.features),
            self.param_dtype,
        )
        y = convolve(own_form(), x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
        if self.use_bias:
            bias = self.param("bias", initial.zeros, (self.features,), self.param_dtype)
            y += bias.astype(self.dtype)
        return y


def convolve(form: Form, x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """x (B, T, C), kernel (W, C, F) -> (B, T / stride, F), in the type of both."""
    width, channels, features = kernel.shape
    if stride > 1:
        return compilers(x, kernel, stride)
    if channels == 1 and width > 1 and form.sums:
        return shifted_sums(x, kernel)
    outputs = form.outputs.get(width)
    if (
        outputs
        and min(channels, features) >= FEWEST_CHANNELS
        and x.shape[1] >= FEWEST_TURNS * outputs
        and x.dtype.itemsize >= 4  # half precision would lose digits in the sums
    ):
        return toom_cook(x, kernel, outputs)
    return compilers(x, kernel)


def compilers(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """As XLA does it."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


@jax.custom_vjp
def shifted_sums(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (B, T, 1), kernel (W, 1, F) -> (B, T, F)."""
    signals = zip(shifted(x, len(kernel)), kernel, strict=True)
    return functools.reduce(jnp.add, (signal * weights for signal, weights in signals))


def shifted(x: jax.Array, width: int) -> list[jax.Array]:
    """What stands at each place of the windows of "same" padding: `width` arrays of x's shape."""
    x = windows.padded(x, 0, count=x.shape[1], window=width, stride=1, before=(width - 1) // 2)
    return windows.places(x, width, 1)


def _sums_forward(x: jax.Array, kernel: jax.Array) -> Any:
    return shifted_sums(x, kernel), (x, kernel)


# The gradient by hand: to the kernel as one product of all windows, where autodiff passes over the
# gradient once for each place in them.
def _sums_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    columns = jnp.concatenate(shifted(x, len(kernel)), axis=-1)  # (B, T, W)
    to_kernel = jnp.einsum("btw,btf->wf", columns, gradient)
    _, to_x = jax.vjp(lambda x: compilers(x, kernel), x)
    return to_x(gradient)[0], to_kernel[:, None].astype(kernel.dtype)


shifted_sums.defvjp(_sums_forward, _sums_backward)


def toom_cook(x: jax.Array, kernel: jax.Array, outputs: int) -> jax.Array:
    """x (B, T, C), kernel (W, C, F) -> (B, T, F), with (outputs + W - 1) products (C, F) for every
    `outputs` positions in place of outputs * W.

    Signal and kernel are taken as polynomials, evaluated at a few points and multiplied there.
    Source: Toom 1963, Cook 1966; for the layers of a network: Lavin & Gray 2015."""
    width, channels, features = kernel.shape
    batch, length, _ = x.shape
    to_outputs, of_kernel, of_signal = _transforms(outputs, width)
    turns = -(-length // outputs)
    shape = (batch, turns, features)
    count = outputs + width - 1  # samples that a turn reads, and points
    x = windows.padded(x, 0, count=turns, window=count, stride=outputs, before=(width - 1) // 2)
    samples = windows.places(x, count, outputs)  # each (B, turns, C)
    kernels = jnp.einsum("pw,wcf->pcf", of_kernel.astype(kernel.dtype), kernel)
    products = [
        (_weighted(weights, samples).reshape(-1, channels) @ kernels[p]).reshape(*shape)
        for p, weights in enumerate(of_signal)
    ]
    y = _summed(products, to_outputs)
    return y.reshape(batch, turns * outputs, features)[:, :length]


def _summed(products: list[jax.Array], weights: np.ndarray) -> jax.Array:
    """The products at all points, each (B, turns, F), weights (outputs, points) ->
    (B, turns, outputs, F).

    Scoring takes one expression for all outputs, which the compiler joins with what follows.
    Training takes one for each: batch norm passes over them more than once, and the compiler would
    compute them anew each time."""
    columns = weights.T.astype(products[0].dtype)

    @jax.custom_vjp
    def summed(products: list[jax.Array]) -> jax.Array:
        terms = zip(products, columns, strict=True)
        return functools.reduce(jnp.add, (x[:, :, None] * column[:, None] for x, column in terms))

    def forward(products: list[jax.Array]) -> tuple[jax.Array, None]:
        return jnp.stack([_weighted(row, products) for row in weights], axis=2), None

    def backward(_: None, gradient: jax.Array) -> tuple[list[jax.Array]]:
        gradients = [gradient[:, :, i] for i in range(len(weights))]
        return ([_weighted(column, gradients) for column in columns],)

    summed.defvjp(forward, backward)
    return summed(products)


def _weighted(weights: np.ndarray, terms: list[jax.Array]) -> jax.Array:
    used = [
        term if weight == 1 else term * np.asarray(weight, term.dtype)
        for weight, term in zip(weights.tolist(), terms, strict=True)
        if weight
    ]
    return functools.reduce(jnp.add, used)


# Small and simple, as powers of them are what rounding grows with; the last point is infinity.
# With these, float32 is off by 7e-7 (rms) of outputs of size 1, by 6e-6 at the most; an eighth one
# makes that three times as much.
_POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "2", "-2", "1/2", "-1/2"))


@functools.cache
def _transforms(outputs: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the products to the outputs (outputs, points), of the kernel (points, width), and of the
    signal (points, points), exact in float64.

    Source: Lavin & Gray 2015, section 4, as Lagrange interpolation."""
    points = _POINTS[: outputs + width - 2]
    if len(points) < outputs + width - 2:
        raise ValueError(f"too few points for {outputs} outputs of a kernel of {width}")
    to_outputs = [
        [point**power for point in points] + [Fraction(power == outputs - 1)]
        for power in range(outputs)
    ]
    of_kernel, of_signal = [], []
    for i, point in enumerate(points):
        others = points[:i] + points[i + 1 :]
        scale = math.prod(point - other for other in others)
        of_kernel.append([point**power / scale for power in range(width)])
        of_signal.append([*_polynomial(others), Fraction(0)])
    of_kernel.append([Fraction(power == width - 1) for power in range(width)])
    of_signal.append(_polynomial(points))
    to_y, of_w, of_x = (np.array(rows, np.float64) for rows in (to_outputs, of_kernel, of_signal))
    return to_y, of_w, of_x


def _polynomial(roots: tuple[Fraction, ...]) -> list[Fraction]:
    """Its coefficients, lowest power first, the highest 1."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        lowered = [*(root * c for c in coefficients), Fraction(0)]
        coefficients = [a - b for a, b in zip(shifted, lowered, strict=True)]
    return coefficients
