"""A trained model from a path, with all that its input and output need. For now: a run's directory.

Other kinds of models get their function here and their line in `load`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capfinder import capmap, files, models, settings
from capfinder.data.versions import Dataset
from capfinder.errors import InputError, SettingsError
from capfinder.stages import assembly
from capfinder.stages.assembly import TrainedModel
from capfinder.stages.train import Training, read_outcome
from capfinder.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class Classifier:
    """A model, the storage dtype that its signals go through, its classes' names by number, and the
    batch size and number of devices that its own evaluation was told to take (None: the machine's).
    """

    model: TrainedModel
    dtype: str
    class_names: list[str]
    batch_size: int | None
    mesh: int | None


def load(path: Path) -> Classifier:
    """The model that `--model` names; JAX is set up for it.

    Raises: InputError for anything but a run's directory with a finished training."""
    if path.is_dir():
        return _from_run(path)
    found = "is a file" if path.exists() else "no such directory"
    raise InputError(
        f"--model={path}: {found}; expected the output directory of a run that has trained a model"
    )


def _from_run(run_dir: Path) -> Classifier:
    if not (run_dir / "run.json").is_file():
        raise InputError(
            f"--model={run_dir}: holds no run.json; expected the output directory of a run that "
            "has trained a model"
        )
    record = files.read_json(run_dir / "run.json")
    config = _config(run_dir, record)
    outcome_path = _training(run_dir, config, record)
    outcome = read_outcome(outcome_path)
    assembly.configure_jax(config)
    model = assembly.trained_model(
        config,
        _hyperparameters(outcome),
        Checkpoints(outcome_path.parent).restore_variables(outcome["best_epoch"]),
        best_epoch=outcome["best_epoch"],
    )
    class_names = capmap.class_names(config.etl_params.class_map.to_dict(), model.num_classes)
    return Classifier(
        model,
        config.shared_params.dtype,
        class_names,
        batch_size=config.evaluate_params.batch_size,
        mesh=config.runtime_params.mesh,
    )


def _config(run_dir: Path, record: dict[str, Any]) -> ConfigDict:
    """The run's settings, those it didn't know yet at their default; its directory where it is.

    Compiled programs are read from the user's own directory alone: they are code, and the run may
    be anybody's."""
    own = {"shared_params.output_dir": str(run_dir), "runtime_params.compilation_cache_dir": None}
    try:
        config = settings.to_config(settings.check(record["settings"]))
        return settings.checked(config, own)
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{run_dir / 'run.json'}: isn't a run's record. Run the train stage again."
        ) from None
    except SettingsError as error:
        raise InputError(
            f"{run_dir / 'run.json'}: {error}. Was it written by another version of capfinder?"
        ) from None


def _training(run_dir: Path, config: ConfigDict, record: dict[str, Any]) -> Path:
    """outcome.json of the training that run.json speaks of: a directory may hold those of several
    settings, and of one setting those of several outcomes of tuning."""
    fingerprint = record.get("dataset", {}).get("fingerprint")
    dataset = Dataset(run_dir, "", fingerprint, {})  # its files needn't be here any more
    found = []
    for path in (run_dir / "checkpoints").glob("*/outcome.json"):
        outcome = read_outcome(path)
        if outcome["about"]["model_type"] != config.shared_params.model_type:
            continue
        about = outcome["about"]
        training = Training(config, dataset=dataset, hyperparameters=_hyperparameters(outcome))
        if _agree(about, json.loads(json.dumps(training.about))):
            found.append((path, about["hyperparameters"]))
    if not found:
        raise InputError(
            f"--model={run_dir}: holds no finished training of the settings in its run.json. Run "
            "its train stage first."
        )
    metrics_path = run_dir / "evaluation" / "metrics.json"
    evaluated = files.read_json(metrics_path) if metrics_path.is_file() else {}
    path, _ = max(
        found, key=lambda one: (one[1] == evaluated.get("hyperparameters"), one[0].stat().st_mtime)
    )
    return path


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal, but for settings that only one of two versions of capfinder knows."""
    common = one["settings"].keys() & other["settings"].keys()
    is_equal = all(one["settings"][key] == other["settings"][key] for key in common)
    return is_equal and one | {"settings": None} == other | {"settings": None}


def _hyperparameters(outcome: dict[str, Any]) -> Any:
    about = outcome["about"]
    return models.parse_hyperparameters(about["model_type"], about["hyperparameters"])
