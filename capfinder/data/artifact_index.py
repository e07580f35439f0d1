"""The index of a packed dataset: names, sizes and checksums, and which files belong to it."""

import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from capfinder.data.records import DATASET_NAME
from capfinder.errors import InputError

INDEX = "index.json"
FORMAT, FORMAT_VERSION = "capfinder-dataset", 1
MAX_INDEX_BYTES = 16 * 2**20  # some 100,000 members
MAX_NAME_BYTES = 100  # what a plain tar header holds
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
VERSION = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
ORIGINAL = re.compile(r"dataset\.tar\.gz\.\d+|tar_hash\.json")  # Capfinder 0.4's


@dataclass(frozen=True)
class Entry:
    """A part or a member: its name, its size in bytes, its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What an artifact holds: `chunks` joined in order are a tar of `members`, in any order."""

    version: str
    fingerprint: str
    chunks: tuple[Entry, ...]
    members: tuple[Entry, ...]

    @property
    def chunk_bytes(self) -> int:
        return sum(chunk.size for chunk in self.chunks)

    def check_names(self, names: Iterable[str], where: str) -> None:
        """Raises: InputError when the files of the artifact aren't the index and its parts."""
        found, wanted = set(names), {INDEX, *(chunk.name for chunk in self.chunks)}
        if found != wanted:
            odd = sorted(wanted - found) or sorted(found - wanted)
            problem = "lacks" if wanted - found else "holds more than its index says:"
            raise InputError(f"{where}: {problem} {_some(odd)}. Name another version.")


def chunk_name(number: int) -> str:
    return f"{DATASET_NAME}.tar.{number:05d}"


def check_format(names: Iterable[str], where: str) -> None:
    """Raises: InputError when files of these names aren't one of our artifacts."""
    found = sorted(names)
    if INDEX in found:
        return
    if any(ORIGINAL.fullmatch(name) for name in found):
        raise InputError(
            f"{where}: is in the CSV format of Capfinder 0.4 ({_some(found)}), whose training and "
            "test sets share reads. Set etl_params.caps_data_dir to the cap-signal CSV files to "
            "build the dataset anew, or name another version."
        )
    raise InputError(
        f"{where}: isn't a dataset of this program: no {INDEX} among {_some(found)}. Name another "
        "version."
    )


def parse_index(data: bytes, where: str) -> Index:
    """Raises: InputError when `data` isn't an index that could be `pack`'s."""
    try:
        if len(data) > MAX_INDEX_BYTES:
            raise ValueError(f"{len(data):,} bytes")
        found = json.loads(data)
        if (found["format"], found["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {found['format']!r}, version {found['format_version']!r}")
        index = Index(
            _matching(found["version"], VERSION),
            _matching(found["fingerprint"], SHA256),
            tuple(_entry(value) for value in found["chunks"]),
            tuple(_entry(value) for value in found["members"]),
        )
        _check_entries(index)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{where}, {INDEX}: isn't an index of this program, version {FORMAT_VERSION} "
            f"({type(error).__name__}: {str(error)[:200]}). Name another version, or update "
            "capfinder."
        ) from None
    return index


def _entry(value: Any) -> Entry:
    size = value["size"]
    if type(size) is not int or not 0 <= size < 2**60:
        raise ValueError(f"size {size!r}")
    name = value["name"]
    if not isinstance(name, str) or not is_good_name(name):
        raise ValueError(f"name {name!r}")
    return Entry(name, size, _matching(value["sha256"], SHA256))


def _check_entries(index: Index) -> None:
    """Raises: ValueError."""
    expected = [chunk_name(number) for number in range(len(index.chunks))]
    if not expected or [chunk.name for chunk in index.chunks] != expected:
        raise ValueError("the parts aren't numbered from 0 on")
    if not all(chunk.size > 0 for chunk in index.chunks):
        raise ValueError("an empty part")
    names = [member.name.casefold() for member in index.members]  # some disks don't tell a from A
    directories = {name[: match.start()] for name in names for match in re.finditer("/", name)}
    if len(set(names)) < len(names) or directories & set(names):
        raise ValueError("a name is there twice")
    blocks = sum(1 + -(-member.size // tarfile.BLOCKSIZE) for member in index.members) + 2
    if index.chunk_bytes != blocks * tarfile.BLOCKSIZE:
        raise ValueError("the sizes of parts and members don't fit together")


def _matching(value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(repr(value)[:100])
    return value


def is_good_name(name: str) -> bool:
    return len(name) <= MAX_NAME_BYTES and NAME.fullmatch(name) is not None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name)[1:-1] for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "no file"
