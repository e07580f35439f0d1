"""capfinder tune-worker: one more process on the study of a run that was started elsewhere.

Its settings are those that the run has noted in run.json, so it can't search another space. Of the
run's directory it writes the study, the log and Comet's archive; run.json stays as it is."""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capfinder import files, log, run_record, settings, tracking
from capfinder.data import versions
from capfinder.data.versions import Dataset
from capfinder.errors import InputError, SettingsError
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.stages import assembly, tune

STORAGE_VARIABLE = "CAPFINDER_STORAGE"
LOOK_SECONDS = 2.0  # between two looks for a run that hasn't begun
HIDDEN = "***"  # a password, see settings.without_password


class NotYetError(InputError):
    """The run, or its study, isn't there."""


@dataclass(frozen=True)
class Job:
    """The study to work on."""

    config: ConfigDict
    dataset: Dataset

    @property
    def output_dir(self) -> Path:
        return Path(self.config.shared_params.output_dir)


def run(
    run_dir: Path,
    *,
    storage: str | None = None,
    timeout_minutes: float | None = None,
    wait_minutes: float = 0.0,
) -> None:
    """Runs trials of the study until it has max_trials, the time is over or Ctrl-C came.

    storage, timeout_minutes: in place of the run's. wait_minutes: how long the run may take to
    begin its study.
    Raises: InputError when there is no study of the run's settings; StageFailedError as the run's
    own tuning; StoppedError after a signal."""
    overrides = {"tune_params.timeout_minutes": timeout_minutes} if timeout_minutes else {}
    log.start(None)
    with Interrupt().installed() as interrupt:
        job = _awaited(run_dir.expanduser().resolve(), storage, overrides, 60 * wait_minutes)
        log.start(job.output_dir / "logs", debug=job.config.debug_code)
        _work(job, interrupt)


def _work(job: Job, interrupt: Interrupt) -> None:
    config, name = job.config, f"{socket.gethostname()}_{os.getpid()}"
    run_record.keep_secrets(config)
    log.log_settings(json.dumps(settings.to_shown(config), indent=4))
    logger.info("== tune-worker, process %d on %s ==", os.getpid(), socket.gethostname())
    interrupt.say_if_ignored()
    assembly.configure_jax(config)
    tracker = tracking.start(
        config.tracking_params.mode,
        project=f"{config.tune_params.comet_project_name}_{config.shared_params.model_type}",
        output_dir=job.output_dir,
        name=f"{job.output_dir.name}_tuning_{name}",
    )
    ends = interrupt.graceful("this worker ends; its trial is left to the others")
    with tracker, ends, tune.open_study(config, job.dataset) as study:
        tracker.log_parameters(settings.to_shown(config))
        tune.search(config, job.dataset, study, tracker, interrupt)
        logger.info(
            "Study %s: %d of %d trials are finished",
            study.name,
            study.finished(),
            config.tune_params.max_trials,
        )


def _awaited(
    run_dir: Path, storage: str | None, overrides: dict[str, Any], wait_seconds: float
) -> Job:
    deadline, has_said = time.monotonic() + wait_seconds, False
    while True:
        try:
            return _job(run_dir, storage, overrides)
        except NotYetError as error:
            if not wait_seconds:
                raise NotYetError(f"{error}, or give --wait_minutes") from None
            if time.monotonic() >= deadline:
                raise
            if not has_said:
                logger.info("Waiting up to %s: %s", log.format_seconds(wait_seconds), error)
            has_said = True
            time.sleep(LOOK_SECONDS)


def _job(run_dir: Path, storage: str | None, overrides: dict[str, Any]) -> Job:
    """What run.json says of the run. Raises: NotYetError, InputError, SettingsError."""
    path = run_dir / "run.json"
    if not path.exists():
        raise NotYetError(
            f"{run_dir}: has no run.json, so no run has made its dataset there yet. Start the run "
            "first"
        )
    record = files.read_json(path)
    try:
        noted, place = record["settings"], record["dataset"]["directory"]
        asked = storage or _noted_storage(path, noted["tune_params"]["storage"])
    except (KeyError, TypeError):
        raise InputError(f"{path}: isn't the record of a run") from None
    overrides = overrides | {
        "tune_params.overwrite": False,
        "tune_params.storage": asked,
        "shared_params.output_dir": str(run_dir),
    }
    try:
        config = settings.checked(settings.to_config(settings.check(noted)), overrides)
    except SettingsError as error:
        raise InputError(f"{path}: {error}; a worker's capfinder must be the run's") from None
    if config.tune_params.max_trials == 0:
        raise InputError(f"{path}: tune_params.max_trials=0, the run has no tuning")
    if config.train_params.init_from is not None:
        raise InputError(f"{path}: train_params.init_from is set, the run has no tuning")
    job = Job(config, versions.open_dataset(run_record.inside(run_dir, place)))
    _check_study(job)
    return job


def _noted_storage(path: Path, noted: str | None) -> str | None:
    """The run's own; from the environment where run.json hides its password."""
    if noted is None or HIDDEN not in noted:
        return noted
    if given := os.environ.get(STORAGE_VARIABLE):
        return given
    raise InputError(
        f"{path}: holds no passwords; put the whole URL of {noted} into the environment variable "
        f"{STORAGE_VARIABLE}, or give --storage"
    )


def _check_study(job: Job) -> None:
    """Raises: NotYetError when the storage has no study of these settings; it says how the
    nearest one differs."""
    from capfinder.stages import storage, study

    config, url = job.config, job.config.tune_params.storage
    directory = tune.study_directory(config)
    found = storage.studies(directory, url)
    name = study.name_of(config.shared_params.model_type, tune.fingerprint(config, job.dataset))
    if name in found:
        return
    facts, record = tune.facts(config, job.dataset), job.output_dir / "run.json"
    apart = [_differences(facts, others) for others in found.values() if others]
    nearest = min(apart, key=len, default=[])
    differs = f"; the nearest one differs in {', '.join(nearest)}" if nearest else ""
    shown = directory if url is None else settings.without_password(url)
    raise NotYetError(
        f"{shown}: holds no study {name} of the settings in {record}{differs}. "
        "Start the run's tuning first"
    )


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """'batch_size (32 there, 64 here)' for each setting that isn't the same."""
    ours = json.loads(json.dumps(ours))  # as the storage gives it back: lists, no tuples
    return [
        f"{name} ({theirs.get(name)} there, {ours.get(name)} here)"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
