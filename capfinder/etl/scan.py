"""Pass one: every row's identity, every reject, every file's checksum, without parsing a number."""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capfinder import log
from capfinder.errors import InputError
from capfinder.etl import csv_reader, hashing, sources
from capfinder.etl.csv_files import Block, is_gzip, read_blocks
from capfinder.etl.csv_reader import Reject
from capfinder.etl.identities import (
    CONFLICT,
    DUPLICATE,
    KEEP,
    Identities,
    find_duplicates,
    records_of,
)
from capfinder.etl.quality import RunStatistics
from capfinder.etl.rejects import CONFLICTING_CLASSES, DUPLICATE_READ_ID, Rejects
from capfinder.etl.sources import Source
from capfinder.etl.spill import Spill
from capfinder.etl.stream import BLOCK_BYTES, map_in_order, merge

READS_PER_PART = 1 << 17  # of the identities: 40 MB of memory while one part is gone through
LINES_PER_SEGMENT = 1 << 17
_BAD = np.dtype([("begin", "<i8"), ("id_bytes", "u1"), ("line", "<i8"), ("verdict", "i1")])
_NAMED_AT_ONCE = 10_000
_REASONS = {DUPLICATE: DUPLICATE_READ_ID, CONFLICT: CONFLICTING_CLASSES}


@dataclass
class FileFacts:
    """What pass one learns of one file. `run`: its identity, from the content of its good rows
    whatever their order; `unique`: good rows that are no duplicates."""

    sha256: str = ""
    run: str = ""
    rows: int = 0
    unique: int = 0


@dataclass(frozen=True)
class ScannedBlock:
    """records (n,) of identities.IDENTITY, samples (n,) of their signals; all rows counted."""

    records: np.ndarray
    samples: np.ndarray
    rejects: list[Reject]
    rows: int


@dataclass(frozen=True)
class Scanned:
    """All that pass one found."""

    identities: Identities
    facts: list[FileFacts]
    rejects: Rejects
    statistics: RunStatistics


ScanFiles = Callable[..., Generator[tuple[int, ScannedBlock | None]]]  # as scan_files below


def scan(block: Block, *, file: int, cap_class: int, seed: int) -> ScannedBlock:
    """One block of the file number `file`, whose class is `cap_class`."""
    rows, rejects, count = csv_reader.scan_block(block, cap_class=cap_class)
    hashes = hashing.keyed_hash(rows.read_id, seed=seed)
    return ScannedBlock(records_of(rows, hashes, file), rows.samples, rejects, count)


def scan_files(
    found: Sequence[Source], facts: Sequence[FileFacts], *, seed: int
) -> Generator[tuple[int, ScannedBlock | None]]:
    """A file's number and one of its blocks, in their order; None at its end, when the sha256 of
    its facts is set. Files may come side by side."""
    total = sum(source.size for source in found)

    def blocks(number: int) -> Generator[tuple[int, Block | None, int]]:
        digest, seen = hashlib.sha256(), 0
        path = found[number].path
        for block, position in read_blocks(path, block_bytes=BLOCK_BYTES, digest=digest):
            yield number, block, position - seen
            seen = position
        facts[number].sha256 = digest.hexdigest()
        yield number, None, 0  # the file's end

    def scan_one(item: tuple[int, Block | None, int]) -> tuple[int, ScannedBlock | None, int]:
        number, block, size = item
        if block is None:
            return number, None, 0
        scanned = scan(block, file=number, cap_class=found[number].cap_class, seed=seed)
        return number, scanned, size

    with log.progress_bytes("Reading CSV files", total=total) as bar:
        streams = [functools.partial(blocks, number) for number in range(len(found))]
        for number, scanned, size in map_in_order(scan_one, merge(streams)):
            yield number, scanned
            bar.advance(size)


def scan_sources(
    found: Sequence[Source],
    *,
    scan_files: ScanFiles,
    reads: int,
    seed: int,
    max_reject_fraction: float,
    scratch: Path,
) -> Scanned:
    """Reads every file once. Duplicates, in one class or in two, are among the rejects already.

    scan_files: the engine's; reads: about how many there are.
    Raises: InputError when a file has more rejects than allowed, duplicates counted, or a read is
    in both directories."""
    facts = [FileFacts() for _ in found]
    identities = Identities(scratch, parts=max(1, -(-reads // READS_PER_PART)))
    rejects = Rejects(scratch, found)
    statistics = RunStatistics(len(found))
    runs = np.zeros((len(found), 2), np.uint64)
    with contextlib.closing(scan_files(found, facts, seed=seed)) as blocks:
        for number, scanned in blocks:
            if scanned is None:
                rejects.check(number, facts[number].rows, max_reject_fraction)
                continue
            facts[number].rows += scanned.rows
            rejects.add(number, scanned.rejects)
            statistics.add_lengths(number, scanned.samples)
            # Modulo 2**64: a checksum that doesn't hang on the order of rows.
            runs[number] += scanned.records["content"].sum(axis=0, dtype=np.uint64)
            identities.add(scanned.records)
    for number, (source, fact) in enumerate(zip(found, facts, strict=True)):
        source.check_unchanged()
        fact.run = "{:016x}{:016x}".format(*runs[number].tolist())
    scanned_all = Scanned(identities, facts, rejects, statistics)
    _reject_duplicates(scanned_all, found, scratch, max_reject_fraction)
    return scanned_all


def run_ranks(facts: Sequence[FileFacts]) -> np.ndarray:
    """(files,) the rank of each file's run identity: an order that doesn't hang on file names."""
    return np.unique([fact.run for fact in facts], return_inverse=True)[1]


def segment_of(file: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Part (n,) int64 of a Spill for rows in the order of the files: their file, then their place
    in it. file, line (n,)."""
    return file.astype(np.int64) << 32 | line // LINES_PER_SEGMENT


def file_of_segment(segment: int) -> int:
    return segment >> 32


def unique_reads(
    scanned: Scanned, found: Sequence[Source]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each part of the identities its number, its records in `hash_order` and the verdict on
    each: KEEP, DUPLICATE or CONFLICT."""
    label = np.array([source.label for source in found])
    ranks = run_ranks(scanned.facts)
    for part, records in scanned.identities:
        file = records["file"]
        yield part, records, find_duplicates(records, label[file], ranks[file])


def _reject_duplicates(
    scanned: Scanned, found: Sequence[Source], scratch: Path, max_reject_fraction: float
) -> None:
    """Raises: InputError when a read is in both directories, or a file has too many rejects."""
    is_test = np.array([source.is_test for source in found])
    unique = np.zeros(len(found), np.int64)
    # A packed file is unpacked from its beginning each time: it isn't gone to twice.
    is_packed = np.array([is_gzip(source.path) for source in found])
    shared = _SharedReads(found)
    bad = Spill(scratch, "duplicates", _BAD)
    for _, records, verdict in unique_reads(scanned, found):
        if is_test.any():
            shared.add(records, is_test[records["file"]])
        unique += np.bincount(records["file"][verdict == KEEP], minlength=len(found))
        is_bad = verdict != KEEP
        file = records["file"][is_bad]
        named = np.empty(int(is_bad.sum()), _BAD)
        for name in ("begin", "id_bytes", "line"):
            named[name] = records[name][is_bad]
        named["verdict"] = verdict[is_bad]
        bad.add(segment_of(file, named["line"] * ~is_packed[file]), named)
    shared.check()
    for fact, count in zip(scanned.facts, unique.tolist(), strict=True):
        fact.unique = count
    for number, parts in itertools.groupby(bad.parts(), file_of_segment):
        segments = list(parts)
        count = sum(bad.counts[segment] for segment in segments)
        rows = scanned.facts[number].rows
        for segment in segments:
            records = bad.take(segment)
            records = records[np.argsort(records["begin"])]
            if scanned.rejects.are_too_many(number, rows, max_reject_fraction, more=count):
                _name_duplicates(scanned.rejects, number, found[number], records[:1])
                scanned.rejects.check(number, rows, max_reject_fraction, more=count - 1)
            _name_duplicates(scanned.rejects, number, found[number], records)
            count -= len(records)


def _name_duplicates(rejects: Rejects, number: int, source: Source, records: np.ndarray) -> None:
    texts = sources.read_ids_of(source, records)
    for start in range(0, len(records), _NAMED_AT_ONCE):
        part = records[start : start + _NAMED_AT_ONCE]
        rejects.add(
            number,
            [
                Reject(line, text, _REASONS[kind])
                for line, text, kind in zip(
                    part["line"].tolist(), texts, part["verdict"].tolist(), strict=False
                )
            ],
        )


class _SharedReads:
    """Reads that are in the directory of the training data and in that of the test data."""

    def __init__(self, found: Sequence[Source]) -> None:
        self._sources = found
        self._count = 0
        self._example: tuple[np.void, np.void] | None = None

    def add(self, records: np.ndarray, is_test: np.ndarray) -> None:
        both = np.intersect1d(records["identity"][is_test], records["identity"][~is_test])
        if len(both) and self._example is None:
            rows = np.flatnonzero(records["identity"] == both[0])
            self._example = (records[rows[~is_test[rows]][0]], records[rows[is_test[rows]][0]])
        self._count += len(both)

    def check(self) -> None:
        if self._example is None:
            return
        places = [f"{self._sources[row['file']].path}, line {row['line']}" for row in self._example]
        first = np.array([self._example[0]])
        read_id = next(sources.read_ids_of(self._sources[first["file"][0]], first))
        raise InputError(
            f"{self._count:,} reads are both in etl_params.caps_data_dir and in "
            f"split_params.test_caps_data_dir, such as read_id {read_id} ({places[0]}; "
            f"{places[1]}). Remove them from one of the two."
        )
