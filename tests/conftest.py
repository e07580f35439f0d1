"""Shared by all tests: Keras computes with JAX, whatever the machine's keras.json says."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
