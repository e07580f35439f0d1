"""A dataset version in the form that is uploaded: an uncompressed tar cut in parts, and an index.

`cat cap_data.tar.* | tar x` opens it as well. What is downloaded is trusted in nothing: every
part, member and shard must be what the index and the manifest say, and nothing else is written.
"""

import hashlib
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from capfinder import files, log
from capfinder.data import versions
from capfinder.data.artifact_check import check_unpacked, shard_digests
from capfinder.data.artifact_index import (
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    Entry,
    Index,
    chunk_name,
    is_good_name,
)
from capfinder.data.versions import Dataset
from capfinder.errors import InputError
from capfinder.log import MEGABYTE

CHUNK_BYTES = 192 * 2**20  # Comet takes files of up to 200 MiB
COPY_BYTES = 2**20


def pack(dataset: Dataset, directory: Path, *, chunk_bytes: int) -> list[Path]:
    """Writes the parts and the index into `directory` and returns their paths, the index last.

    Equal datasets give equal bytes. Hidden files are left out.
    Raises: InputError when the dataset isn't what its manifest says, or there is no room."""
    paths = {
        path.relative_to(dataset.directory).as_posix(): path
        for path in sorted(dataset.directory.rglob("*"))
        if not path.is_dir()
    }
    paths = {name: path for name, path in paths.items() if not _is_hidden(name)}
    for name, path in paths.items():
        if path.is_symlink() or not path.is_file() or not is_good_name(name):
            raise InputError(f"{path}: only plain files with plain names can be uploaded")
    total = sum(path.stat().st_size for path in paths.values())
    _check_room(directory, total, "pack the dataset for its upload")
    digests = shard_digests(dataset.manifest)
    members: list[Entry] = []
    with (
        _ChunkWriter(directory, chunk_bytes) as writer,
        log.progress_bytes(f"Packing {dataset.version}", total=total) as bar,
    ):
        for name, path in paths.items():
            member = _add(writer, name, path)
            if digests.get(name, member.sha256) != member.sha256:
                raise InputError(
                    f"{path}: isn't what {versions.MANIFEST} says (SHA-256 differs). Remove "
                    f"{dataset.directory} to have the version built again."
                )
            members.append(member)
            bar.advance(member.size)
        chunks = writer.finish()
    path = directory / INDEX
    files.write_json(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": dataset.version,
            "fingerprint": dataset.fingerprint,
            "chunks": [asdict(chunk) for chunk in chunks],
            "members": [asdict(member) for member in members],
        },
    )
    return [*(directory / chunk.name for chunk in chunks), path]


def unpack(index: Index, open_chunk: Callable[[Entry], Path], root: Path, where: str) -> Dataset:
    """Writes the version to root/<version>, whole or not at all.

    open_chunk: the path of a part, asked for one by one in order (a download, say); when the next
    is asked for, the last isn't needed any more. where: names the artifact in messages.
    Raises: InputError when anything differs from the index or the manifest."""
    target = root / index.version
    if target.exists():
        raise InputError(f"{target}: is already there; remove it to have {where} in its place")
    root.mkdir(parents=True, exist_ok=True)
    largest = max(chunk.size for chunk in index.chunks)
    _check_room(root, sum(m.size for m in index.members) + largest, f"unpack {where}")
    with files.atomic_directory(target) as partial:
        stream = _ChunkReader(index.chunks, open_chunk, where)
        left = {member.name: member for member in index.members}
        try:
            while left:
                member = _next_member(stream, left, where)
                _extract(stream, partial, member, where)
            stream.end()
        finally:
            stream.close()
        check_unpacked(
            partial,
            version=index.version,
            fingerprint=index.fingerprint,
            digests={member.name: member.sha256 for member in index.members},
            where=where,
        )
    return versions.open_dataset(target)


class _ChunkWriter:
    """Cuts what is written into files of `limit` bytes."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        self._chunks: list[Entry] = []
        self._stream: IO[bytes] | None = None
        self._size = 0

    def __enter__(self) -> "_ChunkWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def write(self, data: bytes) -> None:
        while data:
            if self._stream is None:
                self._stream = (self._directory / chunk_name(len(self._chunks))).open("wb")
                self._digest, self._size = hashlib.sha256(), 0
            part = data[: self._limit - self._size]
            self._stream.write(part)
            self._digest.update(part)
            self._size += len(part)
            data = data[len(part) :]
            if self._size == self._limit:
                self._close()

    def finish(self) -> list[Entry]:
        """The parts written, after the two empty blocks that end a tar."""
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self._close()
        return self._chunks

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            name = chunk_name(len(self._chunks))
            self._chunks.append(Entry(name, self._size, self._digest.hexdigest()))
            self._stream = None


class _ChunkReader:
    """The parts as one stream; each is checked against the index before its first byte is used."""

    def __init__(
        self, chunks: Sequence[Entry], open_chunk: Callable[[Entry], Path], where: str
    ) -> None:
        self._chunks, self._open_chunk, self._where = iter(chunks), open_chunk, where
        self._stream: IO[bytes] | None = None

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        parts: list[bytes] = []
        while size:
            part = self._stream.read(size) if self._stream else b""
            parts.append(part)
            size -= len(part)
            if not part and not self._open_next():
                raise InputError(f"{self._where}: ends too early. Nothing of it was kept.")
        return b"".join(parts)

    def end(self) -> None:
        """Raises: InputError unless the two empty blocks that end a tar are all that follows."""
        rest = self.read(2 * tarfile.BLOCKSIZE)
        if any(rest) or (self._stream and self._stream.read(1)) or self._open_next():
            raise InputError(
                f"{self._where}: holds more than its index says. Nothing of it was kept."
            )

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open_next(self) -> bool:
        self.close()
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        path = self._open_chunk(chunk)
        try:
            if path.stat().st_size != chunk.size or files.sha256_file(path) != chunk.sha256:
                raise InputError(
                    f"{self._where}: {chunk.name} is damaged (SHA-256 or size differs). Nothing of "
                    "it was kept."
                )
            self._stream = path.open("rb")
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror})") from None
        return True


def _add(writer: _ChunkWriter, name: str, path: Path) -> Entry:
    header = tarfile.TarInfo(name)
    header.size, header.mode = path.stat().st_size, 0o644
    writer.write(header.tobuf(tarfile.GNU_FORMAT))
    digest, left = hashlib.sha256(), header.size
    with path.open("rb") as stream:
        while left:
            data = stream.read(min(COPY_BYTES, left))
            if not data:
                raise InputError(f"{path}: became shorter while it was read")
            digest.update(data)
            writer.write(data)
            left -= len(data)
    writer.write(bytes(-header.size % tarfile.BLOCKSIZE))
    return Entry(name, header.size, digest.hexdigest())


def _next_member(stream: _ChunkReader, left: dict[str, Entry], where: str) -> Entry:
    """The member whose header comes next, taken out of `left`; its content follows."""
    try:
        header = tarfile.TarInfo.frombuf(
            stream.read(tarfile.BLOCKSIZE), encoding="utf-8", errors="surrogateescape"
        )
    except (tarfile.HeaderError, ValueError) as error:
        raise InputError(f"{where}: isn't a tar ({error}). Nothing of it was kept.") from None
    if header.type != tarfile.REGTYPE:
        kind = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}.get(
            header.type, "a device or the like"
        )
        raise InputError(
            f"{where}: {header.name!r} is {kind}, not a plain file. Nothing of it was kept."
        )
    member = left.pop(header.name, None)
    if member is None:
        raise InputError(
            f"{where}: {header.name!r} is there twice or not in its index. Nothing of it was kept."
        )
    if header.size != member.size:
        raise InputError(
            f"{where}: {header.name} has {header.size:,} bytes, not {member.size:,} as its index "
            "says. Nothing of it was kept."
        )
    return member


def _extract(stream: _ChunkReader, directory: Path, member: Entry, where: str) -> None:
    path = directory / member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), member.size
    with path.open("xb") as out:
        while left:
            data = stream.read(min(COPY_BYTES, left))
            digest.update(data)
            out.write(data)
            left -= len(data)
    stream.read(-member.size % tarfile.BLOCKSIZE)
    if digest.hexdigest() != member.sha256:
        raise InputError(
            f"{where}: {member.name} is damaged (SHA-256 differs). Nothing of it was kept."
        )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _check_room(directory: Path, size: int, purpose: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise InputError(
            f"{directory}: {free / MEGABYTE:,.0f} MB free, but {size / MEGABYTE:,.0f} MB are "
            f"needed to {purpose}"
        )
