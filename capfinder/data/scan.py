"""Pass one: every row's identity, every reject, every file's checksum, without parsing a number."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from capfinder import log
from capfinder.data import csv_reader, splits
from capfinder.data.csv_files import Block, read_blocks
from capfinder.data.csv_reader import Reject, Rows
from capfinder.data.sources import Source
from capfinder.data.stream import BLOCK_BYTES, map_in_order
from capfinder.errors import InputError

MEGABYTE = 1_000_000
REJECT_REASONS = {splits.DUPLICATE: "duplicate read_id", splits.CONFLICT: "conflicting classes"}


@dataclass
class FileFacts:
    """What pass one learns of one file. `run`: its identity, from the content of its good rows
    whatever their order."""

    sha256: str = ""
    run: str = ""
    rows: int = 0
    rejects: list[Reject] = field(default_factory=list)


@dataclass
class Identities:
    """The good rows of all files, one entry a read: read_id (n,) 'S', label (n,) int32, file (n,)
    int32 index into the sources, line, start, end (n,) int64 as in csv_reader.Rows, content (n, 2)
    uint64, hash (n,) uint64: the keyed hash that chooses reads."""

    read_id: np.ndarray
    label: np.ndarray
    file: np.ndarray
    line: np.ndarray
    start: np.ndarray
    end: np.ndarray
    content: np.ndarray
    hash: np.ndarray

    def __len__(self) -> int:
        return len(self.read_id)

    def take(self, index: np.ndarray) -> "Identities":
        return Identities(**{name: values[index] for name, values in vars(self).items()})


class Progress:
    """Moves a bar of megabytes by bytes."""

    def __init__(self, bar: log.Bar) -> None:
        self._bar, self._bytes = bar, 0

    def advance(self, size: int) -> None:
        before, self._bytes = self._bytes, self._bytes + size
        self._bar.advance(-(-self._bytes // MEGABYTE) + (-before // MEGABYTE))


def scan_sources(
    sources: Sequence[Source], *, seed: int, max_reject_fraction: float
) -> tuple[Identities, list[FileFacts]]:
    """Reads every file once. Duplicates, in one class or in two, are among the rejects already.

    Raises: InputError when a file has more rejects than allowed, duplicates counted."""
    facts = [FileFacts() for _ in sources]
    total = sum(source.size for source in sources)
    parts: list[tuple[int, Rows, np.ndarray]] = []

    def blocks() -> Iterator[tuple[int, Block, int]]:
        for number, source in enumerate(sources):
            digest, seen = hashlib.sha256(), 0
            for block, position in read_blocks(source.path, block_bytes=BLOCK_BYTES, digest=digest):
                yield number, block, position - seen
                seen = position
            facts[number].sha256 = digest.hexdigest()

    def scan(item: tuple[int, Block, int]) -> tuple[int, Rows, np.ndarray, list[Reject], int, int]:
        number, block, size = item
        rows, rejects, count = csv_reader.scan_block(block, cap_class=sources[number].cap_class)
        hashes = splits.keyed_hash(rows.read_id, seed=seed, purpose="choose")
        return number, rows, hashes, rejects, count, size

    runs = np.zeros((len(sources), 2), np.uint64)
    with log.progress("Reading CSV files", total=-(-total // MEGABYTE), unit="MB") as bar:
        progress, current = Progress(bar), 0
        for number, rows, hashes, rejects, count, size in map_in_order(scan, blocks()):
            if number != current:
                check_rejects(sources[current], facts[current], max_reject_fraction)
                current = number
            facts[number].rows += count
            facts[number].rejects += rejects
            runs[number] += rows.content.sum(axis=0, dtype=np.uint64)  # modulo 2**64: a checksum
            parts.append((number, rows, hashes))
            progress.advance(size)
    for source, fact, run in zip(sources, facts, runs.tolist(), strict=True):
        check_rejects(source, fact, max_reject_fraction)
        source.check_unchanged()
        fact.run = f"{run[0]:016x}{run[1]:016x}"
    return _without_duplicates(_join(parts, sources), sources, facts, max_reject_fraction), facts


def _join(parts: list[tuple[int, Rows, np.ndarray]], sources: Sequence[Source]) -> Identities:
    rows = [part[1] for part in parts]
    counts = [len(part[2]) for part in parts]
    file = np.repeat(np.array([part[0] for part in parts], np.int32), counts)
    return Identities(
        read_id=np.concatenate([part.read_id for part in rows]),
        label=np.array([source.label for source in sources], np.int32)[file],
        file=file,
        line=np.concatenate([part.line for part in rows]),
        start=np.concatenate([part.start for part in rows]),
        end=np.concatenate([part.end for part in rows]),
        content=np.concatenate([part.content for part in rows]),
        hash=np.concatenate([part[2] for part in parts]),
    )


def run_ranks(facts: Sequence[FileFacts]) -> np.ndarray:
    """(files,) the rank of each file's run identity: an order that doesn't hang on file names."""
    return np.unique([fact.run for fact in facts], return_inverse=True)[1]


def _without_duplicates(
    identities: Identities,
    sources: Sequence[Source],
    facts: list[FileFacts],
    max_reject_fraction: float,
) -> Identities:
    """Raises: InputError when a read is in both directories, or a file has too many rejects."""
    is_test = np.array([source.is_test for source in sources])[identities.file]
    _check_directories(identities, is_test, sources)
    verdict = splits.find_duplicates(
        identities.read_id,
        identities.hash,
        identities.label,
        identities.content,
        run_ranks(facts)[identities.file],
    )
    for index in np.flatnonzero(verdict != splits.KEEP).tolist():
        reject_row(identities, index, REJECT_REASONS[int(verdict[index])], facts)
    for source, fact in zip(sources, facts, strict=True):
        check_rejects(source, fact, max_reject_fraction)
    return identities.take(np.flatnonzero(verdict == splits.KEEP))


def _check_directories(
    identities: Identities, is_test: np.ndarray, sources: Sequence[Source]
) -> None:
    if not is_test.any():
        return
    both = np.intersect1d(identities.read_id[is_test], identities.read_id[~is_test])
    if len(both):
        rows = np.flatnonzero(identities.read_id == both[0])
        first, second = rows[~is_test[rows]][0], rows[is_test[rows]][0]
        places = [
            f"{sources[identities.file[row]].path}, line {identities.line[row]}"
            for row in (first, second)
        ]
        raise InputError(
            f"{len(both):,} reads are both in etl_params.caps_data_dir and in "
            f"split_params.test_caps_data_dir, such as read_id {both[0].decode()} ({places[0]}; "
            f"{places[1]}). Remove them from one of the two."
        )


def reject_row(identities: Identities, index: int, reason: str, facts: Sequence[FileFacts]) -> None:
    """Notes a row that looked good so far as a reject of its file."""
    facts[identities.file[index]].rejects.append(
        Reject(int(identities.line[index]), identities.read_id[index].decode(), reason)
    )


def check_rejects(source: Source, facts: FileFacts, max_reject_fraction: float) -> None:
    """Raises: InputError when more than the allowed share of a file's rows are rejects."""
    bad = len(facts.rejects)
    if bad <= Fraction(repr(float(max_reject_fraction))) * facts.rows:
        return
    line, read_id, reason = min(facts.rejects)
    raise InputError(
        f"{source.path}: {bad:,} of {facts.rows:,} rows rejected ({max_reject_fraction:.1%} "
        f"allowed), first at line {line}, read_id {read_id}: {reason}. Correct the file or raise "
        "etl_params.max_reject_fraction."
    )


def count_rejects(facts: Sequence[FileFacts]) -> dict[str, int]:
    """Rejects per reason, over all files."""
    return dict(sorted(Counter(reject.reason for f in facts for reject in f.rejects).items()))
