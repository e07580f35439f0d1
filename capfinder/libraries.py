"""Libraries that need care when they are loaded: quiet, discreet, and off the GPU, which is for
JAX."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any


def lazily(name: str) -> Any:
    """The module, which is loaded when something of it is first used."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensorflow() -> Any:
    """TensorFlow, imported on first use."""
    with _keras_on("jax"):  # TensorFlow imports Keras
        import tensorflow as tf
    with contextlib.suppress(RuntimeError):  # it has started already: too late to change
        tf.config.set_visible_devices([], "GPU")
    return tf


def keras(backend: str = "jax") -> Any:
    """Keras, imported on first use, on that backend; it stays on one that was loaded before."""
    with _keras_on(backend):
        import keras as library
    if library.config.backend() == "tensorflow":
        tensorflow()
    return library


def onnxruntime() -> Any:
    """ONNX Runtime, imported on first use. Since 1.29 it tells its makers of each model that it
    runs, its name included, and writes a number for the machine to the user's cache: not for us,
    unless the user has set ORT_DISABLE_TELEMETRY otherwise."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as library

    return library


@contextlib.contextmanager
def _keras_on(backend: str) -> Iterator[None]:
    """For an import alone, so that other processes keep the user's choice of a backend."""
    # Else lines about CPU features on stderr, of TensorFlow, which Keras imports where it is. Its
    # oneDNN kernels, which are announced whatever the level, serve nothing here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["KERAS_BACKEND"]
        else:
            os.environ["KERAS_BACKEND"] = before
