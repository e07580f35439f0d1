"""Builds one version of the dataset from scanned CSV files: pass two, shards, checks, manifest."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import capmap, files
from capfinder.data import records, versions
from capfinder.errors import StageFailedError
from capfinder.etl import hashing, quality, quality_warnings, shuffle, sources
from capfinder.etl import plan as planning
from capfinder.etl.csv_reader import Reject
from capfinder.etl.engines import Engine, PassTwo
from capfinder.etl.leaks import LeakCheck
from capfinder.etl.parents import Parents
from capfinder.etl.plan import Plan, SplitRules
from capfinder.etl.scan import Scanned
from capfinder.etl.shuffle import ParsedBlock, WrittenShard
from capfinder.etl.sources import Source
from capfinder.etl.stream import map_in_order
from capfinder.log import logger
from capfinder.stages import etl_report


@dataclass(frozen=True)
class EtlSettings:
    """The settings of the ETL; all of them are part of a dataset's fingerprint."""

    rules: SplitRules
    target_length: int
    dtype: str
    class_map: dict[int, int]
    max_reject_fraction: float

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["class_map"] = {str(key): value for key, value in self.class_map.items()}
        return {**values.pop("rules"), **values, "hash": hashing.HASH}

    @property
    def record_bytes(self) -> int:
        return self.target_length * np.dtype(self.dtype).itemsize


class Builder:
    """Builds one version: pass two, the shards, the checks and what lies beside the shards."""

    def __init__(
        self,
        settings: EtlSettings,
        found: Sequence[Source],
        scanned: Scanned,
        engine: Engine,
        scratch: Path,
    ) -> None:
        """scratch: where temporary files may lie until the version is built."""
        self.settings, self.sources, self.scanned = settings, found, scanned
        self.engine, self.scratch = engine, scratch
        self.parents = None
        if settings.rules.group_by == "parent_read":
            self.parents = Parents(
                scratch, found, parts=scanned.identities.parts, seed=settings.rules.seed
            )

    def build(self, directory: Path, number: str, fingerprint: str) -> None:
        """Fills `directory`."""
        times, found = 1, self._try(directory, times=1)
        while found is None:
            # With some reads to spare, so that few rounds find all that fail, however many.
            times *= 2
            self._try(None, times=times)
            found = self._try(directory, times=1)
        plan, written = found
        self._check_written(directory, plan, written)
        self._write_metadata(directory, written, number)
        self.scanned.rejects.write(directory / "rejects.csv")
        manifest = self._manifest(plan, written, number, fingerprint)
        files.write_json(directory / versions.MANIFEST, manifest)
        names = capmap.class_names(manifest["settings"]["class_map"], manifest["num_classes"])
        etl_report.show_summary(manifest, names)
        for warning in manifest["warnings"]:
            logger.warning("%s", warning)

    def _try(self, directory: Path | None, *, times: int) -> tuple[Plan, list[WrittenShard]] | None:
        """Plans, parses and writes the shards; None when a chosen row failed to parse. It is a
        reject then, and will not be chosen again.

        times: how many times as many reads as wanted are tried; directory None: only tried."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            plan = planning.make_plan(
                self.scanned,
                self.sources,
                parents=self.parents,
                rules=self.settings.rules,
                times=times,
                record_bytes=self.settings.record_bytes,
                scratch=Path(scratch),
            )
            pass_two = self.engine.pass_two(
                plan,
                self.sources,
                target_length=self.settings.target_length,
                dtype=self.settings.dtype,
                scratch=Path(scratch),
            )
            is_good = self._parse(pass_two)
            if not is_good or directory is None:
                return None
            return plan, pass_two.write(directory)

    def _parse(self, pass_two: PassTwo) -> bool:
        """Parses the chosen rows; whether none failed. Raises: InputError for too many rejects."""
        scanned = self.scanned
        scanned.statistics.clear_signals()
        excluded = [np.zeros(0, np.uint64)]
        for parsed in pass_two.parse():
            failed = np.fromiter(parsed.signals.problems, np.int64)
            if len(excluded) == 1 and not len(failed):
                _add_signals(scanned.statistics, parsed)
            if not len(failed):
                continue
            excluded.append(parsed.rows["identity"][failed])
            number = int(parsed.rows["file"][0])
            fact = scanned.facts[number]
            fact.unique -= len(failed)
            scanned.rejects.add(
                number,
                [
                    Reject(int(parsed.rows["line"][at]), parsed.read_ids[at].decode(), reason)
                    for at, reason in parsed.signals.problems.items()
                ],
            )
            scanned.rejects.check(number, fact.rows, self.settings.max_reject_fraction)
        scanned.identities.exclude(np.concatenate(excluded))
        return len(excluded) == 1

    def _check_written(self, directory: Path, plan: Plan, written: Sequence[WrittenShard]) -> None:
        """Reads every shard back, checksums and all.

        Raises: StageFailedError when a read or group is in two splits, or not as planned."""
        settings = self.settings
        reads = LeakCheck(self.scratch, what="read_id", entries=int(plan.counts.sum()))
        groups = LeakCheck(
            self.scratch,
            what=settings.rules.group_by,
            entries=int(plan.counts.sum()),
            may_repeat=True,
        )
        counts, checksums = np.zeros_like(plan.counts), np.zeros_like(plan.checksums)

        def read(each: WrittenShard) -> tuple[WrittenShard, np.ndarray, np.ndarray]:
            blocks = records.read_shard_blocks(
                directory / each.name, target_length=settings.target_length, dtype=settings.dtype
            )
            found = [
                (block.cap_classes, hashing.keyed_hash(block.read_ids, seed=settings.rules.seed))
                for block in blocks
            ]
            labels, hashes = (np.concatenate(column) for column in zip(*found, strict=True))
            return each, labels, hashes

        for each, labels, hashes in map_in_order(
            read, written, workers=shuffle.SHARD_WRITERS, ahead=1
        ):
            split = records.SPLITS.index(each.shard.split)
            identity = hashes[:, hashing.IDENTITY]
            np.add.at(counts[split], labels, 1)
            np.add.at(checksums[split], labels, identity)
            reads.add(split, hashes[:, hashing.CHOOSE], identity)
            if settings.rules.group_by != "read":
                groups.add(split, each.groups, each.groups)
        if not (np.array_equal(counts, plan.counts) and np.array_equal(checksums, plan.checksums)):
            raise StageFailedError(
                f"{directory}: the shards don't hold the reads planned. Please report this."
            )
        reads.check()
        groups.check()

    def _write_metadata(
        self, directory: Path, written: Sequence[WrittenShard], number: str
    ) -> None:
        of_split = {
            split: [each for each in written if each.shard.split == split]
            for split in records.SPLITS
        }
        records.write_metadata(
            directory,
            version=number,
            target_length=self.settings.target_length,
            dtype=self.settings.dtype,
            shard_lengths={
                split: [each.shard.num_examples for each in shards]
                for split, shards in of_split.items()
            },
            shard_bytes={
                split: [each.file.size for each in shards] for split, shards in of_split.items()
            },
        )

    def _manifest(
        self, plan: Plan, written: Sequence[WrittenShard], number: str, fingerprint: str
    ) -> dict[str, Any]:
        settings = self.settings
        per_class = plan.examples_per_class
        source_facts = etl_report.source_facts(self.sources, self.scanned, plan)
        quality_rows = self.scanned.statistics.rows(source_facts)
        return {
            "version": number,
            "fingerprint": fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": package_version("capfinder"),
            "settings": settings.as_json(),
            "seed": settings.rules.seed,
            "hash": hashing.HASH,
            "num_classes": settings.rules.num_classes,
            "target_length": settings.target_length,
            "dtype": settings.dtype,
            "examples_per_class": per_class[0]
            if len(set(per_class.values())) == 1
            else {str(label): reads for label, reads in per_class.items()},
            "sources": source_facts,
            "counts": {
                split: {str(label): reads for label, reads in enumerate(row)}
                for split, row in zip(records.SPLITS, plan.counts.tolist(), strict=True)
            },
            "rejects": self.scanned.rejects.counts(),
            "quality": quality_rows,
            "shards": [
                {
                    "name": each.name,
                    "sha256": each.file.sha256,
                    "num_examples": each.shard.num_examples,
                }
                for each in written
            ],
            "warnings": sources.simulation_warnings(self.sources)
            + plan.warnings
            + quality_warnings.warnings(quality_rows),
        }


def _add_signals(statistics: quality.RunStatistics, parsed: ParsedBlock) -> None:
    signals = parsed.signals
    statistics.add_signals(parsed.rows["file"], signals.lengths, signals.total, signals.squares)
