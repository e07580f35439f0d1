"""What an export has written, as it is told: to run.json, on the terminal, beside the files."""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from capfinder import files, log, run_record
from capfinder.exporting import card
from capfinder.exporting.record import ExportedFile
from capfinder.log import logger


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written."""

    files: tuple[ExportedFile, ...]
    about: dict[str, Any]  # of the model, as in the `.keras` file
    classifier_reused: bool  # the `.keras` file lay there already

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

    def as_record(self, output_dir: Path) -> list[dict[str, Any]]:
        """For run.json and the report. Besides what `ExportedFile.as_row` has: path below
        `output_dir`, samples of the signals taken, and which model it is."""
        common = {
            "input_length": self.about["preprocessing"]["input_length"],
            "model": files.fingerprint([self.about["weights_sha256"], self.about["class_names"]]),
        }
        return [
            {**file.as_row(), "path": str(file.path.relative_to(output_dir)), **common}
            for file in self.files
        ]


def remove_earlier(classifier: Path) -> None:
    """Leaves `classifier` alone of the `.keras` files beside it."""
    for old in sorted(classifier.parent.glob("classifier_*.keras")):
        if old != classifier:
            old.unlink()
            logger.info("Removed %s, the classifier of an earlier export", old)


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


def merged(
    earlier: Iterable[Mapping[str, Any]], result: ExportResult, output_dir: Path
) -> list[dict[str, Any]]:
    """run.json's `exports` after `result`, where it was `earlier`: files of the same model that
    weren't written again stay in it; those of another model are removed."""
    new = result.as_record(output_dir)
    names, models = {row["name"] for row in new}, {row["model"] for row in new}
    untouched = [dict(row) for row in earlier if row.get("name") not in names]
    same = [row for row in untouched if not models or row.get("model") in models]
    for row in untouched:
        if row not in same and row.get("model") is not None:
            _remove(run_record.inside(output_dir, row.get("path")))
    there = [row for row in same if run_record.inside(output_dir, row.get("path")).exists()]
    return [*there, *new]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    logger.info("Removed %s, of an earlier model", path)
