"""Bytes of cap-signal CSV files, plain or gzipped: blocks of whole lines, ranges of chosen rows."""

import contextlib
import gzip
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip, igzip_lib

from capfinder.errors import InputError

_NEWLINE = 10  # compared by numpy: a tenth of the time that bytes.count takes
HEADER = b"read_id,cap_class,timeseries"
MAX_ROW_BYTES = 4096 * 4096  # as Capfinder 0.4.3's csv.field_size_limit
HEAD_BYTES = 4096  # of a line beyond MAX_ROW_BYTES, enough to name its read

# Any: isal's stubs take the class for one of its instances.
_DAMAGED: Any = (EOFError, gzip.BadGzipFile, igzip_lib.IsalError)


@dataclass(frozen=True)
class Block:
    """Whole lines of a file. `offset`: bytes before them in the (decompressed) file; `line`: number
    of the first; `is_head`: one line beyond MAX_ROW_BYTES, of which `data` is only the start."""

    data: bytes
    offset: int
    line: int
    is_head: bool = False


class _Hashed(io.RawIOBase):
    """A file whose bytes, as they lie on disk, pass through `digest`; `position` counts them."""

    def __init__(self, path: Path, digest: Any) -> None:
        self._file = path.open("rb", buffering=0)
        self._digest = digest
        self.position = 0

    def readable(self) -> bool:
        return True

    def start_at(self, offset: int) -> None:
        """Goes there before the first byte is read."""
        self.position = self._file.seek(offset)

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        if self._digest is not None:
            self._digest.update(memoryview(buffer)[:count])
        self.position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise InputError(
            f"{path}: can't be decompressed ({error}). Copy or compress the file again."
        ) from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from None


def is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _unpacked(path: Path, file: io.BufferedIOBase) -> Any:
    """igzip, as gzip takes three times as long: 170 MB/s of text a core, igzip 550."""
    return igzip.IGzipFile(fileobj=file) if is_gzip(path) else file


def read_blocks(
    path: Path, *, block_bytes: int, digest: Any = None, begin: tuple[int, int] | None = None
) -> Iterator[tuple[Block, int]]:
    """The file behind its header in blocks of about `block_bytes`, each with the bytes read from
    disk so far. Read to its end, the whole file has gone through `digest` (a hashlib object).

    begin: a block's offset and line, to start there; what lies before isn't read, of a gzipped
    file only decompressed. No digest then.
    Raises: InputError when the file is empty, has another header or can't be read."""
    if begin is not None:
        yield from _blocks_from(path, block_bytes, *begin)
        return
    with _readable(path), _Hashed(path, digest) as raw:
        buffered = io.BufferedReader(raw, buffer_size=1 << 20)
        stream = _unpacked(path, buffered)
        for block in _whole_lines(path, stream, block_bytes):
            yield block, raw.position
        while buffered.read(1 << 20):  # what may follow gzip's own end
            pass


def _blocks_from(
    path: Path, block_bytes: int, offset: int, line: int
) -> Iterator[tuple[Block, int]]:
    with _readable(path), _Hashed(path, None) as raw:
        if not is_gzip(path):
            raw.start_at(offset)
        stream = _unpacked(path, io.BufferedReader(raw, buffer_size=1 << 20))
        if is_gzip(path):
            _skip(stream, offset)
        for block in whole_lines(stream, block_bytes, offset=offset, line=line):
            yield block, raw.position


def _skip(stream: Any, size: int) -> None:
    while size and (part := stream.read(min(size, 1 << 20))):
        size -= len(part)


def _whole_lines(path: Path, stream: Any, block_bytes: int) -> Iterator[Block]:
    first = stream.readline(HEAD_BYTES)
    check_header(path, first)
    yield from whole_lines(stream, block_bytes, offset=len(first), line=2)


def text_blocks(path: Path, *, block_bytes: int) -> Iterator[bytes]:
    """A CSV file of any kind, its header too, in blocks of about `block_bytes` that end with a row:
    a line end within quotes is none.

    Raises: InputError when it can't be read."""
    with _readable(path), path.open("rb") as raw:
        waiting = b""
        for block in whole_lines(_unpacked(path, raw), block_bytes, offset=0, line=1):
            waiting += block.data
            if waiting.count(b'"') % 2 == 0:
                yield waiting
                waiting = b""
        if waiting:
            yield waiting


def whole_lines(stream: Any, block_bytes: int, *, offset: int, line: int) -> Iterator[Block]:
    """The rest of a stream, which is at the byte `offset`, where line number `line` begins."""
    rest = b""
    while chunk := stream.read(block_bytes):
        data = rest + chunk
        cut = data.rfind(b"\n") + 1
        if not cut and len(data) > MAX_ROW_BYTES:
            yield Block(data[:HEAD_BYTES], offset, line, is_head=True)
            offset += len(data) + _skip_line(stream)
            line, rest = line + 1, b""
            continue
        rest = data[cut:]
        if cut:
            yield Block(data[:cut], offset, line)
            line += count_line_ends(data)
            offset += cut
    if rest:
        yield Block(rest, offset, line)


def count_line_ends(data: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == _NEWLINE))


def line_of(path: Path, number: int, *, block_bytes: int = 1 << 20) -> bytes:
    """Line `number` of the file, from 2 on, without its end; b"" if it isn't there. Reads all that
    lies before.

    Raises: InputError as read_blocks."""
    for block, _ in read_blocks(path, block_bytes=block_bytes):
        lines = count_line_ends(block.data) + (not block.data.endswith(b"\n"))
        if number < block.line + lines:
            return block.data.split(b"\n")[number - block.line].removesuffix(b"\r")
    return b""


def _skip_line(stream: Any) -> int:
    """Reads past the next line end; returns how many bytes that took."""
    size = 0
    while part := stream.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def check_header(path: Path, first: bytes) -> None:
    """first: line 1, or the start of it. Raises: InputError when it isn't the header."""
    if not first:
        raise InputError(f"{path}: is empty; expected the header {HEADER.decode()} and rows")
    names = first.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").removesuffix(b"\r")
    if names.replace(b'"', b"") != HEADER:
        found = first[:80].decode("utf-8", "replace").rstrip("\r\n")
        raise InputError(
            f"{path}, line 1: found {found!r}, expected the header {HEADER.decode()}. "
            "Correct the file or move it elsewhere."
        )


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes start..end of the decompressed file for each of the ascending `ranges`."""
    with _readable(path), path.open("rb") as raw:
        stream = _unpacked(path, raw)
        for start, end in ranges:
            stream.seek(start)
            yield stream.read(end - start)
