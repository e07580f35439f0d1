"""Directories of data, right and wrong in all the ways that files and file systems have."""

import gzip
import os
import random
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etl_mutations import HEADER, mutated

Rng = random.Random
PLAIN = HEADER + b"\n"
RUNS, READS = 3, 4  # of each class
CLASSES = range(2)  # of the directories that are spoiled
SHORT_ROWS = 1 << 20  # bytes
HUGE_LINE = 17 << 20


def rows(label: object, *, run: int = 0, count: int = READS) -> bytes:
    return b"".join(
        f'{label}-{run}-{number},{label},"0.5,-1.25,{number}.0,1e-3"\n'.encode()
        for number in range(count)
    )


def good_directory(directory: Path, classes: Sequence[int], *, prefix: str = "") -> None:
    """Three runs of each class, and which molecule each read comes from."""
    directory.mkdir(parents=True)
    parents = [b"read_id,parent_read_id\n"]
    for label in classes:
        for run in range(RUNS):
            text = rows(f"{label}", run=run).replace(b"-", f"{prefix}-".encode(), 1)
            (directory / f"data__cap_{label}_run{run}.csv").write_bytes(PLAIN + text)
            parents += [line.split(b",")[0] + b",p\n" for line in text.splitlines()]
    (directory / "metadata__all.csv").write_bytes(b"".join(parents))


def _last(directory: Path) -> Path:
    return directory / f"data__cap_{CLASSES[-1]}_run{RUNS - 1}.csv"


def _write(content: bytes, name: str = "") -> Callable[[Rng, Path], None]:
    """Instead of the last file, or beside it under `name`."""

    def make(rng: Rng, directory: Path) -> None:
        (directory / name if name else _last(directory)).write_bytes(content)

    return make


def _instead(make: Callable[[Path], Any]) -> Callable[[Rng, Path], None]:
    """Something else under the last file's name."""

    def change(rng: Rng, directory: Path) -> None:
        path = _last(directory)
        path.rename(directory.parent / "away.csv")
        make(path)

    return change


def _alone(name: str) -> Callable[[Rng, Path], None]:
    """Nothing but the last file, under another name; "": nothing."""

    def change(rng: Rng, directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        if name:
            (directory / name).write_bytes(GOOD)

    return change


def _whole(then: Callable[[Path], Any]) -> Callable[[Rng, Path], None]:
    """Something else under the directory's own name."""

    def change(rng: Rng, directory: Path) -> None:
        directory.rename(directory.parent / "away")
        then(directory)

    return change


def _renamed(name: str | bytes) -> Callable[[Rng, Path], None]:
    def change(rng: Rng, directory: Path) -> None:
        _last(directory).rename(directory / os.fsdecode(name))

    return change


def _without_class(rng: Rng, directory: Path) -> None:
    for path in directory.glob(f"data__cap_{CLASSES[-1]}_*"):
        path.unlink()


def _spoiled_text(rng: Rng, directory: Path) -> None:
    path = rng.choice(sorted(directory.glob("data__*")))
    text = path.read_bytes()
    content = mutated(rng, text) if rng.random() < 0.3 else PLAIN + mutated(rng, text[len(PLAIN) :])
    if rng.random() < 0.3:
        path.unlink()
        path, content = path.with_suffix(".csv.gz"), gzip.compress(content)
        content = mutated(rng, content) if rng.random() < 0.5 else content
    path.write_bytes(content)


def _many(rng: Rng, directory: Path) -> None:
    for number in range(300):
        (directory / f"{number}.csv").write_bytes(PLAIN + rows(rng.choice(CLASSES), run=number))


def _short_rows(rng: Rng, directory: Path) -> None:
    """A block of them at the longest target_length would be 20 GB of numbers."""
    for path in directory.glob("data__*"):
        label = path.name.split("_")[3]
        path.write_bytes(PLAIN + f'a,{label},"1"\n'.encode() * (SHORT_ROWS // 8))


def _metadata_pipe(rng: Rng, directory: Path) -> None:
    path = directory / "metadata__all.csv"
    path.unlink()
    os.mkfifo(path)


def _mode(mode: int, path: Callable[[Path], Path]) -> Callable[[Rng, Path], None]:
    return lambda rng, directory: path(directory).chmod(mode)


def _same(directory: Path) -> Path:
    return directory


@dataclass(frozen=True)
class Kind:
    """`outcome`: "valid", "refused" or "either"; `words`: in the error; `settings`: to go with."""

    make: Callable[[Rng, Path], Any]
    outcome: str
    words: str = ""
    settings: tuple[tuple[str, Any], ...] = ()


GOOD = PLAIN + rows(CLASSES[-1])
FORBIDDEN = "valid" if os.geteuid() == 0 else "refused"  # root may read anything
BY_FILE = (("split_params.group_by", "file"),)
BY_PARENT = (("split_params.group_by", "parent_read"),)
TINY = (("shared_params.train_val_fraction", 1e-6),)
LONGEST = (
    ("shared_params.target_length", 32_768),
    ("shared_params.dtype", "float64"),
    ("etl_params.examples_per_class", 100),
)
KINDS: dict[str, Kind] = {
    "good": Kind(lambda rng, directory: None, "valid"),
    "missing": Kind(_whole(lambda directory: None), "refused", "no such directory"),
    "empty": Kind(_alone(""), "refused", "no *.csv or *.csv.gz"),
    "a file": Kind(_whole(lambda directory: directory.touch()), "refused", "not a directory"),
    "a pipe": Kind(_whole(os.mkfifo), "refused", "not a directory"),
    "a link to one": Kind(_whole(lambda path: path.symlink_to("away")), "valid"),
    "a link to nothing": Kind(_whole(lambda path: path.symlink_to("x")), "refused", "no such"),
    "a loop of links": Kind(_whole(lambda path: path.symlink_to(path)), "refused", "caps"),
    "other names": Kind(_alone("data.txt"), "refused", "no *.csv"),
    "hidden files": Kind(_alone(".a.csv"), "refused", "no *.csv"),
    "metadata alone": Kind(_alone("metadata__a.csv"), "refused", "no *.csv"),
    "capital letters": Kind(_renamed("DATA.CSV"), "valid"),
    "spaces": Kind(_renamed("  a b  .csv"), "valid"),
    "other scripts": Kind(_renamed("データ　é.csv"), "valid"),
    "a long name": Kind(_renamed("n" * 251 + ".csv"), "valid"),
    "markup": Kind(_renamed("[bold]%s{0}$(x).csv"), "valid"),
    "a line end in a name": Kind(_renamed("a\nb.csv"), "valid"),
    "an escape in a name": Kind(_renamed("\x1b[31m.csv"), "valid"),
    "a name not in UTF-8": Kind(_renamed(b"a\xff.csv"), "refused", "isn't in UTF-8"),
    "class missing": Kind(_without_class, "refused", "missing class 1"),
    "class surplus": Kind(_write(PLAIN + rows(2), "b.csv"), "refused", "surplus class 2"),
    "class huge": Kind(_write(PLAIN + rows(999_999_999), "b.csv"), "refused", "999999999"),
    "class too huge": Kind(_write(PLAIN + rows(10**10)), "refused", "no row can be used"),
    "class a word": Kind(_write(PLAIN + rows("one")), "refused", "no row can be used"),
    "classes mixed": Kind(_write(GOOD + rows(0)), "valid"),
    "file not readable": Kind(_mode(0, _last), FORBIDDEN, "Permission denied"),
    "directory not readable": Kind(_mode(0, _same), FORBIDDEN, "Permission denied"),
    "directory not searchable": Kind(_mode(stat.S_IRUSR, _same), FORBIDDEN, "Permission denied"),
    "directory named so": Kind(lambda rng, d: (d / "c.csv").mkdir(), "valid"),
    "link": Kind(_instead(lambda path: path.symlink_to("../away.csv")), "valid"),
    "link to nothing": Kind(
        _instead(lambda path: path.symlink_to("nothing")), "refused", "leads nowhere"
    ),
    "loop of links": Kind(
        _instead(lambda path: path.symlink_to(path.name)), "refused", "leads nowhere"
    ),
    "link to a device": Kind(
        _instead(lambda path: path.symlink_to("/dev/zero")), "refused", "not a plain file"
    ),
    "pipe": Kind(_instead(os.mkfifo), "refused", "not a plain file"),
    "socket": Kind(
        _instead(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)), "refused", "not a plain file"
    ),
    "README a pipe": Kind(lambda rng, d: os.mkfifo(d / "README.txt"), "valid"),
    "empty file": Kind(_write(b""), "refused", "is empty"),
    "header alone": Kind(_write(PLAIN), "refused", "no rows"),
    "wrong header": Kind(_write(b"a,b,c\n" + rows(1)), "refused", "expected the header"),
    "no header": Kind(_write(rows(1)), "refused", "expected the header"),
    "bytes": Kind(_write(bytes(range(256)) * 20), "refused", "expected the header"),
    "nothing but NUL": Kind(_write(bytes(5000)), "refused", "expected the header"),
    "bytes below a header": Kind(_write(PLAIN + bytes(range(256))), "refused", "no row can be"),
    "not gzip": Kind(_write(GOOD, "b.csv.gz"), "refused", "can't be decompressed"),
    "gzip": Kind(_write(gzip.compress(GOOD), "b.csv.gz"), "valid"),
    "gzip not named so": Kind(_write(gzip.compress(GOOD)), "refused", "expected the header"),
    "gzip cut": Kind(_write(gzip.compress(GOOD)[:-20], "b.csv.gz"), "refused", "decompressed"),
    "gzip of nothing": Kind(_write(gzip.compress(b""), "b.csv.gz"), "refused", "is empty"),
    "gzip without bytes": Kind(_write(b"", "b.csv.gz"), "refused", "b.csv.gz"),
    "UTF-16": Kind(_write(GOOD.decode().encode("utf-16")), "refused", "expected the header"),
    "byte-order mark": Kind(_write(b"\xef\xbb\xbf" + GOOD), "valid"),
    "not UTF-8": Kind(_write(GOOD.replace(b"1-0-0", b"\xe9")), "valid"),
    "line ends of Windows": Kind(_write(GOOD.replace(b"\n", b"\r\n")), "valid"),
    "line ends of old": Kind(_write(GOOD.replace(b"\n", b"\r")), "refused", "expected the header"),
    "enormous line": Kind(_write(PLAIN + b"1," * (HUGE_LINE // 2) + b"\n" + rows(1)), "valid"),
    "nothing but an enormous line": Kind(
        _write(PLAIN + b"1," * (HUGE_LINE // 2)), "refused", "line too long"
    ),
    "many files": Kind(_many, "valid"),
    "short rows, long signals": Kind(_short_rows, "valid", "", LONGEST),
    "split by file": Kind(lambda rng, directory: None, "valid", "", BY_FILE),
    "too few files": Kind(
        lambda rng, d: _last(d).unlink(), "refused", "split_params.group_by=file", BY_FILE
    ),
    "no metadata": Kind(
        lambda rng, d: (d / "metadata__all.csv").unlink(), "refused", "metadata__", BY_PARENT
    ),
    "metadata a pipe": Kind(_metadata_pipe, "refused", "metadata__", BY_PARENT),
    "too few reads": Kind(lambda rng, directory: None, "refused", "left for training", TINY),
    "spoiled text": Kind(_spoiled_text, "either"),
}
NAMES = (*KINDS, *["spoiled text"] * 20)
