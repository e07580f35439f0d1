"""What the ETL says about its input: the manifest's sources, the closing tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from capfinder import log
from capfinder.data.records import SPLITS
from capfinder.etl import quality
from capfinder.etl.plan import Plan
from capfinder.etl.scan import Scanned
from capfinder.etl.sources import Source
from capfinder.log import logger


def source_facts(sources: Sequence[Source], scanned: Scanned, plan: Plan) -> list[dict[str, Any]]:
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
            "good": fact.rows - rejected,
            "chosen": chosen,
        }
        for source, fact, rejected, chosen in zip(
            sources,
            scanned.facts,
            scanned.rejects.per_file,
            plan.chosen_of_file.tolist(),
            strict=True,
        )
    ]


def show_summary(manifest: Mapping[str, Any], names: Sequence[str]) -> None:
    """The tables that end the ETL, from the new version's manifest; names: of the classes."""
    rows = []
    for label in sorted({source["dataset_class"] for source in manifest["sources"]}):
        of_class = [each for each in manifest["sources"] if each["dataset_class"] == label]
        used = [manifest["counts"][split][str(label)] for split in SPLITS]
        figures = (
            sum(source["rows"] for source in of_class),
            sum(source["rows"] - source["good"] for source in of_class),
            len(of_class),
            sum(used),
            *used,
        )
        rows.append((names[label], label, *(f"{figure:,}" for figure in figures)))
    columns = ("cap", "class", "rows", "rejected", "runs", "chosen", *SPLITS)
    log.table("Reads", columns, rows)
    log.table("Runs", quality.COLUMNS, quality.table(manifest["quality"], names), left=(0, 1))
    logger.info("%s", quality.NOTE)
    if manifest["rejects"]:
        counted = [(reason, f"{count:,}") for reason, count in manifest["rejects"].items()]
        log.table("Rejected rows (all in rejects.csv)", ("reason", "rows"), counted)
