"""The compiled reader against the slow one, on a block of lines or on a file."""

import gzip
import hashlib
import math
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import etl_reference
import numpy as np
from etl_mutations import HEADER
from etl_reference import Row

from capfinder.errors import InputError
from capfinder.etl.csv_files import Block, read_blocks, read_ranges
from capfinder.etl.csv_reader import OTHER_CLASS, Rows, parse_signals, scan_block


@dataclass
class Tally:
    """What the cases so far held."""

    good: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # whole files or runs refused

    def add(self, other: "Tally") -> None:
        self.good += other.good
        self.rejects += other.rejects
        self.errors += other.errors


class Mismatch(AssertionError):
    """The reader isn't what the format's definition says."""


def must(condition: object, what: str, *found: object) -> None:
    if not condition:
        raise Mismatch(f"{what}: {'; '.join(repr(each)[:300] for each in found)}")


def compare_block(block: Block, *, cap_class: int | None, target_length: int, dtype: str) -> Tally:
    """Raises: Mismatch."""
    expected = etl_reference.read_rows(block.data, first_line=block.line, dtype=dtype)
    rows, rejects, count = scan_block(block, cap_class=cap_class)
    found = [(rows, [tuple(reject) for reject in rejects], count)]
    starts, ends = rows.start - block.offset, rows.end - block.offset
    data = block.data if count % 2 else memoryview(block.data)
    signals = parse_signals(data, starts, ends, target_length=target_length, dtype=dtype)
    return _compare(expected, found, [signals], cap_class, target_length, dtype, block.offset)


def compare_file(
    path: Path, *, block_bytes: int, cap_class: int | None, target_length: int, dtype: str
) -> Tally:
    """Raises: Mismatch."""
    packed = path.read_bytes()
    content = unpacked(packed) if path.suffix == ".gz" else packed
    first = b"" if content is None else content[:4096].partition(b"\n")[0]
    names = first.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\r").replace(b'"', b"")
    digest = hashlib.sha256()
    try:
        blocks = [b for b, _ in read_blocks(path, block_bytes=block_bytes, digest=digest)]
    except InputError as error:
        must(content is None or names != HEADER, "refused without a cause", error)
        must(str(path) in str(error) and "\n" not in str(error), "unclear error", error)
        return Tally(errors=Counter(["not gzip" if content is None else "header"]))
    must(content is not None, "a file was read that gzip can't unpack")
    assert content is not None
    must(names == HEADER, "a header was taken", first)
    must(digest.hexdigest() == hashlib.sha256(packed).hexdigest(), "wrong SHA-256")
    head = len(first) + 1
    expected = etl_reference.read_rows(content[head:], first_line=2, dtype=dtype)
    found, signals = [], []
    for block in blocks:
        rows, rejects, count = scan_block(block, cap_class=cap_class)
        found.append((rows, [tuple(reject) for reject in rejects], count))
        ranges = list(zip(rows.start.tolist(), rows.end.tolist(), strict=True))
        texts = [bytes(text) for text in read_ranges(path, ranges)]
        bounds = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        signals.append(
            parse_signals(
                b"".join(texts), bounds[:-1], bounds[1:], target_length=target_length, dtype=dtype
            )
        )
    return _compare(expected, found, signals, cap_class, target_length, dtype, head)


def unpacked(packed: bytes) -> bytes | None:
    try:
        return gzip.decompress(packed)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return None


def _compare(
    expected: list[Row],
    scanned: list[tuple[Rows, list[tuple[int, str, str]], int]],
    parsed: list,
    cap_class: int | None,
    target_length: int,
    dtype: str,
    offset: int,
) -> Tally:
    """scanned, parsed: what scan_block and parse_signals gave, block by block; offset: of the first
    line in the file."""
    must(sum(count for *_, count in scanned) == len(expected), "rows counted", scanned, expected)
    by_line = {row.line: row for row in expected}
    tally, seen = Tally(), set()
    contents: dict[tuple[int, int], bytes] = {}
    for (rows, rejects, count), signals in zip(scanned, parsed, strict=True):
        must(len(rows.line) + len(rejects) == count, "rows lost", rows, rejects, count)
        must(rejects == sorted(rejects), "rejects not sorted", rejects)
        must((np.diff(rows.line) > 0).all(), "rows out of order", rows.line)
        for index, line in enumerate(rows.line.tolist()):
            must(line in by_line and line not in seen, "no such row, or twice", line)
            seen.add(line)
            row = by_line[line]
            _compare_identity(row, rows, index, offset)
            content = tuple(rows.content[index].tolist())
            must(contents.setdefault(content, row.content) == row.content, "one hash for", row)
            reasons = _reasons(row, cap_class)
            if index in signals.problems:
                reason = signals.problems[index]
                must(reason in reasons, "a reason that isn't so", reason, row)
                must(not signals.fitted[index].any(), "values of a reject", row)
                must(not signals.total[index] and not signals.squares[index], "sums of one", row)
                tally.rejects[reason] += 1
            else:
                must(not reasons, "taken for good", row, cap_class)
                _compare_values(row, signals, index, target_length, dtype)
                tally.good += 1
        for line, read_id, reason in rejects:
            must(line in by_line and line not in seen, "no such row, or twice", line)
            seen.add(line)
            must(
                reason in _reasons(by_line[line], cap_class),
                "a reason that isn't so",
                reason,
                by_line[line],
            )
            must(read_id.isprintable() or not read_id, "read_id not fit to be shown", read_id)
            tally.rejects[reason] += 1
    must(len(set(contents.values())) == len(contents), "two hashes for one line", contents)
    must(seen == by_line.keys(), "rows missing", by_line.keys() - seen)
    return tally


def _reasons(row: Row, cap_class: int | None) -> frozenset[str]:
    differs = cap_class is not None and row.cap_class >= 0 and row.cap_class != cap_class
    return row.reasons | {OTHER_CLASS} if differs else row.reasons


def _compare_identity(row: Row, rows: Rows, index: int, offset: int) -> None:
    found = (
        rows.read_id[index].decode(),
        int(rows.cap_class[index]),
        int(rows.begin[index]) - offset,
        int(rows.start[index]) - offset,
        int(rows.end[index]) - offset,
    )
    wanted = (row.read_id, row.cap_class, row.begin, row.start, row.end)
    must(found == wanted, "identity", found, wanted)
    must(row.only_parsing_shows or not row.reasons, "scanned as good", row)
    if not row.reasons:
        must(rows.samples[index] == len(row.numbers), "samples", rows.samples[index], row)


def _compare_values(row: Row, signals: object, index: int, target_length: int, dtype: str) -> None:
    wanted = etl_reference.fitted(row.numbers, target_length, dtype)
    fitted = signals.fitted[index]  # type: ignore[attr-defined]
    must(fitted.dtype == dtype and fitted.shape == (target_length,), "shape", fitted)
    if fitted.tobytes() != wanted.tobytes():
        places = [
            (at, a, b)
            for at, (a, b) in enumerate(zip(fitted.tolist(), wanted.tolist(), strict=True))
            if math.copysign(1, a) != math.copysign(1, b) or a != b
        ]
        raise Mismatch(f"values (place, found, wanted) {places[:5]} of {row.content[:3000]!r}")
    must(signals.lengths[index] == len(row.numbers), "length", row)  # type: ignore[attr-defined]
    sizes = [abs(number) for number in row.numbers]
    total, squares = float(signals.total[index]), float(signals.squares[index])  # type: ignore[attr-defined]
    if max(sizes) < 1e150:  # beyond, the sums of float64 themselves are infinite
        scale = math.fsum(sizes)
        must(abs(total - math.fsum(row.numbers)) <= 1e-9 * scale, "total", total, row)
        wanted_squares = math.fsum(size * size for size in sizes)
        must(math.isclose(squares, wanted_squares, rel_tol=1e-9), "squares", squares, row)
