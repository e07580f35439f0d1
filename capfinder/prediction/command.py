"""`capfinder predict` and `capfinder evaluate`: a model, a directory of CSV files, an output
directory. One may be stopped at any time, and run again."""

from collections.abc import Mapping
from pathlib import Path

from capfinder import files, log, run_record, trained
from capfinder.allowed import MOST
from capfinder.errors import InputError
from capfinder.etl import sources
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.prediction import labels, making, place, reads, result
from capfinder.prediction.making import Asked
from capfinder.prediction.place import COMPOSITION, LOGS, METRICS

LOCK = ".predict.lock"


def run(
    model_path: Path, *, caps_data_dir: Path, output_dir: Path, batch_size: int | None = None
) -> None:
    """Writes output_dir/predictions.csv, rejects.csv and composition.json, each whole or not at
    all. What a stopped run has left is gone on from; a result of the same input is left as it is.

    batch_size: None for the one that the model's run was given, else the machine's.
    Raises: InputError for a model, a directory or a file that can't be used, or when no read can;
    StoppedError after a signal."""
    _run(Asked(model_path, caps_data_dir, output_dir, batch_size))


def evaluate(
    model_path: Path,
    *,
    caps_data_dir: Path,
    output_dir: Path,
    batch_size: int | None = None,
    class_map: Mapping[str, int] | None = None,
) -> None:
    """As `run`, of the reads with a label that the model has; the others are rejects. Writes
    metrics.json and confusion_matrix.csv besides.

    class_map: class in the files -> the model's; {}: they are the same; None: as in its training.
    Raises: as `run`; InputError when no read has such a label."""
    asked = Asked(model_path, caps_data_dir, output_dir, batch_size, True, class_map)
    _run(asked)


def _run(asked: Asked) -> None:
    if asked.batch_size is not None and not 1 <= asked.batch_size <= MOST:
        raise InputError(f"--batch_size={asked.batch_size}: must be from 1 to {MOST}")
    place.check(asked.output_dir, asked.names)
    paths = sources.list_files(asked.caps_data_dir, setting="--caps_data_dir")
    reads.check_headers(paths)
    _prepare(asked)
    holder = f"capfinder {'evaluate' if asked.evaluates else 'predict'}"
    lock = asked.output_dir / LOCK
    with files.exclusive_lock(lock, holder=holder, setting="--output_dir"):
        log.start(asked.output_dir / LOGS)
        with Interrupt().installed() as interrupt:
            classifier = trained.load(asked.model_path)
            found = making.make(asked, classifier, paths, interrupt)
    result.show(found)
    if asked.evaluates:
        figures = files.read_json(asked.output_dir / METRICS)
        labels.show(figures, classifier.class_names, classifier.facts.test)
    for name in (*asked.names, COMPOSITION):
        logger.info("%-16s %s", name.partition(".")[0], asked.output_dir / name)


def _prepare(asked: Asked) -> None:
    output_dir = asked.output_dir
    if output_dir.resolve() == asked.caps_data_dir.resolve():
        raise InputError(
            f"--output_dir={output_dir}: is --caps_data_dir, where every CSV file is input; choose "
            "another"
        )
    run_record.prepare_output_dir(output_dir, setting="--output_dir")
