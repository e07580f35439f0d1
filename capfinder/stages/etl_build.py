"""Builds one version of the dataset from scanned CSV files: pass two, shards, checks, manifest."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import files
from capfinder.data import plan as planning
from capfinder.data import records, scan, shuffle, sources, splits, versions
from capfinder.data.plan import Groups, Plan, SplitRules
from capfinder.data.scan import FileFacts, Identities
from capfinder.data.sources import Source
from capfinder.errors import StageFailedError
from capfinder.log import logger
from capfinder.stages import etl_report


@dataclass(frozen=True)
class EtlSettings:
    """The settings that decide a dataset's content; all of them are part of its fingerprint."""

    rules: SplitRules
    target_length: int
    dtype: str
    class_map: dict[int, int]
    max_reject_fraction: float

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["class_map"] = {str(key): value for key, value in self.class_map.items()}
        return {**values.pop("rules"), **values, "hash": splits.HASH}

    @property
    def record_bytes(self) -> int:
        return self.target_length * np.dtype(self.dtype).itemsize


class Builder:
    """Builds one version: pass two, the shards, the checks and what lies beside the shards."""

    def __init__(
        self,
        settings: EtlSettings,
        found: Sequence[Source],
        identities: Identities,
        facts: list[FileFacts],
    ) -> None:
        self.settings, self.sources, self.facts = settings, found, facts
        self.identities = identities
        self.is_usable = np.ones(len(identities), np.bool_)
        self.run_rank = scan.run_ranks(facts)
        self.groups = self._groups()

    def _groups(self) -> Groups | None:
        kind, reads = self.settings.rules.group_by, self.identities
        if kind == "file":
            names = np.unique([fact.run.encode() for fact in self.facts])
            return Groups(kind, names, self.run_rank[reads.file])
        if kind == "parent_read":
            directories = sorted({source.path.parent for source in self.sources})
            parents = sources.read_parents(directories, reads.read_id)
            names, of_read = np.unique(parents, return_inverse=True)
            return Groups(kind, names, of_read)
        return None

    def build(self, directory: Path, number: str, fingerprint: str) -> None:
        """Fills `directory`; its parent takes temporary files meanwhile."""
        settings = self.settings
        plan = self._plan()
        while True:
            with tempfile.TemporaryDirectory(prefix=files.PARTIAL, dir=directory.parent) as scratch:
                buckets = shuffle.Buckets(
                    Path(scratch), target_length=settings.target_length, dtype=settings.dtype
                )
                failures = self._parse(plan.row, plan, buckets)
                if not failures:
                    sizes = shuffle.write_shards(directory, buckets, plan, self.identities)
                    break
            plan = self._replace(plan, failures)
        lengths = {
            split: [shard.num_examples for shard in plan.shards if shard.split == split]
            for split in records.SPLITS
        }
        records.write_metadata(
            directory,
            version=number,
            target_length=settings.target_length,
            dtype=settings.dtype,
            shard_lengths=lengths,
            shard_bytes=sizes,
        )
        counts = self._check_written(directory, plan)
        etl_report.write_rejects(directory / "rejects.csv", self.sources, self.facts)
        manifest = self._manifest(directory, plan, counts, number, fingerprint)
        files.write_json(directory / versions.MANIFEST, manifest)
        etl_report.show_summary(self.sources, self.facts, counts)
        for warning in manifest["warnings"]:
            logger.warning("%s", warning)

    def _plan(self) -> Plan:
        is_test = np.array([source.is_test for source in self.sources])
        return planning.make_plan(
            self.identities,
            is_usable=self.is_usable,
            is_test=is_test[self.identities.file],
            run=self.run_rank[self.identities.file],
            groups=self.groups,
            rules=self.settings.rules,
            record_bytes=self.settings.record_bytes,
        )

    def _parse(
        self, rows: np.ndarray, plan: Plan | None, buckets: shuffle.Buckets | None
    ) -> dict[int, str]:
        """Parses rows of the identities, into `buckets` if given; reasons of those that fail."""
        failures: dict[int, str] = {}
        for parsed in shuffle.parse_rows(
            self.identities,
            rows,
            self.sources,
            target_length=self.settings.target_length,
            dtype=self.settings.dtype,
        ):
            for at, reason in parsed.problems.items():
                failures[int(rows[parsed.index[at]])] = reason
            if buckets is not None and plan is not None and not failures:
                buckets.add(plan.shard[parsed.index], parsed.index, parsed)
        return failures

    def _replace(self, plan: Plan, failures: dict[int, str]) -> Plan:
        """Plans anew without the rows that failed. The rows that come in are parsed for trial, so
        that the second full pass is the last."""
        is_parsed = np.zeros(len(self.identities), np.bool_)
        is_parsed[plan.row] = True
        while failures:
            for row, reason in sorted(failures.items()):
                self.is_usable[row] = False
                scan.reject_row(self.identities, row, reason, self.facts)
            for source, fact in zip(self.sources, self.facts, strict=True):
                scan.check_rejects(source, fact, self.settings.max_reject_fraction)
            plan = self._plan()
            fresh = plan.row[~is_parsed[plan.row]]
            failures = self._parse(fresh, None, None)
            is_parsed[fresh] = True
        return plan

    def _check_written(self, directory: Path, plan: Plan) -> dict[str, dict[str, int]]:
        """Reads the shards back: counts per split and class.

        Raises: StageFailedError when a read or group is in two splits, or not as planned."""
        reads = self.identities
        ids, counts = {}, {}
        for number, split in enumerate(records.SPLITS):
            blocks = [(b.read_ids, b.cap_classes) for b in records.read_blocks(directory, split)]
            ids[split], labels = (np.concatenate(part) for part in zip(*blocks, strict=True))
            planned = plan.row[plan.split == number]
            planned = planned[np.argsort(reads.read_id[planned])]
            order = np.argsort(ids[split])
            if not (
                np.array_equal(ids[split][order], reads.read_id[planned])
                and np.array_equal(labels[order], reads.label[planned])
            ):
                raise StageFailedError(
                    f"{directory}: {split} doesn't hold the reads planned. Please report this."
                )
            count = np.bincount(labels, minlength=self.settings.rules.num_classes)
            counts[split] = {str(label): int(n) for label, n in enumerate(count)}
        check_disjoint(ids)
        if plan.group is not None and self.groups is not None:
            order = np.argsort(reads.read_id[plan.row])
            known = reads.read_id[plan.row][order]
            group = {
                split: self.groups.names[
                    np.unique(plan.group[order][np.searchsorted(known, of_split)])
                ]
                for split, of_split in ids.items()
            }
            check_disjoint(group, what=self.groups.kind)
        return counts

    def _manifest(
        self,
        directory: Path,
        plan: Plan,
        counts: dict[str, dict[str, int]],
        number: str,
        fingerprint: str,
    ) -> dict[str, Any]:
        settings = self.settings
        per_class = plan.examples_per_class
        names = [
            records.shard_name(shard.split, shard.index, shard.num_shards) for shard in plan.shards
        ]
        return {
            "version": number,
            "fingerprint": fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": package_version("capfinder"),
            "settings": settings.as_json(),
            "seed": settings.rules.seed,
            "hash": splits.HASH,
            "num_classes": settings.rules.num_classes,
            "target_length": settings.target_length,
            "dtype": settings.dtype,
            "examples_per_class": per_class[0]
            if len(set(per_class.values())) == 1
            else {str(label): reads for label, reads in per_class.items()},
            "sources": etl_report.source_facts(self.sources, self.facts),
            "counts": counts,
            "rejects": scan.count_rejects(self.facts),
            "shards": [
                {
                    "name": name,
                    "sha256": files.sha256_file(directory / name),
                    "num_examples": shard.num_examples,
                }
                for name, shard in zip(names, plan.shards, strict=True)
            ],
            "warnings": sources.simulation_warnings(self.sources) + plan.warnings,
        }


def check_disjoint(ids: dict[str, np.ndarray], *, what: str = "read_id") -> None:
    """Raises: StageFailedError when an id is twice in a split or in two of them."""
    everything = np.concatenate(list(ids.values()))
    unique, counts = np.unique(everything, return_counts=True)
    if len(unique) == len(everything):
        return
    twice = unique[counts > 1]
    where = [split for split, of_split in ids.items() if np.isin(twice[0], of_split)]
    raise StageFailedError(
        f"{len(twice):,} {what}s are twice in the dataset, such as {twice[0].decode()} in "
        f"{' and '.join(where)}. It was not kept; please report this."
    )
