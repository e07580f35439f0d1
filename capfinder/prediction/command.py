"""`capfinder predict`: reads, batches, predictions, each while the next ones are being made."""

import contextlib
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from capfinder import compiled, files, log
from capfinder.errors import InputError, StoppedError
from capfinder.etl import sources
from capfinder.etl.csv_reader import Reject
from capfinder.evaluation import metrics, predictions
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.prediction import loading, reads
from capfinder.prediction.loading import Classifier
from capfinder.prediction.reads import Reads
from capfinder.prediction.tally import Tally
from capfinder.stages import inference

PREDICTIONS, REJECTS = "predictions.csv", "rejects.csv"
COMPILING = "Compiling the reader of CSV files for this machine (once, some 20 seconds)"
NO_NUMBER = "the model gives no number"


def run(
    model_path: Path, *, caps_data_dir: Path, output_dir: Path, batch_size: int | None = None
) -> Tally:
    """Writes output_dir/predictions.csv and rejects.csv, both whole or not at all.

    batch_size: None for the one that the model's run was given, else the machine's.
    Raises: InputError for a model, a directory or a file that can't be used, or when no read can;
    StoppedError after a signal."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch_size={batch_size}: must be at least 1")
    paths = sources.list_files(caps_data_dir, setting="--caps_data_dir")
    reads.check_headers(paths)
    total = sum(path.stat().st_size for path in paths)
    _prepare(output_dir, caps_data_dir)
    log.start(output_dir / "logs")
    tally = Tally()
    try:
        with Interrupt().installed() as interrupt:
            classifier = loading.load(model_path)
            batching = inference.batching(batch_size or classifier.batch_size, mesh=classifier.mesh)
            logger.info(
                "%s of %s on %d files, %s, in batches of %s reads",
                classifier.model.model_type,
                model_path,
                len(paths),
                log.format_bytes(total),
                f"{batching.batch_size:,}",
            )
            _say_what_is_replaced(output_dir / PREDICTIONS)
            with interrupt.graceful("stopping"):
                _predict(classifier, paths, output_dir, batching, total, tally, interrupt)
    except StoppedError as stopped:
        raise StoppedError(_stopped_text(tally, total), stopped.exit_code) from None
    tally.show(classifier.class_names)
    for name in (PREDICTIONS, REJECTS):
        logger.info("%-12s %s", name.removesuffix(".csv"), output_dir / name)
    return tally


def _prepare(output_dir: Path, caps_data_dir: Path) -> None:
    if output_dir.resolve() == caps_data_dir.resolve():
        raise InputError(
            f"--output_dir={output_dir}: is --caps_data_dir, where every CSV file is input; choose "
            "another"
        )
    try:
        (output_dir / "logs").mkdir(parents=True, exist_ok=True)
        files.remove_dead(output_dir)
    except OSError as error:
        raise InputError(
            f"--output_dir={output_dir}: can't be written to ({error.strerror})"
        ) from None


def _say_what_is_replaced(path: Path) -> None:
    if path.exists():
        made = datetime.fromtimestamp(path.stat().st_mtime)
        logger.warning(
            "%s of %s is replaced once this is done", path, made.strftime("%d %B %Y, %H:%M")
        )


def _stopped_text(tally: Tally, total: int) -> str:
    share = tally.disk_bytes / max(total, 1)
    return (
        f"stopped after {tally.reads:,} reads, {share:.0%} of the input; no predictions were "
        "written. The same command starts from the beginning."
    )


def _predict(
    classifier: Classifier,
    paths: Sequence[Path],
    output_dir: Path,
    batching: inference.Batching,
    total: int,
    tally: Tally,
    interrupt: Interrupt,
) -> None:
    """Everything between the first byte read and both files under their names."""
    model = classifier.model
    started = time.monotonic()
    with (
        compiled.announced(lambda: logger.info(COMPILING)),
        files.atomic_path(output_dir / PREDICTIONS) as predictions_path,
        files.atomic_path(output_dir / REJECTS) as rejects_path,
        predictions_path.open("wb") as stream,
        _Rejects(rejects_path, paths, tally) as rejects,
        contextlib.closing(
            reads.read(paths, target_length=model.target_length, dtype=classifier.dtype)
        ) as parsed,
        log.progress_bytes("Predicting", total=total) as bar,
    ):
        stream.write(predictions.header(model.num_classes))

        def advance(block: Reads) -> None:
            if interrupt.requested:
                raise StoppedError("stopped by Ctrl-C", 130)
            tally.disk_bytes += block.disk_bytes
            bar.advance(block.disk_bytes)

        def parts() -> Iterator[tuple[np.ndarray, Reads]]:
            """Rejects go to their file at once: a block waits here until its batch is full."""
            for block in parsed:
                rejects.add(block.file, block.rejects)
                if len(block.lines):
                    yield block.signals, replace(block, rejects=[])
                else:
                    advance(block)

        for logits, block in inference.predict(model, parts(), batching):
            logits, scored = _with_numbers(logits, block)
            rejects.add(scored.file, scored.rejects)
            _write(stream, logits, scored, classifier.class_names, tally)
            advance(block)
        if not tally.reads:
            raise InputError(rejects.nothing_usable())
    tally.seconds = time.monotonic() - started


def _with_numbers(logits: np.ndarray, block: Reads) -> tuple[np.ndarray, Reads]:
    """Without the reads on which the model overflows: they become rejects."""
    is_number = np.isfinite(logits).all(axis=1)
    if is_number.all():
        return logits, block
    problems = dict.fromkeys(np.flatnonzero(~is_number).tolist(), NO_NUMBER)
    return logits[is_number], reads.without(block, problems)


def _write(
    stream: BinaryIO, logits: np.ndarray, block: Reads, class_names: list[str], tally: Tally
) -> None:
    if not len(logits):
        return
    probabilities = metrics.softmax(logits)
    stream.write(predictions.lines(block.read_ids, block.labels, probabilities, class_names))
    tally.add(probabilities)


class _Rejects:
    """rejects.csv, written as they come: file, line, read_id, reason."""

    def __init__(self, path: Path, paths: Sequence[Path], tally: Tally) -> None:
        self._stream = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._stream, lineterminator="\n")
        self._writer.writerow(("file", "line", "read_id", "reason"))
        self._paths, self._tally = paths, tally
        self._first = ""

    def __enter__(self) -> "_Rejects":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def add(self, file: int, rejects: Sequence[Reject]) -> None:
        name = self._paths[file].name
        self._writer.writerows((name, *reject) for reject in rejects)
        self._tally.rejects.update(reject.reason for reject in rejects)
        if rejects and not self._first:
            line, read_id, reason = rejects[0]
            self._first = f", first in {name} at line {line}, read_id {read_id!r}: {reason}"

    def nothing_usable(self) -> str:
        directory, count = self._paths[0].parent, self._tally.rejects.total()
        if not count:
            return (
                f"--caps_data_dir={directory}: its files hold no rows below their headers; choose "
                "a directory of files with reads"
            )
        rows = "the only row can't" if count == 1 else f"none of {count:,} rows can"
        return f"{directory}: {rows} be used{self._first}. Correct the files."
