"""A model that lies in a directory by itself: an import, or what a fine-tuning started from.

directory/import.json       what is known of the model, sealed
directory/best/0/           its weights, as a training keeps its own"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capfinder import files, settings
from capfinder.errors import InputError, SettingsError, StageFailedError
from capfinder.evaluation import facts
from capfinder.stages import assembly
from capfinder.stages.assembly import TrainedModel
from capfinder.trained import checks
from capfinder.trained.classifier import Classifier
from capfinder.training.checkpoint import Checkpoints

RECORD = "import.json"
_SETTINGS = {  # of a record
    "model_type": "shared_params.model_type",
    "num_classes": "shared_params.num_classes",
    "target_length": "shared_params.target_length",
    "dtype": "shared_params.dtype",
    "class_map": "etl_params.class_map",
}
_EPOCH = 0  # under which the weights are kept: which one it was isn't known


def is_one(path: Path) -> bool:
    """Whether the directory holds such a model."""
    return (path / RECORD).is_file()


def record_of(classifier: Classifier) -> dict[str, Any]:
    """What `load` needs besides the weights."""
    model = classifier.model
    return {
        "model_type": model.model_type,
        "hyperparameters": dataclasses.asdict(model.hyperparameters),
        "num_classes": model.num_classes,
        "num_parameters": model.num_parameters,
        "target_length": model.target_length,
        "dtype": classifier.dtype,
        "class_names": classifier.class_names,
        "class_map": classifier.class_map,
        "facts": classifier.facts.as_json(),
        "weights_sha256": assembly.weights_sha256(model.variables),
    }


def write(classifier: Classifier, record: Mapping[str, Any], directory: Path) -> None:
    """`directory`, in place of one that is there, appears whole or not at all.

    record: `record_of` the classifier, and what else is to be known of it.
    Raises: StageFailedError when the weights can't be written, else OSError."""
    files.remove_dead(directory.absolute().parent)
    with files.atomic_directory(directory.absolute()) as partial:
        try:
            with Checkpoints(partial) as checkpoints:
                checkpoints.save_best(_EPOCH, classifier.model.variables, {})
        except StageFailedError as error:  # which speaks of a training, and of `partial`
            raise StageFailedError(
                f"{directory}: the weights can't be written ({error.__cause__}). Free or give "
                "access to the disk and run the command again."
            ) from error
        files.write_json(partial / RECORD, files.sealed(record))


def holds(directory: Path, record: Mapping[str, Any]) -> bool:
    """Whether `write` has put there what `record` tells of, and it is whole."""
    try:
        if files.fingerprint(read_record(directory)) != files.fingerprint(record):
            return False
        _weights(directory, record["weights_sha256"])
    except InputError:
        return False
    return True


def load(directory: Path) -> Classifier:
    """A model that `write` has put there; JAX is set up for it.

    Raises: InputError for one that isn't whole, or whose parts don't fit together."""
    record = read_record(directory)
    try:
        known = config({name: record[name] for name in _SETTINGS})
        hyperparameters = checks.hyperparameters(known, record["hyperparameters"])
        class_names = checks.class_names(record["class_names"], known.shared_params.num_classes)
        assembly.configure_jax(known)
        model = assembly.trained_model(
            known,
            hyperparameters,
            _weights(directory, record["weights_sha256"]),
            best_epoch=_EPOCH,
        )
        checks.check_weights(model)
        return Classifier(
            model,
            known.shared_params.dtype,
            class_names,
            known.etl_params.class_map.to_dict(),
            facts.from_json(record["facts"], num_classes=model.num_classes),
        )
    except (KeyError, ValueError, SettingsError) as error:
        raise InputError(
            f"{directory / RECORD}: {error}. Was it written by another version of capfinder? "
            "Import the model again."
        ) from None


def read_record(directory: Path) -> dict[str, Any]:
    """What import.json holds. Raises: InputError when it isn't what was written."""
    path = directory / RECORD
    values = files.read_json(path)
    try:
        return files.unsealed(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}. Import the model again.") from None


def config(values: Mapping[str, Any]) -> ConfigDict:
    """The default settings with those of a model. Raises: SettingsError when they can't be."""
    own = {key: values[name] for name, key in _SETTINGS.items() if name in values}
    return settings.checked(settings.default_config(), own)


def trained_model(
    values: Mapping[str, Any], hyperparameters: Any, variables: dict[str, Any]
) -> TrainedModel:
    """values: with those that `config` takes. Raises: SettingsError when they can't be."""
    return assembly.trained_model(config(values), hyperparameters, variables, best_epoch=_EPOCH)


def _weights(directory: Path, sha256: str) -> dict[str, Any]:
    again = f"Import the model again, into another directory or once {directory} is removed."
    try:
        variables = Checkpoints(directory).restore_variables(_EPOCH)
    except InputError as error:
        raise InputError(f"{directory}: its weights can't be read. {again}") from error
    if assembly.weights_sha256(variables) != sha256:
        raise InputError(f"{directory}: its weights are another model's. {again}")
    return variables
