"""Shared by all tests: which backend Keras has, and how hard XLA tries."""

import os

from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")

os.environ.setdefault("KERAS_BACKEND", "jax")  # whatever the machine's keras.json says
# Tests compile much and compute little: without LLVM's optimisations they take a fifth of the time.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
)
