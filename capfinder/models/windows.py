"""Windows over time, without looking up any position alone.

Time is folded into the channels, `stride` positions side by side; what stands at one place of every
window is then a slice."""

import jax
import jax.numpy as jnp


def padded(
    x: jax.Array, fill: float, *, count: int, window: int, stride: int, before: int
) -> jax.Array:
    """x (B, T, C) with `before` times `fill` in front and as many behind it as `count` windows,
    one every `stride` positions, take: rows of `stride` positions, none of them in part."""
    after = (count + rows_after(window, stride)) * stride - x.shape[1] - before
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), (before, after, 0), (0, 0, 0)))


def rows_after(window: int, stride: int) -> int:
    """Rows that a window reaches into, besides the one it begins in."""
    return (window - 1) // stride


def places(x: jax.Array, window: int, stride: int) -> list[jax.Array]:
    """The values at each place of the windows: `window` arrays (B, windows, C)."""
    batch, length, channels = x.shape
    folded = x.reshape(batch, length // stride, stride * channels)
    count = length // stride - rows_after(window, stride)
    found = []
    for k in range(window):
        row, column = divmod(k, stride)
        found.append(folded[:, row : row + count, column * channels : (column + 1) * channels])
    return found
