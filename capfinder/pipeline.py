"""The order of stages, and what a rerun may skip."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from capfinder import capmap, files, log, preparation, run_record, settings
from capfinder.errors import InputError
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.run_record import RunRecord

if TYPE_CHECKING:
    from capfinder.data.versions import Dataset
    from capfinder.stages.train import Training, TrainResult
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
            tracker.log_parameters(settings.to_shown(self.config))
            yield tracker


def run(config: ConfigDict, *, stages: tuple[str, ...]) -> None:
    """Runs `stages` in order on what is on disk.

    Raises: CapfinderError; StoppedError after a signal."""
    config = preparation.prepared(config)
    runtime = config.runtime_params
    with Interrupt().installed() as interrupt:
        if not runtime.distributed:
            _run(config, stages, interrupt)
            return
        from capfinder.stages import assembly, train
        from capfinder.training import hosts

        assembly.configure_jax(config)
        with hosts.joined(runtime.coordinator_address, runtime.num_processes, runtime.process_id):
            if hosts.is_main():
                _run(config, stages, interrupt)
                hosts.tell("end")
            else:
                log.start(None, beside=True)
                train.train_along(config, interrupt=interrupt)


def _run(config: ConfigDict, stages: tuple[str, ...], interrupt: Interrupt) -> None:
    """All that one process alone does, and the main one of several."""
    from capfinder import tracking

    output_dir = Path(config.shared_params.output_dir)
    class_names = capmap.class_names(
        config.etl_params.class_map.to_dict(), config.shared_params.num_classes
    )
    run_record.prepare_output_dir(output_dir)
    log.start(output_dir / "logs", debug=config.debug_code)
    log.log_settings(json.dumps(settings.to_shown(config), indent=4))
    started = time.monotonic()
    tracking.check(config.tracking_params.mode)
    if stages != ("etl",):
        preparation.check_hyperparameters(config)
    record = RunRecord(output_dir)
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
    from capfinder.stages import etl

    config = context.config
    asked = run_record.dataset_key(config)
    if "etl" not in context.stages:
        known = context.record.values.get("dataset", {})
        if known.get("asked") != asked:
            raise InputError(
                f"{context.output_dir}: holds no dataset of these settings yet; "
                "run the etl stage first"
            )
        dataset = versions.open_dataset(context.output_dir / known["directory"])
        _begin(context, dataset, known)
        return dataset
    done: dict[str, str] = {}
    with context.timed("etl", done):
        result = etl.run(config)
        dataset = result.dataset
        done["summary"] = f"dataset {dataset.version}: {result.why}"
        facts = {
            "directory": str(dataset.directory.relative_to(context.output_dir)),
            "version": dataset.version,
            "fingerprint": dataset.fingerprint,
            "why": result.why,
            "asked": asked,
        }
        _begin(context, dataset, facts)
    if result.is_unpublished:
        _publish(context, dataset)
    return dataset


def _publish(context: Context, dataset: "Dataset") -> None:
    """Logs a new version, and sends it to Comet when that is possible."""
    from capfinder.stages import etl, remote

    config = context.config
    with context.tracked(config.etl_params.comet_project_name, "dataset") as tracker:
        _track_dataset(tracker, dataset)
        tracker.log_file(dataset.directory / "manifest.json")
        root = etl.versions_root(config)
        comet = remote.connect(config, root)
        label = None if comet is None else comet.upload(dataset, tracker)
        if label:
            context.record.update(dataset=context.record.values["dataset"] | {"artifact": label})
        if comet is None or label is not None:  # else a later run tries again
            etl.unpublished(root).unlink(missing_ok=True)


def _begin(context: Context, dataset: "Dataset", facts: dict[str, Any]) -> None:
    context.record.begin(
        run_record.results_key(context.config, dataset.fingerprint),
        settings=settings.to_shown(context.config),
        seed=context.config.tune_params.seed,
        class_names=context.class_names,
        dataset=facts,
    )


def _track_dataset(tracker: "Tracker", dataset: "Dataset") -> None:
    tracker.log_parameters(
        {"dataset_version": dataset.version, "dataset_fingerprint": dataset.fingerprint}
    )


def _tune(context: Context, dataset: "Dataset") -> "TuneResult":
    from capfinder.stages import tune

    config = context.config
    if config.tune_params.max_trials == 0:
        if "tune" in context.stages:
            context.record.update(tuning=None)
        return tune.without_study(config)
    if "tune" not in context.stages:
        return tune.best(config, dataset=dataset) or tune.without_study(config)
    done: dict[str, str] = {}
    with context.timed("tune", done):
        known = None if config.tune_params.overwrite else tune.best(config, dataset=dataset)
        if known is not None and known.num_finished >= config.tune_params.max_trials:
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
    from capfinder.stages import train

    config, output_dir = context.config, context.output_dir
    for name in (".", "evaluation", "best_model", "best_model/classifier"):
        files.remove_partial(output_dir / name)
    training = train.Training(config, dataset=dataset, hyperparameters=tuned.hyperparameters)
    if training.is_finished() and not _left_to_do(context, training.load()):
        logger.info("Training, evaluation and export of these settings are already done")
        return
    project = f"{config.train_params.comet_project_name}_{config.shared_params.model_type}"
    with context.tracked(project, "training") as tracker:
        _track_dataset(tracker, dataset)
        trained = _train(context, training, tracker)
        left = _left_to_do(context, trained)
        if "evaluate" in left:
            _evaluate(context, dataset, trained, tracker, left["evaluate"])
        if "export" in left:
            _export(context, dataset, trained, tracker, left["export"])
        from capfinder.evaluation import report  # after the first step, which it would put off

        tracker.log_file(report.render(output_dir))
        if path := log.file_path():
            tracker.log_file(path)


def _left_to_do(context: Context, trained: "TrainResult") -> dict[str, str]:
    """The stages asked for whose output isn't there for this very training, with their keys."""
    config, output_dir, values = context.config, context.output_dir, context.record.values
    evaluation = output_dir / "evaluation"
    outputs = {
        "evaluate": [evaluation / "metrics.json", evaluation / "predictions_test.csv"],
        "export": [output_dir / row["path"] for row in values.get("exports", [])],
    }
    keys = {
        "evaluate": files.fingerprint([trained.key, context.class_names]),
        "export": files.fingerprint(
            [trained.key, context.class_names, config.export_params.formats]
        ),
    }
    left = {
        stage: keys[stage]
        for stage, paths in outputs.items()
        if stage in context.stages and not context.record.is_done(stage, keys[stage], paths)
    }
    if not (output_dir / "report.html").exists() and "evaluate" in context.stages:
        left["evaluate"] = keys["evaluate"]
    return left


def _train(context: Context, training: "Training", tracker: "Tracker") -> "TrainResult":
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
            signals=assembly.example_signals(context.config, dataset, "test"),
            class_names=context.class_names,
        )
        done["summary"] = result.summary()
        context.record.update(exports=result.as_record(context.output_dir))
        for name, path in result.paths.items():
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
