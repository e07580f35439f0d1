"""metadata__*.csv beside the data, in memory that doesn't grow with them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capfinder.etl.csv_files import text_blocks

BLOCK_BYTES = 1 << 23
MOST_BYTES = 256  # of a name: in an array each takes as much as the longest of them


def is_too_long() -> Any:
    """A polars expression: of each column of a table of texts whether it has over MOST_BYTES."""
    import polars as pl

    return pl.all().str.len_bytes() > MOST_BYTES


def tables(path: Path) -> Iterator[Any]:
    """The rows as polars tables of texts, block by block.

    Raises: InputError, OSError or PolarsError for a file that can't be read as CSV."""
    import polars as pl  # slow to load, and needed where there are metadata alone

    header = b""
    # polars' own batches come from a reader that runs ahead: 150 bytes a row of memory.
    for block in text_blocks(path, block_bytes=BLOCK_BYTES):
        first, _, text = (b"", b"", block) if header else block.partition(b"\n")
        header = header or first + b"\n"
        yield pl.read_csv(io.BytesIO(header + text), infer_schema=False)
    if not header:
        raise pl.exceptions.NoDataError("empty CSV")
