"""The trained model in Keras's own layers: `.keras` archives and `.weights.h5` files.

Nothing leads from jax2tf to a self-contained `.keras` file, so the network is built a second time
(each architecture's `keras_twin`) and gets the Flax weights. Keras runs on whichever backend it
was loaded with, JAX if nothing has loaded it before; the files are the same.
"""

import contextlib
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import libraries, models
from capfinder.allowed import shortened
from capfinder.errors import StageFailedError
from capfinder.exporting import batches, compat, fitting

SIGNAL, PROBABILITIES = "signal", "probabilities"  # names of the input and of the output
# Keras's names inside a layer -> ours; the rest have the same name on both sides.
_FLAX_NAMES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
    "embeddings": "embedding",
    "attention_output": "out",
}
_KERAS_ONLY = {"lstm_cell"}  # a level that our modules don't have
TRAINING_ONLY = {"steps"}  # how far BatchNorm's running averages have come: no use to a reader


class TwinError(StageFailedError):
    """An architecture's `keras_twin` isn't its Flax module in Keras's layers."""


@contextlib.contextmanager
def _clean_keras(dtype: str) -> Iterator[Any]:
    """Keras with `dtype` for weights and computation, and names counted from the start.

    Clearing the session makes the names of layers, and so the file, the same every time."""
    keras = libraries.keras()
    policy, layout = keras.config.dtype_policy(), keras.config.image_data_format()
    keras.utils.clear_session()
    keras.config.set_dtype_policy(dtype)
    keras.config.set_image_data_format("channels_last")  # the user's keras.json may say otherwise
    try:
        yield keras
    finally:
        keras.config.set_dtype_policy(policy)
        keras.config.set_image_data_format(layout)


@contextlib.contextmanager
def without_draws(keras: Any, *, most_bytes: float = math.inf) -> Iterator[None]:
    """Weights are 0 at first: they get their values later, and on JAX the drawing of initial ones
    is compiled for every shape, seconds for a model.

    Raises: ValueError where they come to more than `most_bytes`, before these are taken."""
    total = 0

    def zeros(self: Any, shape: Any, dtype: Any = None, **_: Any) -> np.ndarray:
        nonlocal total
        dtype = np.dtype(dtype or keras.config.floatx())
        total += math.prod(shape) * dtype.itemsize
        if total > most_bytes:
            raise ValueError(f"its layers have more than {most_bytes / 1e9:.1f} GB of weights")
        return np.zeros(shape, dtype)

    known = vars(keras.initializers).values()
    kinds: list[Any] = [one for one in known if isinstance(one, type) and "__call__" in vars(one)]
    drawing = {kind: kind.__call__ for kind in kinds}
    try:
        for kind in drawing:
            kind.__call__ = zeros
        yield
    finally:
        for kind, draw in drawing.items():
            kind.__call__ = draw


def build_twin(
    model_type: str,
    hyperparameters: Any,
    *,
    num_classes: int,
    target_length: int,
    dtype: str,
    input_length: int | None = None,
) -> Any:
    """The architecture as a Keras model: signal (B, input_length, 1) -> probabilities (B, C).

    input_length: the twin cuts or pads signals to target_length itself; None: they have it.
    `dtype` is that of the parameters, "float32" or "float64", whatever training computed in."""
    with _clean_keras(dtype) as keras, without_draws(keras):
        network = models.architecture(model_type).keras_twin(
            hyperparameters, num_classes=num_classes, layers=keras.layers
        )
        signal = keras.Input((input_length or target_length, 1), dtype=dtype, name=SIGNAL)
        fitted = fitting.keras_fitted(signal, target_length, keras.layers)
        probabilities = keras.layers.Softmax(name=PROBABILITIES)(network(fitted))
        twin = keras.Model(signal, probabilities, name=model_type)
        weights = {id(weight) for weight in twin.weights}
        for variable in twin.variables:
            if id(variable) not in weights:  # states of dropout's random generators, saved too
                variable.assign(np.zeros(variable.shape, "uint32"))
    return twin


def trained_twin(variables: Mapping[str, Any], *, model_type: str, **given: Any) -> Any:
    """A twin, as of `build_twin`, with the weights in `variables`. Raises: TwinError."""
    try:
        twin = build_twin(model_type, **given)
        copy_weights(twin, variables)
    except MemoryError:
        raise
    except Exception as error:  # an architecture's own code, and what Keras says to it
        said = shortened(" ".join(f"{type(error).__name__}: {error}".split()))
        raise TwinError(
            f"{models.architecture(model_type).__file__}: keras_twin doesn't give the network of "
            f"{model_type} ({said}). Correct its layers, and their names, which are those of the "
            "Flax module"
        ) from error
    return twin


def copy_weights(twin: Any, variables: Mapping[str, Any]) -> None:
    """Gives the twin the weights in `variables` ({"params", "batch_stats"}), found by name.

    A layer is named like its Flax module's path joined by "_"; inside a layer the names are
    Keras's, translated by _FLAX_NAMES. Every weight is assigned exactly once.
    Raises: ValueError when a weight of either side has no partner, or another shape."""
    from flax.traverse_util import flatten_dict

    arrays: dict[str, np.ndarray] = {}
    for collection in ("params", "batch_stats"):
        for path, array in flatten_dict(dict(variables.get(collection, {}))).items():
            name = "_".join(path)
            if name in arrays:
                raise ValueError(f"two weights of the Flax model are called {name}")
            if path[-1] not in TRAINING_ONLY:
                arrays[name] = np.asarray(array)
    for weight in twin.weights:
        name = flax_name(weight.path)
        if name not in arrays:
            raise ValueError(f"the Flax model has no {name} for the Keras weight {weight.path}")
        array = arrays.pop(name)
        if array.shape != tuple(weight.shape):
            raise ValueError(
                f"{name} has shape {array.shape} in Flax, {tuple(weight.shape)} in Keras"
            )
        weight.assign(array)
    if arrays:
        raise ValueError(f"no Keras weight takes the Flax model's {', '.join(sorted(arrays))}")


def flax_name(keras_path: str) -> str:
    """'block_0_norm/gamma' -> 'block_0_norm_scale', 'lstm_1/lstm_cell/bias' -> 'lstm_1_bias'."""
    layer, *inner = keras_path.split("/")
    return "_".join(
        [layer, *(_FLAX_NAMES.get(part, part) for part in inner if part not in _KERAS_ONLY)]
    )


def write_keras(twin: Any, path: Path, about: Mapping[str, Any]) -> None:
    """A `.keras` archive for Keras 3.4 to the newest, with `about` in its metadata.json.

    load_model reads the archive's config.json and weights and leaves metadata.json alone, so that
    is where class names and preprocessing can lie. Equal models give equal bytes: the archive has
    no date of its own."""
    twin.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = compat.for_3_4(json.loads(members["config.json"]), _keras_defaults)
    config = compat.number_shared_objects(config)
    metadata = json.loads(members["metadata.json"])
    metadata["date_saved"] = "not recorded"  # Keras's file inspector wants the key
    metadata["capfinder"] = about
    members["config.json"] = json.dumps(config).encode()
    members["metadata.json"] = json.dumps(metadata, indent=1).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # dated 1980, as zip's epoch is


def _keras_defaults(node: dict[str, Any]) -> dict[str, Any]:
    """The configuration that this Keras gives an object which it builds from `node`."""
    keras = libraries.keras()
    built = keras.saving.deserialize_keras_object(node)
    return dict(keras.saving.serialize_keras_object(built)["config"])


def read_about(path: Path) -> dict[str, Any] | None:
    """What `write_keras` was told of the model; None for an unreadable file or another's."""
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("metadata.json")).get("capfinder")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return about if isinstance(about, dict) else None


def run_keras(path: Path, signals: np.ndarray) -> np.ndarray:
    """Probabilities (n, C) that a `.keras` file gives `signals` (n, T, 1), loaded as anyone would:
    no custom objects, safe mode."""
    model = libraries.keras().models.load_model(path, compile=False, safe_mode=True)
    return _predict(model, signals)


def write_weights(twin: Any, path: Path) -> None:
    """The weights alone, for `load_weights` of the same network; `path` ends in .weights.h5."""
    twin.save_weights(path)


def run_weights(untrained_twin: Any, path: Path, signals: np.ndarray) -> np.ndarray:
    """Probabilities (n, C) of a fresh twin that takes its weights from the file."""
    untrained_twin.load_weights(path)
    return _predict(untrained_twin, signals)


def _predict(model: Any, signals: np.ndarray) -> np.ndarray:
    """The first signal goes alone, the rest in batches."""
    together = batches.alone_then_together(signals)
    return np.concatenate([np.asarray(model.predict_on_batch(batch)) for batch in together])
