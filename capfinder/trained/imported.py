"""Models from `.keras` files, whoever wrote them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capfinder import capmap
from capfinder.allowed import MOST_NAME_LENGTH, is_text
from capfinder.errors import InputError, SettingsError, StageFailedError
from capfinder.evaluation import facts
from capfinder.exporting import import_check, keras_archive, recognise
from capfinder.exporting.keras_archive import Archive
from capfinder.exporting.keras_graph import UnlikeError
from capfinder.exporting.recognise import Recognised
from capfinder.log import logger, printable
from capfinder.stages import assembly
from capfinder.stages.assembly import TrainedModel
from capfinder.trained import stored
from capfinder.trained.classifier import Classifier

LARGEST_DIFFERENCE = 1e-5  # of a probability, between the Keras model and the imported one


@dataclasses.dataclass(frozen=True)
class Imported:
    """record: as `stored.write` keeps it. remarks: what the file has that the import leaves out."""

    classifier: Classifier
    record: dict[str, Any]
    remarks: list[str]


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
    assembly.configure_jax(stored.config({"dtype": "float64" if archive.is_float64 else "float32"}))
    keras_model = keras_archive.load(archive)
    try:
        found = recognise.recognise(keras_model, learning_rate=archive.learning_rate)
    except UnlikeError as error:
        raise InputError(f"{path}: can't be imported: {error}") from None
    model = _trained_model(path, found)
    difference = _difference(path, keras_model, model, found)
    classifier = _classifier(archive, found, model)
    return Imported(classifier, _record(archive, found, classifier, difference), found.remarks)


def _trained_model(path: Path, found: Recognised) -> TrainedModel:
    try:
        return stored.trained_model(vars(found), found.hyperparameters, found.variables)
    except SettingsError as error:
        raise InputError(f"{path}: can't be imported: {error}") from None


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


def _classifier(archive: Archive, found: Recognised, model: TrainedModel) -> Classifier:
    class_map = _class_map(archive.about, found.num_classes)
    return Classifier(
        model,
        found.dtype,
        _class_names(archive.about, class_map, found.num_classes),
        class_map,
        facts.from_json(archive.about.get("facts"), num_classes=found.num_classes),
    )


def _record(
    archive: Archive, found: Recognised, classifier: Classifier, difference: float
) -> dict[str, Any]:
    return {
        "source": printable(archive.path.name),
        "source_sha256": archive.sha256,
        "keras_version": printable(archive.keras_version),
        "input_length": found.input_length,
        "max_abs_difference": difference,
        **stored.record_of(classifier),
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
    given = {"class_map": about.get("class_map", {}), "num_classes": num_classes}
    try:
        found: dict[str, int] = stored.config(given).etl_params.class_map.to_dict()
    except SettingsError:
        return {}
    return found
