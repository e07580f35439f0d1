"""A manifest as tables of texts, the same ones for the terminal and for the page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfinder.data.records import DATASET_NAME, SPLITS
from capfinder.etl import quality
from capfinder.log import format_bytes

_SHORT_DIGEST = 12


@dataclass(frozen=True)
class Table:
    """Texts in rows under columns; the columns in `left` are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    note: str = ""


@dataclass(frozen=True)
class Inspected:
    """A dataset version: its manifest, names of its classes by their number, what to show of it,
    what is wrong with its files and, where nothing is, what was checked."""

    directory: Path
    manifest: Mapping[str, Any]
    names: Sequence[str]
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    warnings: Sequence[str]
    problems: Sequence[str]
    checked: str

    def counts(self, split: str) -> dict[str, int]:
        """Reads of the split by class number as text."""
        return dict(self.manifest["counts"][split])


def facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a version is, as (name, value)."""
    total = sum(sum(by_class.values()) for by_class in manifest["counts"].values())
    return [
        ("version", manifest["version"]),
        ("fingerprint", manifest["fingerprint"]),
        ("created", manifest.get("created", "-")),
        ("by", f"capfinder {manifest.get('code_version', '-')}"),
        ("reads", f"{total:,} of {manifest['num_classes']} classes"),
        ("signals", f"{manifest['target_length']:,} samples of {manifest['dtype']}"),
    ]


def tables(manifest: Mapping[str, Any], names: Sequence[str], directory: Path) -> list[Table]:
    """names: of the classes, by their number; directory: where the shards lie."""
    found = [reads(manifest, names), sources(manifest, names)]
    if manifest.get("quality"):
        found.append(
            Table(
                "Quality control of each run",
                quality.COLUMNS,
                quality.table(manifest["quality"], names),
                left=(0, 1),
                note=quality.NOTE,
            )
        )
    return [*found, rejects(manifest), decided_by(manifest), shards(manifest, directory)]


def reads(manifest: Mapping[str, Any], names: Sequence[str]) -> Table:
    counts = manifest["counts"]

    def row(label: str, name: str, figures: Sequence[int]) -> tuple[str, ...]:
        return (label, name, *(f"{figure:,}" for figure in (*figures, sum(figures))))

    rows = [
        row(str(label), name, [counts[split][str(label)] for split in SPLITS])
        for label, name in enumerate(names)
    ]
    everything = row("", "all", [sum(counts[split].values()) for split in SPLITS])
    return Table("Reads", ("class", "cap", *SPLITS, "total"), [*rows, everything], left=(0, 1))


def sources(manifest: Mapping[str, Any], names: Sequence[str]) -> Table:
    """The CSV files; the label in the file is shown where etl_params.class_map changed it."""
    return Table(
        "Sources",
        ("file", "cap", "label", "used for", "size", "rows", "good", "run", "SHA-256"),
        [
            (
                source["file"],
                names[source["dataset_class"]],
                str(source["cap_class"]),
                "test" if source["is_test"] else _uses(manifest),
                format_bytes(source["size"]),
                f"{source['rows']:,}",
                f"{source['good']:,}",
                str(source.get("run", "-"))[:_SHORT_DIGEST],
                source["sha256"][:_SHORT_DIGEST],
            )
            for source in manifest["sources"]
        ],
        left=(0, 1, 3, 7, 8),
    )


def _uses(manifest: Mapping[str, Any]) -> str:
    has_test_files = any(source["is_test"] for source in manifest["sources"])
    return "train, validation" if has_test_files else "all splits"


def rejects(manifest: Mapping[str, Any]) -> Table:
    counted = manifest.get("rejects") or {}
    return Table(
        "Rejected rows",
        ("reason", "rows"),
        [(reason, f"{count:,}") for reason, count in counted.items()],
        note="each is listed in rejects.csv beside the shards" if counted else "none",
    )


def decided_by(manifest: Mapping[str, Any]) -> Table:
    return Table(
        "Settings that decided it",
        ("setting", "value"),
        [
            (name, json.dumps(value, ensure_ascii=False))
            for name, value in manifest.get("settings", {}).items()
        ],
        left=(0, 1),
    )


def shards(manifest: Mapping[str, Any], directory: Path) -> Table:
    rows = []
    for split in SPLITS:
        listed = list(of_split(manifest, split))
        there = [directory / shard["name"] for shard in listed]
        sizes = [path.stat().st_size for path in there if path.is_file()]
        rows.append(
            (
                split,
                f"{len(listed):,}",
                f"{len(sizes):,}",
                f"{sum(shard['num_examples'] for shard in listed):,}",
                format_bytes(sum(sizes)),
                f"{format_bytes(min(sizes))} to {format_bytes(max(sizes))}" if sizes else "-",
            )
        )
    return Table("Shards", ("split", "shards", "there", "reads", "size", "each"), rows)


def of_split(manifest: Mapping[str, Any], split: str) -> Iterator[Mapping[str, Any]]:
    """The split's entries of manifest["shards"]."""
    start = f"{DATASET_NAME}-{split}."
    return (shard for shard in manifest["shards"] if shard["name"].startswith(start))
