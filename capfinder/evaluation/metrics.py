"""Figures of merit from logits and labels, in plain numpy; every result is ready for JSON.

Logits are (N, C) floats, labels (N,) integers in 0..C-1. A figure that isn't defined (the recall
of a class without reads) is None, never a made-up number."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

CALIBRATION_BINS = 15
COVERAGES = tuple(round(0.05 * step, 2) for step in range(20, 0, -1))  # 1.0, 0.95, ... 0.05
TEMPERATURE_RANGE = (0.01, 100.0)
NORMAL_95 = 1.959963984540054  # the normal quantile that leaves 2.5 % above it


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) -> (N, C) float64 log probabilities; safe for logits of any size."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) -> (N, C) float64 probabilities."""
    return np.exp(log_softmax(logits))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion; keeps within 0..1 and is right for small counts too.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209, the score interval."""
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    z2 = NORMAL_95**2 / trials
    share = successes / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64; row = true class, column = predicted class."""
    pairs = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(matrix: np.ndarray) -> float:
    return float(np.trace(matrix) / matrix.sum())


def balanced_accuracy(matrix: np.ndarray) -> float:
    """Mean recall over the classes that have reads: what class sizes can't bend."""
    support = matrix.sum(axis=1)
    return float((np.diag(matrix)[support > 0] / support[support > 0]).mean())


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def per_class(matrix: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class.

    Precision is None for a class never predicted, recall for one without reads, F1 for both."""
    rows = []
    for index, name in enumerate(class_names):
        right = matrix[index, index]
        support, predicted = matrix[index].sum(), matrix[:, index].sum()
        rows.append(
            {
                "cap_class": index,
                "cap": name,
                "precision": _ratio(right, predicted),
                "recall": _ratio(right, support),
                "f1": _ratio(2 * right, support + predicted),
                "support": int(support),
            }
        )
    return rows


def _answers(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each read the highest probability, and whether the highest logit is the right one."""
    return softmax(logits).max(axis=1), np.asarray(logits).argmax(axis=1) == labels


def calibration_bins(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Reads grouped by confidence (highest probability) in equal bins (low, high]; empty ones left
    out. Each: low, high, count, confidence (mean) and accuracy."""
    confidence, correct = _answers(logits, labels)
    number = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, None)
    number = np.minimum(number, CALIBRATION_BINS - 1)
    return [
        {
            "low": bin_ / CALIBRATION_BINS,
            "high": (bin_ + 1) / CALIBRATION_BINS,
            "count": int((number == bin_).sum()),
            "confidence": float(confidence[number == bin_].mean()),
            "accuracy": float(correct[number == bin_].mean()),
        }
        for bin_ in np.unique(number).tolist()
    ]


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """How far confidence and accuracy lie apart, averaged over the reads; 0 is perfect.

    Source: Naeini et al. 2015 (AAAI), equation 3, with 15 bins."""
    bins = calibration_bins(logits, labels)
    gaps = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    return float(gaps / len(labels))


def _minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search for the minimum of a function with one valley."""
    golden = (math.sqrt(5) - 1) / 2
    a, b = low, high
    left, right = b - golden * (b - a), a + golden * (b - a)
    at_left, at_right = function(left), function(right)
    while b - a > 1e-6:
        if at_left <= at_right:
            b, right, at_right = right, left, at_left
            left = b - golden * (b - a)
            at_left = function(left)
        else:
            a, left, at_left = left, right, at_right
            right = a + golden * (b - a)
            at_right = function(right)
    return (a + b) / 2


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number to divide logits by so that their log loss is lowest; fit it on validation reads.

    Kept to 0.01..100: with every read right (or the logits useless) the best one is 0 (infinity).
    Source: Guo et al. 2017 (ICML), section 4.2. The loss has one valley in log temperature."""
    logits = np.asarray(logits, np.float64)
    low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
    return math.exp(_minimise(lambda t: log_loss(logits / math.exp(t), labels), low, high))


def accuracy_at_coverage(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Accuracy when only the most confident reads get an answer, for coverages 1.0 down to 0.05.

    Each: coverage (of the reads, as reached), accuracy, threshold (answer from this confidence
    on). Reads as confident as the last one answered are answered too, as a threshold would."""
    confidence, correct = _answers(logits, labels)
    falling = np.sort(confidence)[::-1]
    rows = {}
    for coverage in COVERAGES:
        threshold = float(falling[max(1, math.ceil(coverage * len(labels) - 1e-9)) - 1])
        kept = confidence >= threshold
        rows[threshold] = {
            "coverage": float(kept.mean()),
            "accuracy": float(correct[kept].mean()),
            "threshold": threshold,
        }
    return list(rows.values())


def evaluate(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str],
    temperature: float,
) -> dict[str, Any]:
    """The "test" (or "train") entry of metrics.json. `temperature` comes from validation reads.

    Loss, calibration.ece and coverage belong to the logits as they are, ece_after to the tempered.

    Raises: ValueError when there is no read, a logit isn't finite or a label is out of range."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    if len(labels) == 0 or logits.shape != (len(labels), len(class_names)):
        raise ValueError(f"logits {logits.shape} don't fit {len(labels)} labels")
    if not np.isfinite(logits).all():
        raise ValueError("a logit is NaN or infinite")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"labels must lie in 0..{len(class_names) - 1}")
    matrix = confusion_matrix(labels, logits.argmax(axis=1), len(class_names))
    return {
        "accuracy": accuracy(matrix),
        "accuracy_interval": list(wilson_interval(int(np.trace(matrix)), len(labels))),
        "balanced_accuracy": balanced_accuracy(matrix),
        "loss": log_loss(logits, labels),
        "num_examples": len(labels),
        "per_class": per_class(matrix, class_names),
        "calibration": {
            "ece": expected_calibration_error(logits, labels),
            "temperature": float(temperature),
            "ece_after": expected_calibration_error(logits / temperature, labels),
            "bins": calibration_bins(logits, labels),
        },
        "coverage": accuracy_at_coverage(logits, labels),
        "confusion_matrix": matrix.tolist(),
    }


def majority_accuracy(train_labels: np.ndarray, test_labels: np.ndarray, num_classes: int) -> float:
    """Accuracy of always naming the commonest training class (the lowest number of several)."""
    commonest = np.bincount(np.asarray(train_labels, np.int64), minlength=num_classes).argmax()
    return float((np.asarray(test_labels) == commonest).mean())


Blocks = Iterable[tuple[np.ndarray, np.ndarray]]  # signals (n, T) of any float type, labels (n,)


def class_centroids(blocks: Blocks, num_classes: int) -> np.ndarray:
    """(C, T) float64 mean signal of each class, one block in memory at a time.

    A class without reads gets NaN."""
    sums: np.ndarray | None = None
    counts = np.zeros(num_classes)
    for signals, labels in blocks:
        if sums is None:
            sums = np.zeros((num_classes, signals.shape[1]))
        for cap_class in np.unique(labels):
            sums[cap_class] += signals[labels == cap_class].sum(axis=0, dtype=np.float64)
        counts += np.bincount(labels, minlength=num_classes)
    if sums is None:
        raise ValueError("centroids need at least one block")
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / counts[:, None])


def nearest_centroid_accuracy(blocks: Blocks, centroids: np.ndarray) -> float:
    """Accuracy of naming the class whose mean training signal is nearest (Euclidean)."""
    right = total = 0
    for signals, labels in blocks:
        # |x - c|^2 without the |x|^2 that all classes share
        scores = centroids @ signals.astype(np.float64).T * -2
        scores += (centroids**2).sum(axis=1, keepdims=True)
        scores[np.isnan(scores)] = np.inf
        right += int((scores.argmin(axis=0) == labels).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("an accuracy needs at least one read")
    return right / total


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def per_class_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the per-class table, for `log.table`."""
    columns = ["cap", "precision", "recall", "F1", "reads"]
    figures = [
        [row["cap"], *(_percent(row[key]) for key in ("precision", "recall", "f1"))] for row in rows
    ]
    return columns, [
        [*cells, f"{row['support']:,}"] for cells, row in zip(figures, rows, strict=True)
    ]


def confusion_rows(
    matrix: Sequence[Sequence[int]], class_names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the confusion matrix, for `log.table`; counts, true class in front."""
    columns = ["true \\ predicted", *class_names, "reads"]
    return columns, [
        [name, *(f"{count:,}" for count in row), f"{sum(row):,}"]
        for name, row in zip(class_names, matrix, strict=True)
    ]


def confusion_csv(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """CSV text: header `true\\predicted,<cap>,...`, then a row of counts for each true class."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["true\\predicted", *class_names])
    for name, row in zip(class_names, matrix, strict=True):
        writer.writerow([name, *row])
    return stream.getvalue()
