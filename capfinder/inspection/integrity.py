"""Whether a version is whole: its files are there, are the ones written, and share no read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import files
from capfinder.data import records
from capfinder.data.records import SPLITS
from capfinder.errors import InputError
from capfinder.etl.hashing import IDENTITY, keyed_hash
from capfinder.inspection.contents import of_split
from capfinder.log import progress

NAMES_SHOWN = 5
_CANDIDATES = 1000  # hashes that came twice whose read_ids are looked up


def missing_files(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is there too little or too much, without reading a shard."""
    listed = [shard["name"] for shard in manifest["shards"]]
    expected = ["features.json", "dataset_info.json", *listed]
    absent = [name for name in expected if not (directory / name).is_file()]
    there = (path.name for path in directory.glob(f"{records.DATASET_NAME}-*.tfrecord-*"))
    strange = sorted(set(there) - set(listed))
    found = []
    if absent:
        found.append(f"{_named(absent)} missing: copy the version again, or have it rebuilt")
    if strange:
        found.append(f"{_named(strange)} not in the manifest: remove what isn't the dataset's")
    return found


def _named(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def verify(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Reads every byte: SHA-256 of each shard, counts per class, no read_id twice.

    Returns what is wrong. Takes some 25 bytes of memory a read."""
    problems = _changed_shards(directory, manifest)
    hashes: dict[str, np.ndarray] = {}
    total = sum(sum(by_class.values()) for by_class in manifest["counts"].values())
    with progress("Reading records", total=total, unit="reads") as bar:
        for split in SPLITS:
            if not all(
                (directory / shard["name"]).is_file() for shard in of_split(manifest, split)
            ):
                continue  # already said
            parts, counts = [], np.zeros(manifest["num_classes"], np.int64)
            try:
                for block in records.read_blocks(directory, split):
                    parts.append(keyed_hash(block.read_ids, seed=0)[:, IDENTITY])
                    found = np.bincount(block.cap_classes, minlength=len(counts))
                    counts = np.pad(counts, (0, len(found) - len(counts))) + found
                    bar.advance(len(block.read_ids))
            except InputError as error:
                problems.append(str(error))
                continue
            hashes[split] = np.concatenate(parts)
            problems += _wrong_counts(split, counts, manifest["counts"][split])
    return problems + _repeated_reads(directory, hashes)


def _changed_shards(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    there = [shard for shard in manifest["shards"] if (directory / shard["name"]).is_file()]
    changed = []
    with progress("Checking SHA-256", total=len(there), unit="shards") as bar:
        for shard in there:
            if files.sha256_file(directory / shard["name"]) != shard["sha256"]:
                changed.append(shard["name"])
            bar.advance()
    if not changed:
        return []
    return [
        f"{_named(changed)}: not the bytes written (SHA-256 differs from the manifest's): copy "
        "the version again, or have it rebuilt"
    ]


def _wrong_counts(split: str, counts: np.ndarray, listed: Mapping[str, int]) -> list[str]:
    """counts (num_classes or more,) int64 reads of each class, as read back."""
    return [
        f"{split}: holds {count:,} reads of class {label}, the manifest says "
        f"{listed.get(str(label), 0):,}"
        for label, count in enumerate(counts.tolist())
        if count != listed.get(str(label), 0)
    ]


def _repeated_reads(directory: Path, hashes: Mapping[str, np.ndarray]) -> list[str]:
    """hashes: per split (n,) uint64 of its read_ids; those that came twice are read again, since
    two of 10 million read_ids have the same hash once in 400,000 datasets."""
    if not hashes:
        return []
    everything = np.sort(np.concatenate(list(hashes.values())))
    repeated = np.unique(everything[1:][everything[1:] == everything[:-1]])
    if not len(repeated):
        return []
    wanted = repeated[:_CANDIDATES]
    places: dict[bytes, list[str]] = {}
    for split in hashes:
        for block in records.read_blocks(directory, split):
            of_block = keyed_hash(block.read_ids, seed=0)[:, IDENTITY]
            for read_id in block.read_ids[np.isin(of_block, wanted)].tolist():
                places.setdefault(read_id, []).append(split)
    twice = {read_id: where for read_id, where in sorted(places.items()) if len(where) > 1}
    across = {read_id: where for read_id, where in twice.items() if len(set(where)) > 1}
    if not twice:
        return []
    read_id, where = next(iter((across or twice).items()))
    names = " and ".join(dict.fromkeys(where)) if across else f"{where[0]}, twice"
    return [
        f"{len(repeated):,} read_ids are more than once in the dataset, such as "
        f"{read_id.decode('utf-8', 'replace')} in {names}: don't use it, have it rebuilt"
    ]
