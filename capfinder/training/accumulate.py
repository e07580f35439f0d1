"""Gradients of a batch part by part, so that memory holds one part's activations at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (part, batch_stats, dropout key) -> gradients, (batch_stats afterwards, sums over the rows)
PartGradients = Callable[[Any, Any, jax.Array], tuple[Any, tuple[Any, Any]]]


def over_parts(
    gradients_of: PartGradients,
    batch: Any,
    batch_stats: Any,
    rng: jax.Array,
    *,
    microbatch: int,
    shards: int,
) -> tuple[Any, tuple[Any, Any]]:
    """What `gradients_of` gives for the batch as a whole, added up over equal parts of it of at
    most `microbatch` rows, and a smaller last one when the batch can't be divided evenly.

    batch: arrays of B rows each. `gradients_of` must give each row its weight in the batch, so that
    parts are added; batch statistics pass through the parts in turn, and each draws its dropout
    from its number. shards: devices that hold B / shards consecutive rows each; when they divide a
    part, it takes equally many rows of each, and no row changes its device."""
    size = jax.tree.leaves(batch)[0].shape[0]
    count = -(-size // microbatch)
    rows = -(-size // count)
    whole = size // rows  # equal parts
    if rows % shards or size != whole * rows:
        shards = 1

    def equal_parts(array: jax.Array) -> jax.Array:
        """(B, ...) -> (parts, rows, ...)"""
        rest = array.shape[1:]
        split = array[: whole * rows].reshape(shards, whole, rows // shards, *rest)
        return split.swapaxes(0, 1).reshape(whole, rows, *rest)

    def add(
        carry: tuple[Any, Any, Any], item: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any, Any], None]:
        gradients, batch_stats, sums = carry
        part, number = item
        key = jax.random.fold_in(rng, number)
        new, (batch_stats, new_sums) = gradients_of(part, batch_stats, key)
        gradients, sums = jax.tree.map(jnp.add, (gradients, sums), (new, new_sums))
        return (gradients, batch_stats, sums), None

    parts = jax.tree.map(equal_parts, batch)
    first = jax.tree.map(lambda array: array[0], parts)
    shapes, (_, sum_shapes) = jax.eval_shape(gradients_of, first, batch_stats, rng)
    zeros, no_sums = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, sum_shapes)
    )
    carry, _ = jax.lax.scan(add, (zeros, batch_stats, no_sums), (parts, jnp.arange(whole)))
    if size > whole * rows:
        remainder = jax.tree.map(lambda array: array[whole * rows :], batch)
        carry, _ = add(carry, (remainder, whole))
    gradients, batch_stats, sums = carry
    return gradients, (batch_stats, sums)
