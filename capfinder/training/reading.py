"""A checkpoint's files, as Orbax wrote them, read back and compared with their checksums."""

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capfinder import libraries
from capfinder.files import sealed, unsealed
from capfinder.training.packing import checksum

ocp = libraries.lazily("orbax.checkpoint")

CHECKSUM = "arrays_crc32"  # in the meta


def with_checksums(meta: Mapping[str, Any], arrays: Any) -> dict[str, Any]:
    """The meta with checksums of the arrays and of itself, as `read` expects it."""
    return sealed({**meta, CHECKSUM: checksum(arrays)})


def read(path: Path, item: str) -> tuple[dict[str, Any], Any]:
    """A checkpoint's meta, and its arrays as a tree of NumPy's. Raises: ValueError when they aren't
    those that were written; whatever Orbax and TensorStore raise where that shows before."""
    meta, expected = _read_meta(path)
    arrays = read_arrays(path / item)
    if checksum(arrays) != expected:
        raise ValueError(f"the checksum of its {item} is wrong: it isn't what was written")
    return meta, arrays


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's meta alone. Raises: as `read`."""
    return _read_meta(path)[0]


def _read_meta(path: Path) -> tuple[dict[str, Any], str]:
    meta = unsealed(ocp.JsonCheckpointHandler().restore(path / "meta"))
    return meta, meta.pop(CHECKSUM)


def read_arrays(path: Path) -> Any:
    """A tree of NumPy arrays, whatever device they were saved from; nothing is compared."""
    reader = ocp.StandardCheckpointHandler()
    saved = reader.metadata(path)
    template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), dict(saved))
    return reader.restore(path, args=ocp.args.StandardRestore(template))


def hush_orbax() -> None:
    """Orbax logs the traceback of every failure that it also raises, and that we report; and when
    one array can't be read, it drops what it had begun for the others."""
    logging.getLogger("absl").addFilter(_is_not_orbax_s)
    warnings.filterwarnings("ignore", "coroutine '.*Handler.* was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _Hushed):
        sys.unraisablehook = _Hushed(sys.unraisablehook)


def _is_not_orbax_s(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


class _Hushed:
    """The other arrays report to an event loop that is closed by then: the interpreter would print
    a traceback for each."""

    def __init__(self, earlier: Callable[[Any], None]) -> None:
        self._earlier = earlier

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._earlier(unraisable)
