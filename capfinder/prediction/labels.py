"""`capfinder evaluate`: labels in the files as the model's classes, and how it fared on them."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from capfinder import log
from capfinder.allowed import MOST_CLASS_DIGITS, shown
from capfinder.errors import InputError
from capfinder.evaluation import metrics
from capfinder.evaluation.predictions import NO_LABEL as UNKNOWN
from capfinder.prediction import reads
from capfinder.prediction.reads import Reads

NO_LABEL, NOT_IN_MODEL = "no label", "class not in the model"


@dataclass(frozen=True)
class Labels:
    """class_map: class in the files -> the model's; {}: they are the same."""

    class_map: Mapping[int, int]
    num_classes: int

    def as_json(self) -> dict[str, int]:
        return {str(label): number for label, number in self.class_map.items()}

    def apply(self, block: Reads) -> Reads:
        """With the model's classes as labels; reads that have none become rejects."""
        classes = self._classes(block)
        problems = {
            index: NO_LABEL if block.labels[index] < 0 else NOT_IN_MODEL
            for index in np.flatnonzero(classes < 0).tolist()
        }
        return reads.without(replace(block, labels=classes), problems)

    def renumber(self, block: Reads) -> Reads:
        """With the model's classes as labels; reads that have none lose their label."""
        classes = self._classes(block)
        return replace(block, labels=np.where(classes < 0, UNKNOWN, classes))

    def _classes(self, block: Reads) -> np.ndarray:
        """(n,) int64; -1: none of the model's."""
        found, places = np.unique(block.labels, return_inverse=True)
        return np.array([self._class(label) for label in found.tolist()], np.int64)[places]

    def _class(self, label: int) -> int:
        """-1: it is none of the model's."""
        if self.class_map:
            return self.class_map.get(label, -1)
        return label if label < self.num_classes else -1


def from_text(text: str) -> dict[str, int] | None:
    """--class_map as it is typed: a JSON object, or None.

    Raises: InputError for anything else."""
    if text.lower() in ("none", "null"):
        return None
    pairs: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        pairs = json.loads(text, object_pairs_hook=tuple)
    if not isinstance(pairs, tuple) or not all(_is_label(a) and _is_class(b) for a, b in pairs):
        raise InputError(
            f"--class_map={shown(text)}: expected classes in the files and which of the model's "
            'each one is, such as {"0": 0, "3": 1}'
        )
    found = {str(int(label)): number for label, number in pairs}
    if len(found) < len(pairs):
        raise InputError(f"--class_map={shown(text)}: names a class in the files twice")
    return found


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MOST_CLASS_DIGITS


def _is_class(value: object) -> bool:
    return type(value) is int


def parse(class_map: Mapping[str, int], *, num_classes: int) -> Labels:
    """Raises: InputError for a class that the model doesn't have."""
    for label, number in class_map.items():
        if not 0 <= number < num_classes:
            raise InputError(
                f"--class_map: gives {label} to class {number}; the model has 0 to "
                f"{num_classes - 1}"
            )
    return Labels({int(label): number for label, number in class_map.items()}, num_classes)


def nothing_labelled(rejects: Counter[str]) -> str:
    """Why no read could be evaluated, when that is for want of labels; else ""."""
    if rejects[NOT_IN_MODEL]:
        return (
            f"no read has the label of a class that the model has ({rejects[NOT_IN_MODEL]:,} have "
            "others); say with --class_map which classes in the files are which of the model's"
        )
    if rejects[NO_LABEL]:
        return (
            f"no read has a label: cap_class is empty or negative in {rejects[NO_LABEL]:,} rows. "
            "Name the caps of such reads with `capfinder predict`"
        )
    return ""


def figures(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str],
    files: Sequence[tuple[str, int]],
) -> dict[str, Any]:
    """ "test" and "files" of metrics.json. files: name and number of reads of each, in the order of
    the logits (N, C) and labels (N,). No temperature is fitted: that takes reads of its own."""
    found = metrics.evaluate(logits, labels, class_names=class_names, temperature=1.0)
    for name in ("temperature", "ece_after"):
        del found["calibration"][name]
    right = logits.argmax(axis=1) == labels
    by_file, at = [], 0
    for name, count in files:
        if count:
            correct = int(right[at : at + count].sum())
            low_high = list(metrics.wilson_interval(correct, count))
            accuracy = correct / count
            by_file.append(
                {"file": name, "reads": count, "accuracy": accuracy, "accuracy_interval": low_high}
            )
        at += count
    return {"test": found, "files": by_file}


def show(
    found: Mapping[str, Any], class_names: Sequence[str], own: Mapping[str, Any] | None
) -> None:
    """own: figures of the model's own test reads, if they are known."""
    test = found["test"]
    columns, rows = metrics.confusion_rows(test["confusion_matrix"], class_names)
    log.table("Confusion matrix", columns, rows)
    columns, rows = metrics.per_class_rows(test["per_class"])
    log.table("Reads by class", columns, rows)
    if len(found["files"]) > 1:
        cells = [
            (one["file"], f"{one['reads']:,}", f"{one['accuracy']:.1%}", _range(one))
            for one in found["files"]
        ]
        log.table("Accuracy by file", ("file", "reads", "accuracy", "95 % interval"), cells)
    log.logger.info(
        "Accuracy %.1f%% (%s) on %s reads, balanced %.1f%%, loss %.4f%s",
        100 * test["accuracy"],
        _range(test),
        f"{test['num_examples']:,}",
        100 * test["balanced_accuracy"],
        test["loss"],
        f"; on the model's own test reads {own['accuracy']:.1%} ({_range(own)})" if own else "",
    )


def _range(figures: Mapping[str, Any]) -> str:
    low, high = figures["accuracy_interval"]
    return f"{low:.1%} to {high:.1%}"
