"""Cap-signal CSV text that is real, or simulated, and then spoiled in one way or several."""

import random
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from capfinder import simulate

HEADER = b"read_id,cap_class,timeseries"
SQUIGGLES = Path(__file__).parents[3] / "shared" / "data" / "squiggles"
Rng = random.Random


def corpus(scratch: Path) -> list[bytes]:
    """Rows without line ends: of the real squiggles where they are, else simulated."""
    paths = sorted(SQUIGGLES.glob("data__*.csv"))
    if not paths:
        paths = simulate.run(
            output_dir=scratch / "simulated",
            reads_per_class=60,
            num_classes=2,
            runs_per_class=1,
            effect=1.0,
            seed=1,
        )
    return [line for path in paths for line in path.read_bytes().splitlines()[1:]]


def _halfway(rng: Rng) -> str:
    """Exactly between two float32 or two float64 numbers, or a hair beside it."""
    if rng.random() < 0.5:
        low = np.float32(rng.uniform(-4, 4) * 10.0 ** rng.choice([0, 0, 0, -3, 5, -30, 30]))
        middle = (Decimal(float(low)) + Decimal(float(np.nextafter(low, np.float32(9e9))))) / 2
    else:
        value = rng.uniform(-4, 4) * 10.0 ** rng.choice([0, 0, 0, -3, 5, -300, 300])
        middle = Decimal(value) + (Decimal(np.nextafter(value, np.inf)) - Decimal(value)) / 2
    text = format(middle, rng.choice(["f", "E"]))
    return text + rng.choice(["", "", "0" * 20 + "1"]) if "." in text and "E" not in text else text


def _long_digits(rng: Rng) -> str:
    digits = "".join(rng.choices("0123456789", k=rng.choice([16, 17, 18, 19, 20, 21, 40, 800])))
    at = rng.randint(0, len(digits))
    exponent = rng.choice(["", "", f"e{rng.randint(-330, 330)}", f"E+{rng.randint(0, 30)}"])
    return f"{rng.choice(['', '-', '+'])}{digits[:at]}.{digits[at:]}{exponent}"


def _plain(rng: Rng) -> str:
    return f"{rng.gauss(0, 1):.{rng.randint(0, 17)}f}"


def _any_float(rng: Rng) -> str:
    """Any bits at all: NaN and infinities, subnormals, both ends of the range."""
    kind = rng.choice([np.float16, np.float32, np.float64])
    return repr(float(np.frombuffer(rng.randbytes(8), kind)[0]))


def _like_a_number(rng: Rng) -> str:
    return "".join(rng.choices("0123456789+-.eE", k=rng.randint(0, 9)))


# fmt: off
_ODD = (
    "nan", "NaN", "-nan", "inf", "-inf", "Infinity", "+Infinity", "infinit", "1_0", "0x1p3", "1,5",
    "", "-", "+", ".", "e", "e5", "1e", "1e+", "1.e5", ".5", "5.", "-.5", "+.5e-3", "--1", "+-1",
    "1.2.3", "1e5e", "1e5.0", "00012", "000000000000000000000000000001.5", "-0", "-0.0", "+0.0",
    "1e-45", "7e-46", "1e-400", "-1e-400", "4.9e-324", "2.4e-324", "2.2250738585072011e-308",
    "1.17549421e-38", "65504", "65519.99", "65520", "-65520", "65519.999", "65519.998046875",
    "3.4028235e38", "3.4028235677973366e38", "3.40282357e38", "1e39", "-1e39",
    "1.7976931348623157e308", "1.7976931348623159e308", "1e309", "1e999", "-1e999", "1e-999",
    "1e99999999999999999999", "1e-99999999999999999999", "0e99999999999999999999", "0e-9999999999",
    "9007199254740993", "9007199254740992.9999", "18446744073709551615", "18446744073709551616",
    "99999999999999999999", "0.00000000000000000000000000001", "123456789012345678e-18",
    " 1", "1 ", "1\t", "\u0661", "1\u00b2", "\uff11", "\u22121", "1\u00a0", "1d5", "1f", "1l",
)
# fmt: on
NUMBERS: Sequence[Callable[[Rng], str]] = (
    lambda rng: rng.choice(_ODD),
    lambda rng: rng.choice(_ODD),
    _halfway,
    _long_digits,
    _plain,
    _any_float,
    _like_a_number,
)


def odd_number(rng: Rng) -> bytes:
    return rng.choice(NUMBERS)(rng).encode()


def _at(rng: Rng, text: bytes) -> int:
    return rng.randint(0, len(text))


def _span(rng: Rng, text: bytes) -> tuple[int, int]:
    start = _at(rng, text)
    return start, min(len(text), start + int(2 ** rng.uniform(0, 9)))


def _insert(rng: Rng, text: bytes, part: bytes) -> bytes:
    at = _at(rng, text)
    return text[:at] + part + text[at:]


def flip_bit(rng: Rng, text: bytes) -> bytes:
    changed = bytearray(text)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_byte(rng: Rng, text: bytes) -> bytes:
    changed = bytearray(text)
    if changed:
        changed[rng.randrange(len(changed))] = rng.choice(b'",\r\n\x00 \t+-.eE09/:\x7f\x80\xff')
    return bytes(changed)


def insert_bytes(rng: Rng, text: bytes) -> bytes:
    parts = (b'"', b",", b"\n", b"\r\n", b"\r", b'""', b'","', b',"', b'",', b"\x00", b" ", b"\t")
    return _insert(rng, text, rng.choice([*parts, rng.randbytes(rng.randint(1, 9))]))


def insert_unicode(rng: Rng, text: bytes) -> bytes:
    odd = ("\ufeff", "é", "\u200b", "\u2028", "\x85", "\U0001f9ec", "\xa0", "\u202e", "ß")
    return _insert(rng, text, rng.choice(odd).encode())


def insert_nuls(rng: Rng, text: bytes) -> bytes:
    return _insert(rng, text, b"\x00" * rng.randint(1, 40))


def delete(rng: Rng, text: bytes) -> bytes:
    start, end = _span(rng, text)
    return text[:start] + text[end:]


def repeat(rng: Rng, text: bytes) -> bytes:
    start, end = _span(rng, text)
    return _insert(rng, text, text[start:end])


def truncate(rng: Rng, text: bytes) -> bytes:
    return text[: _at(rng, text)]


def byte_order_mark(rng: Rng, text: bytes) -> bytes:
    return b"\xef\xbb\xbf" + text


def other_line_ends(rng: Rng, text: bytes) -> bytes:
    old, new = rng.choice([(b"\r\n", b"\n"), (b"\n", b"\r\n"), (b"\n", b"\r"), (b"\n", b"\n\n")])
    return text.replace(old, new, rng.choice([1, 2, -1]))


def join_lines(rng: Rng, text: bytes) -> bytes:
    return text.replace(b"\n", rng.choice([b"", b",", b" "]), rng.randint(1, 2))


def mix_lines(rng: Rng, text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines + rng.choices(lines, k=rng.randint(0, 2)) if lines else lines)


def spoil_field(rng: Rng, text: bytes) -> bytes:
    """Another number, read_id or class in the place of one that is there."""
    lines = text.split(b"\n")
    at = rng.randrange(len(lines))
    fields = lines[at].split(b",")
    place = min(rng.choice([0, 1, 2, 3, rng.randrange(len(fields))]), len(fields) - 1)
    fields[place] = (_odd_id, _odd_class)[place](rng) if place < 2 else odd_number(rng)
    if place == 2 and rng.random() < 0.8:
        fields[place] = b'"' + fields[place]
    lines[at] = b",".join(fields)
    return b"\n".join(lines)


def quote_field(rng: Rng, text: bytes) -> bytes:
    lines = text.split(b"\n")
    at = rng.randrange(len(lines))
    fields = lines[at].split(b",", 2)
    place = rng.randrange(len(fields))
    bare = fields[place].strip(b'"\r')
    fields[place] = rng.choice([b'"%b"', b"%b", b'""%b""', b'"%b', b'%b"', b' "%b"']) % bare
    lines[at] = b",".join(fields)
    return b"\n".join(lines)


def long_signal(rng: Rng, text: bytes) -> bytes:
    """Thousands of numbers, or one of thousands of digits, where a quoted signal begins."""
    count = rng.choice([255, 256, 257, 2000, 2047, 2049, 20_000])
    long = b"1.25," * count if rng.random() < 0.7 else b"3" * count + b"e-%d," % rng.randint(0, 300)
    return text.replace(b',"', b',"' + long, 1)


def _odd_id(rng: Rng) -> bytes:
    return rng.choice(
        [
            b"x" * rng.choice([1, 127, 128, 129, 130, 4000]),
            "é".encode() * rng.choice([1, 63, 64, 65]),
            "\u4e2d".encode() * rng.choice([42, 43]),
            b"", b" a", b"a ", b"a b", b"\ta", b"a\x00", b"\x00", b'"a""b"', b'a"b', b"\xff\xfe",
            b"=1+1", b"\xc2\x85", b"\xed\xa0\x80", "a\u3000".encode(), b"\x1f",
        ]
    )  # fmt: skip


def _odd_class(rng: Rng) -> bytes:
    known = (b"0", b"1", b"7", b'"0"', b'"1"', b"00", b"000000000", b"0000000000", b"999999999")
    odd = (b"2147483648", b"-1", b"+1", b"1.0", b" 0", b"0 ", b"", b"a", b"1e0", b"\xc2\xb2", b'""')
    return rng.choice([*known, *odd, "\u0661".encode()])


MUTATIONS: Sequence[Callable[[Rng, bytes], bytes]] = (
    flip_bit, set_byte, insert_bytes, insert_unicode, insert_nuls, delete, repeat, truncate,
    byte_order_mark, other_line_ends, join_lines, mix_lines, spoil_field, spoil_field, spoil_field,
    spoil_field, quote_field, quote_field, long_signal,
)  # fmt: skip


def mutated(rng: Rng, text: bytes) -> bytes:
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 6])):
        text = rng.choice(MUTATIONS)(rng, text)
    return text


def some_rows(rng: Rng, rows: Sequence[bytes], *, count: int) -> list[bytes]:
    """`count` of `rows`, their signals cut to a few numbers or left whole."""
    chosen = []
    for row in rng.choices(rows, k=count):
        start, _, signal = row.partition(b',"')
        numbers = signal.strip(b'"\r').split(b",")
        kept = numbers[: int(2 ** rng.uniform(0, 10))]
        chosen.append(start + b',"' + b",".join(kept) + b'"')
    return chosen


def lines_of(rng: Rng, rows: Sequence[bytes]) -> bytes:
    end = rng.choice([b"\n", b"\r\n"])
    return end.join(rows) + rng.choice([end, end, end, b""])
