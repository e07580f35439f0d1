"""A split of a dataset version, opened: as plain arrays mapped from disk, or left in its shards.

The arrays are a cache that lies beside the version, built from the shards when it is absent and
named by the version's fingerprint. It is written as a plain file is, not through a writable map:
what a map has waiting for the disk counts as the process's memory.
"""

import fcntl
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from capfinder import files, log
from capfinder.data import records
from capfinder.errors import InputError

_CHUNK_RECORDS = 4096


@dataclass(frozen=True)
class Split:
    """One split in stored order, its arrays mapped from disk.

    signal (N, T) storage dtype; cap_class (N,) int32; length (N,) int32, samples before fitting;
    read_id (N,) UTF-8 bytes; shard_lengths: records of each shard."""

    signal: np.ndarray
    cap_class: np.ndarray
    length: np.ndarray
    read_id: np.ndarray
    shard_lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.cap_class)

    @property
    def row(self) -> tuple[int, np.dtype]:
        """(T, storage dtype) of a signal."""
        return self.signal.shape[1], self.signal.dtype

    def blocks(self) -> Iterator[records.Block]:
        """The records in stored order, some thousands at a time."""
        for start in range(0, len(self), _CHUNK_RECORDS):
            part = slice(start, start + _CHUNK_RECORDS)
            yield records.Block(
                self.signal[part], self.cap_class[part], self.read_id[part], self.length[part]
            )


@dataclass(frozen=True)
class ShardedSplit:
    """One split that stays in its shards and is read whenever it is asked for.

    shard_lengths: records of each of `paths`; row: (T, storage dtype) of a signal."""

    paths: tuple[Path, ...]
    shard_lengths: tuple[int, ...]
    row: tuple[int, np.dtype]

    def __len__(self) -> int:
        return sum(self.shard_lengths)

    @functools.cached_property
    def cap_class(self) -> np.ndarray:
        """(N,) int32, what the order of an epoch needs: read in one pass, then kept."""
        cap_class, done = np.empty(len(self), np.int32), 0
        with log.progress("Reading labels", total=len(self), unit="reads") as bar:
            for block in self.blocks():
                end = done + len(block.cap_classes)
                cap_class[done:end] = block.cap_classes
                bar.advance(end - done)
                done = end
        return cap_class

    @property
    def row_bytes(self) -> int:
        return self.row[0] * self.row[1].itemsize

    def blocks(self) -> Iterator[records.Block]:
        """The records in stored order, some thousands at a time."""
        for shard in range(len(self.paths)):
            yield from self.shard_blocks(shard)

    def shard_blocks(self, shard: int) -> Iterator[records.Block]:
        """Those of one shard. Raises: InputError when it is damaged, or isn't the manifest's."""
        return _checked_blocks(self.paths[shard], self.shard_lengths[shard], self.row)


def open_split(directory: Path, split: str) -> Split:
    """Opens `split` of the dataset version in `directory`; builds its cache first when absent.

    Raises: InputError when the shards don't hold what the version's manifest says."""
    cache, shards = _look_up(directory, split)
    opened = _open_cache(cache, tuple(shards.values()))
    if opened is not None:
        return opened
    with _lock_file(cache.parent / f"{split}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it: wait and use that
        opened = _open_cache(cache, tuple(shards.values()))
        if opened is not None:
            return opened
        files.remove_partial(cache.parent, f"{split}-")
        _build_cache(cache, _in_shards(directory, split, shards), split)
    opened = _open_cache(cache, tuple(shards.values()))
    assert opened is not None
    return opened


def _lock_file(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise InputError(
            f"{path.parent}: can't be written to ({error.strerror}). Give access to it, or set "
            "runtime_params.data_residency=stream, which reads the shards themselves."
        ) from None


def open_shards(directory: Path, split: str) -> ShardedSplit:
    """Opens `split` of the dataset version in `directory` without a cache; reads nothing yet.

    Raises: InputError when shards are missing; later, when they don't hold what they should."""
    _, shards = _look_up(directory, split)
    return _in_shards(directory, split, shards)


def _in_shards(directory: Path, split: str, shards: dict[str, int]) -> ShardedSplit:
    paths = tuple(records.shard_paths(directory, split))
    if [path.name for path in paths] != list(shards):
        raise InputError(
            f"{directory}: holds {len(paths)} shards of split {split!r}, its manifest.json "
            f"lists {len(shards)}. Copy the dataset version again, or remove it."
        )
    return ShardedSplit(paths, tuple(shards.values()), records.signal_spec(directory))


def read_ids(directory: Path, split: str) -> Iterator[np.ndarray]:
    """The split's read_ids in stored order, (k,) UTF-8 bytes at a time: from the cache where there
    is one, else from the shards. Holds some megabytes, nothing stays mapped.

    Raises: InputError as `open_split`."""
    cache, shards = _look_up(directory, split)
    if _open_cache(cache, tuple(shards.values())) is None:
        for block in _in_shards(directory, split, shards).blocks():
            yield block.read_ids
        return
    yield from _array_chunks(cache / "read_id.npy")


def _look_up(directory: Path, split: str) -> tuple[Path, dict[str, int]]:
    """Where the split's cache lies, and records by name of shard, from the version's manifest."""
    manifest = files.read_json(directory / "manifest.json")
    prefix = f"{records.DATASET_NAME}-{split}."
    shards = {
        shard["name"]: int(shard["num_examples"])
        for shard in sorted(manifest["shards"], key=lambda shard: str(shard["name"]))
        if shard["name"].startswith(prefix)
    }
    return directory.parent.parent / "cache" / manifest["fingerprint"] / split, shards


def _open_cache(cache: Path, shard_lengths: tuple[int, ...]) -> Split | None:
    """None when the cache is absent or can't be what was built."""
    try:
        arrays = [
            np.load(cache / f"{name}.npy", mmap_mode="r")
            for name in ("signal", "cap_class", "length", "read_id")
        ]
    except (OSError, ValueError):
        return None
    if any(len(array) != sum(shard_lengths) for array in arrays):
        return None
    signal, cap_class, length, read_id = arrays
    return Split(signal, cap_class, length, read_id, shard_lengths)


def _checked_blocks(path: Path, length: int, row: tuple[int, np.dtype]) -> Iterator[records.Block]:
    found = 0
    for block in records.read_shard_blocks(path, target_length=row[0], dtype=row[1]):
        found += len(block.lengths)
        if found > length:
            break
        yield block
    if found != length:
        raise InputError(
            f"{path}: holds {'at least ' if found > length else ''}{found:,} records, "
            f"manifest.json says {length:,}. Copy the dataset version again, or remove it."
        )


def _build_cache(cache: Path, shards: ShardedSplit, split: str) -> None:
    """Reads the shards once, a block in memory at a time."""
    total, (target_length, dtype) = len(shards), shards.row
    with (
        files.atomic_directory(cache) as partial,
        log.progress(f"Reading {split}", total=total, unit="reads") as bar,
        _ArrayFile(partial / "signal.npy", dtype, (total, target_length)) as signal,
        _ArrayFile(partial / "cap_class.npy", np.dtype(np.int32), (total,)) as cap_class,
        _ArrayFile(partial / "length.npy", np.dtype(np.int32), (total,)) as length,
        _ArrayFile(partial / "read_id.npy", np.dtype("S1"), (total,)) as read_id,
    ):
        for block in shards.blocks():
            signal.append(block.signals)
            cap_class.append(block.cap_classes)
            length.append(block.lengths)
            read_id.append(block.read_ids)
            bar.advance(len(block.lengths))


class _ArrayFile:
    """An .npy file that is written from its beginning to its end."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._path, self._dtype, self._shape = path, dtype, shape
        self._stream = self._start()

    def _start(self) -> BinaryIO:
        stream = self._path.open("wb")
        np.lib.format.write_array_header_1_0(
            stream,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": self._shape,
            },
        )
        return stream

    def append(self, rows: np.ndarray) -> None:
        """Casts to the file's dtype; texts that are wider than all before make the file wider."""
        if rows.dtype.kind == "S" and rows.dtype.itemsize > self._dtype.itemsize:
            self._widen(rows.dtype)
        rows = np.ascontiguousarray(rows, self._dtype)
        self._stream.write(rows.reshape(-1).view(np.uint8).data)

    def _widen(self, dtype: np.dtype) -> None:
        """Rare: identifiers mostly have one width."""
        self._stream.close()
        narrow = self._path.with_name(f"{self._path.name}-narrow")
        self._path.rename(narrow)
        self._dtype = dtype
        self._stream = self._start()
        for rows in _array_chunks(narrow):
            self.append(rows)
        narrow.unlink()

    def __enter__(self) -> "_ArrayFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()


def _array_chunks(path: Path) -> Iterator[np.ndarray]:
    """The rows of a one-dimensional .npy file, as many as are there."""
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        _, _, dtype = np.lib.format.read_array_header_1_0(stream)
        while len(rows := np.frombuffer(stream.read(_CHUNK_RECORDS * dtype.itemsize), dtype)):
            yield rows
