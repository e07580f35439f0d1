"""Memory: how the C library and Python's collector deal with it while a training goes on.

XLA's CPU backend allocates a step's temporary buffers anew in every call. glibc maps such large
blocks afresh each time, so that the kernel clears every page of them: with 500 MB of buffers
120,000 page faults and 0.37 s of system time a step (cnn_lstm of the released size, batch 256, two
cores), 15 to 20 % of the step. Kept in the process, the same blocks serve every step."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST_INT = 2**31 - 1  # bytes: what mallopt can be told; a larger free top is given back
NEW_OBJECTS = 100_000  # after so many the collector looks at them, by default after 700


def keep_freed() -> bool:
    """From now on freed memory stays with the process, for the next allocation; True if that works.

    To be called before JAX's backend starts, as its threads get their own arenas then. Linux with
    glibc only; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    # One arena: those of threads are limited to 64 MB, and fall back to mapping.
    return all(
        mallopt(parameter, value)
        for parameter, value in (
            (_MMAP_MAX, 0),
            (_TRIM_THRESHOLD, _LARGEST_INT),
            (_ARENA_MAX, 1),
        )
    )


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Inside, Python looks for unreachable objects less often.

    Imports and traces make millions of objects that stay: looking through them took a sixth of the
    time to a training's first step."""
    before = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
