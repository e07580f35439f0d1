"""File locks that the kernel frees when their holder dies, however it dies."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it for the block."""
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def take(path: Path) -> IO[str] | None:
    """The lock, held until the stream is closed; None when somebody else holds it."""
    stream = path.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


class KernelLock:
    """The lock that an Optuna journal file is written under.

    Optuna's own stays behind after a kill, and everybody then waits half a minute for it. What a
    killed writer or a full disk has left unfinished goes before the next line is written."""

    def __init__(self, path: Path, journal: Path) -> None:
        self._path, self._journal = path, journal
        self._stream: IO[str] | None = None

    def acquire(self) -> bool:
        self._stream = self._path.open("a")
        fcntl.flock(self._stream, fcntl.LOCK_EX)
        drop_unfinished_line(self._journal)
        return True

    def release(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def drop_unfinished_line(journal: Path) -> None:
    """Cuts off what a crash left half written; Optuna could read nothing after it."""
    if not journal.exists():
        return
    with journal.open("rb+") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


def first_damaged_line(journal: Path) -> str:
    """' (line N)', the first that isn't JSON; '' when all are."""
    with journal.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                json.loads(line)
            except ValueError:
                return f" (line {number:,})"
    return ""
