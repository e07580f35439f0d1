"""`.keras` files of unknown origin: looked at as plain JSON first, then loaded by Keras.

Keras is given a file only when everything that its configuration names is one of Keras's own
harmless classes; nothing in a file may run code, and we write none of its members anywhere."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfinder import files, libraries
from capfinder.allowed import is_number, shortened, shown
from capfinder.errors import InputError
from capfinder.exporting import compat, keras

MODELS = {"Functional", "Sequential", "Model"}
# Keras's own modules, as it names them in files; "builtins" is for the names of functions.
_MODULES = {
    "builtins",
    "keras",
    "keras.constraints",
    "keras.dtype_policies",
    "keras.initializers",
    "keras.layers",
    "keras.models",
    "keras.regularizers",
    "keras.src.activations.activations",
    "keras.src.models.functional",
    "keras.src.models.model",
    "keras.src.models.sequential",
    "keras.src.ops.numpy",
}
_LAYER_MODULES = {"keras.layers", "keras.src.activations.activations", "keras.src.ops.numpy"}
_NO_LAYERS = {"__keras_tensor__", "__tuple__"}
_CAPFINDERS = {"AttentionLayer", "ResNetBlockHyper", "Lambda"}  # classes in models of 0.4.3
_CONFIG, _METADATA = "config.json", "metadata.json"
_WEIGHTS = {"model.weights.h5", "model.weights.npz"}
_MOST_BYTES = 2**26  # of JSON, unpacked; the released classifier has 28 kB
KERAS_FILE = "expected a .keras file as Keras 3 writes it"


@dataclass(frozen=True)
class Archive:
    """What a `.keras` file says of itself.

    about: what `keras.write_keras` was told, {} in another program's. learning_rate: as told there,
    else what the model was compiled with; None: not said."""

    path: Path
    sha256: str
    keras_version: str
    about: dict[str, Any]
    is_float64: bool
    learning_rate: float | None


def read(path: Path) -> Archive:
    """Raises: InputError for what isn't a `.keras` file, or one that holds more than a network of
    Keras's own layers."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; {KERAS_FILE}")
    if path.suffix != ".keras":
        raise InputError(f"{path}: isn't called .keras; {KERAS_FILE}")
    config, metadata = _members(path)
    model = {name: value for name, value in config.items() if name != "compile_config"}
    objects = [node for node in _nodes(model) if "class_name" in node]
    _check_objects(path, model, objects)
    about = metadata.get("capfinder")
    about = about if isinstance(about, dict) else {}
    compiled_rate = _number(config, "compile_config", "optimizer", "config", "learning_rate")
    return Archive(
        path=path,
        sha256=files.sha256_file(path),
        keras_version=shortened(str(metadata.get("keras_version"))),
        about=about,
        is_float64=any(_dtype(node) == "float64" for node in _nodes(model)),
        learning_rate=_number(about, "hyperparameters", "learning_rate") or compiled_rate,
    )


def load(archive: Archive) -> Any:
    """The Keras model; for float64 JAX must be set up for that before.

    Raises: InputError when Keras can't read it."""
    library = libraries.keras()
    try:
        with keras.without_draws(library, most_bytes=_most_bytes(archive.path)):
            return library.models.load_model(archive.path, compile=False, safe_mode=True)
    except Exception as error:  # whatever a loader raises, the file is unusable
        raise InputError(f"{archive.path}: Keras can't load it ({_first_line(error)})") from error


def _most_bytes(path: Path) -> int:
    """More than the weights in a file of this size can have, be it packed or of fewer bits."""
    return 16 * path.stat().st_size + 2**26


def _members(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and metadata.json."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if _CONFIG not in names:
                raise InputError(f"{path}: holds no {_CONFIG}; {KERAS_FILE}")
            if not _WEIGHTS & set(names):
                raise InputError(f"{path}: holds no weights; {KERAS_FILE}")
            if extra := set(names) - _WEIGHTS - {_CONFIG, _METADATA}:
                raise InputError(
                    f"{path}: holds {shown(min(extra))}, which no file of such a model does; "
                    f"{KERAS_FILE}"
                )
            config = _json(path, archive, _CONFIG)
            metadata = _json(path, archive, _METADATA) if _METADATA in names else {}
    except zipfile.BadZipFile:
        raise InputError(f"{path}: isn't a zip archive, or a damaged one; {KERAS_FILE}") from None
    except (OSError, NotImplementedError, RuntimeError) as error:  # the last two: odd compression
        raise InputError(f"{path}: can't be read ({_first_line(error)})") from None
    return config, metadata


def _json(path: Path, archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    if archive.getinfo(name).file_size > _MOST_BYTES:
        raise InputError(f"{path}: its {name} is larger than any model's; {KERAS_FILE}")
    try:
        value = json.loads(archive.read(name))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: its {name} isn't JSON; {KERAS_FILE}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: its {name} isn't a JSON object; {KERAS_FILE}")
    return value


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in it, outer ones before those in them, however deep."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
            waiting += reversed(list(found.values()))
        elif isinstance(found, list):
            waiting += reversed(found)


def _check_objects(path: Path, model: dict[str, Any], objects: list[dict[str, Any]]) -> None:
    if not isinstance(model.get("class_name"), str):
        raise InputError(f"{path}: its {_CONFIG} names no model; {KERAS_FILE}")
    for node in objects:
        name, module = node["class_name"], node.get("module")
        if not isinstance(name, str) or not isinstance(module, str | None):
            raise InputError(f"{path}: {_called(node)} has no class; {KERAS_FILE}")
        if name in _NO_LAYERS and module is None:
            continue
        hint = (
            ". Of Capfinder 0.4.3's own models cnn_lstm ones alone can be imported"
            if name in _CAPFINDERS
            else ""
        )
        if module not in _MODULES:
            raise InputError(
                f"{path}: {_called(node)} is of class {_word(name)}, which isn't Keras's own; code "
                f"that comes with a model isn't run{hint}"
            )
        is_layer = module in _LAYER_MODULES or "inbound_nodes" in node
        if is_layer and name not in {*compat.LAYERS_3_4, *MODELS, "Identity"}:
            raise InputError(
                f"{path}: {_called(node)} is of class {_word(name)}, which none of the "
                f"architectures has{hint}"
            )
    if model["class_name"] not in MODELS:
        raise InputError(f"{path}: holds a {_word(model['class_name'])}, not a model")


def _called(node: dict[str, Any]) -> str:
    config = node.get("config")
    name = config.get("name") if isinstance(config, dict) else None
    return f"layer {_word(name)}" if isinstance(name, str) else "something in it"


def _word(value: str) -> str:
    """A name in a file, which may be any text."""
    return shortened(value) if value.isidentifier() else shown(value)


def _dtype(node: dict[str, Any]) -> Any:
    """Of a layer, or of a policy."""
    if node.get("class_name") == "DTypePolicy" and isinstance(node.get("config"), dict):
        return node["config"].get("name")
    return node.get("dtype")


def _number(value: Any, *keys: str) -> float | None:
    """value[key][key]...; None when there is no number."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if is_number(value) else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {shortened(lines[0])}" if lines else type(error).__name__
