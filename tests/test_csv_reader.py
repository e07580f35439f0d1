import csv
import gzip
import hashlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
from csv_input import HEADER, row
from hypothesis import given
from hypothesis import strategies as st

from capfinder.data import csv_reader
from capfinder.data.csv_files import MAX_ROW_BYTES, Block, read_blocks, read_ranges
from capfinder.data.csv_reader import Reject, parse_signals, scan_block
from capfinder.errors import InputError


def scan_text(text: bytes, cap_class: int | None = None):
    """Rows, rejects and count of rows of one block, numbered as if it stood behind the header."""
    return scan_block(Block(text, 0, 2), cap_class=cap_class)


def scan_file(path: Path, block_bytes: int = 1 << 20):
    digest = hashlib.sha256()
    blocks = [block for block, _ in read_blocks(path, block_bytes=block_bytes, digest=digest)]
    return [scan_block(block, cap_class=None) for block in blocks], digest.hexdigest()


def write_bytes(tmp_path: Path, content: bytes, name: str = "data__a.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


finite = st.floats(-1e30, 1e30, allow_nan=False)
number = st.one_of(
    finite.map(repr),
    finite.map(lambda value: f"{value:.8f}"),
    finite.map(lambda value: f"{value:+.3E}"),
    st.sampled_from([".5", "5.", "-.25e-3", "+7", "007.50", "1e-60", "-0.0"]),
)
ids = st.text(st.sampled_from("abcdef0123456789-_.:é"), min_size=1, max_size=40)
records = st.lists(
    st.tuples(ids, st.integers(0, 10**9 - 1), st.lists(number, min_size=1, max_size=30)),
    min_size=1,
    max_size=20,
)


@given(records, st.sampled_from(["\n", "\r\n"]), st.integers(0, 2), st.booleans())
def test_values_equal_those_of_csv_and_float(rows, end, quoting, has_last_end):
    written = io.StringIO(newline="")
    for name, cap_class, numbers in rows:
        style = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)[quoting]
        csv.writer(written, quoting=style, lineterminator=end).writerow(
            (name, cap_class, ",".join(numbers))
        )
    text = written.getvalue()
    text = text if has_last_end else text.removesuffix(end)
    read = list(csv.reader(io.StringIO(text, newline="")))

    good, rejects, count = scan_text(text.encode())
    assert (rejects, count) == ([], len(rows))
    assert [name.decode() for name in good.read_id.tolist()] == [fields[0] for fields in read]
    assert good.cap_class.tolist() == [int(fields[1]) for fields in read]
    texts = [text.encode()[a:b] for a, b in zip(good.start, good.end, strict=True)]
    for dtype in ("float32", "float64"):
        parsed = parse_signals(texts, dtype=dtype)
        assert parsed.problems == {}
        for fields, start, length in zip(read, parsed.starts, parsed.lengths, strict=True):
            expected = np.array([float(value) for value in fields[2].split(",")]).astype(dtype)
            found = parsed.values[start : start + length]
            assert found.dtype == dtype
            assert found.tobytes() == expected.tobytes()


@given(st.lists(st.text("0123456789+-.eE", max_size=9), min_size=1, max_size=12))
def test_a_number_is_what_float_takes_for_one(texts):
    signal = ",".join(texts)
    _, rejects, _ = scan_text(row("r", 0, signal).encode())
    problems = [] if rejects else list(parse_signals([signal.encode()], dtype="float64").problems)

    def is_number(text):
        try:
            return math.isfinite(float(text))
        except ValueError:
            return False

    assert (not rejects and not problems) == all(is_number(text) for text in texts)


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 64))
def test_any_bytes_are_good_rows_or_rejects_whatever_the_block_size(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("any") / "a.csv"
    usual = [row("r1", 0, [1.0, 2.0]).encode(), b'"r2",3,4.5', b'r3,0,"1,,2"']
    content = HEADER.encode() + b"\n" + b"\n".join([*usual, *lines])
    path.write_bytes(content)
    small, digest = scan_file(path, size)
    whole, _ = scan_file(path)
    assert digest == hashlib.sha256(content).hexdigest()
    for scanned in (small, whole):
        assert all(len(rows.line) + len(bad) == count for rows, bad, count in scanned)

    def all_of(scanned):
        rows = [
            (name.decode(), *place)
            for part, _, _ in scanned
            for name, *place in zip(
                part.read_id.tolist(),
                part.cap_class.tolist(),
                part.line.tolist(),
                part.start.tolist(),
                part.end.tolist(),
                part.content.tolist(),
                strict=True,
            )
        ]
        return rows, [reject for _, rejects, _ in scanned for reject in rejects]

    assert all_of(small) == all_of(whole)


BAD_ROWS = {
    b"r,0": csv_reader.FIELD_COUNT,
    b"r": csv_reader.FIELD_COUNT,
    b'r,0,"1,2",3': csv_reader.FIELD_COUNT,
    b"r,0,1,2": csv_reader.FIELD_COUNT,
    b'r,0,"1,2"x': csv_reader.FIELD_COUNT,
    b'r,x,0,"1,2"': csv_reader.FIELD_COUNT,
    b'r,0,"1,a"': csv_reader.NOT_A_NUMBER,
    b'r,0,"1,,2"': csv_reader.NOT_A_NUMBER,
    b'r,0,",1"': csv_reader.NOT_A_NUMBER,
    b'r,0,"1,"': csv_reader.NOT_A_NUMBER,
    b'r,0,"1, 2"': csv_reader.NOT_A_NUMBER,
    b'r,0,"1_0"': csv_reader.NOT_A_NUMBER,
    b'r,0,"1\xc2\xb2"': csv_reader.NOT_A_NUMBER,
    b'r,0,"1\x00"': csv_reader.NOT_A_NUMBER,
    b'r,0,"1,nan"': csv_reader.NOT_FINITE,
    b'r,0,"-inf,1"': csv_reader.NOT_FINITE,
    b'r,0,"Infinity"': csv_reader.NOT_FINITE,
    b"r,0,NaN": csv_reader.NOT_FINITE,
    b'r,0,""': csv_reader.EMPTY_SIGNAL,
    b"r,0,": csv_reader.EMPTY_SIGNAL,
    b'r\xff,0,"1"': csv_reader.BAD_UTF8,
    b'r,0,"1\xe9"': csv_reader.BAD_UTF8,
    b'r,0,"1,2': csv_reader.TRUNCATED,
    b'r,0,"': csv_reader.TRUNCATED,
    b'r,,"1"': csv_reader.BAD_CLASS,
    b'r,-1,"1"': csv_reader.BAD_CLASS,
    b'r,1.0,"1"': csv_reader.BAD_CLASS,
    b'r, 1,"1"': csv_reader.BAD_CLASS,
    b'r,1234567890,"1"': csv_reader.BAD_CLASS,
    HEADER.encode(): csv_reader.BAD_CLASS,
    b',0,"1"': csv_reader.BAD_READ_ID,
    b' r,0,"1"': csv_reader.BAD_READ_ID,
    b'r\x07,0,"1"': csv_reader.BAD_READ_ID,
    b'"a""b",0,"1"': csv_reader.BAD_READ_ID,
    b"r" * 129 + b',0,"1"': csv_reader.BAD_READ_ID,
    b'r,7,"1"': csv_reader.OTHER_CLASS,
}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bad", BAD_ROWS, ids=lambda bad: repr(bad[:16]))
def test_a_bad_row_has_one_reason_and_leaves_its_neighbours_alone(bad, end):
    good = [row(f"good{i}", 0, [i, 0.5]).encode() for i in range(3)]
    text = end.join([good[0], good[1], bad, good[2], b""])
    rows, rejects, count = scan_text(text, cap_class=0)
    assert [(reject.line, reject.reason) for reject in rejects] == [(4, BAD_ROWS[bad])]
    assert rows.read_id.tolist() == [b"good0", b"good1", b"good2"]
    assert rows.line.tolist() == [2, 3, 5]
    assert count == 4


@pytest.mark.parametrize("last", [b"", b"r", b"r,0", b"r,0,", b'r,0,"', b'r,0,"1.5,2', b'r,0,"1.5'])
def test_a_last_line_without_an_end_is_truncated_unless_complete(last):
    rows, rejects, count = scan_text(row("a", 0, [1]).encode() + b"\n" + last)
    assert len(rows.line) == 1
    assert rejects == ([Reject(3, "r", csv_reader.TRUNCATED)] if last else [])
    assert count == 1 + bool(last)


@pytest.mark.parametrize("last", [b'r,0,"1.5,2"', b"r,0,1.5", b'"r","0","1.5"', b'r,0,"1.5"\r'])
def test_a_complete_last_line_needs_no_end(last):
    rows, rejects, _ = scan_text(last)
    assert rejects == []
    assert rows.read_id.tolist() == [b"r"]


@pytest.mark.parametrize(
    ("signal", "dtype", "reason"),
    [
        ("1,1.2.3", "float32", csv_reader.NOT_A_NUMBER),
        ("1,-", "float64", csv_reader.NOT_A_NUMBER),
        ("1e5e", "float16", csv_reader.NOT_A_NUMBER),
        ("1e999", "float64", csv_reader.NOT_FINITE),
        ("-1e39,1", "float32", csv_reader.NOT_FINITE),
        ("1e39,1", "float64", None),
        ("70000", "float16", csv_reader.NOT_FINITE),
        ("65504", "float16", None),
    ],
)
def test_parsing_finds_what_the_bytes_alone_did_not_show(signal, dtype, reason):
    texts = [b"1,2", signal.encode(), b"3"]
    parsed = parse_signals(texts, dtype=dtype)
    assert parsed.problems == ({1: reason} if reason else {})
    assert parsed.lengths.tolist() == [2, signal.count(",") + 1, 1]
    assert parsed.values[parsed.starts[2]] == 3


def test_blank_lines_are_no_rows_but_count_as_lines():
    text = b"\n\r\n" + row("a", 0, [1]).encode() + b"\n\n" + b"x\n"
    rows, rejects, count = scan_text(text)
    assert (rows.line.tolist(), [reject.line for reject in rejects], count) == ([4], [6], 2)


def test_a_line_beyond_the_limit_is_one_reject(tmp_path):
    huge = b'huge,0,"' + b"1," * (MAX_ROW_BYTES // 2) + b'1"'
    ends = [row("a", 0, [1]).encode(), row("b", 0, [2]).encode()]
    path = write_bytes(tmp_path, b"\n".join([HEADER.encode(), ends[0], huge, ends[1]]))
    for block_bytes in (1 << 20, 1 << 26):
        scanned, _ = scan_file(path, block_bytes)
        names = [name for rows, _, _ in scanned for name in rows.read_id.tolist()]
        rejects = [reject for _, rejects, _ in scanned for reject in rejects]
        assert names == [b"a", b"b"]
        assert rejects == [Reject(3, "huge", csv_reader.TOO_LONG)]
        start, end = scanned[-1][0].start[-1], scanned[-1][0].end[-1]
        assert list(read_ranges(path, [(int(start), int(end))])) == [b"2.00000000"]


def test_a_gzipped_file_gives_the_rows_of_the_plain_one(tmp_path):
    lines = [row(f"r{i}", i % 3, np.arange(i + 1)) for i in range(50)]
    content = "\r\n".join([HEADER, *lines, ""]).encode()
    plain = write_bytes(tmp_path, content)
    packed = write_bytes(tmp_path, content, "data__a.csv.gz")
    (one, one_digest), (two, two_digest) = scan_file(plain, 200), scan_file(packed, 700)
    starts = [np.concatenate([rows.start for rows, _, _ in scanned]) for scanned in (one, two)]
    ends = [np.concatenate([rows.end for rows, _, _ in scanned]) for scanned in (one, two)]
    assert starts[0].tolist() == starts[1].tolist()
    ranges = list(zip(starts[0].tolist(), ends[0].tolist(), strict=True))[::7]
    assert list(read_ranges(plain, ranges)) == list(read_ranges(packed, ranges))
    assert one_digest == hashlib.sha256(content).hexdigest()
    assert two_digest == hashlib.sha256(packed.read_bytes()).hexdigest()


@pytest.mark.parametrize("cut", [5, 30, -4])
def test_a_damaged_gzip_file_is_an_input_error(tmp_path, cut):
    path = write_bytes(tmp_path, (HEADER + "\n" + "a,0,1\n" * 500).encode(), "a.csv.gz")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"a\.csv\.gz: can't be decompressed"):
        scan_file(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"read_id,cap_class\n",
        b"a,0,1\n",
        b"read_id,timeseries,cap_class\n",
        b"\x00" * 99,
    ],
)
def test_a_file_without_the_header_is_an_input_error(tmp_path, content):
    with pytest.raises(InputError, match=r"data__a\.csv.*read_id,cap_class,timeseries"):
        scan_file(write_bytes(tmp_path, content))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("header", [HEADER.encode(), b'"read_id","cap_class","timeseries"'])
def test_the_header_may_be_quoted_and_have_a_byte_order_mark(tmp_path, start, header):
    scanned, _ = scan_file(write_bytes(tmp_path, start + header + b"\r\na,0,1\r\n"))
    assert scanned[0][0].read_id.tolist() == [b"a"]


def test_content_tells_rows_apart_but_not_line_ends():
    rows, _, _ = scan_text(b'a,0,"1,2"\nb,0,"1,2"\na,0,"1,2"\r\na,0,"1,3"\n')
    content = [tuple(pair) for pair in rows.content.tolist()]
    assert content[0] == content[2]
    assert len(set(content)) == 3
    expected = hashlib.sha256(b'a,0,"1,2"').digest()
    assert content[0] == (
        int.from_bytes(expected[:8], "little"),
        int.from_bytes(expected[8:16], "little"),
    )
