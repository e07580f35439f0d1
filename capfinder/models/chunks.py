"""Layers that score a few reads at a time, so that what one layer leaves is in the cache for the
next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# By platform: reads at a time, of which the widest layer has 128 channels at half of 500 samples,
# as measured with 8 to 64 on two cores (cpu). A platform without an entry takes the whole batch.
CHUNKS = {"cpu": 16}


def own_chunk(times: int) -> int | None:
    """For the platform that JAX computes on; None where several devices share a batch."""
    chunk = CHUNKS.get(jax.default_backend()) if jax.device_count() == 1 else None
    return chunk and chunk * times


def in_chunks(
    module: nn.Module,
    layers: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    train: bool,
    times: int = 1,
) -> jax.Array:
    """layers(x), for layers of `module` that score each read by itself: (B, ...) -> (B, ...).

    times: as many more reads fit the cache, where the widest layer is as much smaller.
    Training takes the whole batch, as its batch norm does, and so does a batch that isn't a
    multiple of the platform's chunk, or whose size is a symbol, as in an export."""
    size, batch = own_chunk(times), x.shape[0]
    is_known = isinstance(batch, int)
    if train or size is None or not is_known or batch <= size or batch % size:
        return layers(x)

    def one(_: nn.Module, carry: None, chunk: jax.Array) -> tuple[None, jax.Array]:
        return carry, layers(chunk)

    scan: Any = nn.scan(one, variable_broadcast=True, split_rngs={"params": False})
    _, y = scan(module, None, x.reshape(-1, size, *x.shape[1:]))
    return jnp.reshape(y, (batch, *y.shape[2:]))
