"""The Flax model itself as a TensorFlow SavedModel, by jax2tf: the numerical referee."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capfinder import libraries

SIGNATURE, SIGNAL, PROBABILITIES = "serving_default", "signal", "probabilities"
PLATFORMS = ("cpu", "cuda", "tpu")  # where the file runs; jax2tf's default is only where it is made
_BATCH = 256


def write_saved_model(
    probabilities: Callable[[Any, Any], jax.Array],
    variables: Mapping[str, Any],
    directory: Path,
    *,
    target_length: int,
) -> None:
    """Saves `probabilities(variables, signal (B, T, 1)) -> (B, C)` with a free batch size.

    The signature `serving_default` takes `signal` in the parameters' dtype and returns
    {"probabilities": ...}; plain TensorFlow loads it."""
    tf = libraries.tensorflow()
    from jax.experimental import jax2tf

    dtype = jax.tree.leaves(variables)[0].dtype
    converted = jax2tf.convert(
        probabilities,
        polymorphic_shapes=[None, f"b, {target_length}, 1"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    module = tf.Module()
    module.weights = jax.tree.map(tf.Variable, jax.tree.map(np.asarray, dict(variables)))

    @tf.function(
        autograph=False,
        input_signature=[tf.TensorSpec((None, target_length, 1), dtype, name=SIGNAL)],
    )
    def serve(signal: Any) -> Any:
        return {PROBABILITIES: converted(module.weights, signal)}

    tf.saved_model.save(module, str(directory), signatures={SIGNATURE: serve})


def run_saved_model(directory: Path, signals: np.ndarray) -> np.ndarray:
    """Probabilities (n, C) of the reloaded model for `signals` (n, T, 1).

    The first signal goes alone, the rest in batches: a file whose batch size isn't free fails."""
    tf = libraries.tensorflow()
    # jax2tf's wrong batch size shows only when the graph runs, never at loading.
    serve = tf.saved_model.load(str(directory)).signatures[SIGNATURE]
    dtype = serve.structured_input_signature[1][SIGNAL].dtype
    starts = [0, *range(1, len(signals), _BATCH)]
    results = [
        serve(**{SIGNAL: tf.constant(signals[start:stop], dtype)})[PROBABILITIES].numpy()
        for start, stop in zip(starts, [*starts[1:], len(signals)], strict=True)
    ]
    return np.concatenate(results)
