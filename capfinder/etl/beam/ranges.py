"""Pass one for Beam's workers: ranges of lines of the files, each scanned by itself.

A range doesn't know how many lines come before it: its line numbers count from its own first line,
until the launching machine adds them up."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from capfinder.etl.beam.encoding import RangeEnd
from capfinder.etl.beam.exchange import Exchange, WorkerFile, record
from capfinder.etl.csv_files import (
    HEAD_BYTES,
    check_header,
    count_line_ends,
    read_blocks,
    whole_lines,
)
from capfinder.etl.scan import ScannedBlock, scan
from capfinder.etl.stream import BLOCK_BYTES

RANGE_BYTES = 64_000_000  # some seconds of one processor


@dataclass(frozen=True)
class ScanRange:
    """The lines of file number `file` that begin in bytes start..end."""

    name: str
    file: int
    text: WorkerFile
    cap_class: int
    seed: int
    start: int
    end: int

    def findings(self) -> Iterator[ScannedBlock | RangeEnd]:
        """Raises: InputError when the file can't be read."""
        if (self.start, self.end) == (0, self.text.size):
            digest = hashlib.sha256()
            path = cast(Path, self.text)
            for block, _ in read_blocks(path, block_bytes=BLOCK_BYTES, digest=digest):
                yield scan(block, file=self.file, cap_class=self.cap_class, seed=self.seed)
            yield RangeEnd(0, digest.hexdigest())
            return
        with self.text.open("rb") as stream:
            lines = LineRange(stream, self.start, self.end)
            if self.start == 0:
                check_header(cast(Path, self.text), lines.readline(HEAD_BYTES))
            first = 2 if self.start == 0 else 1
            for block in whole_lines(lines, BLOCK_BYTES, offset=lines.position, line=first):
                yield scan(block, file=self.file, cap_class=self.cap_class, seed=self.seed)
        yield RangeEnd(lines.ended, None)


@dataclass(frozen=True)
class Digest:
    """The checksum of a file that is scanned in several ranges."""

    name: str
    text: WorkerFile

    def findings(self) -> Iterator[str]:
        with self.text.open("rb") as stream:
            digest = hashlib.sha256()
            while data := stream.read(BLOCK_BYTES):
                digest.update(data)
        yield digest.hexdigest()


class LineRange:
    """The lines that begin in bytes start..end of `stream`, as a stream that data.csv_files reads.

    position: byte of the file that comes next; ended: lines ended so far."""

    def __init__(self, stream: Any, start: int, end: int) -> None:
        self._stream, self._end, self._is_within_line = stream, end, False
        self.position, self.ended = start, 0
        if start:  # the line that `start` lies in begins before it, unless one ends just there
            stream.seek(start - 1)
            self.position -= 1
            self._is_within_line = True
            while self._is_within_line and self._pass(stream.readline(BLOCK_BYTES)):
                pass
            self.ended = 0

    def read(self, size: int) -> bytes:
        if self.position < self._end:
            return self._pass(self._stream.read(min(size, self._end - self.position)))
        return self.readline(size)

    def readline(self, size: int) -> bytes:
        """Up to `size` bytes, to the end of a line at most."""
        if self.position >= self._end and not self._is_within_line:
            return b""
        return self._pass(self._stream.readline(size))

    def _pass(self, data: bytes) -> bytes:
        self.position += len(data)
        self.ended += count_line_ends(data)
        self._is_within_line = bool(data) and not data.endswith(b"\n")
        return data


def shift(block: ScannedBlock, lines: int) -> ScannedBlock:
    """A range's block with its lines numbered as in the file; `lines` come before the range."""
    records = block.records.copy()
    records["line"] += lines
    rejects = [reject._replace(line=reject.line + lines) for reject in block.rejects]
    return replace(block, records=records, rejects=rejects)


def ranges(size: int, *, is_packed: bool) -> list[tuple[int, int]]:
    """start..end of each range of a file; what is compressed can't be entered in its middle."""
    if is_packed or size <= RANGE_BYTES:
        return [(0, size)]
    starts = [*range(0, size, RANGE_BYTES), size]
    return list(itertools.pairwise(starts))


def do(task: ScanRange | Digest, exchange: Exchange) -> None:
    """Leaves what the task finds in the exchange, unless an earlier attempt has."""
    if not exchange.has(task.name):
        record(exchange, task.name, task.findings())
