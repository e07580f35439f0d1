"""The time warp against numpy.interp, and the factors' distribution and independence."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder.data import augment

warp = jax.jit(augment.time_warp)
draw = jax.jit(augment.stretches)
T = 40
seeds = st.integers(0, 2**32 - 1)
stretch_values = st.floats(-0.2, 0.2)


def fitted(signal: np.ndarray, width: int) -> np.ndarray:
    """Centred padding or cropping, the odd sample to or from the right (written independently)."""
    extra = width - len(signal)
    if extra < 0:
        return signal[-extra // 2 :][:width]
    return np.pad(signal, (extra // 2, extra - extra // 2))


def reference(row: np.ndarray, length: int, stretch: float) -> np.ndarray:
    """numpy.interp on the true signal, in float64."""
    length = min(length, len(row))
    start = (len(row) - length) // 2
    signal = row[start : start + length].astype(np.float64)
    new = max(1, int(np.round(np.float32(length) * (np.float32(1) + np.float32(stretch)))))
    positions = np.linspace(0, length - 1, new)
    return fitted(np.interp(positions, np.arange(length), signal), len(row))


def make_rows(seed: int, lengths: list[int], width: int = T) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=n).astype(np.float32) for n in lengths]
    return np.stack([fitted(row, width) for row in rows])


@settings(max_examples=150, deadline=None)
@given(seeds, st.lists(st.tuples(st.integers(1, 3 * T), stretch_values), min_size=4, max_size=4))
def test_the_warp_equals_numpy_interp_on_the_signal_without_its_padding(seed, cases):
    lengths, stretches = zip(*cases, strict=True)
    rows = make_rows(seed, list(lengths))
    warped = np.asarray(warp(rows, np.array(lengths), np.array(stretches, np.float32)))
    assert warped.dtype == np.float32 and warped.shape == rows.shape
    expected = [reference(r, n, s) for r, n, s in zip(rows, lengths, stretches, strict=True)]
    np.testing.assert_allclose(warped, expected, rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 3 * T), stretch_values)
def test_values_stay_between_the_signals_extremes_and_zero(seed, length, stretch):
    rows = make_rows(seed, [length])
    rows[rows != 0] += np.float32(0.5)  # extremes that are not symmetric
    warped = np.asarray(warp(rows, np.array([length]), np.array([stretch], np.float32)))
    assert warped.min() >= min(rows.min(), 0) and warped.max() <= max(rows.max(), 0)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 3 * T))
def test_no_stretch_changes_no_bit(seed, length):
    rows = make_rows(seed, [length])
    rows[0, max(T - length, 0) // 2] = -0.0  # its first sample
    warped = np.asarray(warp(rows, np.array([length]), np.zeros(1, np.float32)))
    assert warped.tobytes() == rows.tobytes()


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, T), stretch_values)
def test_the_new_signal_is_centred_with_its_ends_kept(seed, length, stretch):
    rows = make_rows(seed, [length])
    signal = rows[0, (T - length) // 2 :][:length]
    new = int(np.round(np.float32(length) * (np.float32(1) + np.float32(stretch))))
    warped = np.asarray(warp(rows, np.array([length]), np.array([stretch], np.float32)))[0]
    if new > T:
        return
    left = (T - new) // 2
    assert (warped[:left] == 0).all() and (warped[left + new :] == 0).all()
    assert warped[left] == signal[0]
    assert new == 1 or warped[left + new - 1] == signal[-1]


def test_a_flat_signal_shows_the_new_length():
    """100 samples at 10 % become 90 and 110: no zero is stretched, none is blended in."""
    rows = np.stack([fitted(np.full(100, 3.0, np.float32), 150)] * 2)
    warped = np.asarray(warp(rows, np.array([100, 100]), np.array([-0.1, 0.1], np.float32)))
    assert [int((row == 3).sum()) for row in warped] == [90, 110]
    assert set(np.unique(warped)) == {0.0, 3.0}


def test_an_expanded_full_row_keeps_its_centre():
    rows = np.linspace(-1, 1, 101, dtype=np.float32)[None]
    warped = np.asarray(warp(rows, np.array([500]), np.array([0.2], np.float32)))[0]
    np.testing.assert_allclose(warped, np.linspace(-1, 1, 121)[10:111], atol=1e-6)


def test_float64_signals_are_warped_in_float64():
    rows = make_rows(3, [30]).astype(np.float64) * (1 + 1e-12)
    with jax.enable_x64(True):
        warped = np.asarray(warp(rows, np.array([30]), np.array([0.1])))
    assert warped.dtype == np.float64
    np.testing.assert_allclose(warped[0], reference(rows[0], 30, 0.1), rtol=0, atol=1e-14)


def test_a_row_does_not_depend_on_its_batch_mates():
    lengths = np.array([10, 25, 40, 90], np.int32)
    rows = make_rows(5, lengths.tolist())
    stretch = np.array([0.1, -0.2, 0.05, 0.15], np.float32)
    together = np.asarray(warp(rows, lengths, stretch))
    mirrored = np.asarray(warp(rows[::-1], lengths[::-1], stretch[::-1]))
    np.testing.assert_array_equal(together, mirrored[::-1])


# --- how far each example is warped


def stretches_of(seed: int, epoch: int, indices, versions) -> np.ndarray:
    return np.asarray(draw(augment.epoch_key(seed, epoch), np.array(indices), np.array(versions)))


def test_versions_are_as_it_is_squished_and_expanded():
    n = 2000
    as_it_is, squished, expanded = (
        stretches_of(1, 0, np.arange(n) + version * n, np.full(n, version)) for version in range(3)
    )
    assert (as_it_is == 0).all()
    assert (squished <= 0).all() and (squished > -augment.MAX_FACTOR).all()
    assert (expanded >= 0).all() and (expanded < augment.MAX_FACTOR).all()


@pytest.mark.parametrize("version", [1, 2])
def test_factors_are_uniform_between_0_and_20_percent(version):
    n = 20_000
    factors = np.sort(np.abs(stretches_of(7, 3, np.arange(n), np.full(n, version))))
    distance = np.abs(factors / 0.2 - (np.arange(n) + 0.5) / n).max()  # Kolmogorov-Smirnov
    assert distance < 1.63 / np.sqrt(n)  # the 1 % point; the seed is fixed


def test_squish_and_expand_draw_independently_and_afresh_every_epoch():
    n = 20_000
    indices = np.arange(n)
    squished = stretches_of(7, 3, indices + n, np.full(n, 1))
    others = {
        "expanded": stretches_of(7, 3, indices + 2 * n, np.full(n, 2)),
        "next epoch": stretches_of(7, 4, indices + n, np.full(n, 1)),
        "other seed": stretches_of(8, 3, indices + n, np.full(n, 1)),
        "neighbour": np.roll(squished, 1),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(squished, other)[0, 1]) < 4 / np.sqrt(n), name


def test_a_factor_depends_on_seed_epoch_and_index_alone():
    whole = stretches_of(5, 2, np.arange(100), np.full(100, 2))
    some = np.array([71, 3, 40])
    np.testing.assert_array_equal(stretches_of(5, 2, some, np.full(3, 2)), whole[some])
    with jax.enable_x64(True):
        wide = stretches_of(5, 2, np.arange(100), np.full(100, 2))
    np.testing.assert_array_equal(wide, whole)
