"""What a prediction comes to, file by file: counts and figures while it goes on.

All sums are whole numbers, so that they are the same whatever blocks the reads came in: where a
stopped run goes on, the blocks are cut elsewhere."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from capfinder.etl import hashing
from capfinder.etl.quality import RunStatistics

_CONFIDENCE = 2**30  # parts of a probability that are counted: 8 billion reads fit into an int64


class Figures(RunStatistics):
    """The figures of one file's reads, which can be put aside and taken up again."""

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        super().__init__(1)
        if saved is not None:
            bins, counts = np.array(saved["lengths"], np.int64).reshape(-1, 2).T
            self._lengths[0, bins] = counts
            self._length_sum[0], self._shortest[0], self._longest[0] = saved["range"]
            self._chosen[0] = saved["reads"]
            self._sums[0] = saved["sums"]

    def add(self, figures: np.ndarray) -> None:
        """figures (n, 4) as reads.Reads has them."""
        lengths, total, squares, _ = figures.T
        self.add_lengths(0, lengths.astype(np.int32))
        self.add_signals(np.zeros(len(lengths), np.int64), lengths, total, squares)

    def saved(self) -> dict[str, Any]:
        bins = np.flatnonzero(self._lengths[0])
        return {
            "lengths": np.stack([bins, self._lengths[0, bins]], axis=1).tolist(),
            "range": [int(each[0]) for each in (self._length_sum, self._shortest, self._longest)],
            "reads": int(self._chosen[0]),
            "sums": self._sums[0].tolist(),
        }

    def figures(self) -> dict[str, Any]:
        """As the manifest's "quality" has them; {} without reads."""
        if not self._chosen[0]:
            return {}
        return {"length": self._length_figures(0), "signal": self._signal_figures(0)}


class FileTally:
    """counts (C,) int64 of the predicted classes; rejects by reason; the signals' figures; ids: of
    64 bits, the same for the same read_ids in whatever order."""

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros(num_classes, np.int64)
        self.rejects: Counter[str] = Counter()
        self._confidence = np.zeros(num_classes, np.int64)
        self._samples = self._beyond = self.ids = 0
        self._gathered: Figures | None = None
        self._figures: dict[str, Any] = {}

    @property
    def reads(self) -> int:
        return int(self.counts.sum())

    @property
    def confidence(self) -> np.ndarray:
        """(C,) sums of the probabilities of the reads' predicted classes."""
        return self._confidence / _CONFIDENCE

    def add(self, probabilities: np.ndarray, figures: np.ndarray, target_length: int) -> None:
        """Some more reads: probabilities (n, C); figures (n, 4) as reads.Reads has them."""
        if not len(probabilities):
            return
        predicted, highest = probabilities.argmax(axis=1), probabilities.max(axis=1)
        np.add.at(self.counts, predicted, 1)
        parts = np.rint(highest * _CONFIDENCE).astype(np.int64)
        np.add.at(self._confidence, predicted, parts)
        self._samples += int(np.minimum(figures[:, 0], target_length).sum())
        self._beyond += int(figures[:, 3].sum())
        if self._gathered is None:
            self._gathered = Figures()
        self._gathered.add(figures)

    def add_ids(self, read_ids: np.ndarray) -> None:
        """read_ids (n,) 'S' of those reads."""
        words = hashing.keyed_hash(read_ids, seed=0)[:, hashing.IDENTITY]
        self.ids = (self.ids + int(words.sum())) % 2**64

    def close(self) -> None:
        """No more reads come: what takes memory goes."""
        if self._gathered is not None:
            self._figures = self._gathered.figures()
            self._gathered = None

    def signals(self) -> dict[str, Any]:
        """Length, level and spread of its reads once closed; {} without reads."""
        if not self._figures:
            return {}
        signal = self._figures["signal"]
        return {
            "mean": signal["mean"],
            "between_reads": signal["between_reads_sd"],
            "spread": signal["within_read_sd"],
            "length": self._figures["length"],
            "beyond": round(self._beyond / self._samples, 6),
        }

    def saved(self) -> dict[str, Any]:
        return {
            "counts": self.counts.tolist(),
            "confidence": self._confidence.tolist(),
            "rejects": dict(self.rejects),
            "ids": self.ids,
            "samples": [self._samples, self._beyond],
            "gathered": self._gathered.saved() if self._gathered is not None else None,
            "figures": self._figures,
        }

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "FileTally":
        tally = cls(len(saved["counts"]))
        tally.counts[:], tally._confidence[:] = saved["counts"], saved["confidence"]
        tally.rejects = Counter(saved["rejects"])
        tally.ids = saved["ids"]
        tally._samples, tally._beyond = saved["samples"]
        tally._gathered = Figures(saved["gathered"]) if saved["gathered"] else None
        tally._figures = saved["figures"]
        return tally
