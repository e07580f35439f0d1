"""The Flax model itself as a TensorFlow SavedModel, by jax2tf: the numerical referee."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import libraries
from capfinder.exporting import batches, fitting
from capfinder.exporting.keras import PROBABILITIES, SIGNAL

SIGNATURE = "serving_default"
PLATFORMS = ("cpu", "cuda", "tpu")  # where the file runs; jax2tf's default is only where it is made


def write_saved_model(
    probabilities: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    directory: Path,
    *,
    target_length: int,
    input_length: int | None = None,
) -> None:
    """Saves `probabilities(variables, signal (B, target_length, 1)) -> (B, C)`, B free.

    The signature `serving_default` takes `signal` (B, input_length, 1; None: target_length) in the
    parameters' dtype and returns {"probabilities": ...}; plain TensorFlow loads it."""
    tf = libraries.tensorflow()
    import jax
    from jax.experimental import jax2tf

    dtype = jax.tree.leaves(variables)[0].dtype
    length = input_length or target_length
    converted = jax2tf.convert(
        lambda weights, signal: probabilities(weights, fitting.jax_fitted(signal, target_length)),
        polymorphic_shapes=[None, f"b, {length}, 1"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    module = tf.Module()
    module.weights = jax.tree.map(tf.Variable, jax.tree.map(np.asarray, dict(variables)))

    @tf.function(
        autograph=False,
        input_signature=[tf.TensorSpec((None, length, 1), dtype, name=SIGNAL)],
    )
    def serve(signal: Any) -> Any:
        return {PROBABILITIES: converted(module.weights, signal)}

    tf.saved_model.save(module, str(directory), signatures={SIGNATURE: serve})


def run_saved_model(directory: Path, signals: np.ndarray) -> np.ndarray:
    """Probabilities (n, C) of the reloaded model for `signals` (n, T, 1): of the first of them
    alone, of the rest in batches."""
    tf = libraries.tensorflow()
    # jax2tf's wrong batch size shows only when the graph runs, never at loading.
    serve = tf.saved_model.load(str(directory)).signatures[SIGNATURE]
    dtype = serve.structured_input_signature[1][SIGNAL].dtype
    results = [
        serve(**{SIGNAL: tf.constant(batch, dtype)})[PROBABILITIES].numpy()
        for batch in batches.alone_then_together(signals)
    ]
    return np.concatenate(results)
