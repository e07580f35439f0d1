"""Signals of any length to signals of one length; pure numpy."""

import numpy as np


def fit_length(signal: np.ndarray, target_length: int) -> np.ndarray:
    """(length,) -> (target_length,): cut or zero-padded at both ends, centred; an odd extra sample
    comes off, or goes to, the right. The dtype stays."""
    cut = max(len(signal) - target_length, 0) // 2
    pad = max(target_length - len(signal), 0) // 2
    kept = signal[cut : cut + target_length]
    fitted = np.zeros(target_length, signal.dtype)
    fitted[pad : pad + len(kept)] = kept
    return fitted
