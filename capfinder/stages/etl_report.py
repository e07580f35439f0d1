"""What the ETL says about its input: rejects.csv, the manifest's sources, the closing tables."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capfinder import log
from capfinder.data import scan
from capfinder.data.records import SPLITS
from capfinder.data.scan import FileFacts
from capfinder.data.sources import Source


def write_rejects(path: Path, sources: Sequence[Source], facts: Sequence[FileFacts]) -> None:
    """Every bad row: file, line, read_id, reason."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "line", "read_id", "reason"))
        for source, fact in zip(sources, facts, strict=True):
            writer.writerows((source.name, *reject) for reject in sorted(fact.rejects))


def source_facts(sources: Sequence[Source], facts: Sequence[FileFacts]) -> list[dict[str, Any]]:
    """For the manifest; cap_class as in the file, dataset_class as after etl_params.class_map."""
    return [
        {
            "file": source.name,
            "size": source.size,
            "sha256": fact.sha256,
            "run": fact.run,
            "cap_class": source.cap_class,
            "dataset_class": source.label,
            "is_test": source.is_test,
            "rows": fact.rows,
            "good": fact.rows - len(fact.rejects),
        }
        for source, fact in zip(sources, facts, strict=True)
    ]


def show_summary(
    sources: Sequence[Source], facts: Sequence[FileFacts], counts: dict[str, dict[str, int]]
) -> None:
    rows = []
    for label in sorted({source.label for source in sources}):
        of_class = [f for s, f in zip(sources, facts, strict=True) if s.label == label]
        used = [counts[split][str(label)] for split in SPLITS]
        figures = (
            sum(fact.rows for fact in of_class),
            sum(len(fact.rejects) for fact in of_class),
            len(of_class),
            sum(used),
            *used,
        )
        rows.append((label, *(f"{figure:,}" for figure in figures)))
    log.table("Reads", ("class", "rows", "rejected", "runs", "chosen", *SPLITS), rows)
    rejects = scan.count_rejects(facts)
    if rejects:
        counted = [(reason, f"{count:,}") for reason, count in rejects.items()]
        log.table("Rejected rows (all in rejects.csv)", ("reason", "rows"), counted)
