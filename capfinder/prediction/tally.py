"""What a prediction comes to: counts while it goes on, tables at its end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from capfinder import log
from capfinder.log import logger


@dataclass
class Tally:
    """counts, confidence: by predicted class (C,), reads and the sums of their probabilities of it;
    rejects by reason; bytes of files, as they lie on disk, and seconds that it took."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(0))
    rejects: Counter[str] = field(default_factory=Counter)
    disk_bytes: int = 0
    seconds: float = 0.0

    @property
    def reads(self) -> int:
        return int(self.counts.sum())

    def add(self, probabilities: np.ndarray) -> None:
        """probabilities (n, C) of some more reads."""
        classes = probabilities.shape[1]
        if not len(self.counts):
            self.counts, self.confidence = np.zeros(classes, np.int64), np.zeros(classes)
        predicted = probabilities.argmax(axis=1)
        self.counts += np.bincount(predicted, minlength=classes)
        self.confidence += np.bincount(predicted, probabilities.max(axis=1), minlength=classes)

    def show(self, class_names: Sequence[str]) -> None:
        reads = self.reads
        rows = [
            (name, f"{count:,}", _percent(count, reads), _percent(confidence, count))
            for name, count, confidence in zip(
                class_names, self.counts.tolist(), self.confidence.tolist(), strict=True
            )
        ]
        whole = _percent(float(self.confidence.sum()), reads)
        rows.append(("all", f"{reads:,}", _percent(reads, reads), whole))
        log.table("Predictions", ("predicted cap", "reads", "share", "mean confidence"), rows)
        if self.rejects:
            total = self.rejects.total() + reads
            log.table(
                f"Rejects: {self.rejects.total():,} of {total:,} rows",
                ("reason", "rows", "share"),
                [
                    (reason, f"{count:,}", _percent(count, total))
                    for reason, count in self.rejects.most_common()
                ],
            )
        seconds = max(self.seconds, 1e-9)
        logger.info(
            "%s reads in %s: %s reads/s, %.0f MB/s",
            f"{reads:,}",
            log.format_seconds(seconds),
            f"{reads / seconds:,.0f}",
            self.disk_bytes / log.MEGABYTE / seconds,
        )


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
