"""Hypothesis's cases for the reader: from rows that are nearly right down to any bytes."""

from etl_cases import DTYPES, ReaderCase
from etl_mutations import NUMBERS
from hypothesis import strategies as st

usual_numbers = st.floats(-4, 4).map(lambda value: f"{value:.8f}")
any_numbers = st.floats(width=64).map(repr) | st.floats(width=32).map(repr)
odd_numbers = st.builds(lambda make, rng: make(rng), st.sampled_from(NUMBERS), st.randoms())
number_like = st.text("0123456789+-.eE", max_size=30)
numbers = usual_numbers | any_numbers | odd_numbers | number_like
signals = st.lists(numbers, max_size=20).map(",".join)
usual_ids = st.text("abcdef0123456789-", min_size=1, max_size=40)
read_ids = usual_ids | st.text(max_size=140)
classes = st.integers(0, 3).map(str) | st.integers(-(10**10), 10**10).map(str) | st.text(max_size=4)
usual_rows = st.builds(
    '{},{},"{}"'.format,
    usual_ids,
    st.integers(0, 1),
    st.lists(usual_numbers, min_size=1).map(",".join),
)
quoting = st.sampled_from(['{},{},"{}"', '"{}","{}","{}"', "{},{},{}", '{},{},"{}', '{},"{},{}"'])
odd_rows = st.builds(
    lambda form, *fields: form.format(*fields), quoting, read_ids, classes, signals
)
lines = st.one_of(
    usual_rows.map(str.encode),
    odd_rows.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text('",\r 01.e-x', max_size=30).map(str.encode),
    st.binary(max_size=60),
)
texts = st.builds(
    lambda parts, end, last: end.join(parts) + last,
    st.lists(lines, min_size=1, max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from([b"\n", b"\r\n", b"\r", b""]),
)
reader_cases = st.builds(
    ReaderCase,
    data=texts,
    name=st.just(""),
    how_far=st.tuples(st.integers(0, 2**40), st.integers(2, 10**9)),
    cap_class=st.sampled_from([None, None, 0]),
    target_length=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
