"""JAX's settings, which a command that is run in the tests' own process changes."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache

from capfinder import log

CHANGED = (
    "jax_enable_x64",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@contextmanager
def restored() -> Iterator[None]:
    """Commands may be run inside; afterwards JAX and the log are as they were."""
    before = {name: getattr(jax.config, name) for name in CHANGED}
    compilation_cache.reset_cache()  # else a directory used before stays in use
    try:
        yield
    finally:
        log.stop()
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
