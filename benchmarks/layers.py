"""Each layer's form beside others that compute the same: what the models' choices rest on.

    python benchmarks/layers.py --rounds 9

Milliseconds of value and gradient on the platform that JAX finds; the models' own form comes first.
Prints a table and writes it to RESULTS.md, into a section of that platform."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import linen as nn

from capfinder import memory
from capfinder.models import convolution, lstm
from capfinder.models.layers import BatchNorm, Dropout, max_pool, max_pool_same

PACKAGES = ("numpy", "jax", "flax")
Function = Callable[..., jax.Array]


def plain_lstm(x: jax.Array, kernel: jax.Array, recurrent: jax.Array, bias: jax.Array) -> jax.Array:
    """As one writes it, with JAX's own gradient."""

    def step(carry: Any, x_t: jax.Array) -> Any:
        hidden, cell = carry
        gates = x_t @ kernel + hidden @ recurrent + bias
        into, forget, new, out = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(into) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(out) * jnp.tanh(cell)
        return (hidden, cell), hidden

    start = jnp.zeros((x.shape[1], recurrent.shape[0]), x.dtype)
    return jax.lax.scan(step, (start, start), x)[1]


def convolution_as_one_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """ "im2col": all windows side by side."""
    columns = jnp.concatenate(convolution.shifted(x, len(kernel)), axis=-1)
    return columns @ kernel.reshape(-1, kernel.shape[-1])


def convolution_as_shifted_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    shifted = zip(convolution.shifted(x, len(kernel)), kernel, strict=True)
    return functools.reduce(jnp.add, (window @ part for window, part in shifted))


def reduce_window(x: jax.Array, *, window: int, stride: int, padding: str) -> jax.Array:
    return nn.max_pool(x, (window,), strides=(stride,), padding=padding)


def reshaped_maximum(x: jax.Array) -> jax.Array:
    batch, length, channels = x.shape
    return x.reshape(batch, length // 2, 2, channels).max(axis=2)


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    zeros = jnp.zeros(x.shape[-1])
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": zeros, "var": zeros + 1, "steps": jnp.float32(0)},
    }
    return BatchNorm(False).apply(variables, x, mutable=["batch_stats"])[0]


def _plain_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias


def _dropout(x: jax.Array, module: Any) -> jax.Array:
    return module(0.5, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)})


def cases(batch: int) -> Iterator[tuple[str, list[tuple[int, ...]], dict[str, Function]]]:
    """Layer, shapes of its inputs, forms; the first form is the models' own on this platform."""
    own = lstm.own_form()
    others = (lstm.Form(place, unroll) for place in ("inside", "before") for unroll in (1, 2))
    forms = {
        f"own gradient, input product {form.input_product} the scan, {form.unroll} in a turn": (
            functools.partial(lstm.lstm, form)
        )
        for form in dict.fromkeys((own, *others))
    }
    for channels, units in ((32, 64), (128, 128), (128, 32)):
        shapes = [(62, batch, channels), (channels, 4 * units), (units, 4 * units), (4 * units,)]
        yield (
            f"LSTM {channels} to {units}, 62 steps",
            shapes,
            {**forms, "autodiff, input product inside the scan": plain_lstm},
        )
    for length, channels, filters, width in (
        (500, 1, 64, 3),
        (250, 64, 128, 7),
        (125, 128, 32, 3),
        (125, 128, 128, 5),
    ):
        yield (
            f"convolution {channels} to {filters}, {width} wide, {length} positions",
            [(batch, length, channels), (width, channels, filters)],
            {
                "the models' own": functools.partial(convolution.convolve, convolution.own_form()),
                "XLA's convolution": convolution.compilers,
                "one product of all windows": convolution_as_one_product,
                "a product for each shift": convolution_as_shifted_products,
            },
        )
    yield (
        "maxima of 2, 500 positions, 64 channels",
        [(batch, 500, 64)],
        {
            "own gradient, slices": functools.partial(max_pool, window=2),
            "maximum of a reshaped axis": reshaped_maximum,
            "reduce_window": functools.partial(reduce_window, window=2, stride=2, padding="VALID"),
        },
    )
    yield (
        "maxima of 3, every 2, 500 positions, 32 channels",
        [(batch, 500, 32)],
        {
            "own gradient, slices": functools.partial(max_pool_same, window=3, stride=2),
            "reduce_window": functools.partial(reduce_window, window=3, stride=2, padding="SAME"),
        },
    )
    yield (
        "batch norm, 250 positions, 64 channels",
        [(batch, 250, 64), (64,), (64,)],
        {"own gradient": _norm, "autodiff, no running averages": _plain_norm},
    )
    yield (
        "dropout, 250 positions, 64 channels",
        [(batch, 250, 64)],
        {
            "bits from a hash": functools.partial(_dropout, module=Dropout),
            "JAX's bits (threefry)": functools.partial(_dropout, module=nn.Dropout),
        },
    )


def measure(
    shapes: list[tuple[int, ...]], forms: dict[str, Function], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of value and gradient by all inputs, the forms in turns."""
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32) for shape in shapes]
    weights = jnp.asarray(
        rng.normal(size=jax.eval_shape(next(iter(forms.values())), *inputs).shape)
    )

    def compiled(form: Function) -> Function:
        def loss(*inputs: jax.Array) -> jax.Array:
            return (form(*inputs) * weights).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(inputs)))))

    functions = {name: compiled(form) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if number:  # the first one compiles
                seconds[name].append(1e3 * (time.perf_counter() - started))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=256)
    results.add_option(parser)
    options = parser.parse_args()
    memory.keep_freed()
    rows = []
    for layer, shapes, forms in cases(options.batch_size):
        found = measure(shapes, forms, options.rounds)
        first = next(iter(found.values()))
        for name, milliseconds in found.items():
            ratio, low, high = results.median_ratio(milliseconds, first)
            rows.append(
                (
                    layer,
                    name,
                    f"{statistics.median(milliseconds):.1f}",
                    f"{ratio:.2f}",
                    f"{low:.2f} to {high:.2f}",
                )
            )
            layer = ""
    platform = jax.default_backend()
    columns = ("layer", "form", "ms", "to the first", "of the rounds")
    text = (
        f"{results.provenance(PACKAGES)}\n\nPlatform: {platform}. float32, batch "
        f"{options.batch_size}; value and gradient by all inputs, median of "
        f"{options.rounds} rounds in which the forms take turns.\n\n{results.table(columns, rows)}"
    )
    results.publish(f"Forms of the layers ({platform})", text, trial=options.trial)


if __name__ == "__main__":
    main()
