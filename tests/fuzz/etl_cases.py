"""Cases for the reader of cap-signal CSV: pure data, made from a seed, kept as JSON on failure."""

import dataclasses
import gzip
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etl_compare import Tally, compare_block, compare_file
from etl_mutations import HEADER, lines_of, mutated, some_rows

from capfinder.etl.csv_files import MAX_ROW_BYTES, Block

DTYPES = ("float16", "float32", "float64")
FILE_SHARE, HUGE_LINE_SHARE = 0.15, 0.003
HUGE_LINE = b'\nhuge,0,"' + b"1," * (MAX_ROW_BYTES // 2) + b'1"\n'


@dataclass(frozen=True)
class ReaderCase:
    """Text to be read as a block of lines or, with a `name`, as a file; how_far: the block's offset
    and first line, or the file's block size."""

    data: bytes
    name: str
    how_far: tuple[int, ...]
    cap_class: int | None
    target_length: int
    dtype: str

    def check(self, scratch: Path) -> Tally:
        """Raises: Mismatch, or what a bug raises."""
        fit = {"target_length": self.target_length, "dtype": self.dtype}
        if not self.name:
            block = Block(self.data, *self.how_far)
            return compare_block(block, cap_class=self.cap_class, **fit) if self.data else Tally()
        path = scratch / self.name
        path.write_bytes(self.data)
        (block_bytes,) = self.how_far
        try:
            return compare_file(path, block_bytes=block_bytes, cap_class=self.cap_class, **fit)
        finally:
            path.unlink()

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "data": self.data.decode("latin-1")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ReaderCase":
        changed = {"data": values["data"].encode("latin-1"), "how_far": tuple(values["how_far"])}
        return cls(**{**values, **changed})


def make_reader_case(seed: int, number: int, rows: Sequence[bytes]) -> ReaderCase:
    """Some of `rows`, spoiled; equal arguments give equal cases."""
    rng = random.Random(f"{seed} {number}")
    text = mutated(rng, lines_of(rng, some_rows(rng, rows, count=rng.randint(1, 6))))
    name, how_far = "", (rng.choice([0, 29, 1 << 40]), rng.choice([2, 3, 10**9]))
    if rng.random() < FILE_SHARE:
        name = rng.choice(["data__case.csv", "data__case.csv", "data__case.csv.gz"])
        is_huge = rng.random() < HUGE_LINE_SHARE
        how_far = (1 << 20 if is_huge else rng.choice([1, 7, 100, 5000, 1 << 20]),)
        text += HUGE_LINE + text if is_huge else b""
        text = _as_file(rng, text, is_packed=name.endswith(".gz"))
    return ReaderCase(
        text,
        name,
        how_far,
        rng.choice([None, None, None, 0]),
        rng.choice([1, 2, 7, 50, 500]),
        rng.choice(DTYPES),
    )


def _as_file(rng: random.Random, text: bytes, *, is_packed: bool) -> bytes:
    """With a header that is mostly right; a packed one is sometimes damaged."""
    plain, quoted = HEADER + b"\n", b'"read_id","cap_class","timeseries"\n'
    usual = (plain, plain, plain, quoted, HEADER + b"\r\n", b"\xef\xbb\xbf" + plain)
    content = rng.choice([*usual, mutated(rng, quoted), b""]) + text
    if not is_packed:
        return content
    packed = gzip.compress(content, 1)
    damage = rng.random()
    if damage < 0.15:
        return packed[: rng.randint(0, len(packed))]
    if damage < 0.3:
        return mutated(rng, packed)
    return packed + gzip.compress(text) if damage < 0.4 else packed  # two members are one file
