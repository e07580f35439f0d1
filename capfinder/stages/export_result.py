"""What an export has written, as it is told: to run.json, on the terminal, beside the files."""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from capfinder import files, log, run_record
from capfinder.errors import InputError
from capfinder.exporting import card, keras
from capfinder.exporting.record import ExportedFile, size_of
from capfinder.log import logger

NOTE = "exports.json"  # of a directory that has no run.json to tell of the files in it
_CLASSIFIER = re.compile(r"classifier_[0-9]{8}_[0-9]{6}\.keras")


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written."""

    files: tuple[ExportedFile, ...]
    about: dict[str, Any]  # of the model, as in the `.keras` file
    classifier_reused: bool  # the `.keras` file lay there already
    weights_sha256: str  # of what the files hold, so without what only a training needs
    source: Path | None = None  # the file that the model came from; it stays wherever it lies

    @property
    def paths(self) -> dict[str, Path]:
        """By format."""
        return {file.name: file.path for file in self.files}

    @property
    def classifier(self) -> Path | None:
        """The `.keras` file, if it was asked for."""
        return self.paths.get("keras")

    def summary(self) -> str:
        if not self.files:
            return "no format asked for"
        worst = max(file.difference for file in self.files)
        return f"{', '.join(self.paths)}; within {worst:.0e} of the trained model"

    @property
    def _models(self) -> list[str]:
        """What tells the model from others, as it is noted and as it was in earlier versions."""
        return [
            files.fingerprint([weights, self.about["class_names"]])
            for weights in (self.weights_sha256, self.about["weights_sha256"])
        ]

    def is_of(self, row: Mapping[str, Any]) -> bool:
        """Whether a row, as of `as_record`, is of the same model."""
        return row.get("model") in self._models

    def as_record(self, output_dir: Path) -> list[dict[str, Any]]:
        """For run.json and the report. Besides what `ExportedFile.as_row` has: path below
        `output_dir`, samples of the signals taken, and which model it is."""
        common = {
            "input_length": self.about["preprocessing"]["input_length"],
            "model": self._models[0],
        }
        return [
            {**file.as_row(), "path": str(file.path.relative_to(output_dir)), **common}
            for file in self.files
        ]


def classifiers(directory: Path) -> list[Path]:
    """The `.keras` files in `directory` that exports have written: others may be named likewise."""
    return [
        path
        for path in sorted(directory.glob("classifier_*.keras"))
        if _CLASSIFIER.fullmatch(path.name) and keras.read_about(path) is not None
    ]


def remove_earlier(result: ExportResult) -> None:
    """Leaves the classifier of `result`, if it has one, alone of the exported ones beside it."""
    if result.classifier is None or result.classifier_reused:
        return
    for old in classifiers(result.classifier.parent):
        if old != result.classifier and not _is_source(old, result):
            old.unlink()
            logger.info("Removed %s, the classifier of an earlier export", old)


def _is_source(path: Path, result: ExportResult) -> bool:
    return result.source is not None and path.resolve() == result.source.resolve()


def describe(
    directory: Path, result: ExportResult, rows: Iterable[Mapping[str, Any]], output_dir: Path
) -> None:
    """Writes labels.json and model_card.md.

    rows: of all the files of the model in `output_dir`, as in run.json's `exports`."""
    classifier = directory / "classifier"
    names = result.about["class_names"]
    files.write_json(
        classifier / "labels.json", {str(index): name for index, name in enumerate(names)}
    )
    listed = [
        {**row, "file": os.path.relpath(output_dir / row["path"], classifier)} for row in rows
    ]
    files.write_text(classifier / "model_card.md", card.text(result.about, listed))


def show(directory: Path, result: ExportResult, *, num_signals: int) -> None:
    """A table of the files."""
    length = result.about["preprocessing"]["input_length"]
    log.table(
        f"Exported model (takes {length} samples; reloaded in a fresh process and compared on "
        f"{num_signals} signals)",
        ("format", "file", "MB", "largest |Δp|", "read by", "opset"),
        [
            (
                file.name,
                file.path.relative_to(directory),
                f"{file.size / 1e6:.2f}",
                f"{file.difference:.1e}",
                file.reader,
                file.opset or "",
            )
            for file in result.files
        ],
        left=(0, 1, 4),
    )


def noted(directory: Path) -> list[dict[str, Any]]:
    """What `note` has written there; [] where that isn't there, or isn't what is written."""
    try:
        values = files.read_json(directory / NOTE)
    except InputError:
        return []
    return list(values["exports"]) if _is_note(directory, values) else []


def _is_note(directory: Path, values: Any) -> bool:
    if not run_record.is_record(values) or not values.get("exports"):
        return False
    with contextlib.suppress(InputError):
        return all(run_record.inside(directory, row.get("path")) for row in values["exports"])
    return False


def note(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Keeps what the next export there must know: rows as run.json's `exports`."""
    files.write_json(directory / NOTE, {"exports": [dict(row) for row in rows]})


def merged(
    earlier: Iterable[Mapping[str, Any]], result: ExportResult, output_dir: Path
) -> list[dict[str, Any]]:
    """run.json's `exports` after `result`, where it was `earlier`: files of the same model that
    weren't written again stay in it; those of another model are removed."""
    new = result.as_record(output_dir)
    names = {row["name"] for row in new}
    untouched = [dict(row) for row in earlier if row.get("name") not in names]
    same = [row for row in untouched if not new or result.is_of(row)]
    for row in untouched:
        if row not in same and row.get("model") is not None:
            path = run_record.inside(output_dir, row.get("path"))
            if not _is_source(path, result):
                _remove(path, row)
    there = [row for row in same if run_record.inside(output_dir, row.get("path")).exists()]
    return [*there, *new]


def _remove(path: Path, row: Mapping[str, Any]) -> None:
    """Of another size it isn't what was written there."""
    if not path.exists() or row.get("bytes", size_of(path)) != size_of(path):
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    logger.info("Removed %s, of an earlier model", path)
