"""What quality control warns of: signals that aren't z-scored, runs that stand out, runs that can't
be told from classes.

No likelihood is assumed: a run is compared with the median of the others, as that of a few runs
isn't moved by one bad run among them."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

# A z-scored read has mean 0 and spread 1 as a whole; the stretch round its cap differs somewhat
# (simulated: means -0.6 to 1.2, spreads 1.0 to 1.8). Picoamperes are some 60 to 120, 5 to 20 wide.
MAX_MEAN, MAX_SPREAD_FACTOR = 3.0, 2.5
MIN_READS = 100  # a run of fewer isn't compared: its mean signal alone has an error of 0.07
MAD_FACTOR = 5 * 1.4826  # five standard deviations, by the median absolute deviation

Row = Mapping[str, Any]  # an entry of RunStatistics.rows


@dataclass(frozen=True)
class _Figure:
    """A figure that runs are compared by. Two runs may differ by `within` in one class, a run from
    the other classes by `across`: there it can't be told from what the cap does, so only much.

    These are floors, for few runs, of which the median absolute deviation says little. Two
    simulated runs of a class differ by 0.09 in mean (standard deviation) and by 4.5 % in spread,
    less than a sixth of `within`: 180 simulated datasets of 4 to 12 runs gave no warning."""

    name: str
    of: Callable[[Row], float]
    show: str
    is_ratio: bool
    within: float
    across: float

    def distance(self, one: float, other: float) -> float:
        return abs(math.log(one / other)) if self.is_ratio else abs(one - other)


FIGURES = (
    _Figure("mean signal", lambda row: row["signal"]["mean"], "{:.2f}", False, 0.6, 1.5),
    _Figure(
        "spread of the signal",
        lambda row: row["signal"]["within_read_sd"],
        "{:.2f}",
        True,
        math.log(1.4),
        math.log(1.7),
    ),
    _Figure(
        "median length",
        lambda row: row["length"]["median"],
        "{:,.0f}",
        True,
        math.log(1.4),
        math.log(2.5),
    ),
)


def warnings(rows: Sequence[Row]) -> list[str]:
    """What to be wary of, a line each."""
    measured = [row for row in rows if row["signal"] and row["length"]]
    odd = [row for row in measured if not _looks_z_scored(row)]
    compared = [row for row in measured if _looks_z_scored(row) and row["chosen"] >= MIN_READS]
    return [*_not_z_scored(odd, measured), *_standing_out(compared), *_confounded(rows)]


def _looks_z_scored(row: Row) -> bool:
    signal = row["signal"]
    is_central = abs(signal["mean"]) <= MAX_MEAN
    return is_central and 1 / MAX_SPREAD_FACTOR <= signal["within_read_sd"] <= MAX_SPREAD_FACTOR


def _not_z_scored(odd: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    if not odd:
        return []
    worst = max(odd, key=lambda row: abs(row["signal"]["mean"]) + row["signal"]["within_read_sd"])
    which = "all runs" if len(odd) == len(measured) else _listed([row["file"] for row in odd])
    example = f"in {worst['file']} " if len(measured) > 1 and len(odd) > 1 else ""
    return [
        f"The signals of {which} don't look z-scored: {example}their mean is "
        f"{worst['signal']['mean']:.3g} and their spread {worst['signal']['within_read_sd']:.3g}, "
        "where about 0 and 1 are expected. If they are picoamperes or another scaling, z-score "
        "each whole read (less its mean, divided by its standard deviation) before the region "
        "round the cap is cut out, as Capfinder does."
    ]


def _standing_out(rows: Sequence[Row]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for figure in FIGURES:
        for row, reference, others in _outliers(figure, rows):
            values = (figure.show.format(value) for value in (figure.of(row), reference))
            found[row["file"], others].append("{} {} against {}".format(figure.name, *values))
    return [
        f"{file} stands out from {others}: {', '.join(what)}. Check how this run was basecalled, "
        "z-scored and cut, and leave it out if something went wrong: a model may learn it as a cap."
        for (file, others), what in found.items()
    ]


def _outliers(figure: _Figure, rows: Sequence[Row]) -> list[tuple[Row, float, str]]:
    """Runs far from the others: row, median of the others, who they are."""
    classes: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        classes[row["dataset_class"]].append(row)
    centres = {label: median(map(figure.of, of_class)) for label, of_class in classes.items()}
    residuals = [
        figure.distance(figure.of(row), centres[label])
        for label, of_class in classes.items()
        if len(of_class) >= 3
        for row in of_class
    ]
    tolerance = max(figure.within, MAD_FACTOR * median(residuals) if residuals else 0.0)
    found = []
    for label, of_class in sorted(classes.items()):
        elsewhere = [centre for other, centre in centres.items() if other != label]
        if len(of_class) >= 3:
            far = [
                row
                for row in of_class
                if figure.distance(figure.of(row), centres[label]) > tolerance
            ]
        elif len(of_class) == 2:
            far = _farther(figure, of_class, elsewhere, tolerance)
        elif len(elsewhere) >= 2:  # with one other class: which of the two is it?
            reference = median(elsewhere)
            if figure.distance(figure.of(of_class[0]), reference) > figure.across:
                found.append((of_class[0], reference, "the other classes"))
            continue
        else:
            continue
        for row in far:
            others = [figure.of(other) for other in of_class if other is not row]
            what = "the other run" if len(others) == 1 else "the other runs"
            found.append((row, median(others), f"{what} of its class"))
    return found


def _farther(
    figure: _Figure, pair: Sequence[Row], elsewhere: Sequence[float], tolerance: float
) -> list[Row]:
    """Of two runs that differ too much, the one that is less like the other classes."""
    one, other = map(figure.of, pair)
    if figure.distance(one, other) <= tolerance:
        return []
    if not elsewhere:
        return [pair[1]]
    centre = median(elsewhere)
    return [max(pair, key=lambda row: figure.distance(figure.of(row), centre))]


def _confounded(rows: Sequence[Row]) -> list[str]:
    """Classes of one run, unless their test reads come from runs of their own."""
    runs: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["good"]:
            runs[row["dataset_class"]].append(row)
    single, tested = [], []
    for label, of_class in sorted(runs.items()):
        training = [row for row in of_class if not row["is_test"]]
        if len(training) == 1:
            single.append((label, training[0]["file"]))
            tested.append(len(of_class) > 1)
    if not single or all(tested):
        return []
    which = _listed([f"class {label} from {file}" for label, file in single])
    return [
        f"Runs and classes are confounded, {which} alone: what the model learns may be the run "
        "and not the cap, and no accuracy on reads of the same runs can tell which. Add runs of "
        "these classes; then test on runs of their own, with split_params.group_by=file (3 or "
        "more runs per class) or split_params.test_caps_data_dir."
    ]


def _listed(names: Sequence[str], shown: int = 4) -> str:
    """'a, b and c'; beyond `shown` names '... and 7 more'."""
    parts = list(names[:shown])
    if len(names) > shown:
        parts.append(f"{len(names) - shown:,} more")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
