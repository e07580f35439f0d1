"""`capfinder export`: a trained model, of a run, an import or a `.keras` file, in other formats."""

import contextlib
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
from capfinder.trained import Classifier, run_directory, stored

MADE_SIGNALS = 256
SEED = 0
FORMATS = "export_params.formats"


def run(path: Path, *, overrides: Mapping[str, Any], output_dir: Path | None) -> None:
    """Writes the model at `path` to output_dir, or where a run or an import keeps its own files.

    overrides: of export_params, put over a run's own settings or the defaults. A run's run.json is
    told of the files that come to lie in it.
    Raises: InputError for a model or a directory that can't be used; StageFailedError naming a file
    that isn't the model; StoppedError after a signal."""
    _check_is_model(path)
    if output_dir is None and not path.is_dir():
        raise InputError(
            f"--output_dir: must be given, as {path} is no directory of a run or an import"
        )
    is_run = (path / "run.json").is_file()
    config = _config(path if is_run else None, overrides)
    home = path if output_dir is None else output_dir
    _make(home)
    with run_record.training_lock(home), Interrupt().installed():
        log.start(home / "logs")
        classifier = trained.load(path)
        signals = _signals(path if is_run else None, config, classifier)
        record = RunRecord(path) if is_run and output_dir is None else None
        noted = export_result.noted(home) if record is None else record.values.get("exports")
        earlier = noted or []
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
            option="--formats ",
            source=None if path.is_dir() else path,
        )
        rows = export_result.merged(earlier, result, home)
        if record is None:
            export_result.note(home, rows)
        else:
            record.update(exports=rows)
    logger.info("Exported: %s", result.summary())
    for name, written in result.paths.items():
        logger.info("%-16s %s", name, written)


def _check_is_model(path: Path) -> None:
    """Before anything is made: a mistyped directory gets no logs."""
    with contextlib.suppress(OSError):  # a name that is too long, say
        if path.suffix == ".keras" and path.is_file():
            return
        if any((path / name).is_file() for name in ("run.json", stored.RECORD)):
            return
    trained.load(path)  # raises, and says what was expected


def _make(home: Path) -> None:
    try:
        (home / "logs").mkdir(parents=True, exist_ok=True)
        for directory in (home, home / "classifier", home / "best_model"):
            files.remove_dead(directory)
        files.remove_dead(home / "best_model" / "classifier")
    except OSError as error:
        raise InputError(f"{home}: can't be written to ({error.strerror})") from None


def _config(run_dir: Path | None, overrides: Mapping[str, Any]) -> ConfigDict:
    """The settings of a run, or else the defaults, with `overrides`.

    Raises: InputError where they name no format."""
    config = settings.default_config()
    if run_dir is not None:
        config = run_directory.config_of(run_dir, files.read_json(run_dir / "run.json"))
    config = settings.checked(config, overrides)
    if not config.export_params.formats:
        where = "--formats" if FORMATS in overrides else f"{run_dir}: its {FORMATS}"
        some = ",".join(settings.EXPORT_FORMATS)
        raise InputError(f"{where} names no format; give --formats some of {some}")
    return config


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
