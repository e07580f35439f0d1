"""What a build will take, before it starts: from the first rows of each file."""

import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capfinder import log
from capfinder.errors import InputError
from capfinder.etl import splits
from capfinder.etl.csv_files import is_gzip, read_blocks
from capfinder.etl.csv_reader import parse_signals, scan_block
from capfinder.etl.identities import IDENTITY
from capfinder.etl.parents import metadata_of
from capfinder.etl.plan import CHOSEN, RECORD_EXTRA_BYTES, SplitRules
from capfinder.etl.sources import Source
from capfinder.etl.stream import BLOCK_BYTES, worker_count
from capfinder.log import logger
from capfinder.stages.etl_build import EtlSettings

SAMPLE_BLOCKS = 4  # of a compressed file, to see how much text its bytes hold
SAMPLE_ROWS = 1000  # parsed, to see how fast that is: of short rows a block holds 100,000
SPARE_BYTES = 50_000_000
SURE = 10  # no estimate is so many times too low
WRITE_READS_PER_SECOND = 100_000  # buckets, shards and their check, a slow disk


@dataclass(frozen=True)
class Estimate:
    """text_bytes: of all files, decompressed; disk_bytes: needed at the worst moment."""

    files: int
    file_bytes: int
    text_bytes: int
    reads: int
    chosen: int
    seconds: float
    disk_bytes: int

    def check_space(self, directory: Path) -> None:
        """Raises: InputError when the disk of `directory` has too little space left."""
        free = shutil.disk_usage(directory).free
        logger.info(
            "Input: %d files, %s, about %s reads of which %s are used; about %s on %d processors; "
            "needs %s of disk (%s free)",
            self.files,
            log.format_bytes(self.file_bytes),
            f"{self.reads:,}",
            f"{self.chosen:,}",
            log.format_seconds(max(self.seconds, 1.0)),
            worker_count(),
            log.format_bytes(self.disk_bytes),
            log.format_bytes(free),
        )
        if free < self.disk_bytes:
            raise InputError(
                f"{directory}: the dataset of about {self.chosen:,} reads needs "
                f"{log.format_bytes(self.disk_bytes)} of disk, {log.format_bytes(free)} are free. "
                "Free some space, choose a shared_params.output_dir on another disk, or lower "
                "etl_params.examples_per_class."
            )


def estimate(found: Sequence[Source], settings: EtlSettings) -> Estimate:
    """Looks at the first rows of each file, and times the work on those of the first."""
    reads = np.zeros(settings.rules.num_classes)
    tested, text_bytes = 0.0, 0.0
    for source in found:
        text, rows = _size(source)
        text_bytes += text
        if source.is_test:
            tested += rows
        else:
            reads[source.label] += rows
    _check_splits(found, reads, settings.rules)
    limit = settings.rules.examples_per_class or np.inf
    if not settings.rules.keep_all:
        limit = min(limit, reads.min())
    chosen = float(np.minimum(reads, limit).sum()) + tested
    total = float(reads.sum()) + tested
    scan_rate, parse_rate = _rates(found[0], settings)
    per_read = text_bytes / max(total, 1)
    seconds = (
        text_bytes / scan_rate / worker_count()
        + chosen * per_read / parse_rate / worker_count()
        + chosen / WRITE_READS_PER_SECOND
    )
    # At the worst the identities, the plan, and two copies of the signals are on the disk: buckets
    # and shards, later shards and the cache that training reads.
    record = settings.record_bytes + RECORD_EXTRA_BYTES
    disk = total * IDENTITY.itemsize + chosen * (2 * CHOSEN.itemsize + 2 * record) + SPARE_BYTES
    return Estimate(
        files=len(found),
        file_bytes=sum(source.size for source in found),
        text_bytes=int(text_bytes),
        reads=int(total),
        chosen=int(chosen),
        seconds=seconds,
        disk_bytes=int(disk),
    )


def _check_splits(found: Sequence[Source], reads: np.ndarray, rules: SplitRules) -> None:
    """What is sure to fail after hours of reading; reads (C,) of each class, about.

    Raises: InputError, as it would then be."""
    fitted = [source for source in found if not source.is_test]
    has_test_dir = len(fitted) < len(found)
    if rules.group_by == "file":
        files = np.bincount([source.label for source in fitted], minlength=rules.num_classes)
        splits.check_groups(files.tolist(), has_test_dir=has_test_dir, kind="file")
    elif rules.group_by == "parent_read":
        metadata_of(sorted({source.path.parent for source in found}))
    else:
        most = SURE * int(reads.min()) + SURE
        train, *_ = splits.split_counts(
            most,
            train_test_fraction=rules.train_test_fraction,
            train_val_fraction=rules.train_val_fraction,
            has_test_dir=has_test_dir,
        )
        if not train:
            raise InputError(
                f"class {reads.argmin()} has fewer than {most:,} reads, and of so few none would "
                "be left for training. Add reads, or raise shared_params.train_test_fraction or "
                "train_val_fraction."
            )


def _size(source: Source) -> tuple[float, float]:
    """About how many bytes of text and how many rows a file has."""
    is_packed = is_gzip(source.path)
    blocks = read_blocks(source.path, block_bytes=BLOCK_BYTES)
    sample = list(itertools.islice(blocks, SAMPLE_BLOCKS if is_packed else 1))
    text = sum(len(block.data) for block, _ in sample)
    rows = sum(block.data.count(b"\n") for block, _ in sample)
    growth = text / max(sample[-1][1], 1) if is_packed else 1.0
    whole = max(source.size * growth, text)
    return whole, whole / max(text, 1) * rows


def _rates(source: Source, settings: EtlSettings) -> tuple[float, float]:
    """Bytes per second of one processor in pass one and in pass two."""
    block, _ = next(read_blocks(source.path, block_bytes=BLOCK_BYTES))
    seconds = []
    for _ in range(2):  # the first call may compile
        started = time.perf_counter()
        rows, _, _ = scan_block(block, cap_class=source.cap_class)
        scanned = time.perf_counter()
        starts, ends = (each[:SAMPLE_ROWS] - block.offset for each in (rows.start, rows.end))
        parse_signals(
            block.data,
            starts,
            ends,
            target_length=settings.target_length,
            dtype=settings.dtype,
        )
        seconds = [scanned - started, time.perf_counter() - scanned]
    parsed = int((ends - starts).sum()) or len(block.data)
    return len(block.data) / max(seconds[0], 1e-6), parsed / max(seconds[1], 1e-6)
