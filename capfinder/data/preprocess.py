"""Signals of any length to signals of one length; pure numpy."""

import numpy as np


def fit_length(signal: np.ndarray, target_length: int) -> np.ndarray:
    """(length,) -> (target_length,): cut or zero-padded at both ends, centred; an odd extra sample
    comes off, or goes to, the right. The dtype stays."""
    return fit_rows(
        signal, np.zeros(1, np.int64), np.array([len(signal)]), target_length=target_length
    )[0]


def fit_rows(
    values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, *, target_length: int
) -> np.ndarray:
    """`fit_length` of n signals at once -> (n, target_length).

    values: signals end to end; signal i is values[starts[i] : starts[i] + lengths[i]]."""
    left_cut = np.maximum(lengths - target_length, 0) // 2
    left_pad = np.maximum(target_length - lengths, 0) // 2
    kept = np.minimum(lengths, target_length)
    place = np.arange(target_length) - left_pad[:, None]  # (n, target_length), in the kept part
    is_kept = (place >= 0) & (place < kept[:, None])
    source = np.where(is_kept, (starts + left_cut)[:, None] + place, 0)
    return np.where(is_kept, values[source], values.dtype.type(0))
