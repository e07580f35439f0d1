"""How the files of `capfinder predict` and `evaluate` come about: made anew, gone on with, or there
already."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from capfinder import compiled, files, log
from capfinder.errors import InputError, StoppedError
from capfinder.etl import sources
from capfinder.evaluation import metrics
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.prediction import labels, origins, place, result
from capfinder.prediction.place import COMPOSITION, CONFUSION, METRICS
from capfinder.prediction.reads import Step
from capfinder.prediction.scoring import (
    LABEL_DTYPE,
    LABELS,
    LOGITS,
    OUTPUTS,
    PREDICTIONS,
    REJECTS,
    Job,
    Scoring,
    stat_of,
)
from capfinder.prediction.unfinished import METADATA, Unfinished, clear_published
from capfinder.stages import assembly, inference
from capfinder.trained import Classifier

COMPILING = "Compiling the reader of CSV files for this machine (once, some 20 seconds)"
FORMAT = 2  # of the unfinished files: others than this can't be gone on with


@dataclass(frozen=True)
class Asked:
    """What the command line says. class_map: class in the files -> the model's, {} for the same
    numbers, None as in the model's training."""

    model_path: Path
    caps_data_dir: Path
    output_dir: Path
    batch_size: int | None
    evaluates: bool = False
    class_map: Mapping[str, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The files that it makes, beside COMPOSITION."""
        more = (METRICS, CONFUSION) if self.evaluates else ()
        return (PREDICTIONS, REJECTS, *more)


def make(
    asked: Asked, classifier: Classifier, paths: Sequence[Path], interrupt: Interrupt
) -> dict[str, Any]:
    """What composition.json holds, once all files have their names.

    Hold a lock on the output directory."""
    batching = inference.batching(asked.batch_size or classifier.batch_size, mesh=classifier.mesh)
    metadata = sources.metadata_files([asked.caps_data_dir])
    known = _labels(asked, classifier)

    def about() -> dict[str, Any]:
        return _about(asked, classifier, batching, known, [*paths, *metadata])

    begun = about()
    fingerprint = files.fingerprint(begun)
    if earlier := _earlier(asked, fingerprint):
        logger.info(
            "%s has these predictions already, of the same model, input and settings (give another "
            "--output_dir to have them made again)",
            asked.output_dir,
        )
        clear_published(asked.output_dir, begun)
        return earlier
    outputs = (*OUTPUTS, LOGITS, LABELS) if asked.evaluates else OUTPUTS
    with contextlib.closing(Unfinished(asked.output_dir, outputs, about=begun)) as unfinished:
        if not unfinished.is_complete:
            _say_what_is_replaced(asked.output_dir / PREDICTIONS)
            steps = _label_steps(asked, known)
            job = _job(asked, classifier, batching, steps, paths, metadata, unfinished.directory)
            scoring = Scoring(job, unfinished)
            with _saying_that_it_goes_on(scoring):
                composition = _scored(job, unfinished, scoring, interrupt)
                if about() != begun:
                    raise InputError(
                        f"{asked.caps_data_dir}: a file has changed while it was read. Run again "
                        "when all are whole."
                    )
                where = {"model": str(asked.model_path), "caps_data_dir": str(asked.caps_data_dir)}
                if asked.evaluates:
                    _evaluate(job, unfinished, {**where, "class_map": known.as_json()}, composition)
                sizes = {name: unfinished.path(name).stat().st_size for name in asked.names}
                seal = {"outputs": sizes, "fingerprint": fingerprint}
                unfinished.complete({**where, **composition, **seal})
        assert unfinished.state is not None
        place.check(asked.output_dir, asked.names)  # hours may have passed
        place.remove_others(asked.output_dir, asked.names)
        unfinished.publish(asked.names, COMPOSITION, unfinished.state, claim=["outputs"])
        return unfinished.state


def _labels(asked: Asked, classifier: Classifier) -> labels.Labels:
    given = classifier.class_map if asked.class_map is None else asked.class_map
    return labels.parse(given, num_classes=classifier.model.num_classes)


def _label_steps(asked: Asked, known: labels.Labels) -> list[Step]:
    if asked.evaluates:
        return [known.apply]
    return [known.renumber] if known.class_map else []


def _about(
    asked: Asked,
    classifier: Classifier,
    batching: inference.Batching,
    known: labels.Labels,
    paths: Sequence[Path],
) -> dict[str, Any]:
    """All that the outputs depend on; its keys are for `unfinished.difference` to name."""
    model = classifier.model
    of_model = [
        model.model_type,
        assembly.weights_sha256(model.variables),
        dataclasses.asdict(model.hyperparameters),
        model.target_length,
        classifier.dtype,
    ]
    found = {
        "the command": "evaluate" if asked.evaluates else "predict",
        "the version of capfinder": [version("capfinder"), FORMAT],
        "the model": files.fingerprint(of_model),
        "what is known of the model": files.fingerprint(classifier.facts.as_json()),
        "the mapping of cap names": classifier.class_names,
        "the class map": known.as_json(),
        "the batch size": batching.batch_size,
        "the device": [jax.default_backend(), jax.local_device_count()],
        "the input file": {path.name: _identity(path) for path in paths},
    }
    return dict(json.loads(json.dumps(found)))


def _identity(path: Path) -> list[int]:
    """Which tells a change: the kernel sets ctime, where a copying program may set mtime back."""
    stat = stat_of(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _earlier(asked: Asked, fingerprint: str) -> dict[str, Any] | None:
    """What composition.json holds, if it belongs to the files beside it and to this fingerprint."""
    try:
        found = files.read_json(asked.output_dir / COMPOSITION)
        if found["fingerprint"] != fingerprint:
            return None
        for name in asked.names:
            if (asked.output_dir / name).stat().st_size != found["outputs"][name]:
                return None
    except (InputError, OSError, KeyError, TypeError):
        return None
    return dict(found)


def _say_what_is_replaced(path: Path) -> None:
    if path.exists():
        made = datetime.fromtimestamp(path.stat().st_mtime)
        logger.warning(
            "%s of %s is replaced once this is done", path, made.strftime("%d %B %Y, %H:%M")
        )


def _job(
    asked: Asked,
    classifier: Classifier,
    batching: inference.Batching,
    steps: list[Step],
    paths: Sequence[Path],
    metadata: Sequence[Path],
    directory: Path,
) -> Job:
    columns: tuple[str, ...] = ()
    if metadata:
        shutil.rmtree(directory / METADATA, ignore_errors=True)
        (directory / METADATA).mkdir()
        table = origins.load(metadata, directory / METADATA)
        if table is not None:
            steps = [*steps, table.add_to]
            columns = origins.COLUMNS
    dtype = "float64" if classifier.dtype == "float64" else "float32"
    return Job(classifier, paths, batching, steps, columns, dtype if asked.evaluates else "")


@contextlib.contextmanager
def _saying_that_it_goes_on(scoring: Scoring) -> Iterator[None]:
    try:
        yield
    except StoppedError as stopped:
        share = scoring.disk_bytes / max(scoring.total_bytes, 1)
        raise StoppedError(
            f"stopped after {scoring.reads:,} reads, {share:.0%} of the input; the same command "
            "goes on from there",
            stopped.exit_code,
        ) from None


def _scored(
    job: Job, unfinished: Unfinished, scoring: Scoring, interrupt: Interrupt
) -> dict[str, Any]:
    """The outputs are whole then; returns what composition.json says of the reads."""
    _say_what_is_done(job, unfinished, scoring)
    started, before, bytes_before = time.monotonic(), scoring.reads, scoring.disk_bytes
    with interrupt.graceful("stopping"), compiled.announced(lambda: logger.info(COMPILING)):
        scoring.run(interrupt)
    if not scoring.reads:
        unfinished.discard()
        raise InputError(labels.nothing_labelled(scoring.rejects()) or scoring.nothing_usable())
    unfinished.sync()
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info(
        "%s reads in %s: %s reads/s, %.0f MB/s",
        f"{scoring.reads - before:,}",
        log.format_seconds(seconds),
        f"{(scoring.reads - before) / seconds:,.0f}",
        (scoring.disk_bytes - bytes_before) / log.MEGABYTE / seconds,
    )
    classifier = job.classifier
    names = [path.name for path in job.paths]
    return result.compose(names, scoring.tallies, classifier.class_names, classifier.facts)


def _say_what_is_done(job: Job, unfinished: Unfinished, scoring: Scoring) -> None:
    logger.info(
        "%s on %s, %s, in batches of %s reads",
        job.classifier.model.model_type,
        log.counted(len(job.paths), "file"),
        log.format_bytes(scoring.total_bytes),
        f"{job.batching.batch_size:,}",
    )
    if unfinished.state is not None:
        logger.info(
            "Going on where a stopped run was: %s reads, %.0f%% of the input",
            f"{scoring.reads:,}",
            100 * scoring.disk_bytes / max(scoring.total_bytes, 1),
        )
    elif unfinished.why_anew:
        logger.warning("Starting anew and not where a stopped run was: %s", unfinished.why_anew)


def _evaluate(
    job: Job, unfinished: Unfinished, head: Mapping[str, Any], composition: Mapping[str, Any]
) -> None:
    """METRICS and CONFUSION from the logits; they are held in memory for that."""
    classifier = job.classifier
    reads_of = [(part["file"], part["reads"]) for part in composition["files"]]
    logits = unfinished.array(LOGITS, job.logits_dtype)
    found = labels.figures(
        logits.reshape(-1, classifier.model.num_classes),
        unfinished.array(LABELS, LABEL_DTYPE),
        class_names=classifier.class_names,
        files=reads_of,
    )
    own = classifier.facts.test
    values = {
        **head,
        "class_names": classifier.class_names,
        **found,
        "rejects": composition["all"]["rejects"],
        "own_test": own,
        "warnings": composition["warnings"],
    }
    text = metrics.confusion_csv(found["test"]["confusion_matrix"], classifier.class_names)
    files.write_text(unfinished.path(CONFUSION), text)
    files.write_json(unfinished.path(METRICS), values)
