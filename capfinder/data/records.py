"""TFRecord shards in TensorFlow Datasets' own format: written, described and read back here alone.

`tfds.builder_from_directory(version_dir)` reads them with none of this code. Equal input gives
equal bytes, the two JSON files included. The bytes themselves are in record_kernels.py: TensorFlow
is imported only for records of another writer whose features come in another order.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import libraries
from capfinder.data.record_kernels import (
    FRAME_BYTES,
    MAX_OVERHEAD_BYTES,
    PROBLEMS,
    WHOLE,
    as_bytes,
    copy_texts,
    decode_records,
    encode_records,
    find_records,
)
from capfinder.errors import InputError
from capfinder.files import read_json

DATASET_NAME = "cap_data"
SPLITS = ("train", "validation", "test")
_SUFFIX = "tfrecord"
_BLOCK_BYTES = 1 << 22  # encoded or decoded at once: it stays in the processor's cache


@dataclass(frozen=True)
class ShardFile:
    """What was written: size in bytes, SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Block:
    """Consecutive records of a split: signals (n, T) in the storage dtype, cap_classes (n,) int64,
    read_ids (n,) UTF-8 bytes ('S'), lengths (n,) int64 samples before fitting."""

    signals: np.ndarray
    cap_classes: np.ndarray
    read_ids: np.ndarray
    lengths: np.ndarray


def shard_name(split: str, index: int, num_shards: int) -> str:
    return f"{DATASET_NAME}-{split}.{_SUFFIX}-{index:05d}-of-{num_shards:05d}"


def shard_paths(directory: Path, split: str) -> list[Path]:
    """The split's shards in order. Raises: InputError when one is missing."""
    paths = sorted(directory.glob(f"{DATASET_NAME}-{split}.{_SUFFIX}-*-of-*"))
    expected = [directory / shard_name(split, i, len(paths)) for i in range(len(paths))]
    if not paths or paths != expected:
        raise InputError(
            f"{directory}: the shards of split {split!r} are missing or incomplete (found "
            f"{len(paths)}). Copy the whole directory again, or remove it and run the etl stage."
        )
    return paths


def write_shard(
    path: Path,
    *,
    signals: np.ndarray,
    cap_classes: np.ndarray,
    read_ids: np.ndarray,
    lengths: np.ndarray,
) -> ShardFile:
    """Writes one shard; holds some megabytes beside its arguments.

    signals (n, T) in the storage dtype; cap_classes, lengths (n,) ints >= 0; read_ids (n,) UTF-8
    bytes ('S')."""
    counts = {len(signals), len(cap_classes), len(read_ids), len(lengths)}
    if signals.ndim != 2 or len(counts) > 1:
        raise ValueError(
            f"signals {signals.shape}, {len(cap_classes)} cap_classes, {len(read_ids)} read_ids "
            f"and {len(lengths)} lengths don't belong together"
        )
    cap_classes, lengths = (np.ascontiguousarray(a, np.int64) for a in (cap_classes, lengths))
    if len(signals) and min(cap_classes.min(), lengths.min()) < 0:
        raise ValueError("cap_classes and lengths must not be negative")
    if read_ids.dtype.kind != "S":
        raise ValueError(f"read_ids must be bytes ('S'), not {read_ids.dtype}")
    row_bytes = signals.shape[1] * signals.dtype.itemsize + read_ids.dtype.itemsize
    row_bytes += MAX_OVERHEAD_BYTES
    rows = max(1, min(len(signals), _BLOCK_BYTES // row_bytes))
    buffer = np.empty(rows * row_bytes, np.uint8)
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as stream:
        for start in range(0, len(signals), rows):
            part = slice(start, start + rows)
            texts = as_bytes(read_ids[part])
            used = encode_records(
                buffer, as_bytes(signals[part]), cap_classes[part], lengths[part], texts
            )
            digest.update(buffer[:used].data)
            stream.write(buffer[:used].data)
            size += used
    return ShardFile(size, digest.hexdigest())


def write_metadata(
    directory: Path,
    *,
    version: str,
    target_length: int,
    dtype: str,
    shard_lengths: Mapping[str, Sequence[int]],
    shard_bytes: Mapping[str, Sequence[int]],
) -> None:
    """Writes features.json and dataset_info.json beside the shards, which must be there already.

    shard_lengths and shard_bytes: per split, records and bytes of each shard in order. `version` is
    given because `directory` may still have its temporary name."""
    import tensorflow_datasets as tfds  # without TensorFlow itself and without the network

    def split_info(split: str) -> Any:
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=DATASET_NAME, split=split, filetype_suffix=_SUFFIX
        )
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[int(length) for length in shard_lengths[split]],
            num_bytes=int(sum(shard_bytes[split])),
            filename_template=template,
        )

    features = tfds.features.FeaturesDict(
        {
            "signal": tfds.features.Tensor(
                shape=(target_length, 1),
                dtype=np.dtype(dtype).type,
                encoding=tfds.features.Encoding.BYTES,  # a float list has no float16, no float64
            ),
            "cap_class": tfds.features.Scalar(np.int64),
            "read_id": tfds.features.Text(),
            "length": tfds.features.Scalar(np.int64),
        }
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=[split_info(split) for split in SPLITS],
        version=version,
        check_data=False,
    )


def signal_spec(directory: Path) -> tuple[int, np.dtype]:
    """(target_length, storage dtype) of a dataset version, from its features.json."""
    path = directory / "features.json"
    try:
        tensor = read_json(path)["featuresDict"]["features"]["signal"]["tensor"]
        return int(tensor["shape"]["dimensions"][0]), np.dtype(tensor["dtype"])
    except (KeyError, TypeError, ValueError, IndexError):
        raise InputError(
            f"{path}: doesn't describe a {DATASET_NAME} dataset. Copy the dataset version again, "
            "or remove it to have it rebuilt."
        ) from None


def read_blocks(directory: Path, split: str) -> Iterator[Block]:
    """The split's records in stored order, some megabytes at a time; no block crosses shards.

    Raises: InputError when a shard is missing or damaged (its checksums are verified)."""
    target_length, dtype = signal_spec(directory)
    for path in shard_paths(directory, split):
        yield from read_shard_blocks(path, target_length=target_length, dtype=dtype)


def read_shard_blocks(
    path: Path, *, target_length: int, dtype: np.typing.DTypeLike
) -> Iterator[Block]:
    """One shard's records in order, some megabytes at a time, every checksum verified.

    Raises: InputError that names the shard and the record when it is damaged."""
    dtype = np.dtype(dtype)
    frame_bytes = FRAME_BYTES + target_length * dtype.itemsize  # the least that a record takes
    buffer = np.empty(max(_BLOCK_BYTES, 2 * frame_bytes), np.uint8)
    filled = done = 0  # bytes in the buffer; records yielded
    with _open(path) as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        while True:
            got = stream.readinto(buffer[filled:].data)
            filled += got
            # Fewer fit only where a record is too short to hold a signal: the rest comes next.
            starts, ends = np.empty((2, filled // frame_bytes + 1), np.int64)
            count, used, found, needed = find_records(buffer[:filled], starts, ends)
            if count:
                places = starts[:count], ends[:count]
                yield _decode(path, done, buffer, places, target_length, dtype)
                done += count
            if found != WHOLE:
                raise _damaged(path, done, PROBLEMS[found])
            filled -= used
            buffer[:filled] = buffer[used : used + filled]
            if count:
                continue
            if filled == got == 0:
                return
            if (got == 0 and needed <= len(buffer)) or needed > filled + file_bytes - stream.tell():
                raise _damaged(path, done, "the file ends within it")
            if needed > len(buffer):
                buffer = np.concatenate([buffer, np.empty(needed - len(buffer), np.uint8)])


def _open(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None


def _damaged(path: Path, done: int, reason: str) -> InputError:
    return InputError(
        f"{path}: record {done + 1:,} is damaged ({reason}). Copy the dataset version again, or "
        "remove its directory and run the etl stage, which builds it again."
    )


def _decode(
    path: Path,
    done: int,
    data: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    target_length: int,
    dtype: np.dtype,
) -> Block:
    """The records that begin and end at `places` of `data`; `done` of the shard came before."""
    starts, ends = places
    n = len(starts)
    signals = np.empty((n, target_length), dtype)
    cap_classes, lengths, id_starts, id_ends = np.empty((4, n), np.int64)
    decoded = decode_records(
        data, starts, ends, as_bytes(signals), cap_classes, lengths, id_starts, id_ends
    )
    if decoded < n:  # another writer's: tf.train.Example leaves the order of features open
        examples = [data[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]
        return _parse_with_tensorflow(path, done, examples, target_length, dtype)
    read_ids = np.zeros(n, f"S{max(1, int((id_ends - id_starts).max()))}")
    copy_texts(data, id_starts, id_ends, as_bytes(read_ids))
    return Block(signals, cap_classes, read_ids, lengths)


def _parse_with_tensorflow(
    path: Path, done: int, examples: list[bytes], target_length: int, dtype: np.dtype
) -> Block:
    tf = libraries.tensorflow()
    spec = {
        "signal": tf.io.FixedLenFeature((), tf.string),
        "cap_class": tf.io.FixedLenFeature((), tf.int64),
        "read_id": tf.io.FixedLenFeature((), tf.string),
        "length": tf.io.FixedLenFeature((), tf.int64),
    }
    try:
        parsed = tf.io.parse_example(examples, spec)
    except tf.errors.InvalidArgumentError:
        for number, example in enumerate(examples):  # which one?
            try:
                tf.io.parse_example([example], spec)
            except tf.errors.InvalidArgumentError as error:
                raise _damaged(path, done + number, error.message.splitlines()[0]) from None
        raise
    signals = parsed["signal"].numpy()
    for number, signal in enumerate(signals):
        if len(signal) != target_length * dtype.itemsize:
            reason = f"its signal has {len(signal)} bytes, not {target_length * dtype.itemsize}"
            raise _damaged(path, done + number, reason)
    return Block(
        signals=np.frombuffer(b"".join(signals), dtype).reshape(-1, target_length),
        cap_classes=parsed["cap_class"].numpy(),
        read_ids=parsed["read_id"].numpy().astype(bytes),
        lengths=parsed["length"].numpy(),
    )
