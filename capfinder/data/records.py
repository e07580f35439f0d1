"""TFRecord shards in TensorFlow Datasets' own format: written, described and read back here alone.

`tfds.builder_from_directory(version_dir)` reads them with none of this code. Equal input gives
equal bytes, the two JSON files included.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import libraries
from capfinder.errors import InputError
from capfinder.files import read_json

DATASET_NAME = "cap_data"
SPLITS = ("train", "validation", "test")
_SUFFIX = "tfrecord"
_BLOCK_RECORDS = 2048  # parsed at once: large enough to hide TensorFlow's cost per call


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
            f"{len(paths)}). Copy the whole directory again, or remove it to have it rebuilt."
        )
    return paths


# A tf.train.Example as bytes. Measured on a float16 record of 500 samples (1 core): 40,000
# records/s with tf.train.Example, whose maps have no guaranteed order either, 110,000 so.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _feature(name: str, kind: int, values: bytes) -> bytes:
    """One entry of Example.features.feature; kind 1 is bytes_list, 3 is int64_list."""
    return _field(1, _field(1, name.encode()) + _field(2, _field(kind, _field(1, values))))


@functools.lru_cache(maxsize=65536)
def _int_feature(name: str, value: int) -> bytes:
    return _feature(name, 3, _varint(value))


@functools.lru_cache(maxsize=4096)
def _bytes_feature_prefix(name: str, size: int) -> bytes:
    """A bytes feature up to where its `size` bytes follow."""
    feature = _feature(name, 1, bytes(size))
    return feature[: len(feature) - size]


@functools.lru_cache(maxsize=4096)
def _example_prefix(size: int) -> bytes:
    return _field(1, bytes(size))[:-size]


def write_shard(
    path: Path,
    *,
    signals: np.ndarray,
    cap_classes: np.ndarray,
    read_ids: Sequence[str],
    lengths: np.ndarray,
) -> int:
    """Writes one shard and returns its size in bytes.

    signals (n, T) in the storage dtype; cap_classes, lengths (n,) ints >= 0; read_ids n strings."""
    counts = {len(signals), len(cap_classes), len(read_ids), len(lengths)}
    if signals.ndim != 2 or len(counts) > 1:
        raise ValueError(
            f"signals {signals.shape}, {len(cap_classes)} cap_classes, {len(read_ids)} read_ids "
            f"and {len(lengths)} lengths don't belong together"
        )
    size = signals.shape[1] * signals.dtype.itemsize
    signal_bytes = np.ascontiguousarray(signals).reshape(-1).view(np.uint8).data
    signal_prefix = _bytes_feature_prefix("signal", size)
    with libraries.tensorflow().io.TFRecordWriter(os.fspath(path)) as writer:
        for row, (cap_class, read_id, length) in enumerate(
            zip(cap_classes.tolist(), read_ids, lengths.tolist(), strict=True)
        ):
            identity = read_id.encode("utf-8")
            features = b"".join(
                (
                    _int_feature("cap_class", cap_class),
                    _int_feature("length", length),
                    _bytes_feature_prefix("read_id", len(identity)),
                    identity,
                    signal_prefix,
                    signal_bytes[row * size : (row + 1) * size],
                )
            )
            writer.write(_example_prefix(len(features)) + features)
    return path.stat().st_size


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
    """The split's records in stored order, some thousands at a time.

    Raises: InputError when a shard is missing or damaged (its checksums are verified)."""
    target_length, dtype = signal_spec(directory)
    paths = [os.fspath(path) for path in shard_paths(directory, split)]
    tf = libraries.tensorflow()
    spec = {
        "signal": tf.io.FixedLenFeature((), tf.string),
        "cap_class": tf.io.FixedLenFeature((), tf.int64),
        "read_id": tf.io.FixedLenFeature((), tf.string),
        "length": tf.io.FixedLenFeature((), tf.int64),
    }

    def parse(examples: Any) -> dict[str, Any]:
        parsed = tf.io.parse_example(examples, spec)
        signals = tf.io.decode_raw(parsed["signal"], tf.as_dtype(dtype))
        return {**parsed, "signal": tf.ensure_shape(signals, (None, target_length))}

    dataset = tf.data.TFRecordDataset(paths).batch(_BLOCK_RECORDS)
    dataset = dataset.map(parse, num_parallel_calls=2, deterministic=True).prefetch(1)
    try:
        for batch in dataset.as_numpy_iterator():
            yield Block(
                signals=batch["signal"],
                cap_classes=batch["cap_class"],
                read_ids=batch["read_id"].astype(bytes),
                lengths=batch["length"],
            )
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        reason = error.message.splitlines()[0]
        raise InputError(
            f"{directory}: a shard of split {split!r} is damaged ({reason}). Copy the dataset "
            "version again, or remove it to have it rebuilt."
        ) from None
