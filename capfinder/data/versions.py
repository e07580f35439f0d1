"""Versions of a dataset on disk: found by fingerprint, opened, numbered; never overwritten."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfinder import files
from capfinder.data.records import SPLITS
from capfinder.errors import InputError
from capfinder.log import logger

FORMAT = 1  # of the dataset: part of the fingerprint, raised when equal input gives other bytes
FIRST_VERSION = "1.0.0"
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a file, and of the cache of a fingerprint


@dataclass(frozen=True)
class Dataset:
    """One version: its directory, number, fingerprint and the whole of its manifest.json."""

    directory: Path
    version: str
    fingerprint: str
    manifest: dict[str, Any]


def open_dataset(directory: Path) -> Dataset:
    """Raises: InputError when `directory` isn't a whole dataset version."""
    manifest = files.read_json(directory / MANIFEST)
    try:
        dataset = Dataset(directory, manifest["version"], manifest["fingerprint"], manifest)
        names = [shard["name"] for shard in manifest["shards"]]
        complete = {"counts", "num_classes", "target_length", "dtype", "warnings", "sources"}
        is_named_well = _NAME.fullmatch(dataset.fingerprint) and all(map(_NAME.fullmatch, names))
        if not is_named_well or not complete <= manifest.keys():
            raise KeyError
        if manifest["counts"].keys() != set(SPLITS):
            raise KeyError
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{directory / MANIFEST}: isn't a dataset's manifest. Remove the directory and run the "
            "etl stage, which builds the version again."
        ) from None
    absent = [
        name
        for name in ("features.json", "dataset_info.json", *names)
        if not (directory / name).is_file()
    ]
    if absent:
        raise InputError(
            f"{directory}: {', '.join(absent)} missing. Copy the version there again, or remove "
            "the directory and run the etl stage, which builds it again."
        )
    return dataset


def version_key(version: str) -> tuple[int, ...]:
    """'1.10.0' -> (1, 10, 0), so that versions sort as numbers. Raises: ValueError."""
    parts = version.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{version!r} is not a version X.Y.Z")
    return tuple(int(part) for part in parts)


def list_versions(root: Path) -> list[str]:
    """Versions in `root`, oldest first, whole or not."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        try:
            found.append((version_key(path.name), path.name))
        except ValueError:
            continue
    return [name for _, name in sorted(found)]


def _opened(root: Path) -> Iterator[Dataset]:
    """The versions that can be used, newest first."""
    for version in reversed(list_versions(root)):
        try:
            yield open_dataset(root / version)
        except InputError as error:
            logger.warning("%s It is passed over.", error)


def find(root: Path, fingerprint: str) -> Dataset | None:
    """The newest version with this fingerprint."""
    return next((each for each in _opened(root) if each.fingerprint == fingerprint), None)


def latest(root: Path) -> Dataset | None:
    """The newest version that can be used."""
    return next(_opened(root), None)


def named(root: Path, version: str) -> Dataset | None:
    """The version X.Y.Z, None when there is none. Raises: InputError when it is damaged."""
    return open_dataset(root / version) if (root / version).is_dir() else None


def has_sources_of_sizes(root: Path, sizes: Iterable[int]) -> bool:
    """Whether a version was made of files of just these sizes: then it may be the same input."""
    wanted = sorted(sizes)
    return any(
        sorted(source["size"] for source in dataset.manifest["sources"]) == wanted
        for dataset in _opened(root)
    )


def next_version(versions: Iterable[str]) -> str:
    """Minor + 1 over the highest of `versions`, local ones and remote ones alike."""
    highest = max((version_key(version) for version in versions), default=None)
    return FIRST_VERSION if highest is None else f"{highest[0]}.{highest[1] + 1}.0"


def make_fingerprint(
    digests: Iterable[str],
    test_digests: Iterable[str],
    metadata_digests: Iterable[str],
    settings: dict[str, Any],
) -> str:
    """Of the files' SHA-256, whatever their names and order, and the settings that matter."""
    return files.fingerprint(
        {
            "format": FORMAT,
            "sources": sorted(digests),
            "test_sources": sorted(test_digests),
            "metadata": sorted(metadata_digests),
            "settings": settings,
        }
    )
