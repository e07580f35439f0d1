"""Shared by all tests: which backend Keras has, and how hard XLA tries."""

import os

from hypothesis import settings

from capfinder import compiled

settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")

# Commands that tests run with a home of their own needn't compile the kernels again.
os.environ.setdefault("NUMBA_CACHE_DIR", str(compiled.cache_directory()))
os.environ.setdefault("KERAS_BACKEND", "jax")  # whatever the machine's keras.json says
# Tests compile much and compute little: without LLVM's optimisations they take a fifth of the time.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
)
