"""report.html: one self-contained page about a run, made from what lies on disk and nothing else.

Whatever a stage hasn't written yet is said to be missing. The page asks no network for anything,
holds no script, and every text from disk is escaped."""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from capfinder import files, interrupts, run_record, settings
from capfinder.errors import InputError
from capfinder.evaluation import charts, formats
from capfinder.evaluation.charts import Series

TEMPLATE = "report_template.html"
EXAMPLES_PER_CLASS = 3
CONFUSIONS_SHOWN = 4
LEAST_CONFUSION = 0.02  # of a class's reads: fewer aren't worth the headline


def render(run_dir: Path) -> Path:
    """Writes run_dir/report.html anew; returns its path.

    Raises: InputError when run_dir holds neither run.json nor evaluation/metrics.json, or one of
    the files can't be read."""
    path = run_dir / "report.html"
    files.write_text(path, page(gather(run_dir)))
    return path


def gather(run_dir: Path) -> dict[str, Any]:
    """All that lies on disk about a run; {} or None for what doesn't."""
    run = _read(run_dir / "run.json")
    metrics = _read(run_dir / "evaluation" / "metrics.json")
    if not run and not metrics:
        raise InputError(
            f"{run_dir}: holds neither run.json nor evaluation/metrics.json, so there is nothing "
            "to report; give a run's output directory"
        )
    tuning = run.get("tuning") or {}
    dataset_dir = _part_of(run_dir, run.get("dataset"))
    study = _part_of(run_dir, tuning) / "best_hyperparameters.json"
    return {
        "run_dir": run_dir,
        "run": run,
        "metrics": metrics,
        "tuning": tuning,
        "best_hyperparameters": _read(study) if tuning.get("directory") else {},
        "manifest": _read(dataset_dir / "manifest.json") if run.get("dataset") else {},
        "examples": list(_examples(dataset_dir)) if run.get("dataset") else [],
        "models": sorted(run_dir.glob("best_model/classifier/*.keras")),
    }


def _part_of(run_dir: Path, values: Mapping[str, Any] | None) -> Path:
    """The directory that a part of run.json names."""
    return run_record.inside(run_dir, _text(values, "directory"))


def _read(path: Path) -> dict[str, Any]:
    values = files.read_json(path) if path.is_file() else {}
    is_one = run_record.is_record(values) if path.name == "run.json" else isinstance(values, dict)
    if not is_one:
        raise InputError(f"{path}: doesn't hold what a run writes there")
    return dict(values)


def _part(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        values = values.get(key) or {}
    return dict(values)


def _text(values: Mapping[str, Any] | None, key: str) -> str:
    return str((values or {}).get(key) or "")


def _examples(dataset_dir: Path) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The first few test reads of each class, padding cut off, from the cache if it is there."""
    fingerprint = _text(_read(dataset_dir / "manifest.json"), "fingerprint")
    cache = dataset_dir.parent.parent / "cache" / fingerprint / "test"
    paths = [cache / f"{name}.npy" for name in ("signal", "cap_class", "length")]
    if not fingerprint or not all(path.is_file() for path in paths):
        return
    try:
        signals, cap_classes, lengths = (np.load(path, mmap_mode="r") for path in paths)
    except (OSError, ValueError):  # damaged, or of objects, which aren't loaded
        return
    for cap_class in np.unique(cap_classes).tolist():
        chosen = np.flatnonzero(np.asarray(cap_classes) == cap_class)[:EXAMPLES_PER_CLASS]
        yield cap_class, [_unpadded(signals[i], int(lengths[i])) for i in chosen]


def _unpadded(stored: np.ndarray, length: int) -> np.ndarray:
    """The centre of a stored row: what the read filled before zeros were put round it."""
    row = np.asarray(stored, np.float64).ravel()
    kept = min(length, row.size)
    left = (row.size - kept) // 2
    return row[left : left + kept]


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # any key of a file may be absent
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for shown in (formats.percent, formats.number, formats.size, formats.duration):
        environment.filters[shown.__name__] = _or_dash(shown)
    environment.filters["value"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(TEMPLATE)


def page(found: Mapping[str, Any]) -> str:
    """The HTML text for what `gather` found."""
    metrics, run = found["metrics"], found["run"]
    names = metrics.get("class_names") or run.get("class_names") or []
    return _template().render(
        **found,
        name=found["run_dir"].resolve().name,
        made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        class_names=names,
        test=metrics.get("test") or {},
        train=metrics.get("train") or {},
        confusions=confusions(_part(metrics, "test").get("confusion_matrix") or [], names),
        split_params=_part(run, "settings", "split_params"),
        group_by=_text(_part(run, "settings", "split_params"), "group_by"),
        warnings=_warnings(found),
        advice=coverage_advice(_part(metrics, "test").get("coverage") or []),
        settings_rows=list(settings_rows(run.get("settings") or {})),
        trials=_trials(found["tuning"]),
        sources=found["manifest"].get("sources") or [],
        charts=_charts(metrics, names, found["examples"]),
    )


def _or_dash(shown: Callable[[Any], str]) -> Callable[[Any], str]:
    """The formatter as a filter that takes an absent key for None."""
    return lambda value: shown(None if isinstance(value, jinja2.Undefined) else value)


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """What to be wary of: from the evaluation, or from what there is where there is none yet."""
    if found["metrics"].get("warnings"):
        return list(found["metrics"]["warnings"])
    ended_early = interrupts.sentences(found["run"].get("interrupted") or {})
    return [*ended_early, *(found["manifest"].get("warnings") or [])]


def confusions(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The commonest mistakes, worst first: true, predicted, count and share of the true class."""
    found: list[dict[str, Any]] = [
        {"true": names[i], "predicted": names[j], "count": count, "share": count / sum(row)}
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count and count / sum(row) >= LEAST_CONFUSION
    ]
    return sorted(found, key=lambda row: row["share"], reverse=True)[:CONFUSIONS_SHOWN]


def coverage_advice(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The row nearest to answering 80 % of the reads, if leaving out the rest would help."""
    if len(rows) < 2:
        return None
    row = min(rows, key=lambda row: abs(row["coverage"] - 0.8))
    return row if row["accuracy"] > rows[0]["accuracy"] else None


def settings_rows(groups: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every setting as run: key, value, default, whether they differ, meaning."""
    flat = dict(_flatten(groups))
    for key, value in flat.items():
        setting = settings.BY_KEY.get(key)
        default = setting.default if setting else None
        same = json.dumps(value) == json.dumps(default)
        yield {
            "key": key,
            "value": value,
            "changed": setting is not None and not same,
            "default": default,
            "meaning": setting.meaning if setting else "",
        }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested groups -> dotted keys; a setting whose value is a mapping stays whole."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in settings.BY_KEY:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _trials(tuning: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Best first, those without a value last."""

    def rank(row: dict[str, Any]) -> float:
        return math.inf if row.get("value") is None else -float(row["value"])

    return sorted(tuning.get("trials") or [], key=rank)


def _charts(
    metrics: Mapping[str, Any],
    names: Sequence[str],
    examples: Sequence[tuple[int, Sequence[np.ndarray]]],
) -> dict[str, Any]:
    history = metrics.get("history") or []
    test, best = metrics.get("test") or {}, metrics.get("best_epoch")

    def curve(*keys: tuple[str, str], logarithmic: bool = False, percents: bool = False) -> Any:
        return charts.line_chart(
            [
                Series(label, colour, [(row["epoch"], row[key]) for row in history if key in row])
                for colour, (key, label) in enumerate(keys)
            ],
            x_label="epoch",
            y_format=formats.tick_percent if percents else formats.number,
            marked_x=best,
            marked_label=f"best epoch {best}",
            logarithmic=logarithmic,
        )

    coverage = [(row["coverage"], row["accuracy"]) for row in test.get("coverage") or []]
    return {
        "comparison": _comparison(metrics),
        "loss": curve(("loss", "training"), ("val_loss", "validation")),
        "accuracy": curve(("accuracy", "training"), ("val_accuracy", "validation"), percents=True),
        "learning_rate": curve(("learning_rate", "learning rate"), logarithmic=True),
        "test_matrix": _heat_map(test, names),
        "train_matrix": _heat_map(metrics.get("train") or {}, names),
        "reliability": charts.reliability(_part(test, "calibration").get("bins") or []),
        "coverage": charts.line_chart(
            [Series("accuracy of the answers", 0, coverage)],
            x_label="share of the reads that get an answer",
            x_format=formats.tick_percent,
            y_format=formats.tick_percent,
        ),
        "examples": _traces(names, examples),
    }


def _heat_map(scored: Mapping[str, Any], names: Sequence[str]) -> Any:
    matrix = scored.get("confusion_matrix")
    return charts.heat_map(matrix, names) if matrix else None


def _comparison(metrics: Mapping[str, Any]) -> Any:
    test, baselines = metrics.get("test") or {}, metrics.get("baselines") or {}
    if "accuracy" not in test:
        return None
    rows = [("this model", test["accuracy"], "model")]
    for key, label in (
        ("nearest_centroid_accuracy", "nearest mean signal"),
        ("majority_accuracy", "always the same cap"),
    ):
        if baselines.get(key) is not None:
            rows.append((label, baselines[key], "baseline"))
    interval = test.get("accuracy_interval")
    return charts.comparison(rows, (interval[0], interval[1]) if interval else None)


def _traces(
    names: Sequence[str], examples: Sequence[tuple[int, Sequence[np.ndarray]]]
) -> list[tuple[str, list[Any]]]:
    """For each class its name and its traces, all on one scale."""
    signals = [signal for _, some in examples for signal in some]
    if not signals:
        return []
    samples = max(signal.size for signal in signals)
    reach = max(1.0, max(float(np.abs(signal).max()) for signal in signals))
    return [
        (
            names[cap_class] if cap_class < len(names) else f"class {cap_class}",
            [
                charts.trace(signal, cap_class, samples=samples, limits=(-reach, reach))
                for signal in some
            ],
        )
        for cap_class, some in examples
    ]
