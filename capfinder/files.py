"""Files that appear whole or not at all: write under a temporary name, fsync, rename."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from capfinder.errors import InputError

PARTIAL = ".partial-"
EARLIER = "-earlier"  # ends the name of a directory that is being replaced
CHECKSUM = "sha256"  # of the rest of a sealed JSON object


def _partial_name(path: Path) -> Path:
    # With the host: several may write to a directory that they share, under equal process ids.
    return path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}+{socket.gethostname()}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """When the disk is full in the block, the error says for what; the system's doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is fsynced and renamed into place.

    Its suffixes stay at the end of the temporary name, for writers that go by them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path)
    partial = partial.with_name(partial.name + "".join(path.suffixes))
    try:
        with _named(path):
            yield partial
            _fsync(partial)
            partial.replace(path)
            _fsync(path.parent)
    finally:
        _remove(partial)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `path`, replacing it, after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path)
    _remove(partial)
    partial.mkdir()
    try:
        with _named(path):
            yield partial
            for member in sorted(partial.rglob("*")):
                if member.is_file():
                    _fsync(member)
            earlier = partial.with_name(f"{partial.name}{EARLIER}")
            if path.exists():
                path.replace(earlier)
            partial.replace(path)
            _fsync(path.parent)
        _remove(earlier)
    finally:
        _remove(partial)


def remove_partial(directory: Path, name: str = "") -> None:
    """Clears what killed writers of `name` (any) left directly in `directory`; hold its lock."""
    for member in directory.glob(f"{PARTIAL}{name}*"):
        _clear(member)


def remove_dead(directory: Path) -> None:
    """Clears what writers left directly in `directory` that were killed on this machine; needs no
    lock, as the names of those that live stay, and those of other machines."""
    host = re.escape(socket.gethostname())
    for member in directory.glob(f"{PARTIAL}*"):
        number = re.fullmatch(rf"[^+]*-(\d+)(\+{host})?(\.[^-+]*|{EARLIER})?", member.name)
        if number is not None and not _may_live(number[1]):
            _clear(member)


def _clear(left: Path) -> None:
    """Removes what a killed writer left; a directory that it had just moved out of the way, and
    put nothing in the place of, gets its name back."""
    moved = re.fullmatch(rf"{re.escape(PARTIAL)}(.+)-\d+\+[^+]*{EARLIER}", left.name)
    if moved is not None and not left.with_name(moved[1]).exists():
        with contextlib.suppress(OSError):  # another process has done it
            left.rename(left.with_name(moved[1]))
    else:
        _remove(left)


def _may_live(process: str) -> bool:
    """Without /proc (macOS) nothing is known: what such a process left stays."""
    proc = Path("/proc")
    return not (proc / "self").exists() or (proc / process).exists()


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=4, ensure_ascii=False) + "\n")


def read_json(
    path: Path, *, parse: Callable[[str], Any] = json.loads, encoding: str = "utf-8"
) -> Any:
    """Raises: InputError naming the file when it is missing or isn't JSON; what `parse` raises."""
    try:
        return parse(path.read_text(encoding=encoding))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: isn't text in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: not valid JSON (brackets within brackets, too deep)") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}: not valid JSON ({error})") from None


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object with a checksum of itself in it, for `unsealed` to go by."""
    plain = json.loads(json.dumps(value))
    return {**plain, CHECKSUM: fingerprint(plain)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """What was sealed. Raises: ValueError when that isn't what `value` holds."""
    plain = dict(value)
    expected = plain.pop(CHECKSUM, None)
    if expected is None:
        raise ValueError("there is no checksum; was it written by another version of capfinder?")
    if expected != fingerprint(plain):
        raise ValueError("the checksum is wrong: it isn't what was written")
    return plain


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def fingerprint(value: Any) -> str:
    """64 hex digits; equal JSON values give equal fingerprints, whatever the order of keys."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":")))


@contextlib.contextmanager
def exclusive_lock(
    path: Path,
    *,
    holder: str,
    waiting: Callable[[str], None] | None = None,
    setting: str = "shared_params.output_dir",
) -> Iterator[None]:
    """Holds an advisory lock on `path`; the kernel frees it when the process ends, however it ends.

    When somebody else holds it: with `waiting`, that is told who it is, and the lock waited for;
    else the error names the `setting` to change.
    Raises: InputError that names who holds it, without `waiting`; InputError for a directory that
    can't be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path.parent}: can't be written to ({error.strerror})") from None
    with opened as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "another run"
            if waiting is None:
                raise InputError(
                    f"{path.parent}: in use by {owner}. Wait for it to end, or choose another "
                    f"{setting}."
                ) from None
            waiting(owner)
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        since = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"
        stream.write(f"{holder}, process {os.getpid()} on {socket.gethostname()}, since {since}")
        stream.flush()
        yield
