"""The model that a run has trained, from its output directory."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capfinder import capmap, files, run_record, settings
from capfinder.data.versions import Dataset
from capfinder.errors import InputError, SettingsError
from capfinder.evaluation import facts
from capfinder.evaluation.facts import Facts
from capfinder.stages import assembly
from capfinder.stages.train import Training, read_outcome
from capfinder.trained import checks
from capfinder.trained.classifier import Classifier
from capfinder.training.checkpoint import Checkpoints

AGAIN = "Run the train stage again."


def load(run_dir: Path) -> Classifier:
    """Raises: InputError for anything but a run's directory with a finished training."""
    if not (run_dir / "run.json").is_file():
        raise InputError(
            f"{run_dir}: holds neither run.json nor import.json; expected a run's output "
            "directory, an import, or a .keras file"
        )
    record = files.read_json(run_dir / "run.json")
    config = config_of(run_dir, record)
    evaluated = _evaluated(run_dir)
    outcome_path = _training(run_dir, config, record, evaluated)
    outcome = _outcome(outcome_path)
    assembly.configure_jax(config)
    model = assembly.trained_model(
        config,
        checks.hyperparameters(config, outcome["about"]["hyperparameters"]),
        Checkpoints(outcome_path.parent).restore_variables(outcome["best_epoch"]),
        best_epoch=outcome["best_epoch"],
    )
    class_map = config.etl_params.class_map.to_dict()
    try:
        checks.check_weights(model)
        class_names = _class_names(record, class_map, model.num_classes)
    except ValueError as error:
        raise InputError(f"{run_dir / 'run.json'}: {error}. {AGAIN}") from None
    return Classifier(
        model,
        config.shared_params.dtype,
        class_names,
        class_map,
        _facts(evaluated, outcome, model.num_classes),
        batch_size=config.evaluate_params.batch_size,
        mesh=config.runtime_params.mesh,
    )


def _class_names(record: dict[str, Any], class_map: dict[str, int], num_classes: int) -> list[str]:
    """As the run knew them: here the same numbers may mean other caps.

    Raises: ValueError when what is there isn't so many names."""
    names = record.get("class_names")
    if names is None:
        return capmap.class_names(class_map, num_classes)
    return checks.class_names(names, num_classes)


def config_of(run_dir: Path, record: dict[str, Any]) -> ConfigDict:
    """The run's settings, those it didn't know yet at their default; its directory where it is.

    Compiled programs are read from the user's own directory alone: they are code, and the run may
    be anybody's."""
    own = {"shared_params.output_dir": str(run_dir), "runtime_params.compilation_cache_dir": None}
    if not run_record.is_record(record) or not isinstance(record.get("settings"), dict):
        raise InputError(f"{run_dir / 'run.json'}: isn't a run's record. {AGAIN}")
    try:
        config = settings.to_config(settings.check(record["settings"]))
        return settings.checked(config, own)
    except SettingsError as error:
        raise InputError(
            f"{run_dir / 'run.json'}: {error}. Was it written by another version of capfinder?"
        ) from None


def _evaluated(run_dir: Path) -> dict[str, Any]:
    """metrics.json; {} where there is none."""
    path = run_dir / "evaluation" / "metrics.json"
    values = files.read_json(path) if path.is_file() else {}
    return dict(values) if isinstance(values, dict) else {}


def _facts(evaluated: dict[str, Any], outcome: dict[str, Any], num_classes: int) -> Facts:
    """What the evaluation found, if it was of this training."""
    same = all(
        evaluated.get(name) == value
        for name, value in (
            ("hyperparameters", outcome["about"]["hyperparameters"]),
            ("best_epoch", outcome["best_epoch"]),
            ("history", outcome["history"]),
        )
    )
    return facts.from_metrics(evaluated, num_classes=num_classes) if same else Facts()


def _training(
    run_dir: Path, config: ConfigDict, record: dict[str, Any], evaluated: dict[str, Any]
) -> Path:
    """outcome.json of the training that run.json speaks of: a directory may hold those of several
    settings, and of one setting those of several outcomes of tuning."""
    fingerprint: Any = (record.get("dataset") or {}).get("fingerprint")
    dataset = Dataset(run_dir, "", fingerprint, {})  # its files needn't be here any more
    found = []
    for path in (run_dir / "checkpoints").glob("*/outcome.json"):
        outcome = _outcome(path)
        about = outcome["about"]
        if about["model_type"] != config.shared_params.model_type:
            continue
        try:
            hyperparameters = checks.hyperparameters(config, about["hyperparameters"])
        except SettingsError:
            continue  # they are of another target_length, or of another version
        training = Training(config, dataset=dataset, hyperparameters=hyperparameters)
        # Of fine-tuned ones only how they were asked for: what they started from may be gone.
        start = about.get("start", {"freeze": "nothing"})
        is_fine_tuned = ("start" in about) == (config.train_params.init_from is not None)
        if not is_fine_tuned or start.get("freeze") != config.train_params.freeze:
            continue
        if _agree(about, json.loads(json.dumps(training.about))):
            found.append((path, about["hyperparameters"]))
    if not found:
        raise InputError(
            f"{run_dir}: holds no finished training of the settings in its run.json. "
            f"{_what_to_do(run_dir)}"
        )
    path, _ = max(
        found, key=lambda one: (one[1] == evaluated.get("hyperparameters"), one[0].stat().st_mtime)
    )
    return path


def _what_to_do(run_dir: Path) -> str:
    """Where no training has finished. Results that were set aside lie without their checkpoints."""
    exported = sorted((run_dir / "best_model" / "classifier").glob("[!.]*.keras"))
    if not exported:
        return "Run its train stage first."
    if not (run_dir / "checkpoints").is_dir():
        return f"What was exported of it is there: give that file, {exported[-1]}"
    return (
        "Run its train stage first, or wait for it to end. An exported model is there, which may "
        f"be of an earlier training: to use that, give that file, {exported[-1]}"
    )


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal, but for settings that only one of two versions of capfinder knows."""
    common = one["settings"].keys() & other["settings"].keys()
    is_equal = all(one["settings"][key] == other["settings"][key] for key in common)
    apart: dict[str, Any] = {"settings": None, "start": None}
    return is_equal and one | apart == other | apart


def _outcome(path: Path) -> dict[str, Any]:
    """Raises: InputError when `path` doesn't tell how a training ended, and of what."""
    outcome = read_outcome(path)
    about = {"start": {}, **outcome["about"]}
    parts = {"model_type": str, "hyperparameters": dict, "settings": dict, "start": dict}
    if not all(isinstance(about.get(name), kind) for name, kind in parts.items()):
        raise InputError(f"{path}: doesn't tell of what training it is. {AGAIN}")
    return outcome
