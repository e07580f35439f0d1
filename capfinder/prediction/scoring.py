"""From blocks of reads to the rows of predictions.csv, with a place to go on from at any time."""

import contextlib
import csv
import io
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import log
from capfinder.errors import InputError, StoppedError
from capfinder.etl.csv_reader import Reject
from capfinder.evaluation import metrics, predictions
from capfinder.interrupts import Interrupt
from capfinder.prediction import reads
from capfinder.prediction.reads import BEGINNING, Position, Reads, Step
from capfinder.prediction.tally import FileTally
from capfinder.prediction.unfinished import Unfinished
from capfinder.stages import inference
from capfinder.trained import Classifier

PREDICTIONS, REJECTS = "predictions.csv", "rejects.csv"
OVERFLOWS = "rejects_of_the_model.csv"  # become the last rows of REJECTS
LOGITS, LABELS = "logits", "labels"  # raw arrays, for an evaluation
LABEL_DTYPE = "int32"
OUTPUTS = (PREDICTIONS, REJECTS, OVERFLOWS)
NO_NUMBER = "the model gives no number"
SAVE_SECONDS = 10.0  # what a kill costs at most


@dataclass(frozen=True)
class Job:
    """What is to be scored. steps: what else is done to each block; columns: those that they add;
    logits_dtype: LOGITS and LABELS are written too, in this dtype and in LABEL_DTYPE."""

    classifier: Classifier
    paths: Sequence[Path]
    batching: inference.Batching
    steps: Sequence[Step] = ()
    columns: Sequence[str] = ()
    logits_dtype: str = ""


@dataclass(frozen=True)
class _Block:
    """A block on its way through the model, its rejects written already. rejects: how many by
    reason; written: bytes of REJECTS with them."""

    reads: Reads
    rejects: Counter[str]
    written: int


def stat_of(path: Path) -> os.stat_result:
    """Raises: InputError when the file is there no more."""
    try:
        return path.stat()
    except OSError:
        raise InputError(
            f"{path.parent}: a file has changed while it was read ({path.name} is gone). Run again "
            "when all are whole."
        ) from None


class Scoring:
    """tallies: one a file; disk_bytes: of all files, read so far."""

    def __init__(self, job: Job, outputs: Unfinished) -> None:
        self._job, self._outputs = job, outputs
        self._before = np.cumsum([0, *(stat_of(path).st_size for path in job.paths)]).tolist()
        classes = job.classifier.model.num_classes
        state: Mapping[str, Any] = outputs.state or {}
        self.tallies = [FileTally.restored(saved) for saved in state.get("tallies", ())]
        self.tallies += [FileTally(classes) for _ in job.paths[len(self.tallies) :]]
        self._position = Position(*state.get("position", BEGINNING))
        self._passed = state.get("passed", 0)  # reads that went through the model
        self._first_reject = state.get("first_reject", "")
        self.disk_bytes = state.get("disk_bytes", 0)
        self._rejects_size = outputs.size(REJECTS)
        self._is_settled, self._saved_at = True, time.monotonic()
        if outputs.state is None:
            outputs.write(PREDICTIONS, predictions.header(classes, job.columns))
            self._add_rejects(REJECTS, [("file", "line", "read_id", "reason")])
            self._rejects_size = outputs.size(REJECTS)

    @property
    def reads(self) -> int:
        return sum(tally.reads for tally in self.tallies)

    @property
    def total_bytes(self) -> int:
        """Of all files, as they lie on disk."""
        return int(self._before[-1])

    def rejects(self) -> Counter[str]:
        return sum((tally.rejects for tally in self.tallies), Counter())

    def run(self, interrupt: Interrupt) -> None:
        """To the end of the last file; the outputs are whole then.

        Raises: InputError for a file that can't be read; StoppedError after a signal: a rerun goes
        on from here."""
        model, megabytes = self._job.classifier.model, _megabytes(self.total_bytes)
        with log.progress("Predicting", total=megabytes, unit="MB") as bar:
            bar.begin_at(_megabytes(self.disk_bytes))
            try:
                for logits, block in inference.predict(
                    model, self._parts(interrupt), self._job.batching
                ):
                    if block is None:
                        continue
                    self._finish(logits, block)
                    bar.advance(_megabytes(self.disk_bytes) - bar.done)
                    if time.monotonic() - self._saved_at >= SAVE_SECONDS:
                        self._save()
            except StoppedError:
                if self._is_settled:
                    self._save()
                raise
        self._close_files(len(self.tallies))
        self._outputs.append(OVERFLOWS, to=REJECTS)

    def _parts(self, interrupt: Interrupt) -> Iterator[tuple[np.ndarray, _Block | None]]:
        """Rejects go to their file at once: a block waits here until its batch is full."""
        job, model = self._job, self._job.classifier.model
        dtype = job.classifier.dtype
        # A read stands in its batch where it would stand in a run that had never been stopped, as
        # some places get another rounding than the others.
        ahead = self._passed % job.batching.batch_size
        if ahead:
            yield np.zeros((ahead, model.target_length), dtype), None
        with contextlib.closing(
            reads.read(
                job.paths,
                target_length=model.target_length,
                dtype=dtype,
                begin=self._position,
                steps=job.steps,
            )
        ) as parsed:
            for block in parsed:
                if interrupt.requested:
                    raise StoppedError("stopped by Ctrl-C", 130)
                reasons = self._note_rejects(REJECTS, block.file, block.rejects)
                size = self._outputs.size(REJECTS)
                rest = replace(block, rejects=[], signals=np.empty((len(block.lines), 0)))
                yield block.signals, _Block(rest, reasons, size)

    def _finish(self, logits: np.ndarray, block: _Block) -> None:
        """All that a scored block adds to the outputs and the tallies."""
        self._is_settled = False
        job, found = self._job, block.reads
        tally = self.tallies[found.file]
        self._passed += len(logits)
        logits, found = with_numbers(logits, found)
        tally.rejects += block.rejects
        tally.rejects += self._note_rejects(OVERFLOWS, found.file, found.rejects)
        if len(logits):
            probabilities = metrics.softmax(logits)
            text = predictions.lines(
                found.read_ids,
                found.labels,
                probabilities,
                job.classifier.class_names,
                found.origins,
            )
            self._outputs.write(PREDICTIONS, text)
            tally.add(probabilities, found.figures, job.classifier.model.target_length)
            tally.add_ids(found.read_ids)
            if job.logits_dtype:
                self._outputs.write(LOGITS, logits.astype(job.logits_dtype).tobytes())
                self._outputs.write(LABELS, found.labels.astype(LABEL_DTYPE).tobytes())
        self._close_files(found.following.file)
        self._position, self._rejects_size = found.following, block.written
        self.disk_bytes = self._before[found.file] + found.disk_bytes
        self._is_settled = True

    def _close_files(self, end: int) -> None:
        for tally in self.tallies[self._position.file : end]:
            tally.close()

    def _save(self) -> None:
        self._outputs.save(
            {
                "position": list(self._position),
                "passed": self._passed,
                "disk_bytes": self.disk_bytes,
                "first_reject": self._first_reject,
                "tallies": [tally.saved() for tally in self.tallies],
            },
            sizes={REJECTS: self._rejects_size},
        )
        self._saved_at = time.monotonic()

    def _note_rejects(self, name: str, file: int, rejects: Sequence[Reject]) -> Counter[str]:
        if not rejects:
            return Counter()
        shown = self._job.paths[file].name
        self._add_rejects(name, [(shown, *reject) for reject in rejects])
        if not self._first_reject:
            line, read_id, reason = rejects[0]
            self._first_reject = f", first in {shown} at line {line}, read_id {read_id!r}: {reason}"
        return Counter(reject.reason for reject in rejects)

    def _add_rejects(self, name: str, rows: Sequence[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._outputs.write(name, text.getvalue().encode())

    def nothing_usable(self) -> str:
        """What to say when there are no reads."""
        directory, count = self._job.paths[0].parent, self.rejects().total()
        if not count:
            return (
                f"--caps_data_dir={directory}: its files hold no rows below their headers; choose "
                "a directory of files with reads"
            )
        rows = "the only row can't" if count == 1 else f"none of {count:,} rows can"
        return f"{directory}: {rows} be used{self._first_reject}. Correct the files."


def with_numbers(logits: np.ndarray, block: Reads) -> tuple[np.ndarray, Reads]:
    """Without the reads on which the model overflows: they become rejects."""
    is_number = np.isfinite(logits).all(axis=1)
    if is_number.all():
        return logits, block
    problems = dict.fromkeys(np.flatnonzero(~is_number).tolist(), NO_NUMBER)
    return logits[is_number], reads.without(block, problems)


def _megabytes(size: int) -> int:
    return -(-size // log.MEGABYTE)
