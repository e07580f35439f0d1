"""Where the launching machine and Beam's workers leave files for each other."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from capfinder.errors import CapfinderError, InputError, StageFailedError
from capfinder.etl.beam import encoding

Item = TypeVar("Item")


def _filesystems() -> Any:
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def _open(path: str) -> Any:
    """Its bytes as they are, whatever its name ends with."""
    from apache_beam.io.filesystem import CompressionTypes

    return _filesystems().open(path, compression_type=CompressionTypes.UNCOMPRESSED)


OPEN = "open"  # a file that says that the launching machine still waits for results
BLOCKS_PER_LOOK = 64  # some 64 MB of text


class ClosedError(Exception):
    """The launching machine has stopped, or this worker can't see the exchange."""


@dataclass(frozen=True)
class Exchange:
    """A folder, `here` for the launching machine and `there` for the workers: a path of a file
    system that all of them share, or twice the same URL, such as gs://bucket/folder.

    Work that Beam repeats is harmless: a file has its name once it is whole, and every attempt
    writes the same bytes. Work goes on only while the folder is open, so that workers that outlive
    the launching machine end too."""

    here: str
    there: str

    def within(self, name: str) -> "Exchange":
        return Exchange(f"{self.here}/{name}", f"{self.there}/{name}")

    def for_workers(self) -> "Exchange":
        return Exchange(self.there, self.there)

    def set_open(self) -> None:
        with self.put(OPEN):
            pass

    def check_open(self) -> None:
        """Raises: ClosedError."""
        if not self.has(OPEN):
            raise ClosedError(
                f"{self.here}: this worker doesn't find the folder. Either the run was stopped, or "
                "the folder isn't on a file system that all machines see: name one with "
                "--exchange_dir, or what it is called there with --worker_path."
            )

    def while_open(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items. Raises: ClosedError, looking now and then."""
        for number, item in enumerate(items):
            if number % BLOCKS_PER_LOOK == BLOCKS_PER_LOOK - 1:
                self.check_open()
            yield item

    def has(self, name: str) -> bool:
        return bool(_filesystems().exists(f"{self.here}/{name}"))

    def open(self, name: str) -> Any:
        return _open(f"{self.here}/{name}")

    @contextlib.contextmanager
    def put(self, name: str) -> Iterator[Any]:
        """A stream whose content appears whole under `name`, or not at all."""
        from apache_beam.io.filesystem import BeamIOError, CompressionTypes

        systems, path = _filesystems(), f"{self.here}/{name}"
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            with systems.create(partial, compression_type=CompressionTypes.UNCOMPRESSED) as stream:
                yield stream
            try:
                systems.rename([partial], [path])
            except BeamIOError:  # HDFS doesn't replace what another attempt wrote meanwhile
                if not self.has(name):
                    raise
                systems.delete([partial])
        except BaseException:
            with contextlib.suppress(Exception):
                systems.delete([partial])
            raise

    def fetch(self, name: str, path: Path) -> None:
        """Moves a file to `path` of the launching machine."""
        source = f"{self.here}/{name}"
        with contextlib.suppress(OSError):  # another file system, or none of this machine's
            os.replace(source, path)
            return
        with _open(source) as stream, path.open("wb") as target:
            shutil.copyfileobj(stream, target, 1 << 20)

    def remove(self) -> None:
        """The folder and all that is in it, if it is there."""
        if "://" not in self.here:
            shutil.rmtree(self.here, ignore_errors=True)
            return
        with contextlib.suppress(Exception):  # what stays is found by the next run
            _filesystems().delete([f"{self.here}/"])


def record(exchange: Exchange, name: str, findings: Iterable[object]) -> None:
    """Leaves what a task finds under `name`. An error that is the user's to mend is a finding too:
    it is raised where the user is."""
    exchange.check_open()
    with exchange.put(name) as stream:
        try:
            for finding in exchange.while_open(findings):
                encoding.write(stream, finding)
        except CapfinderError as error:
            encoding.write(stream, error)


def findings(exchange: Exchange, name: str) -> Iterator[Any]:
    """What `record` left, one by one. Raises: the error that the worker met."""
    if not exchange.has(name):
        raise StageFailedError(
            f"{exchange.here}/{name}: Beam's workers left no result. Is the folder on a file "
            "system that all machines see? See --exchange_dir and --worker_path."
        )
    with exchange.open(name) as stream:
        while True:
            try:
                finding = encoding.read(stream)
            except EOFError:
                return
            except ValueError as error:
                raise StageFailedError(
                    f"{exchange.here}/{name}: isn't what a Beam worker leaves ({error}). Run again."
                ) from None
            if isinstance(finding, CapfinderError):
                raise finding
            yield finding


@dataclass(frozen=True)
class WorkerFile:
    """A CSV file as a worker opens it: what data.csv_files asks of a pathlib.Path. `shown`: its
    path on the launching machine; `size`: that it has there, in bytes."""

    path: str
    shown: str
    size: int

    @property
    def suffix(self) -> str:
        return Path(self.shown).suffix

    def open(self, mode: str, buffering: int = -1) -> Any:
        """Raises: InputError when it isn't the same file."""
        assert mode == "rb", mode  # buffered in any case
        stream = _open(self.path)
        size = stream.seek(0, os.SEEK_END)
        if size != self.size:
            stream.close()
            raise InputError(
                f"{self.shown}: has {self.size:,} bytes, but a Beam worker finds {size:,} in "
                f"{self.path}. Run again when it is whole, or correct --worker_path."
            )
        stream.seek(0)
        return stream

    def __str__(self) -> str:
        return self.shown
