"""Time warping: each training example also comes squished and expanded by up to a fifth.

The warp acts on the signal alone, not on the zeros around it. How far depends on (seed, epoch,
index of the example) and on nothing else, so a batch's make-up changes no example in it.
"""

import jax
import jax.numpy as jnp

VERSIONS = 3  # of an example: 0 as it is, 1 squished, 2 expanded
MAX_FACTOR = 0.2  # of the signal's length
GENERATOR = "threefry2x32"  # of random numbers, named, for JAX's default may change


def epoch_key(seed: int, epoch: int) -> jax.Array:
    """The key of an epoch's factors."""
    return jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), epoch)


def stretches(key: jax.Array, indices: jax.Array, versions: jax.Array) -> jax.Array:
    """Relative change of length (B,) float32: 0, or in (-MAX_FACTOR, 0], or in [0, MAX_FACTOR).

    key: of the epoch; indices (B,): the augmented examples' own numbers, so that the squished and
    the expanded version of one record draw independently; versions (B,) int in 0..2."""

    def factor(index: jax.Array) -> jax.Array:
        own_key = jax.random.fold_in(key, index)
        return jax.random.uniform(own_key, dtype=jnp.float32, maxval=MAX_FACTOR)

    sign = jnp.array([0.0, -1.0, 1.0], jnp.float32)[versions]
    return sign * jax.vmap(factor)(indices)


def time_warp(signals: jax.Array, lengths: jax.Array, stretch: jax.Array) -> jax.Array:
    """Stretches each signal of L samples to round(L * (1 + stretch)) and fits it to its row again.

    signals (B, T) float32 or float64, each signal centred in its row by preprocess.fit_length;
    lengths (B,) int, its samples (more than T: the row is all signal); stretch (B,) float32.
    Linear interpolation; the first and the last sample keep their values. Positions are integers
    over integers, exact on every platform, for T up to 40,000 samples."""
    row_length = signals.shape[1]
    old = jnp.clip(lengths, 1, row_length).astype(jnp.int32)[:, None]  # (B, 1)
    new = jnp.maximum(jnp.round(old * (1 + stretch[:, None])), 1).astype(jnp.int32)
    # Where the new signal begins: left of the row's edge (negative) when it is longer than the row.
    begin = jnp.where(new <= row_length, (row_length - new) // 2, -((new - row_length) // 2))
    sample = jnp.arange(row_length, dtype=jnp.int32)[None, :] - begin  # (B, T), of the new signal
    inside = (sample >= 0) & (sample < new)

    intervals = jnp.maximum(new - 1, 1)
    scaled = jnp.where(inside, sample, 0) * (old - 1)  # position in the old signal x intervals
    left, remainder = scaled // intervals, scaled % intervals
    offset = (row_length - old) // 2
    before = jnp.take_along_axis(signals, offset + left, axis=1)
    after = jnp.take_along_axis(signals, offset + jnp.minimum(left + 1, old - 1), axis=1)
    weight = remainder.astype(signals.dtype) / intervals.astype(signals.dtype)
    between = before + weight * (after - before)
    between = jnp.clip(between, jnp.minimum(before, after), jnp.maximum(before, after))
    return jnp.where(inside, jnp.where(remainder == 0, before, between), 0)
