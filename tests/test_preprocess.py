import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capfinder.etl.preprocess import fit_length

signals = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-4, 4, width=32))


@given(signals, st.integers(0, 80))
def test_padding_then_cutting_gives_the_signal_back(signal, extra):
    padded = fit_length(signal, len(signal) + extra)
    np.testing.assert_array_equal(fit_length(padded, len(signal)), signal)


@pytest.mark.parametrize(
    ("target_length", "expected"),
    [
        (5, [1, 2, 3, 4, 5]),
        (4, [1, 2, 3, 4]),
        (3, [2, 3, 4]),
        (2, [2, 3]),
        (1, [3]),
        (6, [1, 2, 3, 4, 5, 0]),
        (7, [0, 1, 2, 3, 4, 5, 0]),
        (8, [0, 1, 2, 3, 4, 5, 0, 0]),
    ],
)
def test_an_odd_extra_sample_is_on_the_right(target_length, expected):
    assert fit_length(np.arange(1, 6), target_length).tolist() == expected


@given(signals, st.integers(1, 80))
def test_fitting_agrees_with_numpy_pad_and_slices(signal, target_length):
    short, long = target_length - len(signal), len(signal) - target_length
    if short > 0:
        expected = np.pad(signal, (short // 2, short - short // 2))
    else:
        expected = signal[long // 2 : long // 2 + target_length]
    fitted = fit_length(signal.astype(np.float16), target_length)
    assert fitted.dtype == np.float16
    np.testing.assert_array_equal(fitted, expected.astype(np.float16))
