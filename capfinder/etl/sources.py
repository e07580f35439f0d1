"""Which files are the input: cap-signal CSVs of a directory, their class, checksum and metadata."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capfinder import files
from capfinder.allowed import is_text
from capfinder.errors import InputError
from capfinder.etl.csv_files import read_blocks, read_ranges
from capfinder.etl.csv_reader import explained, scan_block
from capfinder.etl.stream import BLOCK_BYTES


@dataclass(frozen=True)
class Source:
    """A file of reads of one class. `name` is how it is shown; `cap_class` the label in the file,
    `label` that in the dataset; `is_test`: from split_params.test_caps_data_dir."""

    path: Path
    name: str
    cap_class: int
    label: int
    is_test: bool
    size: int
    mtime_ns: int
    ctime_ns: int  # set by the kernel at every change, where a copying program may set mtime back

    def check_unchanged(self) -> None:
        """Raises: InputError when the file isn't the one that was listed."""
        stat = self.path.stat() if self.path.exists() else None
        if stat is None or (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise InputError(f"{self.path}: changed while it was read. Run again when it is whole.")


def list_files(directory: Path, *, setting: str) -> list[Path]:
    """The data files directly in `directory`, by name. Raises: InputError when there is none, or
    what is named like one isn't a file."""
    try:
        if not directory.is_dir():
            found = "not a directory" if directory.exists() else "no such directory"
            raise InputError(
                f"{setting}={directory}: {found}; expected one with cap-signal CSV files"
            )
        found_files = sorted(path for path in directory.iterdir() if _is_data_file(path))
    except OSError as error:
        raise InputError(f"{setting}={directory}: can't be read ({error.strerror})") from None
    if not found_files:
        raise InputError(
            f"{setting}={directory}: no *.csv or *.csv.gz file there (metadata__* aside)"
        )
    return found_files


def _is_data_file(path: Path) -> bool:
    """Raises: InputError for what would be one if it could be read, again and again."""
    is_named_so = path.name.lower().endswith((".csv", ".csv.gz"))
    if not is_named_so or path.name.startswith((".", "metadata__")) or path.is_dir():
        return False
    if not is_text(path.name):
        raise InputError(f"{path}: its name isn't in UTF-8. Rename the file.")
    if not path.is_file():
        kind = "not a plain file" if path.exists() else "a link that leads nowhere"
        raise InputError(f"{path}: {kind}. Remove it, or put the CSV file there.")
    return True


def open_sources(
    directory: Path,
    *,
    setting: str,
    class_map: dict[int, int],
    num_classes: int,
    is_test: bool = False,
) -> list[Source]:
    """The files of `directory` whose class is used, each with its class: that of its first good
    row. class_map {}: classes as in the files.

    Raises: InputError for a bad file or when the classes aren't exactly 0..num_classes-1."""
    sources, found = [], []
    for path in list_files(directory, setting=setting):
        stat = path.stat()
        cap_class = _file_class(path)
        found.append(f"{path.name}: {cap_class}")
        if not class_map or cap_class in class_map:
            label = class_map.get(cap_class, cap_class)
            name = f"{directory.name}/{path.name}" if is_test else path.name
            times = stat.st_mtime_ns, stat.st_ctime_ns
            sources.append(Source(path, name, cap_class, label, is_test, stat.st_size, *times))
    labels = {source.label for source in sources}
    if labels != set(range(num_classes)):
        missing, surplus = set(range(num_classes)) - labels, labels - set(range(num_classes))
        problems = [
            f"{what} class {', '.join(map(str, sorted(those)))}"
            for what, those in (("missing", missing), ("surplus", surplus))
            if those
        ]
        mapped = f" with etl_params.class_map={class_map}" if class_map else ""
        raise InputError(
            f"{setting}={directory}: {' and '.join(problems)}, expected exactly 0 to "
            f"{num_classes - 1} (shared_params.num_classes={num_classes}){mapped}. Class per "
            f"file: {'; '.join(found)}. A file holds one class, that of its first good row. "
            "Correct the files, num_classes or class_map."
        )
    return sources


def _file_class(path: Path) -> int:
    first = None
    for block, _ in read_blocks(path, block_bytes=BLOCK_BYTES):
        rows, rejects, _ = scan_block(block, cap_class=None)
        if len(rows.cap_class):
            return int(rows.cap_class[0])
        first = first or (rejects[0] if rejects else None)
    if first is None:
        raise InputError(f"{path}: has a header but no rows. Remove the file or fill it.")
    raise InputError(
        f"{path}: no row can be used, first at line {first.line}, read_id {first.read_id!r}: "
        f"{explained(path, first)}. Correct the file or move it elsewhere."
    )


class DigestIndex:
    """SHA-256 of files seen before, kept in a small JSON file by path, size and times of change, so
    that a rerun needn't read them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, list[str | int]] = {}
        if path.exists():
            try:
                entries = files.read_json(path)
            except InputError:
                entries = {}  # only a shortcut is lost
            self._entries = entries if isinstance(entries, dict) else {}

    def get(self, source: Source) -> str | None:
        entry = self._entries.get(str(source.path.absolute()))
        if isinstance(entry, list) and entry[:-1] == self._seen(source):
            return str(entry[-1])
        return None

    @staticmethod
    def _seen(source: Source) -> list[int]:
        return [source.size, source.mtime_ns, source.ctime_ns]

    def add(self, digests: dict[Source, str]) -> None:
        """Saves these digests and no others: the index doesn't grow with files long gone."""
        self._entries = {
            str(source.path.absolute()): [*self._seen(source), digest]
            for source, digest in digests.items()
        }
        files.write_json(self._path, self._entries)


def metadata_files(directories: list[Path]) -> list[Path]:
    return sorted(
        path
        for directory in directories
        for path in directory.glob("metadata__*")
        if path.name.lower().endswith((".csv", ".csv.gz")) and path.is_file()
    )


def read_ids_of(source: Source, records: np.ndarray) -> Iterator[str]:
    """The read_ids of identity records (n,) of this file, which are in the order of its rows."""
    begins = records["begin"]
    ranges = zip(begins.tolist(), (begins + records["id_bytes"]).tolist(), strict=True)
    return (text.decode() for text in read_ranges(source.path, ranges))


def simulation_warnings(found: Sequence[Source]) -> list[str]:
    """What to say when a directory holds simulated reads, as its README.txt then says itself."""
    directories = sorted({source.path.parent for source in found})
    if any(_is_simulated(directory) for directory in directories):
        return [
            "The input is SIMULATED (capfinder simulate): these figures say nothing about how "
            "well real caps are told apart."
        ]
    return []


def _is_simulated(directory: Path) -> bool:
    path = directory / "README.txt"
    try:
        return path.is_file() and path.read_bytes().startswith(b"SIMULATED")
    except OSError:
        return False
