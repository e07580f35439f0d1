"""The order of stages, and what a rerun may skip."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from capfinder import files, log, preparation, run_record, run_summary, settings
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.run_context import Context, Done
from capfinder.run_record import RunRecord

if TYPE_CHECKING:
    from capfinder.data.versions import Dataset
    from capfinder.stages.train import Training, TrainResult
    from capfinder.stages.tune import TuneResult
    from capfinder.tracking import Tracker


def run(config: ConfigDict, *, stages: tuple[str, ...]) -> None:
    """Runs `stages` in order on what is on disk.

    Raises: CapfinderError; StoppedError after a signal."""
    config = preparation.prepared(config)
    run_record.keep_secrets(config)
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
                start = preparation.start(config)
                train.train_along(config, start=start, interrupt=interrupt)


def _run(config: ConfigDict, stages: tuple[str, ...], interrupt: Interrupt) -> None:
    """All that one process alone does, and the main one of several."""
    from capfinder import tracking

    output_dir = Path(config.shared_params.output_dir)
    class_names = preparation.class_names(config)
    run_record.prepare_output_dir(output_dir)
    log.start(output_dir / "logs", debug=config.debug_code)
    log.log_settings(json.dumps(settings.to_shown(config), indent=4))
    interrupt.say_if_ignored()
    started = time.monotonic()
    tracking.check(config.tracking_params.mode)
    if stages != ("etl",):
        preparation.check_model_settings(config)
    preparation.say_what_is_unused(config)
    record = RunRecord(output_dir)
    context = Context(config, output_dir, record, interrupt, stages, class_names)
    if stages != ("etl",):
        preparation.check_devices(config)
        context.start = preparation.start(config, keep=True)
    dataset = _etl(context)
    if stages != ("etl",):
        _model_stages(context, dataset)
    run_summary.show(
        record,
        seconds=time.monotonic() - started,
        asked=stages,
        ran=context.ran,
        skipped=context.skipped,
        interrupted=context.interrupted,
        set_aside=context.set_aside,
    )


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
    if "etl" not in context.stages:
        known = context.record.dataset_for(config)
        directory = run_record.inside(context.output_dir, known.get("directory"))
        dataset = versions.open_dataset(directory)
        _begin(context, dataset, known)
        return dataset
    done = Done()
    with context.timed("etl", done):
        result = etl.run(config)
        dataset = result.dataset
        done.summary, done.why = f"dataset {dataset.version}", result.why
        done.is_reused = result.reused
        facts = {
            "directory": str(dataset.directory.relative_to(context.output_dir)),
            "version": dataset.version,
            "fingerprint": dataset.fingerprint,
            "why": result.why,
            "asked": run_record.dataset_key(config),
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
    if not {"tune", "train"} & set(context.stages) and context.stages != ("etl",):
        _check_trained(context, dataset)
    context.set_aside = context.record.begin(
        run_record.results_key(context.config, dataset.fingerprint),
        settings=settings.to_shown(context.config),
        seed=context.config.tune_params.seed,
        class_names=context.class_names,
        dataset=facts,
    )
    context.interrupted = dict(context.record.values.get("interrupted") or {})


def _check_trained(context: Context, dataset: "Dataset") -> None:
    """Stages that find nothing to work on mustn't set aside what is there.

    Raises: as `Training.load`."""
    from capfinder.stages import assembly, train

    assembly.configure_jax(context.config)
    hyperparameters = _known(context, dataset).hyperparameters
    train.Training(
        context.config, dataset=dataset, hyperparameters=hyperparameters, start=context.start
    ).load()


def _track_dataset(tracker: "Tracker", dataset: "Dataset") -> None:
    tracker.log_parameters(
        {"dataset_version": dataset.version, "dataset_fingerprint": dataset.fingerprint}
    )


def _tune(context: Context, dataset: "Dataset") -> "TuneResult":
    from capfinder.stages import tune

    config, asked = context.config, context.config.tune_params.max_trials
    if why := preparation.why_not_tuned(context.config):
        _skip_tuning(context, why)
        return _known(context, dataset)
    if "tune" not in context.stages:
        result = _known(context, dataset)
        was_interrupted = (context.record.values.get("tuning") or {}).get("interrupted", False)
        _note_tuning(context, result, was_interrupted)
        return result
    done = Done()
    with context.timed("tune", done):
        known = None if config.tune_params.overwrite else tune.best(config, dataset=dataset)
        if known is not None and known.num_finished >= asked:
            trials = log.counted(known.num_finished, "trial")
            logger.info("The study already has its %s", trials)
            result, done.is_reused = known, True
            done.why = f"reused: the study of these settings has its {trials}"
        else:
            project = f"{config.tune_params.comet_project_name}_{config.shared_params.model_type}"
            with context.tracked(project, "tuning") as tracker:
                _track_dataset(tracker, dataset)
                result = tune.run(
                    config, dataset=dataset, tracker=tracker, interrupt=context.interrupt
                )
            there = 0 if known is None else known.num_finished
            done.why = "new: no finished trial of these settings was there"
            if config.tune_params.overwrite:
                done.why = "new, as tune_params.overwrite asks for"
            elif there:
                done.why = f"went on: {there} of {asked} trials were there"
        done.summary = result.summary()
        context.record.update(tuning=result.as_record(context.output_dir))
    _note_tuning(context, result, result.interrupted)
    return result


def _known(context: Context, dataset: "Dataset") -> "TuneResult":
    """What is trained when nothing is tuned, or nothing more."""
    from capfinder.stages import tune

    if context.start is not None:
        return tune.TuneResult(context.start.hyperparameters, "init_from")
    config = context.config
    best = None if preparation.why_not_tuned(config) else tune.best(config, dataset=dataset)
    return best or tune.without_study(config)


def _skip_tuning(context: Context, why: str) -> None:
    context.skipped["tune"] = why
    if "tune" in context.stages:
        context.record.update(tuning=None)
    context.note_interrupted("tune", None)


def _note_tuning(context: Context, result: "TuneResult", was_interrupted: bool) -> None:
    asked, finished = context.config.tune_params.max_trials, result.num_finished
    reached = {"trials": finished, "max_trials": asked}
    context.note_interrupted("tune", reached if was_interrupted and finished < asked else None)


def _train_and_after(context: Context, dataset: "Dataset", tuned: "TuneResult") -> None:
    from capfinder.stages import train

    config, output_dir = context.config, context.output_dir
    for name in (".", "evaluation", "best_model", "best_model/classifier"):
        files.remove_partial(output_dir / name)
    training = train.Training(
        config, dataset=dataset, hyperparameters=tuned.hyperparameters, start=context.start
    )
    finished = training.load() if training.is_finished() else None
    if finished is not None:
        context.note_interrupted("train", None)
        if not _left_to_do(context, finished) and _is_reported(context):
            logger.info("Training, evaluation and export of these settings are already done")
            return
    project = f"{config.train_params.comet_project_name}_{config.shared_params.model_type}"
    with context.tracked(project, "training") as tracker:
        _track_dataset(tracker, dataset)
        trained = _train(context, training, finished, tracker)
        left = _left_to_do(context, trained)
        if "evaluate" in left:
            _evaluate(context, dataset, trained, tracker, left["evaluate"])
        if "export" in left:
            _export(context, dataset, trained, tracker, left["export"])
        from capfinder.evaluation import report  # after the first step, which it would put off

        tracker.log_file(report.render(output_dir))
        context.record.update(reported=_reported(context))
        if path := log.file_path():
            tracker.log_file(path)


def _reported(context: Context) -> list[Any]:
    """What report.html tells of: the keys of the evaluation and the export."""
    return [context.record.stage(stage).get("key") for stage in ("evaluate", "export")]


def _is_reported(context: Context) -> bool:
    """report.html tells of what there is, or no stage that it tells of was asked for."""
    if not {"evaluate", "export"} & set(context.stages):
        return True
    is_current = context.record.values.get("reported") == _reported(context)
    return is_current and (context.output_dir / "report.html").exists()


def _left_to_do(context: Context, trained: "TrainResult") -> dict[str, Done]:
    """The stages asked for whose output isn't there for this very training: their keys, and why
    what is there won't do."""
    from capfinder.exporting.record import missing

    config, output_dir, record = context.config, context.output_dir, context.record
    evaluated = ("evaluation/metrics.json", "evaluation/predictions_test.csv")
    absent = {
        "evaluate": [name for name in evaluated if not (output_dir / name).exists()],
        "export": missing(
            record.values.get("exports") or [],
            config.export_params.formats,
            input_length=config.export_params.input_length or config.shared_params.target_length,
            output_dir=output_dir,
        ),
    }
    # Exported files are told the figures of the evaluation.
    is_evaluated = "evaluate" in context.stages or _is_evaluated(context, trained)
    keys = {
        "evaluate": _evaluation_key(context, trained),
        "export": _key(
            trained,
            {
                "names of the caps": context.class_names,
                "formats or lengths": config.export_params.to_dict(),
                "figures of the evaluation": is_evaluated,
            },
        ),
    }
    left = {}
    for stage in (name for name in keys if name in context.stages):
        key, noted = keys[stage], record.stage(stage)
        if not noted:
            left[stage] = Done(key=key, why="new: it wasn't done before")
        elif noted.get("key") != key:
            earlier = noted["key"] if isinstance(noted.get("key"), dict) else {}
            others = [part for part in key if earlier.get(part) != key[part]]
            left[stage] = Done(key=key, why=f"anew: not the same {', '.join(others)} as before")
        elif absent[stage]:
            left[stage] = Done(key=key, why=f"anew: {', '.join(absent[stage])} was missing")
    return left


def _evaluation_key(context: Context, trained: "TrainResult") -> dict[str, str]:
    return _key(
        trained, {"names of the caps": context.class_names, "early end": context.interrupted}
    )


def _key(trained: "TrainResult", others: dict[str, Any]) -> dict[str, str]:
    """What a stage's output depends on, by what to call it."""
    parts = {"training": trained.key, **others}
    return {name: files.fingerprint(value) for name, value in parts.items()}


def _is_evaluated(context: Context, trained: "TrainResult") -> bool:
    """metrics.json is of this very training."""
    return context.record.stage("evaluate").get("key") == _evaluation_key(context, trained)


def _train(
    context: Context, training: "Training", finished: "TrainResult | None", tracker: "Tracker"
) -> "TrainResult":
    """finished: what the training gave, if it has run to its end before."""
    done = Done(is_reused=finished is not None)
    if "train" in context.stages:
        with context.timed("train", done):
            result = training.run(tracker=tracker, interrupt=context.interrupt)
            done.summary, done.why = result.summary(), result.why
            if context.start is not None:
                done.why += f"; {context.start.sentence()}"
    else:
        result = finished or training.load()
    max_epochs = context.config.train_params.max_epochs_final_model
    reached = {"epochs": len(result.history), "max_epochs": max_epochs}
    context.note_interrupted("train", reached if result.stopped == "interrupted" else None)
    return result


def _evaluate(
    context: Context, dataset: "Dataset", trained: "TrainResult", tracker: "Tracker", done: Done
) -> None:
    from capfinder.stages import evaluate

    with context.timed("evaluate", done):
        result = evaluate.run(
            context.config,
            dataset=dataset,
            model=trained.model,
            history=trained.history,
            stopped=trained.stopped,
            interrupted=context.interrupted,
            init_from=None if context.start is None else context.start.as_record(),
            class_names=context.class_names,
            tracker=tracker,
        )
        done.summary = result.summary()


def _export(
    context: Context, dataset: "Dataset", trained: "TrainResult", tracker: "Tracker", done: Done
) -> None:
    from capfinder.evaluation import facts
    from capfinder.stages import assembly, export, export_result

    metrics = context.output_dir / "evaluation" / "metrics.json"
    is_known = _is_evaluated(context, trained) and metrics.exists()
    known = files.read_json(metrics) if is_known else {}
    earlier = context.record.values.get("exports") or []
    with context.timed("export", done):
        result = export.run(
            context.config,
            model=trained.model,
            signals=assembly.example_signals(context.config, dataset, "test"),
            class_names=context.class_names,
            facts=facts.from_metrics(known, num_classes=trained.model.num_classes),
            class_map=context.config.etl_params.class_map.to_dict(),
            earlier=earlier,
        )
        done.summary = result.summary()
        if result.classifier_reused:
            done.why += "; the .keras file is of this very model and was kept"
        exports = export_result.merged(earlier, result, context.output_dir)
        context.record.update(exports=exports)
        for name, path in result.paths.items():
            tracker.log_model(path, name=name)
