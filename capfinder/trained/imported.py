"""Models that come from a `.keras` file: imported before, or on the way in.

directory/import.json       what is known of the model, sealed
directory/best/0/           its weights, as a training keeps its own"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from capfinder import capmap, files, models, settings
from capfinder.allowed import MOST_NAME_LENGTH, is_text
from capfinder.errors import InputError, SettingsError, StageFailedError
from capfinder.evaluation import facts
from capfinder.exporting import import_check, keras_archive, recognise
from capfinder.exporting.keras_archive import Archive
from capfinder.exporting.keras_graph import UnlikeError
from capfinder.exporting.recognise import Recognised
from capfinder.log import logger
from capfinder.stages import assembly
from capfinder.stages.assembly import TrainedModel
from capfinder.trained.classifier import Classifier
from capfinder.training.checkpoint import Checkpoints

RECORD = "import.json"
LARGEST_DIFFERENCE = 1e-5  # of a probability, between the Keras model and the imported one
EPOCH = 0  # under which the weights are kept: which one it was isn't known


@dataclasses.dataclass(frozen=True)
class Imported:
    """record: what import.json holds. remarks: what the file has that the import leaves out."""

    classifier: Classifier
    record: dict[str, Any]
    remarks: list[str]


def is_one(path: Path) -> bool:
    """Whether the directory holds an import."""
    return (path / RECORD).is_file()


def from_keras_file(path: Path) -> Classifier:
    """Raises: as `read_keras_file`."""
    imported = read_keras_file(path)
    for remark in imported.remarks:
        logger.info("%s: %s", path, remark)
    return imported.classifier


def read_keras_file(path: Path) -> Imported:
    """The model in a `.keras` file, whoever wrote it, checked against what Keras makes of it; JAX
    is set up for it.

    Raises: InputError for a file that can't be read, or is none of the architectures;
    StageFailedError when the imported model gives other probabilities."""
    archive = keras_archive.read(path)
    assembly.configure_jax(_config({"dtype": "float64" if archive.is_float64 else "float32"}))
    keras_model = keras_archive.load(archive)
    try:
        found = recognise.recognise(keras_model, learning_rate=archive.learning_rate)
    except UnlikeError as error:
        raise InputError(f"{path}: can't be imported: {error}") from None
    model = _trained_model(path, dataclasses.asdict(found), found.hyperparameters, found.variables)
    difference = _difference(path, keras_model, model, found)
    record = _record(archive, found, model, difference)
    return Imported(_classifier(model, record), record, found.remarks)


def write(imported: Imported, directory: Path) -> None:
    """`directory`, new or empty, appears whole or not at all.

    Raises: StageFailedError when the weights can't be written, else OSError."""
    files.remove_dead(directory.absolute().parent)
    with files.atomic_directory(directory.absolute()) as partial:
        try:
            with Checkpoints(partial) as checkpoints:
                checkpoints.save_best(EPOCH, imported.classifier.model.variables, {})
        except StageFailedError as error:  # which speaks of a training, and of `partial`
            raise StageFailedError(
                f"{directory}: the weights can't be written ({error.__cause__}). Free or give "
                "access to the disk and import the model again."
            ) from error
        files.write_json(partial / RECORD, files.sealed(imported.record))


def load(directory: Path) -> Classifier:
    """An import that `write` has made; JAX is set up for it.

    Raises: InputError for one that isn't whole."""
    path = directory / RECORD
    record = read_record(directory)
    try:
        hyperparameters = models.parse_hyperparameters(
            record["model_type"], record["hyperparameters"]
        )
        assembly.configure_jax(_config(record))
        variables = _weights(directory, record["weights_sha256"])
        model = _trained_model(path, record, hyperparameters, variables)
        return _classifier(model, record)
    except (KeyError, TypeError, SettingsError) as error:
        raise InputError(
            f"{path}: {error}. Was it written by another version of capfinder? Import the model "
            "again."
        ) from None


def read_record(directory: Path) -> dict[str, Any]:
    """What import.json holds. Raises: InputError when it isn't what was written."""
    path = directory / RECORD
    values = files.read_json(path)
    try:
        return files.unsealed(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}. Import the model again.") from None


def _weights(directory: Path, sha256: str) -> dict[str, Any]:
    again = f"Import the model again, into another directory or once {directory} is removed."
    try:
        variables = Checkpoints(directory).restore_variables(EPOCH)
    except InputError as error:
        raise InputError(f"{directory}: its weights can't be read. {again}") from error
    if assembly.weights_sha256(variables) != sha256:
        raise InputError(f"{directory}: its weights are another model's. {again}")
    return variables


def _config(values: Mapping[str, Any]) -> ConfigDict:
    """The default settings with those of a model. Raises: SettingsError when they can't be."""
    names = ("model_type", "num_classes", "target_length", "dtype")
    own = {f"shared_params.{name}": values[name] for name in names if name in values}
    return settings.checked(settings.default_config(), own)


def _trained_model(
    path: Path, values: Mapping[str, Any], hyperparameters: Any, variables: dict[str, Any]
) -> TrainedModel:
    try:
        config = _config(values)
    except SettingsError as error:
        raise InputError(f"{path}: can't be imported: {error}") from None
    return assembly.trained_model(config, hyperparameters, variables, best_epoch=EPOCH)


def _difference(path: Path, keras_model: Any, model: TrainedModel, found: Recognised) -> float:
    probabilities = jax.jit(functools.partial(assembly.probabilities, model.module))
    with jax.default_matmul_precision("highest"):  # else a GPU rounds products to 10 bits
        difference = import_check.largest_difference(
            keras_model,
            lambda signals: np.asarray(probabilities(model.variables, signals)),
            input_length=found.input_length,
            target_length=found.target_length,
            dtype=found.dtype,
        )
    if not difference <= LARGEST_DIFFERENCE:  # so that NaN fails too
        raise StageFailedError(
            f"{path}: the imported {found.model_type} gives probabilities that differ from the "
            f"Keras model's by up to {difference:.2g} ({LARGEST_DIFFERENCE:g} allowed); it isn't "
            "used"
        )
    return difference


def _record(
    archive: Archive, found: Recognised, model: TrainedModel, difference: float
) -> dict[str, Any]:
    class_map = _class_map(archive.about, found.num_classes)
    known = facts.from_json(archive.about.get("facts"), num_classes=found.num_classes)
    return {
        "source": archive.path.name,
        "source_sha256": archive.sha256,
        "keras_version": archive.keras_version,
        "model_type": found.model_type,
        "hyperparameters": dataclasses.asdict(found.hyperparameters),
        "num_classes": found.num_classes,
        "num_parameters": model.num_parameters,
        "target_length": found.target_length,
        "input_length": found.input_length,
        "dtype": found.dtype,
        "class_names": _class_names(archive.about, class_map, found.num_classes),
        "class_map": class_map,
        "facts": known.as_json(),
        "weights_sha256": assembly.weights_sha256(found.variables),
        "max_abs_difference": difference,
    }


def _class_names(
    about: Mapping[str, Any], class_map: dict[str, int], num_classes: int
) -> list[str]:
    """As the file has them, if it has; else as the user calls these classes."""
    names = about.get("class_names")
    if isinstance(names, list) and len(names) == num_classes and all(map(_is_name, names)):
        return list(names)
    return capmap.class_names(class_map, num_classes)


def _is_name(value: Any) -> bool:
    is_short = isinstance(value, str) and 0 < len(value.strip()) <= MOST_NAME_LENGTH
    return is_short and value.isprintable() and is_text(value)


def _class_map(about: Mapping[str, Any], num_classes: int) -> dict[str, int]:
    """As the file has it, if that can be; {}: classes in files have the model's numbers."""
    given = about.get("class_map")
    if not isinstance(given, dict) or sorted(map(str, given.values())) != sorted(
        map(str, range(num_classes))
    ):
        return {}
    try:
        own = {"etl_params.class_map": given, "shared_params.num_classes": num_classes}
        settings.checked(settings.default_config(), own)
    except SettingsError:
        return {}
    return dict(given)


def _classifier(model: TrainedModel, record: Mapping[str, Any]) -> Classifier:
    return Classifier(
        model,
        record["dtype"],
        list(record["class_names"]),
        dict(record["class_map"]),
        facts.from_json(record["facts"], num_classes=model.num_classes),
    )
