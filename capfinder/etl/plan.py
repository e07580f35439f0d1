"""Which good reads are used, in which split, shard and place: decided before any is parsed.

The reads pass through here three times, each time in the order of another hash: to be chosen, to
be split, to be placed. A part of them is in memory at a time, and a count for each run and class;
splitting by parent read adds some 75 bytes for each parent."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capfinder.data.records import SPLITS
from capfinder.errors import InputError
from capfinder.etl import hashing, scan, sources, splits
from capfinder.etl.identities import HASHES, KEEP, PLACE_IN_FILE, hash_order
from capfinder.etl.parents import Parents
from capfinder.etl.scan import Scanned
from capfinder.etl.sources import Source
from capfinder.etl.spill import Spill, part_of_hash

SHARD_BYTES = 64_000_000  # a shard is written from memory
RECORD_EXTRA_BYTES = 128  # of a record, beside its signal
READS_PER_PART = 1 << 16  # chosen reads that are in memory at a time
# A chosen read: label is its class in the dataset, assigned an index into SPLITS, group what must
# not cross splits (0 when split by read), shard an index into Plan.shards, place that in the shard.
CHOSEN = np.dtype(
    [
        *HASHES,
        *PLACE_IN_FILE,
        ("label", "<i4"),
        ("assigned", "i1"),
        ("group", "<u8"),
        ("shard", "<i4"),
        ("place", "<i4"),
    ]
)


@dataclass(frozen=True)
class SplitRules:
    """The settings that decide selection and splits; examples_per_class None: the smallest class's
    size, or no limit with keep_all."""

    num_classes: int
    examples_per_class: int | None
    train_test_fraction: float
    train_val_fraction: float
    keep_all: bool
    group_by: str
    seed: int


@dataclass(frozen=True)
class Shard:
    split: str
    index: int
    num_shards: int
    num_examples: int


@dataclass(frozen=True)
class Plan:
    """`rows`: the chosen reads, records of CHOSEN in parts by their place in the files. counts
    (3, C) reads of each split and class, checksums (3, C) uint64 the sums of their IDENTITY words;
    chosen_of_file: reads used of each source; id_bytes: of the longest read_id."""

    rows: Spill
    shards: list[Shard]
    counts: np.ndarray
    checksums: np.ndarray
    chosen_of_file: np.ndarray
    id_bytes: int
    examples_per_class: dict[int, int]
    warnings: list[str]


def make_plan(
    scanned: Scanned,
    found: Sequence[Source],
    *,
    parents: Parents | None,
    rules: SplitRules,
    record_bytes: int,
    scratch: Path,
    times: int = 1,
) -> Plan:
    """parents: needed when rules.group_by is "parent_read"; times: as many times the reads wanted,
    where there are so many.

    Raises: InputError when a class has too few reads or groups for its splits."""
    return _Planner(scanned, found, parents, rules, times, scratch).plan(record_bytes)


class _Planner:
    def __init__(
        self,
        scanned: Scanned,
        found: Sequence[Source],
        parents: Parents | None,
        rules: SplitRules,
        times: int,
        scratch: Path,
    ) -> None:
        self.scanned, self.sources, self.parents = scanned, found, parents
        self.rules, self.scratch = rules, scratch
        self.label = np.array([source.label for source in found])
        self.is_test = np.array([source.is_test for source in found])
        self.run = scan.run_ranks(scanned.facts)  # of each file
        self.groups = self._groups_of_runs()
        unique = np.array([fact.unique for fact in scanned.facts])
        fitted = ~self.is_test
        self.available = np.bincount(
            self.label[fitted], unique[fitted], minlength=rules.num_classes
        ).astype(np.int64)
        _check_available(self.available, scanned)
        wanted, self.warnings = _quota(self.available, rules)
        self.quota = np.minimum(np.array(wanted) * times, self.available).tolist()
        self.share = np.zeros(len(self.run), np.int64)  # of each run, by its rank
        for label, wanted in enumerate(self.quota):
            of_class = fitted & (self.label == label)
            in_run = np.bincount(self.run[of_class], unique[of_class]).astype(np.int64)
            runs = np.unique(self.run[of_class])
            self.share[runs] = splits.share_evenly(in_run[runs].tolist(), wanted)
        self.counts_of_class = [
            splits.split_counts(
                reads,
                train_test_fraction=rules.train_test_fraction,
                train_val_fraction=rules.train_val_fraction,
                has_test_dir=bool(self.is_test.any()),
            )
            for reads in self.quota
        ]
        chosen = sum(self.quota) + int(unique[self.is_test].sum())
        self.parts = -(-chosen // READS_PER_PART)

    def plan(self, record_bytes: int) -> Plan:
        placing = Spill(self.scratch, "to-place", CHOSEN)
        counts = np.zeros((len(SPLITS), self.rules.num_classes), np.int64)
        checksums = np.zeros(counts.shape, np.uint64)
        chosen_of_file = np.zeros(len(self.sources), np.int64)
        id_bytes = 1
        for reads in self._split():
            np.add.at(counts, (reads["assigned"], reads["label"]), 1)
            np.add.at(checksums, (reads["assigned"], reads["label"]), reads["identity"])
            chosen_of_file += np.bincount(reads["file"], minlength=len(self.sources))
            id_bytes = max(id_bytes, int(reads["id_bytes"].max(initial=1)))
            placing.add(part_of_hash(reads["order"], self.parts), reads)
        _check_counts(counts, has_test_dir=bool(self.is_test.any()))
        rows, shards = self._place(placing, counts, record_bytes)
        per_class = dict(enumerate(self.quota))
        return Plan(
            rows, shards, counts, checksums, chosen_of_file, id_bytes, per_class, self.warnings
        )

    def _chosen(self) -> Iterator[np.ndarray]:
        """The reads used, records of CHOSEN; those of the test directory are in TEST already."""
        before = np.zeros(len(self.run), np.int64)
        for part, records, verdict in scan.unique_reads(self.scanned, self.sources):
            records = records[verdict == KEEP]
            run, is_test = self.run[records["file"]], self.is_test[records["file"]]
            is_used = is_test | (splits.running_ranks(run, before) < self.share[run])
            reads = np.zeros(int(is_used.sum()), CHOSEN)
            for name, *_ in (*HASHES, *PLACE_IN_FILE):
                reads[name] = records[name][is_used]
            reads["label"] = self.label[reads["file"]]
            reads["assigned"] = np.where(is_test[is_used], splits.TEST, -1)
            if self.parents is not None:
                reads["group"] = self.parents.of(part, reads)
            elif self.groups is not None:
                reads["group"] = self.groups[run[is_used]]
            yield reads
        if self.parents is not None:
            self.parents.check_complete()

    def _groups_of_runs(self) -> np.ndarray | None:
        """group of each run by its rank, when runs must not cross splits."""
        if self.rules.group_by != "file":
            return None
        names = np.unique([fact.run.encode() for fact in self.scanned.facts])
        return hashing.keyed_hash(names, seed=self.rules.seed)[:, hashing.SPLIT]

    def _split(self) -> Iterator[np.ndarray]:
        """The reads used, `assigned` to a split each."""
        if self.rules.group_by == "file":
            return self._split_by_file()
        if self.rules.group_by == "parent_read":
            return self._split_by_parent()
        return self._split_by_read()

    def _split_by_read(self) -> Iterator[np.ndarray]:
        waiting = Spill(self.scratch, "to-split", CHOSEN)
        for reads in self._chosen():
            waiting.add(part_of_hash(reads["split"], self.parts), reads)
        before = np.zeros(self.rules.num_classes, np.int64)
        for part in waiting.parts():
            reads = waiting.take(part)
            is_test = reads["assigned"] == splits.TEST
            yield reads[is_test]
            reads = reads[~is_test]
            reads = reads[hash_order(reads["split"], reads["identity"])]
            rank = splits.running_ranks(reads["label"], before)
            reads["assigned"] = splits.split_of_rank(rank, reads["label"], self.counts_of_class)
            yield reads

    def _split_by_file(self) -> Iterator[np.ndarray]:
        groups = self.groups
        assert groups is not None
        fitted = np.unique(self.run[~self.is_test])
        fitted = fitted[self.share[fitted] > 0]
        by_hash = fitted[np.argsort(groups[fitted])]
        label_of_run = np.zeros(len(groups), np.int64)
        label_of_run[self.run] = self.label
        assigned = np.full(len(groups), splits.TEST, np.int8)
        assigned[by_hash] = splits.split_groups(
            np.arange(len(by_hash)),
            label_of_run[by_hash],
            self.share[by_hash],
            self.counts_of_class,
            has_test_dir=bool(self.is_test.any()),
            kind="file",
        )
        for reads in self._chosen():
            reads["assigned"] = assigned[self.run[reads["file"]]]
            yield reads

    def _split_by_parent(self) -> Iterator[np.ndarray]:
        waiting = Spill(self.scratch, "to-split", CHOSEN)
        for reads in self._chosen():
            waiting.add(part_of_hash(reads["group"], self.parts), reads)
        groups: list[np.ndarray] = []
        entries: list[np.ndarray] = []
        first = 0
        for part in waiting.parts():
            reads = waiting.read(part)
            self._check_apart(reads)
            fitted = reads[reads["assigned"] != splits.TEST]
            group, index = np.unique(fitted["group"], return_inverse=True)
            entry, size = np.unique(
                np.stack([index + first, fitted["label"]]), axis=1, return_counts=True
            )
            first += len(group)
            groups.append(group)
            entries.append(np.concatenate([entry, size[None]]).astype(np.int32))
        every_group = np.concatenate(groups)
        index, label, size = np.concatenate(entries, axis=1)
        assigned = splits.split_groups(
            index,
            label,
            size,
            self.counts_of_class,
            has_test_dir=bool(self.is_test.any()),
            kind="parent_read",
        )
        for part in waiting.parts():
            reads = waiting.take(part)
            is_fitted = reads["assigned"] != splits.TEST
            at = np.searchsorted(every_group, reads["group"][is_fitted])
            reads["assigned"][is_fitted] = assigned[at]
            yield reads

    def _check_apart(self, reads: np.ndarray) -> None:
        is_test = reads["assigned"] == splits.TEST
        both = np.intersect1d(reads["group"][is_test], reads["group"][~is_test])
        if len(both):
            row = reads[is_test][reads["group"][is_test] == both[0]][:1]
            read_id = next(sources.read_ids_of(self.sources[int(row["file"][0])], row))
            raise InputError(
                f"split_params.group_by=parent_read: the parent of read_id {read_id}, in "
                "split_params.test_caps_data_dir, has reads in etl_params.caps_data_dir too. "
                "Remove them from one of the two."
            )

    def _place(
        self, placing: Spill, counts: np.ndarray, record_bytes: int
    ) -> tuple[Spill, list[Shard]]:
        bounds = [
            splits.shard_bounds(
                int(reads),
                reads_per_shard=max(1, SHARD_BYTES // (record_bytes + RECORD_EXTRA_BYTES)),
                num_classes=self.rules.num_classes,
            )
            for reads in counts.sum(axis=1)
        ]
        shards = [
            Shard(split, index, len(ends) - 1, end - start)
            for split, ends in zip(SPLITS, bounds, strict=True)
            for index, (start, end) in enumerate(itertools.pairwise(ends))
        ]
        first_shard = np.cumsum([0, *(len(ends) - 1 for ends in bounds)])
        rows = Spill(self.scratch, "planned", CHOSEN)
        before = np.zeros(counts.size, np.int64)
        for part in placing.parts():
            reads = placing.take(part)
            reads = reads[hash_order(reads["order"], reads["identity"])]
            within = reads["assigned"].astype(np.int64) * self.rules.num_classes + reads["label"]
            rank = splits.running_ranks(within, before)
            for split in range(len(SPLITS)):
                here = reads["assigned"] == split
                position = splits.position_of_rank(rank[here], reads["label"][here], counts[split])
                shard = np.searchsorted(bounds[split][1:], position, side="right")
                reads["shard"][here] = first_shard[split] + shard
                reads["place"][here] = position - np.array(bounds[split])[shard]
            rows.add(scan.segment_of(reads["file"], reads["line"]), reads)
        return rows, shards


def _quota(available: np.ndarray, rules: SplitRules) -> tuple[list[int], list[str]]:
    """Reads to use of each class, and what to say about it."""
    smallest = int(available.argmin())
    limit = rules.examples_per_class
    if rules.keep_all:
        return [int(have) if limit is None else min(int(have), limit) for have in available], []
    wanted = int(available.min()) if limit is None else limit
    if wanted <= available.min():
        return [wanted] * rules.num_classes, []
    have = int(available.min())
    return [have] * rules.num_classes, [
        f"etl_params.examples_per_class={wanted}, but class {smallest} has only {have:,} good "
        f"reads: {have:,} of each class are used."
    ]


def _check_available(available: np.ndarray, scanned: Scanned) -> None:
    empty = ", ".join(map(str, np.flatnonzero(available == 0).tolist()))
    if empty:
        found = [f"{count:,} {reason}" for reason, count in scanned.rejects.counts().items()]
        raise InputError(
            f"class {empty} has no good reads. Rejected rows of all classes: {', '.join(found)}. "
            "Correct the files."
        )


def _check_counts(counts: np.ndarray, *, has_test_dir: bool) -> None:
    for label, (train, validation, test) in enumerate(counts.T.tolist()):
        if min(train, validation, test) < 1:
            raise InputError(
                f"class {label} gets {train} reads for training, {validation} for validation and "
                f"{test} for testing; each needs at least one. "
                + (
                    "Add good reads to split_params.test_caps_data_dir."
                    if has_test_dir and not test
                    else "Add reads, raise etl_params.examples_per_class, or change "
                    "shared_params.train_test_fraction or train_val_fraction."
                )
            )
