"""`capfinder export`: a trained model, of a run, an import or a `.keras` file, in other formats."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from capfinder import files, log, run_record, settings, trained
from capfinder.data import versions
from capfinder.errors import InputError
from capfinder.etl import preprocess
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.run_record import RunRecord
from capfinder.stages import assembly, export, export_result
from capfinder.trained import Classifier, run_directory

MADE_SIGNALS = 256
SEED = 0


def run(path: Path, *, overrides: Mapping[str, Any], output_dir: Path | None) -> None:
    """Writes the model at `path` to output_dir, or where a run or an import keeps its own files.

    overrides: of export_params, put over a run's own settings or the defaults. A run's run.json is
    told of the files that come to lie in it.
    Raises: InputError for a model or a directory that can't be used; StageFailedError naming a file
    that isn't the model; StoppedError after a signal."""
    if output_dir is None and not path.is_dir():
        if path.exists():
            raise InputError(
                f"--output_dir: must be given, as {path} is no directory of a run or an import"
            )
        raise InputError(f"{path}: no such file or directory")
    home = path if output_dir is None else output_dir
    _make(home)
    with run_record.training_lock(home), Interrupt().installed():
        log.start(home / "logs")
        classifier = trained.load(path)
        is_run = (path / "run.json").is_file()
        config = _config(path if is_run else None, overrides)
        signals = _signals(path if is_run else None, config, classifier)
        record = RunRecord(path) if is_run and output_dir is None else None
        earlier = [] if record is None else record.values.get("exports") or []
        result = export.write(
            home / "best_model" if output_dir is None else home,
            output_dir=home,
            earlier=earlier,
            model=classifier.model,
            signals=signals,
            class_names=classifier.class_names,
            facts=classifier.facts,
            class_map=classifier.class_map,
            formats=config.export_params.formats,
            input_length=config.export_params.input_length,
        )
        if record is not None:
            record.update(exports=export_result.merged(earlier, result, path))
    logger.info("Exported: %s", result.summary())


def _make(home: Path) -> None:
    try:
        (home / "logs").mkdir(parents=True, exist_ok=True)
        for directory in (home, home / "classifier", home / "best_model"):
            files.remove_dead(directory)
        files.remove_dead(home / "best_model" / "classifier")
    except OSError as error:
        raise InputError(f"{home}: can't be written to ({error.strerror})") from None


def _config(run_dir: Path | None, overrides: Mapping[str, Any]) -> ConfigDict:
    """The settings of a run, or else the defaults, with `overrides`."""
    if run_dir is None:
        return settings.checked(settings.default_config(), overrides)
    record = files.read_json(run_dir / "run.json")
    return settings.checked(run_directory.config_of(run_dir, record), overrides)


def _signals(run_dir: Path | None, config: ConfigDict, classifier: Classifier) -> np.ndarray:
    """(n, T, 1) to compare the files on: of the run's test reads while its dataset is there."""
    if run_dir is not None:
        try:
            known = RunRecord(run_dir).values.get("dataset") or {}
            directory = run_record.inside(run_dir, known.get("directory"))
            signals = assembly.example_signals(config, versions.open_dataset(directory), "test")
            logger.info("The files are compared with the model on reads of the run's test set")
            return signals
        except InputError as error:
            logger.debug("no reads of the test set: %s", error)
    logger.info(
        "The files are compared with the model on made-up signals, as no dataset of it is here"
    )
    return made_signals(classifier.model.target_length)


def made_signals(length: int) -> np.ndarray:
    """(MADE_SIGNALS, length, 1) float32, the same every time: steps of random levels with noise,
    as z-scored current has, a quarter to twice as long as `length` before they are fitted to it."""
    rng = np.random.default_rng(SEED)
    signals = []
    for samples in rng.integers(max(length // 4, 1), 2 * length + 1, MADE_SIGNALS):
        levels = np.repeat(rng.normal(0, 0.9, samples // 10 + 1), 10)[:samples]
        signal = np.clip(levels + rng.normal(0, 0.4, samples), -4, 4)
        signals.append(preprocess.fit_length(signal.astype(np.float32), length))
    return np.stack(signals)[..., np.newaxis]
