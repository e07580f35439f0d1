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

from capfinder.errors import InputError
from capfinder.etl import csv_reader, kernels
from capfinder.etl.csv_files import MAX_ROW_BYTES, Block, line_of, read_blocks, read_ranges
from capfinder.etl.csv_reader import Reject, Signals, parse_signals, scan_block
from capfinder.etl.preprocess import fit_length


def scan_text(text: bytes, cap_class: int | None = None):
    """Rows, rejects and count of rows of one block, numbered as if it stood behind the header."""
    return scan_block(Block(text, 0, 2), cap_class=cap_class)


def parse(texts: list[bytes], target_length: int, dtype: str) -> Signals:
    """The signals as they lie in a file: behind a quote, before a quote and a line end."""
    data = b'"' + b'"\r\n9,"'.join(texts) + b'"'
    ends = np.cumsum([len(text) + 6 for text in texts]) - 5
    return parse_signals(
        data,
        ends - [len(text) for text in texts],
        ends,
        target_length=target_length,
        dtype=dtype,
    )


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
    places = zip(good.begin.tolist(), good.read_id.tolist(), strict=True)
    assert all(text.encode()[begin:].startswith(name) for begin, name in places)
    signals = [text.encode()[a:b] for a, b in zip(good.start, good.end, strict=True)]
    assert good.samples.tolist() == [signal.count(b",") + 1 for signal in signals]
    for dtype in ("float32", "float64"):
        parsed = parse_signals(text.encode(), good.start, good.end, target_length=30, dtype=dtype)
        assert parsed.problems == {}
        assert parsed.fitted.dtype == dtype
        for index, fields in enumerate(read):
            values = np.array([float(value) for value in fields[2].split(",")])
            expected = fit_length(values.astype(dtype), 30)
            assert parsed.fitted[index].tobytes() == expected.tobytes()
            assert parsed.lengths[index] == len(values)


@given(records)
def test_the_usual_form_gives_the_same_as_the_slow_way(rows):
    """A third of these have an id that only the slow way takes; a quote makes all take it."""
    usual = [f'{name},{label},"{",".join(numbers)}"'.encode() for name, label, numbers in rows]
    good, rejects, _ = scan_text(b"\n".join(usual))
    assert rejects == []
    at = 0
    for index, line in enumerate(usual):
        outcome = csv_reader._row_fields(line, is_whole=True)
        assert not isinstance(outcome, str)
        begin, end, label, start, stop, samples = outcome
        assert good.begin[index] - at == begin
        assert good.read_id[index] == line[begin:end]
        assert good.cap_class[index] == label
        assert (good.start[index] - at, good.end[index] - at) == (start, stop)
        assert good.samples[index] == samples
        at += len(line) + 1


digits = st.text("0123456789", min_size=1, max_size=25)
all_floats = st.floats(allow_nan=False, allow_infinity=False)
any_number = st.one_of(
    all_floats.map(repr),
    st.floats(-12, 12).map(repr),
    st.floats(-12, 12, width=32).map(lambda value: str(np.float32(value))),
    *(
        st.floats(-12, 12).map(lambda value, form=form: f"{value:{form}}")
        for form in (".8f", ".6f", ".3f", ".9f", ".17f", ".20f", ".25f", ".0f", ".7e", "+.16E")
    ),
    st.integers(-(10**25), 10**25).map(str),
    st.builds("{}{}.{}".format, st.sampled_from(["", "-", "+", "000"]), digits, digits),
    st.builds("{}e{}".format, digits, st.integers(-400, 400)),
    st.builds("{}.{}E{:+d}".format, digits, digits, st.integers(-400, 400)),
    # Halfway between two neighbours, and a little beside: the last bit hangs on the last digit.
    st.builds(
        lambda whole, more: f"{2 * whole + 1}{more}",
        st.integers(2**52, 2**53 - 1),
        st.sampled_from(["", ".0", ".00000000000000000001", ".5", "e0", "0000e-4"]),
    ),
    st.floats(-(2**-1000), 2**-1000).map(repr),  # denormals among them
    st.sampled_from(
        [
            *(
                ".5",
                "5.",
                "-.25e-3",
                "+7",
                "007.50",
                "-0.0",
                "-0",
                "0e999",
                "1e22",
                "1e23",
                "-1e-22",
            ),
            *("9007199254740992", "9007199254740993", "4.9e-324", "2.4703282292062328e-324"),
            *("1.7976931348623157e308", "0." + "0" * 400 + "1e401", "1" + "0" * 400 + "e-400"),
            *(
                "99999999999.99999999",
                "1.00000017881393432617187499",
                "65519.996",
                "1e-99999999999",
            ),
        ]
    ),
)


@given(st.lists(st.lists(any_number, min_size=1, max_size=12), min_size=1, max_size=6))
def test_every_float_equals_pythons_to_the_last_bit(rows):
    texts = [",".join(numbers).encode() for numbers in rows]
    for dtype in ("float64", "float32", "float16"):
        parsed = parse(texts, 12, dtype)
        for index, numbers in enumerate(rows):
            exact = np.array([float(number) for number in numbers])
            with np.errstate(over="ignore"):
                values = exact if dtype == "float64" else exact.astype(np.float32).astype(dtype)
            assert parsed.lengths[index] == len(numbers)
            if not np.isfinite(values).all():
                assert parsed.problems[index] == csv_reader.NOT_FINITE
                assert not parsed.fitted[index].any()
                continue
            assert index not in parsed.problems
            assert parsed.fitted[index].tobytes() == fit_length(values, 12).tobytes()
            with np.errstate(over="ignore"):
                total, squares, magnitude = exact.sum(), (exact * exact).sum(), np.abs(exact).sum()
            if np.isfinite([total, magnitude]).all():
                assert abs(parsed.total[index] - total) <= 1e-14 * magnitude
            assert parsed.squares[index] == pytest.approx(squares, rel=1e-12)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.integers(1, 60), st.data())
def test_signals_are_cut_and_padded_as_each_alone_would_be(lengths, target_length, data):
    form = data.draw(st.sampled_from([".8f", ".4f", ".17f", ".24f", ".3e"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = [[f"{value:{form}}" for value in rng.normal(size=length)] for length in lengths]
    parsed = parse([",".join(numbers).encode() for numbers in rows], target_length, "float16")
    assert parsed.lengths.tolist() == lengths
    for fitted, numbers in zip(parsed.fitted, rows, strict=True):
        values = np.array([float(number) for number in numbers]).astype(np.float32)
        expected = fit_length(values.astype(np.float16), target_length)
        np.testing.assert_array_equal(fitted, expected)


@given(st.lists(st.text("0123456789+-.eE", max_size=9), min_size=1, max_size=12))
def test_a_number_is_what_float_takes_for_one(texts):
    signal = ",".join(texts)
    _, rejects, _ = scan_text(row("r", 0, signal).encode())
    problems = [] if rejects else list(parse([signal.encode()], 5, "float64").problems)

    def is_number(text):
        try:
            return math.isfinite(float(text))
        except ValueError:
            return False

    assert (not rejects and not problems) == all(is_number(text) for text in texts)


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 64))
def test_any_bytes_are_good_rows_or_rejects_whatever_the_block_size(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("any") / "a.csv"
    usual = [
        row("r1", 0, [1.0, 2.0]).encode(),
        b'"r2",3,4.5',
        b'r3,0,"1,,2"',
        b'"r4","7","1,2,-3e4,4.0000005,6"',
        b'r5,0,"1.0,2.0x,3"\r',
        'é,1,"2,3"'.encode(),
    ]
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
                part.begin.tolist(),
                part.start.tolist(),
                part.end.tolist(),
                part.samples.tolist(),
                part.content.tolist(),
                strict=True,
            )
        ]
        return rows, [reject for _, rejects, _ in scanned for reject in rejects]

    assert all_of(small) == all_of(whole)
    for part, _, _ in whole:
        for number in range(len(part.line)):
            name, text = part.read_id[number], content[part.start[number] : part.end[number]]
            assert content[part.begin[number] :].startswith(name)
            assert part.samples[number] == text.count(b",") + 1


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


EXPLAINED = {
    b'r,one,"1"': "bad cap_class 'one', expected a whole number from 0 to 999999999",
    b'r,,"1"': "bad cap_class '', expected a whole number from 0 to 999999999",
    b'r,7,"1"': "class differs from file (cap_class '7'; a file holds one class, that of its first "
    "good row)",
    b'r,0,"1,[2"': "not a number ('[2' in timeseries, expected numbers with commas between them)",
    b"r,0," + b"1 " * 40: f"not a number ('{'1 ' * 20}'... in timeseries, expected numbers with "
    "commas between them)",
    b'r,0,"1,-inf"': "not finite ('-inf' in timeseries)",
    b'r,0,"1,2': "truncated line",
    b"r,0": "wrong field count",
}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", ["data__a.csv", "data__a.csv.gz"])
@pytest.mark.parametrize("bad", EXPLAINED, ids=lambda bad: repr(bad[:16]))
def test_a_reject_is_explained_by_what_the_row_holds(tmp_path, bad, name, end):
    lines = [HEADER.encode(), b"g,0,1", b"", bad, b"h,0,1", b""]
    path = write_bytes(tmp_path, end.join(lines), name)
    (block,) = (block for block, _ in read_blocks(path, block_bytes=1 << 20))
    _, (reject,), _ = scan_block(block, cap_class=0)
    assert csv_reader.explained(path, reject) == EXPLAINED[bad]
    path.unlink()
    assert csv_reader.explained(path, reject) == reject.reason


@given(st.lists(st.sampled_from([b"", b"a", b"bc" * 9]), max_size=9), st.integers(1, 30))
def test_a_line_is_found_by_its_number(tmp_path_factory, lines, block_bytes):
    path = tmp_path_factory.mktemp("lines") / "data__a.csv"
    path.write_bytes(b"\n".join([HEADER.encode(), *lines]))
    for number in range(2, len(lines) + 4):
        expected = (lines[number - 2 :] or [b""])[0]
        assert line_of(path, number, block_bytes=block_bytes) == expected


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
        ("1e999,1.2.3", "float64", csv_reader.NOT_A_NUMBER),
        ("1.5,", "float64", csv_reader.NOT_A_NUMBER),
        ("0.5,2.25,9,1x,0.5", "float16", csv_reader.NOT_A_NUMBER),
        ("3.4028235677973366e38", "float32", csv_reader.NOT_FINITE),
        ("3.4028235677973362e38", "float32", None),
        ("65519.998046875", "float16", csv_reader.NOT_FINITE),
        ("65519.99804687499", "float16", None),
        ("70000", "float16", csv_reader.NOT_FINITE),
        ("65504", "float16", None),
    ],
)
def test_parsing_finds_what_the_bytes_alone_did_not_show(signal, dtype, reason):
    parsed = parse([b"1,2", signal.encode(), b"3"], 2, dtype)
    assert parsed.problems == ({1: reason} if reason else {})
    assert parsed.lengths.tolist() == [2, signal.count(",") + 1, 1]
    assert parsed.fitted[[0, 2]].tolist() == [[1, 2], [3, 0]]
    assert (parsed.total[[0, 2]].tolist(), parsed.squares[[0, 2]].tolist()) == ([3, 3], [5, 9])
    if reason:
        assert (parsed.fitted[1].any(), parsed.total[1], parsed.squares[1]) == (False, 0, 0)


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


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:5],
        lambda whole: whole[:30],
        lambda whole: whole[:-4],
        lambda whole: whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:],  # its checksum
        lambda whole: whole[:20] + b"\xff" * 40 + whole[60:],
        lambda whole: whole + b"what doesn't belong here",
    ],
)
def test_a_damaged_gzip_file_is_an_input_error(tmp_path, damage):
    content = (HEADER + "\n" + "".join(f"a{i},0,{i}\n" for i in range(500))).encode()
    path = write_bytes(tmp_path, content, "a.csv.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"^[^\n]*a\.csv\.gz: can't be decompressed \([^\n]*$"):
        scan_file(path)


def test_a_gzip_file_of_several_members_is_read_whole(tmp_path):
    path = tmp_path / "a.csv.gz"
    parts = [f"{HEADER}\na,0,1\nb,".encode(), b"0,2\nc,0,3\n"]
    path.write_bytes(b"".join(gzip.compress(part) for part in parts) + bytes(20))
    scanned, digest = scan_file(path)
    assert scanned[0][0].read_id.tolist() == [b"a", b"b", b"c"]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


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
    assert content[0] == murmur(b'a,0,"1,2"')


def murmur(text: bytes, seed: int = 0) -> tuple[int, int]:
    buffer = np.frombuffer(text, np.uint8)
    first, second = kernels.content_hash(buffer, 0, len(text), np.uint64(seed))
    return int(first), int(second)


def test_the_content_hash_is_murmurhash3():
    # From the test of Go's spaolacci/murmur3, which has them from the C++ original.
    assert murmur(b"hello") == (0xCBD8A7B341BD9B02, 0x5B1E906A48AE1D19)
    assert murmur(b"The quick brown fox jumps over the lazy dog.") == (
        0xCD99481F9EE902C9,
        0x695DA1A38987B6E7,
    )
    # SMHasher's check of every length: hashes of 0, 0 1, 0 1 2, ..., hashed once more.
    hashes = [murmur(bytes(range(size)), 256 - size) for size in range(256)]
    assert murmur(np.array(hashes, "<u8").tobytes())[0] & 0xFFFFFFFF == 0x6384BA69


@given(st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\r\n", b"bc" * 70]), max_size=40))
def test_line_bounds_are_those_of_split(parts):
    text = b"".join(parts)
    expected, at = [], 0
    for number, line in enumerate(text.split(b"\n")):
        stripped = line.removesuffix(b"\r")
        if stripped:
            expected.append((at, at + len(stripped), number))
        at += len(line) + 1
    bounds = kernels.line_bounds(np.frombuffer(text, np.uint8))
    assert [tuple(column) for column in bounds.T.tolist()] == expected


@given(st.binary(min_size=1, max_size=3), st.integers(0, 300), st.integers(0, 299))
def test_a_wrong_byte_is_found_wherever_it_stands(wrong, size, place):
    signal = bytearray((b"1.5,-2e3," * 40)[: size + 1])
    place = min(place, len(signal) - 1)
    signal[place : place + len(wrong)] = wrong
    is_good = bool(signal) and all(
        number and all(byte in b"0123456789+-.eE" for byte in number)
        for number in bytes(signal).split(b",")
    )
    line = b'r,0,"' + signal + b'"'
    buffer = np.frombuffer(line, np.uint8)
    bounds = np.array([[0], [len(line)], [0]])
    fields, _ = kernels.usual_rows(buffer, bounds, 128, 9, MAX_ROW_BYTES, 0)
    assert fields[5, 0] == (signal.count(b",") + 1 if is_good else 0)
