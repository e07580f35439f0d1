"""Whether reads look like those that a model was trained on: their length, level and spread.

The caps themselves change these figures, and nobody knows which caps an input holds. But each
figure of a mixture of caps is the mean of theirs, weighted by the shares. So an input is compared
with the mixture that fits it best, and what is left then has another cause."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capfinder.allowed import is_number
from capfinder.compiled import kernel
from capfinder.etl.quality_warnings import MAX_MEAN, MAX_SPREAD_FACTOR

LIMIT = 4.0  # Capfinder clips z-scored signals to +-4
# Share of samples beyond it from which something is wrong. Real z-scored current that isn't clipped
# has few: of five real DNA reads, 0.7 % of the samples in all.
MAX_BEYOND = 0.02
_BITS = {"float16": np.uint16, "float32": np.uint32, "float64": np.uint64}

# What runs of one kind may differ by: the mean, and the others as a part of their mean over the
# classes. Simulated runs of a class differ (standard deviation) by 0.075 in mean, 3 % in spread and
# 1 % in length. Where the training runs differ more, so may others: by RUN_DEVIATIONS.
FIGURES = ("mean", "spread", "length")
_SHAPES = ("{:.2f}", "{:.2f}", "{:,.0f} samples")
TOLERANCES = {"mean": 0.30, "spread": 0.18, "length": 0.20}
RUN_DEVIATIONS = 3.0
MAX_BETWEEN_FACTOR = 2.0  # of the standard deviation of the reads' means
MIN_READS = 100  # of fewer only the gravest is said: they may be of a few molecules
_LEAST, _MOST = 1e-4, 1e12  # of a profile's figures: they are divided by, and squared

CAUSES = {
    "mean": "another way of z-scoring (over a part of the read, say), another chemistry, another "
    "region cut out, or caps that the model doesn't know",
    "spread": "another scaling, another chemistry, or caps that the model doesn't know",
    "length": "another region cut out, another chemistry (which reads faster or slower), or caps "
    "that the model doesn't know",
    "between reads": "reads of several kinds or scalings, or signals that weren't z-scored one "
    "by one",
}
RAW = (
    "raw picoamperes, or signals that aren't z-scored: z-score each whole read and clip it to "
    "+-4 before the region round the cap is cut out, as Capfinder does"
)


def beyond(signals: np.ndarray) -> np.ndarray:
    """(n,) int64: how many samples of each signal (n, T), floats of any width, lie beyond LIMIT."""
    integer = _BITS[signals.dtype.name]
    limit = np.array(LIMIT, signals.dtype).view(integer)
    bits = np.ascontiguousarray(signals).view(integer)
    # Without the sign's bit, floats are in the order of their bits; numba knows no float16.
    return np.asarray(_count_above(bits, integer((1 << 8 * bits.itemsize - 1) - 1), limit[()]))


@kernel
def _count_above(bits: np.ndarray, mask: Any, limit: Any) -> np.ndarray:
    counts = np.zeros(len(bits), np.int64)
    for row in range(len(bits)):
        count = 0
        for column in range(bits.shape[1]):
            count += (bits[row, column] & mask) > limit
        counts[row] = count
    return counts


def profile(quality_rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the training reads of each class look like, and how much the runs of a class differ.

    quality_rows: the manifest's "quality" (etl.quality); test runs are left out. {}: there is
    nothing to go by."""
    rows = [row for row in quality_rows if not row["is_test"] and row["signal"] and row["length"]]
    labels = sorted({row["dataset_class"] for row in rows})
    runs = {label: [row for row in rows if row["dataset_class"] == label] for label in labels}
    if not rows:
        return {}
    return {
        "classes": [_class_profile(label, runs[label]) for label in labels],
        "between_runs_sd": _between_runs(list(runs.values())),
    }


def _class_profile(label: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Weighted by the reads that were chosen of each run."""
    weights = np.array([row["chosen"] for row in rows], float)
    means = [row["signal"]["mean"] for row in rows]
    squares = [row["signal"]["mean"] ** 2 + row["signal"]["between_reads_sd"] ** 2 for row in rows]
    mean = float(np.average(means, weights=weights))
    variance = float(np.average(squares, weights=weights)) - mean**2
    figures = {
        "mean": mean,
        "spread": np.average([row["signal"]["within_read_sd"] for row in rows], weights=weights),
        "length": np.average([row["length"]["mean"] for row in rows], weights=weights),
        "between_reads": math.sqrt(max(variance, 0.0)),
    }
    return {
        "cap_class": label,
        "runs": len(rows),
        "reads": int(weights.sum()),
        **{name: round(float(value), 4) for name, value in figures.items()},
    }


def _between_runs(classes: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Standard deviation between runs of a class, pooled over the classes; {} with a run each."""
    freedom = sum(len(rows) - 1 for rows in classes)
    if not freedom:
        return {}
    found = {}
    for name in FIGURES:
        values = [[_figure_of_row(row, name) for row in rows] for rows in classes]
        squares = sum(float(np.var(each)) * len(each) for each in values)
        found[name] = round(math.sqrt(squares / freedom), 4)
    return found


def _figure_of_row(row: Mapping[str, Any], name: str) -> float:
    if name == "length":
        return float(row["length"]["mean"])
    return float(row["signal"]["mean" if name == "mean" else "within_read_sd"])


def warnings(known: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What doesn't look like the training reads, a line each.

    known: a `profile`; None or {}: only what is wrong for any model is said. rows: file, reads,
    mean, spread, between_reads, length (mean, samples), beyond (share of samples beyond LIMIT) of
    each file with reads; and of all of them together, if there are several, as the last."""
    if not _is_profile(known):
        known = None
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for cause, text in _judged(known, row):
            found.setdefault(cause, []).append((row["file"], text))
    return [_sentence(cause, files) for cause, files in found.items()]


def pooled(rows: Sequence[Mapping[str, Any]], *, name: str) -> dict[str, Any]:
    """The figures of all files together, as one row called `name`; rows: one at least."""
    reads = np.array([row["reads"] for row in rows], float)
    names = ("mean", "spread", "length", "beyond")
    found = {key: float(np.average([row[key] for row in rows], weights=reads)) for key in names}
    squares = [row["mean"] ** 2 + row["between_reads"] ** 2 for row in rows]
    variance = float(np.average(squares, weights=reads)) - found["mean"] ** 2
    between = math.sqrt(max(variance, 0.0))
    return {"file": name, "reads": int(reads.sum()), **found, "between_reads": between}


def _is_profile(value: Any) -> bool:
    """Files that carry one may be anybody's."""

    def are_numbers(part: Any, names: Sequence[str], least: float = 0.0) -> bool:
        return isinstance(part, Mapping) and all(
            is_number(part.get(name)) and least <= part[name] <= _MOST for name in names
        )

    if not isinstance(value, Mapping) or not isinstance(value.get("classes"), list):
        return False
    classes, runs = value["classes"], value.get("between_runs_sd")
    return (
        len(classes) > 0
        and all(are_numbers(one, ("mean",), -_MOST) for one in classes)
        and all(are_numbers(one, ("spread", "length"), _LEAST) for one in classes)
        and all(are_numbers(one, ("between_reads",)) for one in classes)
        and all(are_numbers(one, ("runs",), 1.0) for one in classes)
        and isinstance(runs, Mapping)
        and are_numbers(runs, list(runs))
    )


def _sentence(cause: str, files: Sequence[tuple[str, str]], shown: int = 3) -> str:
    texts = "; ".join(f"{file}: {text}" for file, text in files[:shown])
    more = len(files) - shown
    rest = f"; {more:,} more likewise" if more > 0 else ""
    return (
        f"The signals don't look like those that the model was trained on. {texts}{rest}. "
        f"Likely: {cause}."
    )


def _judged(known: Mapping[str, Any] | None, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(likely cause, what was found) for each thing that is wrong with a file."""
    classes = known["classes"] if known else []
    if _is_raw(row) and not any(_is_raw(one) for one in classes):
        text = (
            f"mean {row['mean']:.3g} and spread {row['spread']:.3g} where about 0 and 1 are "
            f"expected, {row['beyond']:.0%} of the samples beyond +-{LIMIT:g}"
        )
        return [(RAW, text)]
    found = []
    if row["beyond"] > MAX_BEYOND:
        text = f"{row['beyond']:.1%} of the samples lie beyond +-{LIMIT:g}, where none is expected"
        found.append((RAW, text))
    if known and classes and row["reads"] >= MIN_READS:
        found += _unlike(known, row)
    return found


def _is_raw(figures: Mapping[str, Any]) -> bool:
    return bool(abs(figures["mean"]) > MAX_MEAN or figures["spread"] > MAX_SPREAD_FACTOR)


def _unlike(known: Mapping[str, Any], row: Mapping[str, Any]) -> list[tuple[str, str]]:
    centres = np.array([[one[name] for name in FIGURES] for one in known["classes"]])
    allowed = _allowed(known, centres, row)
    target = np.array([row[name] for name in FIGURES])
    weights = mixture((centres / allowed).T, target / allowed)
    expected = weights @ centres
    off = (target - expected) / allowed
    found = []
    if np.linalg.norm(off) > 1:
        figure = int(np.abs(off).argmax())
        name, shape = FIGURES[figure], _SHAPES[figure]
        text = (
            f"{name} {shape.format(target[figure])}, expected about "
            f"{shape.format(expected[figure])} for the mix of caps that fits best"
        )
        found.append((CAUSES[name], text))
    moments = [one["mean"] ** 2 + one["between_reads"] ** 2 for one in known["classes"]]
    between = math.sqrt(max(float(weights @ moments) - expected[0] ** 2, 0.0))
    if row["between_reads"] > MAX_BETWEEN_FACTOR * between:
        text = (
            f"the reads' means differ by {row['between_reads']:.2f} (standard deviation), "
            f"expected about {between:.2f}"
        )
        found.append((CAUSES["between reads"], text))
    return found


def _allowed(known: Mapping[str, Any], centres: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
    """(3,) how far each of FIGURES may be off: for another run, and for how few reads there are."""
    scales = {"mean": 1.0, "spread": centres[:, 1].mean(), "length": centres[:, 2].mean()}
    between = known.get("between_runs_sd", {})
    runs = np.mean([one["runs"] for one in known["classes"]])
    reads = math.sqrt(row["reads"])
    errors = {
        "mean": max(one["between_reads"] for one in known["classes"]) / reads,
        # of a read: what simulated and real reads have, at most
        "spread": 0.5 * scales["spread"] / reads,
        "length": 0.5 * scales["length"] / reads,
    }
    allowed = []
    for name in FIGURES:
        run = RUN_DEVIATIONS * between.get(name, 0.0) * math.sqrt(1 + 1 / runs)
        floor = TOLERANCES[name] * scales[name]
        allowed.append(math.hypot(max(floor, run), RUN_DEVIATIONS * errors[name]))
    return np.array(allowed)


def mixture(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights (C,), not negative and 1 in sum, with which the points (F, C) come nearest to the
    target (F,).

    The solution of min |D u|^2 + (1 - sum u)^2, u >= 0, with the differences D of the points from
    the target, lies in the same direction. Source: Lawson and Hanson 1974, Solving Least Squares
    Problems, chapter 23 (nearest point of a convex set by NNLS)."""
    from scipy.optimize import nnls

    differences = points - target[:, None]
    rows = np.vstack([differences, np.ones(points.shape[1])])
    wanted = np.append(np.zeros(len(target)), 1.0)
    found, _ = nnls(rows, wanted)
    return np.asarray(found / found.sum())
