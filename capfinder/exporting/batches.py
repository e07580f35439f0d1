"""The batches that a reloaded file is tried with."""

from collections.abc import Iterator

import numpy as np

SIZE = 256


def alone_then_together(signals: np.ndarray) -> Iterator[np.ndarray]:
    """(n, T, 1): the first alone, the rest by SIZE; a file whose batch size isn't free fails."""
    yield signals[:1]
    for start in range(1, len(signals), SIZE):
        yield signals[start : start + SIZE]
