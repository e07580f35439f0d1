"""The order of stages, and what a rerun may skip."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from capfinder import capmap, files, log, models, run_record, settings
from capfinder.errors import InputError, SettingsError
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.run_record import RunRecord

if TYPE_CHECKING:
    from capfinder.data.versions import Dataset
    from capfinder.stages.train import TrainResult
    from capfinder.stages.tune import TuneResult
    from capfinder.tracking import Tracker


@dataclass(frozen=True)
class Context:
    """What every stage of one run shares."""

    config: ConfigDict
    output_dir: Path
    record: RunRecord
    interrupt: Interrupt
    stages: tuple[str, ...]
    class_names: list[str]
    ran: set[str] = field(default_factory=set)  # by this run, not an earlier one

    @contextmanager
    def timed(self, stage: str, done: dict[str, str]) -> Iterator[None]:
        """Logs the stage's start and notes its end, with what `done` then says of it."""
        logger.info("== %s ==", stage)
        started = time.monotonic()
        yield
        self.record.finish_stage(stage, seconds=time.monotonic() - started, **done)
        self.ran.add(stage)

    @contextmanager
    def tracked(self, project: str, stage: str) -> Iterator["Tracker"]:
        from capfinder import tracking

        with tracking.start(
            self.config.tracking_params.mode,
            project=project,
            output_dir=self.output_dir,
            name=f"{self.output_dir.name}_{stage}",
        ) as tracker:
            tracker.log_parameters(settings.flat(settings.to_shown(self.config)))
            yield tracker


def _directory(config: ConfigDict, key: str) -> Path:
    group, name = key.split(".")
    value = config[group][name]
    if value in ("", settings.PLACEHOLDER_DIRECTORY):
        raise SettingsError(f"{key}={value!r}: a placeholder; set it to a directory of yours")
    return Path(value).expanduser().resolve()


def _check_hyperparameters(config: ConfigDict) -> None:
    """What only the architecture can judge: a mistake must not show after hours of ETL."""
    from capfinder.stages import search_check

    model_type, target_length = config.shared_params.model_type, config.shared_params.target_length
    models.parse_hyperparameters(
        model_type, config.model_params.to_dict(), target_length=target_length
    )
    search_check.check(
        config.search_params.to_dict(),
        architecture=models.architecture(model_type),
        model_type=model_type,
        target_length=target_length,
    )


def explain(config: ConfigDict, *, stages: tuple[str, ...]) -> None:
    """--dry_run: checks all that can be checked without writing, and says what would run."""
    config = settings.checked(config)
    output_dir = _directory(config, "shared_params.output_dir")
    caps_data_dir = _directory(config, "etl_params.caps_data_dir")
    _check_hyperparameters(config)
    log.start(None)
    if caps_data_dir.is_dir():
        from capfinder.data import sources

        paths = sources.list_files(caps_data_dir, setting="etl_params.caps_data_dir")
        size = sum(path.stat().st_size for path in paths)
        logger.info("Input: %d CSV files, %.1f MB, in %s", len(paths), size / 1e6, caps_data_dir)
    else:
        logger.warning(
            "Input: %s doesn't exist; the newest dataset in %s would be used, if there is one",
            caps_data_dir,
            output_dir,
        )
    logger.info("Stages: %s", ", ".join(stages))
    logger.info(
        "Model: %s, schedule %s, at most %d trials of %d epochs, then at most %d epochs",
        config.shared_params.model_type,
        config.lr_scheduler_params.type,
        config.tune_params.max_trials,
        config.tune_params.max_epochs_hpt,
        config.train_params.max_epochs_final_model,
    )
    logger.info("Output: %s. Nothing was written (dry run).", output_dir)


def run(config: ConfigDict, *, stages: tuple[str, ...]) -> None:
    """Runs `stages` in order on what is on disk.

    Raises: CapfinderError; StoppedError after a signal."""
    config = settings.checked(config)
    output_dir = _directory(config, "shared_params.output_dir")
    _directory(config, "etl_params.caps_data_dir")
    config.shared_params.output_dir = str(output_dir)  # stages give paths relative to it
    class_names = capmap.class_names(
        config.etl_params.class_map.to_dict(), config.shared_params.num_classes
    )
    run_record.prepare_output_dir(output_dir)
    log.start(output_dir / "logs", debug=config.debug_code)
    log.log_settings(json.dumps(settings.to_shown(config), indent=4))
    started = time.monotonic()
    with Interrupt().installed() as interrupt:
        if stages != ("etl",):
            _check_hyperparameters(config)
        record = run_record.open_record(config, output_dir, class_names)
        context = Context(config, output_dir, record, interrupt, stages, class_names)
        dataset = _etl(context)
        if stages != ("etl",):
            _model_stages(context, dataset)
    _print_summary(context, time.monotonic() - started)


def _model_stages(context: Context, dataset: "Dataset") -> None:
    from capfinder.stages import assembly

    assembly.configure_jax(context.config)
    tuned = _tune(context, dataset)
    if not {"train", "evaluate", "export"} & set(context.stages):
        return
    with run_record.training_lock(context.output_dir):
        _train_and_after(context, dataset, tuned)


def _etl(context: Context) -> "Dataset":
    """The dataset: made or reused by the stage, or the one this directory's run.json names."""
    from capfinder.data import versions

    if "etl" not in context.stages:
        known = context.record.values.get("dataset")
        if known is None:
            raise InputError(
                f"{context.output_dir}: holds no dataset of these settings yet; "
                "run the etl stage first"
            )
        return versions.open_dataset(context.output_dir / known["directory"])
    from capfinder.stages import etl

    done: dict[str, str] = {}
    with context.timed("etl", done):
        result = etl.run(context.config)
        dataset = result.dataset
        done["summary"] = f"dataset {dataset.version}: {result.why}"
        context.record.update(
            dataset={
                "directory": str(dataset.directory.relative_to(context.output_dir)),
                "version": dataset.version,
                "fingerprint": dataset.fingerprint,
                "why": result.why,
            }
        )
    if not result.reused:
        with context.tracked(context.config.etl_params.comet_project_name, "dataset") as tracker:
            _track_dataset(tracker, dataset)
            tracker.log_file(dataset.directory / "manifest.json")
    return dataset


def _track_dataset(tracker: "Tracker", dataset: "Dataset") -> None:
    tracker.log_parameters(
        {"dataset_version": dataset.version, "dataset_fingerprint": dataset.fingerprint}
    )


def _tune(context: Context, dataset: "Dataset") -> "TuneResult":
    from capfinder.stages import tune

    config = context.config
    if "tune" not in context.stages:
        return tune.best(config, dataset=dataset) or tune.without_study(config)
    done: dict[str, str] = {}
    with context.timed("tune", done):
        known = None if config.tune_params.overwrite else tune.best(config, dataset=dataset)
        if config.tune_params.max_trials == 0:
            result = tune.without_study(config)
        elif known is not None and known.num_finished >= config.tune_params.max_trials:
            logger.info("The study already has its %d trials", known.num_finished)
            result = known
        else:
            project = f"{config.tune_params.comet_project_name}_{config.shared_params.model_type}"
            with context.tracked(project, "tuning") as tracker:
                _track_dataset(tracker, dataset)
                result = tune.run(
                    config, dataset=dataset, tracker=tracker, interrupt=context.interrupt
                )
        done["summary"] = result.summary()
        context.record.update(tuning=result.as_record(context.output_dir))
    return result


def _train_and_after(context: Context, dataset: "Dataset", tuned: "TuneResult") -> None:
    from capfinder.evaluation import report
    from capfinder.stages import train

    config, record = context.config, context.record
    training = train.Training(config, dataset=dataset, hyperparameters=tuned.hyperparameters)
    keys = {
        "evaluate": files.fingerprint([training.key, config.evaluate_params.to_dict()]),
        "export": files.fingerprint([training.key, config.export_params.to_dict()]),
    }
    finished = training.is_finished()
    if finished and all(record.is_done(stage, key) for stage, key in keys.items()):
        logger.info("Training, evaluation and export of these settings are already done")
        return
    project = f"{config.train_params.comet_project_name}_{config.shared_params.model_type}"
    with context.tracked(project, "training") as tracker:
        _track_dataset(tracker, dataset)
        trained = _train(context, training, tracker)
        if "evaluate" in context.stages:
            _evaluate(context, dataset, trained, tracker, keys["evaluate"])
        if "export" in context.stages:
            _export(context, dataset, trained, tracker, keys["export"])
        tracker.log_file(report.render(context.output_dir))
        if path := log.file_path():
            tracker.log_file(path)


def _train(context: Context, training: Any, tracker: "Tracker") -> "TrainResult":
    if "train" not in context.stages:
        return training.load()
    done: dict[str, str] = {}
    with context.timed("train", done):
        result = training.run(tracker=tracker, interrupt=context.interrupt)
        done["summary"] = result.summary()
    return result


def _evaluate(
    context: Context, dataset: "Dataset", trained: "TrainResult", tracker: "Tracker", key: str
) -> None:
    from capfinder.stages import evaluate

    done = {"key": key}
    with context.timed("evaluate", done):
        result = evaluate.run(
            context.config,
            dataset=dataset,
            model=trained.model,
            history=trained.history,
            stopped=trained.stopped,
            class_names=context.class_names,
            tracker=tracker,
        )
        done["summary"] = result.summary()


def _export(
    context: Context, dataset: "Dataset", trained: "TrainResult", tracker: "Tracker", key: str
) -> None:
    from capfinder.stages import assembly, export

    done = {"key": key}
    with context.timed("export", done):
        result = export.run(
            context.config,
            model=trained.model,
            signals=assembly.example_signals(dataset, "test"),
            class_names=context.class_names,
        )
        done["summary"] = result.summary()
        context.record.update(exports=result.as_record(context.output_dir))
        for name, path in result.paths.items():
            if path.is_file():
                tracker.log_model(path, name=name)


def _print_summary(context: Context, seconds: float) -> None:
    values, output_dir = context.record.values, context.output_dir
    log.table(
        f"Finished in {log.format_seconds(seconds)}",
        ("stage", "time", "outcome"),
        [
            (
                name,
                log.format_seconds(stage["seconds"]) if name in context.ran else "earlier",
                stage["summary"],
            )
            for name in context.stages
            if (stage := values["stages"].get(name))
        ],
        left=(0, 2),
    )
    paths = {
        "model": next(iter(sorted(output_dir.glob("best_model/classifier/*.keras"))), None),
        "weights": output_dir / "best_model" / "best_model_weights.weights.h5",
        "report": output_dir / "report.html",
        "metrics": output_dir / "evaluation" / "metrics.json",
        "dataset": output_dir / values["dataset"]["directory"],
        "log": log.file_path(),
    }
    for name, path in paths.items():
        if path is not None and path.exists():
            logger.info("%-8s %s", name, path)
