"""Gradients of a batch part by part, so that memory holds one part's activations at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (part, batch_stats, dropout key) -> gradients, (batch_stats afterwards, sums over the rows)
PartGradients = Callable[[Any, Any, jax.Array], tuple[Any, tuple[Any, Any]]]

# A setting below it is refused: over a few rows, batch norm's variance says nothing of the batch's
# (over a single one it is 0).
MIN_MICROBATCH = 8


def over_parts(
    gradients_of: PartGradients,
    batch: Any,
    batch_stats: Any,
    rng: jax.Array,
    *,
    microbatch: int,
    shards: int,
) -> tuple[Any, tuple[Any, Any]]:
    """What `gradients_of` gives for the batch as a whole, added up over as few parts of it as can
    be of at most `microbatch` rows, all of the same size or, where that can't be, of two sizes.

    batch: arrays of B rows each. `gradients_of` must give each row its weight in the batch, so that
    parts are added; batch statistics pass through the parts in turn, and each draws its dropout
    from its number. shards: devices that hold B / shards consecutive rows each. A part takes
    equally many rows of each (so that no row changes its device, and sizes differ by `shards`),
    unless there are fewer rows in a part than devices."""
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % shards or microbatch < shards:
        shards = 1
    own = size // shards  # rows of each device
    count = -(-own // (microbatch // shards))
    fewer, larger = divmod(own, count)  # `larger` of the parts take one more than `fewer` of each

    def parts_of(array: jax.Array, start: int, parts: int, rows: int) -> jax.Array:
        """(B, ...) -> (parts, shards * rows, ...), from each device's row number `start` on"""
        rest = array.shape[1:]
        of_each = array.reshape(shards, own, *rest)[:, start : start + parts * rows]
        split = of_each.reshape(shards, parts, rows, *rest).swapaxes(0, 1)
        return split.reshape(parts, shards * rows, *rest)

    def add(
        carry: tuple[Any, Any, Any], item: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any, Any], None]:
        gradients, batch_stats, sums = carry
        part, number = item
        key = jax.random.fold_in(rng, number)
        new, (batch_stats, new_sums) = gradients_of(part, batch_stats, key)
        gradients, sums = jax.tree.map(jnp.add, (gradients, sums), (new, new_sums))
        return (gradients, batch_stats, sums), None

    shapes, (_, sum_shapes) = jax.eval_shape(gradients_of, batch, batch_stats, rng)
    zeros, no_sums = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, sum_shapes)
    )
    carry = zeros, batch_stats, no_sums
    start = number = 0
    for parts, rows in ((larger, fewer + 1), (count - larger, fewer)):
        if parts:
            taken = functools.partial(parts_of, start=start, parts=parts, rows=rows)
            numbers = jnp.arange(number, number + parts)
            carry, _ = jax.lax.scan(add, carry, (jax.tree.map(taken, batch), numbers))
            start, number = start + parts * rows, number + parts
    gradients, batch_stats, sums = carry
    return gradients, (batch_stats, sums)
