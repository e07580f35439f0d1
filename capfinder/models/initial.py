"""First weights of layers, Keras's defaults, drawn by NumPy.

As programs of JAX the draws of a model would take a second to compile, and a third of that to be
found in the cache; drawn by `variables` they take none."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Initializer = Callable[..., Any]  # (key, shape, dtype) -> array, as Flax calls it

_generator: contextvars.ContextVar[np.random.Generator | None] = contextvars.ContextVar(
    "generator", default=None
)


def variables(module: nn.Module, signal: jax.ShapeDtypeStruct, *, seed: int) -> dict[str, Any]:
    """What module.init gives for a signal (B, T, 1), from one seed always the same.

    Where all weights are drawn by the initialisers here, or are NumPy's arrays, nothing is computed
    but the draws, and nothing compiled."""
    found: dict[str, Any] = {}

    def init(signal: jax.Array) -> None:
        found.update(module.init(jax.random.key(0), signal, train=False))

    with _drawn_from(np.random.default_rng(seed)):
        jax.eval_shape(init, signal)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found)):
        zeros = np.zeros(signal.shape, signal.dtype)
        found = jax.jit(functools.partial(module.init, train=False))(jax.random.key(seed), zeros)
    return found


@contextlib.contextmanager
def _drawn_from(generator: np.random.Generator) -> Iterator[None]:
    token = _generator.set(generator)
    try:
        yield
    finally:
        _generator.reset(token)


def _initializer(draw: Draw) -> Initializer:
    """Within `variables` from its generator, one weight after the other; elsewhere from the key."""

    @functools.wraps(draw)
    def initializer(key: jax.Array, shape: Sequence[int], dtype: Any = np.float32) -> Any:
        dtype = jax.dtypes.canonicalize_dtype(dtype)

        def drawn_from(generator: np.random.Generator) -> np.ndarray:
            return draw(generator, tuple(shape)).astype(dtype)

        if (generator := _generator.get()) is not None:
            return drawn_from(generator)
        return jax.pure_callback(
            lambda data: drawn_from(np.random.default_rng(np.asarray(data))),
            jax.ShapeDtypeStruct(tuple(shape), dtype),
            jax.random.key_data(key),
        )

    return initializer


@_initializer
def glorot_uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """shape: (..., inputs, outputs). Source: Glorot & Bengio 2010, eq. 16."""
    places = math.prod(shape[:-2])
    limit = math.sqrt(6 / (places * (shape[-2] + shape[-1])))
    return generator.uniform(-limit, limit, shape)


@_initializer
def orthogonal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """shape: (rows, columns), of which the fewer are orthonormal. Source: Saxe et al. 2014."""
    rows, columns = shape
    normal = generator.normal(size=(max(shape), min(shape)))
    # QR by way of Cholesky, R with a positive diagonal: uniform among the orthogonal matrices, and
    # a twentieth of the time of LAPACK's own, which waits for its threads where cores are busy.
    q = np.linalg.solve(np.linalg.cholesky(normal.T @ normal), normal.T).T
    return q if rows >= columns else q.T


def zeros(key: Any, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def ones(key: Any, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)
