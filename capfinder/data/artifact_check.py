"""Whether an unpacked dataset version is what its own manifest says."""

import mmap
import struct
from pathlib import Path
from typing import Any

from capfinder.data import versions
from capfinder.data.records import DATASET_NAME, SPLITS, shard_name
from capfinder.errors import InputError

MAX_MANIFEST_BYTES = 64 * 2**20
UNREADABLE = (
    InputError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OSError,
    RecursionError,
)
_LENGTH = struct.Struct("<Q")  # a TFRecord: length, CRC of it (4 bytes), payload, CRC (4 bytes)


def shard_digests(manifest: dict[str, Any]) -> dict[str, str]:
    """Shard name -> SHA-256 in hex."""
    return {shard["name"]: shard["sha256"] for shard in manifest["shards"]}


def check_unpacked(
    directory: Path, *, version: str, fingerprint: str, digests: dict[str, str], where: str
) -> None:
    """digests: SHA-256 of each file in `directory`, as read.

    Raises: InputError when version, fingerprint, shards, checksums or counts differ."""
    if versions.MANIFEST not in digests:
        raise InputError(f"{where}: lacks {versions.MANIFEST}. Nothing of it was kept.")
    if (directory / versions.MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
        raise InputError(f"{where}: its {versions.MANIFEST} is too large. Nothing of it was kept.")
    try:
        manifest = versions.open_dataset(directory).manifest
        problem = _problem(manifest, directory, version, fingerprint, digests)
    except UNREADABLE as error:
        problem = f"it can't be read ({type(error).__name__}: {str(error)[:200]})"
    if problem:
        raise InputError(
            f"{where}: isn't what its {versions.MANIFEST} says: {problem}. Nothing of it was kept."
        )


def _problem(
    manifest: dict[str, Any],
    directory: Path,
    version: str,
    fingerprint: str,
    digests: dict[str, str],
) -> str:
    """What is wrong, in a few words; empty when nothing is."""
    for name, value, wanted in (
        ("version", manifest["version"], version),
        ("fingerprint", manifest["fingerprint"], fingerprint),
    ):
        if value != wanted:
            return f"its {name} is {value!r}, the index's is {wanted!r}"
    examples = {shard["name"]: shard["num_examples"] for shard in manifest["shards"]}
    expected = shard_digests(manifest)
    found = {name for name in digests if ".tfrecord-" in name}
    if found != expected.keys() or len(manifest["shards"]) != len(expected):
        return "other shards are there than it lists"
    for name in sorted(found):
        if digests[name] != expected[name]:
            return f"{name} has another SHA-256"
        records = count_records(directory / name)
        if records != examples[name]:
            return f"{name} has {records:,} records, not {examples[name]:,}"
    for split in SPLITS:
        of_split = {name for name in found if name.startswith(f"{DATASET_NAME}-{split}.")}
        if of_split != {shard_name(split, i, len(of_split)) for i in range(len(of_split))}:
            return f"the shards of {split} aren't all there"
        records = sum(examples[name] for name in of_split)
        if records != sum(manifest["counts"][split].values()):
            return f"{split} has {records:,} reads, which its counts per class don't add up to"
        found -= of_split
    return f"{min(found)} is of no split" if found else ""


def count_records(path: Path) -> int:
    """Of a TFRecord file, by the lengths alone. Raises: ValueError when they don't fit its size."""
    size, at, count = path.stat().st_size, 0, 0
    if not size:
        return 0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at + 16 <= size:
            at += 16 + _LENGTH.unpack_from(data, at)[0]
            count += 1
    if at != size:
        raise ValueError(f"{path.name} ends within a record")
    return count
