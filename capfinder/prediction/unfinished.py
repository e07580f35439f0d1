"""Outputs that grow for hours in a hidden directory, and how far they have come: a run that was
stopped or killed goes on from there. They get their names once all are whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from capfinder import files
from capfinder.errors import InputError

DIRECTORY = ".unfinished"
STATE = "state.json"
METADATA = "metadata"  # a directory for what is read from there


class Unfinished:
    """The files `names` of output_dir while they are being written.

    state: what the last `save` was given, None if there was none that holds for `about`, a JSON
    object that says what they are made of and how; then `why_anew` says in words why not, "" when
    nothing was begun. `is_complete`: they only need their names."""

    def __init__(self, output_dir: Path, names: Sequence[str], *, about: Mapping[str, Any]) -> None:
        """Hold a lock on output_dir."""
        self._output_dir, self._names, self._about = output_dir, list(names), dict(about)
        self.directory = output_dir / DIRECTORY
        self.state: dict[str, Any] | None = None
        self.is_complete = False
        self.why_anew = ""
        self._streams: dict[str, BinaryIO] = {}
        self._sizes = dict.fromkeys(self._names, 0)
        self._take_up()
        if self.state is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(exist_ok=True)
        files.remove_partial(self.directory)
        if not self.is_complete:
            self._open()

    def _take_up(self) -> None:
        if not (self.directory / STATE).exists():
            return
        try:
            found = files.unsealed(files.read_json(self.directory / STATE))
            about, is_complete = dict(found["about"]), bool(found["is_complete"])
            sizes = {name: int(found["sizes"][name]) for name in self._names}
        except (InputError, ValueError, TypeError, KeyError) as error:
            self.why_anew = f"{self.directory / STATE} can't be read ({error})"
            return
        self.why_anew = difference(about, self._about)
        if not self.why_anew and not is_complete:
            self.why_anew = self._shortened(sizes)
        if not self.why_anew:
            self.state, self.is_complete, self._sizes = found["state"], is_complete, sizes

    def _shortened(self, sizes: Mapping[str, int]) -> str:
        for name, size in sizes.items():
            path = self.path(name)
            if not path.is_file() or path.stat().st_size < size:
                return f"{path} isn't as long as it was"
        return ""

    def _open(self) -> None:
        for name in self._names:
            stream = self.path(name).open("ab")
            stream.truncate(self._sizes[name])
            self._streams[name] = stream

    def path(self, name: str) -> Path:
        return self.directory / name

    def size(self, name: str) -> int:
        """What has been written to it."""
        return self._sizes[name]

    def write(self, name: str, data: bytes) -> None:
        with self._named(name):
            self._streams[name].write(data)
        self._sizes[name] += len(data)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """An error in the block says for which file; that of a full disk doesn't."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path(name))
            raise

    def append(self, name: str, *, to: str) -> None:
        """Moves all of a file to the end of another; a state that was saved before still holds."""
        self._streams[name].flush()
        with self.path(name).open("rb") as source:
            shutil.copyfileobj(source, self._streams[to])
        self._sizes[to] += self._sizes[name]

    def array(self, name: str, dtype: str) -> np.ndarray:
        """All that lies on the disk of it, one number after the other."""
        return np.fromfile(self.path(name), dtype)

    def save(self, state: Mapping[str, Any], *, sizes: Mapping[str, int] | None = None) -> None:
        """A rerun goes on from here. sizes: of files that are ahead of the state."""
        self.sync()
        self._write_state(state, {**self._sizes, **(sizes or {})}, is_complete=False)

    def complete(self, state: Mapping[str, Any]) -> None:
        """Whatever files lie in the directory by now are the result."""
        self.sync()
        self.close()
        self._write_state(state, self._sizes, is_complete=True)
        self.state, self.is_complete = dict(state), True

    def sync(self) -> None:
        """What was written lies on the disk."""
        for name, stream in self._streams.items():
            with self._named(name):
                stream.flush()
                os.fsync(stream.fileno())

    def _write_state(
        self, state: Mapping[str, Any], sizes: Mapping[str, int], *, is_complete: bool
    ) -> None:
        value = {"about": self._about, "is_complete": is_complete, "sizes": sizes, "state": state}
        files.write_json(self.path(STATE), files.sealed(value))

    def close(self) -> None:
        """What isn't saved is lost, on a full disk."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.close()

    def publish(
        self, names: Sequence[str], record: str, value: Mapping[str, Any], *, claim: Sequence[str]
    ) -> None:
        """Gives the complete directory's files their names, and `value` to the JSON file `record`;
        the directory goes. The record says that the others belong together: it comes last, and
        until then holds the keys `claim` alone, which say whose files they are."""
        files.write_json(self._output_dir / record, {key: value[key] for key in claim})
        for name in names:
            if self.path(name).exists():  # else an earlier run got that far
                self.path(name).replace(self._output_dir / name)
        files.write_json(self._output_dir / record, value)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def clear_published(output_dir: Path, about: Mapping[str, Any]) -> None:
    """Removes what is left of this result, which has its names; hold a lock on output_dir."""
    with contextlib.suppress(InputError, KeyError, TypeError):
        if files.read_json(output_dir / DIRECTORY / STATE)["about"] == about:
            shutil.rmtree(output_dir / DIRECTORY, ignore_errors=True)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What has changed, in words; "": nothing has. Both as JSON has them."""
    for key in (*now, *before):
        one, other = before.get(key), now.get(key)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = next(name for name in (*other, *one) if one.get(name) != other.get(name))
            return f"{key} {inner} has changed"
        return f"{key} has changed"
    return ""
