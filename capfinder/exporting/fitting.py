"""Signals of the length that a file takes -> signals of the length that its model takes."""

from typing import Any


def margins(length: int, target_length: int) -> tuple[int, int]:
    """Samples to add on the left and on the right; negative ones come off.

    As `etl.preprocess.fit_length`: centred, an odd sample goes to, or comes off, the right. A
    signal that was fitted before, to another length, may lie a sample beside where one fit would
    have put it, as two halves of odd numbers were rounded."""
    extra = target_length - length
    left = abs(extra) // 2 * (1 if extra > 0 else -1)
    return left, extra - left


def keras_fitted(signal: Any, target_length: int, layers: Any) -> Any:
    """(B, T, 1) -> (B, target_length, 1), by one of Keras's layers if by any."""
    left, right = margins(signal.shape[1], target_length)
    if left == right == 0:
        return signal
    if right > 0:
        return layers.ZeroPadding1D((left, right), name="fit_length")(signal)
    return layers.Cropping1D((-left, -right), name="fit_length")(signal)


def jax_fitted(signal: Any, target_length: int) -> Any:
    """(B, T, 1) -> (B, target_length, 1); B may be a symbol."""
    import jax

    left, right = margins(signal.shape[1], target_length)
    zero = jax.numpy.zeros((), signal.dtype)
    return jax.lax.pad(signal, zero, ((0, 0, 0), (left, right, 0), (0, 0, 0)))
