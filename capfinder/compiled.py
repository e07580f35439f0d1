"""How the inner loops of the ETL are compiled: by numba, at their first call, kept on disk.

They let go of Python's lock, so threads run them side by side."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba.core import config, event


def cache_directory() -> Path:
    """In the user's cache, a directory for this very source: numba notices a change in a kernel's
    own file, but not in one that it was compiled with."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    kernels = b"".join(text for text in texts if b"capfinder.compiled import" in text)
    return base / "capfinder" / "kernels" / hashlib.sha256(kernels).hexdigest()[:16]


if not getattr(config, "CACHE_DIR", ""):  # set by NUMBA_CACHE_DIR
    config.CACHE_DIR = str(cache_directory())  # type: ignore[attr-defined]

# "numpy": a division by zero is no exception, so no division has to look for one.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
helper = numba.njit(**_OPTIONS)  # what only kernels call is kept with them
# Into its caller before LLVM sees it: a call with an array costs 10 ns of reference counting.
inlined = numba.njit(**_OPTIONS, inline="always")


def kernel(function: Callable[..., Any]) -> Any:
    """What Python calls. Where no directory can be written to, each process compiles for itself."""
    try:
        return numba.njit(**_OPTIONS, cache=True)(function)
    except RuntimeError:
        return numba.njit(**_OPTIONS)(function)


class _Announcer(event.Listener):
    def __init__(self, say: Callable[[], None]) -> None:
        self._say, self._said = say, False

    def on_start(self, event: event.Event) -> None:
        if not self._said:
            self._said = True
            self._say()

    def on_end(self, event: event.Event) -> None:
        pass


@contextmanager
def announced(say: Callable[[], None]) -> Iterator[None]:
    """Calls `say` when something has to be compiled inside, before that; at most once."""
    with event.install_listener("numba:compile", _Announcer(say)):
        yield
