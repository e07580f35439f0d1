"""Compiled kernels that parse the numbers of chosen signals and fit them to one length on the way.

Every value is the float64 nearest to the text, as Python's float() has it. Three ways lead there:
one exact operation on small integers (Clinger), a 128-bit power of ten where 17 digits need it
(Lemire), and, where neither can tell which float64 is nearest, a mark for the caller."""

import numpy as np

from capfinder.compiled import helper, inlined, kernel
from capfinder.etl.kernels import HIGH_BITS, I64, U64, commas_in, each_byte, load_word

GOOD, SLOW, NOT_FINITE, NOT_A_NUMBER = range(4)  # the worst of a row's numbers is the row's

_COMMA, _MINUS, _PLUS, _POINT, _ZERO, _E = b",-+.0e"
_ZEROS, _ABOVE_NINE = each_byte(_ZERO), each_byte(127 - ord("9"))
_EXACT = U64(2**53)
_EXACT_POWER = 22  # 10**22 is the last power of ten that a float64 holds exactly
_INTEGER_POWERS = np.array([10**n for n in range(9)], np.uint64)
_FLOAT_POWERS = np.array([10.0**n for n in range(_EXACT_POWER + 1)])
_LOW_HALF = U64(0xFFFFFFFF)
_HUGE = 10**9  # beyond any exponent; a row can't have as many digits

# 5**power, cut to 128 bits, is high << 64 | low, times 2**exponent: one row for each power.
_WIDE_POWER = 100
_wide = []
for _power in range(-_WIDE_POWER, _WIDE_POWER + 1):
    _up, _down = 5 ** max(_power, 0), 5 ** max(-_power, 0)
    _shift = 128 - _up.bit_length() if _power >= 0 else 127 + _down.bit_length()
    _cut = (_up << max(_shift, 0)) // (_down << max(-_shift, 0))
    _wide.append((_cut >> 64, _cut & (2**64 - 1), -_shift))
_WIDE_HIGH = np.array([row[0] for row in _wide], np.uint64)
_WIDE_LOW = np.array([row[1] for row in _wide], np.uint64)
_WIDE_EXPONENT = np.array([row[2] for row in _wide], np.int64)


@kernel
def parse_rows(
    buffer: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    limit: float,
    fitted: np.ndarray,
    lengths: np.ndarray,
    sums: np.ndarray,
    outcomes: np.ndarray,
) -> None:
    """Numbers of the rows starts..ends (n,) -> fitted (n, T), zeros before, cut or padded as
    preprocess.fit_length does it; lengths (n,) int32 before fitting; sums (2, n) float64 of all
    samples and their squares; outcomes (n,) uint8: GOOD, or why fitted and sums don't hold.

    limit: from this magnitude on a number isn't finite in the end."""
    target_length = fitted.shape[1]
    for row in range(len(starts)):
        at, end = starts[row], ends[row]
        length = commas_in(buffer, at, end) + 1
        sample = max(target_length - length, 0) // 2 - max(length - target_length, 0) // 2
        last = sample + length - 1
        total, squares, outcome = 0.0, 0.0, GOOD
        while True:
            at, sample, total, squares = _usual_run(
                buffer, at, end, fitted[row], sample, total, squares
            )
            value, at, found = _number(buffer, at, end)
            if found == GOOD and abs(value) >= limit:
                found = NOT_FINITE
            outcome = max(outcome, found)
            if outcome == NOT_A_NUMBER:
                break
            if 0 <= sample < target_length:
                fitted[row, sample] = value
            total += value
            squares += value * value
            if sample == last:
                break
            at, sample = at + 1, sample + 1
        lengths[row] = length
        sums[0, row], sums[1, row] = total, squares
        outcomes[row] = outcome


@inlined
def _usual_run(
    buffer: np.ndarray,
    start: int,
    end: int,
    fitted: np.ndarray,
    sample: int,
    total: float,
    squares: float,
) -> tuple[int, int, float, float]:
    """As many numbers as have the usual form: a digit, a point, 1 to 8 digits, a comma, with or
    without a minus. They are under 10 and exact (Clinger). Where the run ends, sums up to there.

    No branch hangs on a sign, which nobody can foresee: 1,700 MB/s a core, 730 with one."""
    at, stop = U64(start), U64(max(end - 11, 0))
    while at < stop:
        minus = U64(buffer[at] == _MINUS)
        first = at + minus
        whole = U64(buffer[first]) - U64(_ZERO)  # wraps around below "0"
        word = load_word(buffer, first + U64(2))
        others = _not_digits(word)
        if others == U64(0):
            after = first + U64(10)
            mantissa = whole * U64(10**8) + _eight_digits(word - _ZEROS)
            value = I64(mantissa) / 1e8
        else:
            digits = _digits_before(others)
            if digits == U64(0):
                break
            after = first + U64(2) + digits
            fraction = _eight_digits((word - _ZEROS) << (U64(64) - U64(8) * digits))
            mantissa = whole * _INTEGER_POWERS[digits] + fraction
            value = I64(mantissa) / _FLOAT_POWERS[digits]
        is_usual = (buffer[first + U64(1)] == _POINT) & (buffer[after] == _COMMA)
        if not is_usual or whole > U64(9):
            break
        value = U64(U64(np.float64(value).view(U64)) ^ minus << U64(63)).view(np.float64)
        if 0 <= sample < len(fitted):
            fitted[sample] = value
        total += value
        squares += value * value
        at, sample = after + U64(1), sample + 1
    return I64(at), sample, total, squares


@inlined
def _number(buffer: np.ndarray, at: int, end: int) -> tuple[float, int, int]:
    """The number that starts at `at`: its value, where it ends, GOOD, SLOW or NOT_A_NUMBER."""
    is_negative = at < end and buffer[at] == _MINUS
    at += is_negative or (at < end and buffer[at] == _PLUS)
    mantissa, power, is_cut, at = _decimal(buffer, at, end)
    if at < 0 or (at < end and buffer[at] != _COMMA):
        return 0.0, at, NOT_A_NUMBER
    value, is_sure = _nearest(mantissa, power)
    if is_cut:  # the text lies between this mantissa and the next
        above, is_also_sure = _nearest(mantissa + U64(1), power)
        is_sure = is_sure and is_also_sure and value == above
    return -value if is_negative else value, at, GOOD if is_sure else SLOW


@inlined
def _decimal(buffer: np.ndarray, at: int, end: int) -> tuple[np.uint64, int, bool, int]:
    """Digits, point and exponent -> the first 18 or 19 digits that count as mantissa, the power of
    ten it stands for, whether others than 0 were left out, the place behind (-1: not a number)."""
    first = at
    mantissa, left_out, is_cut, at = _digits(buffer, at, end, U64(0))
    power, digits = left_out, at - first
    if at < end and buffer[at] == _POINT:
        first = at + 1
        mantissa, left_out, is_cut_too, at = _digits(buffer, first, end, mantissa)
        is_cut |= is_cut_too
        power -= at - first - left_out
        digits += at - first
    if digits == 0:
        return mantissa, power, is_cut, -1
    if at < end and buffer[at] | 32 == _E:
        at += 1
        is_negative = at < end and buffer[at] == _MINUS
        at += is_negative or (at < end and buffer[at] == _PLUS)
        first, exponent = at, I64(0)
        while at < end and 48 <= buffer[at] <= 57:
            exponent = min(10 * exponent + I64(buffer[at]) - 48, _HUGE)
            at += 1
        if at == first:
            return mantissa, power, is_cut, -1
        power += -exponent if is_negative else exponent
    return mantissa, power, is_cut, at


@inlined
def _digits(
    buffer: np.ndarray, at: int, end: int, mantissa: np.uint64
) -> tuple[np.uint64, int, bool, int]:
    """Goes on with the mantissa as far as it has room: the new one, how many digits were left out,
    whether one of these isn't 0, the place behind the digits."""
    left_out, is_cut = 0, False
    while at + 8 <= end and mantissa < U64(10**11):
        word = load_word(buffer, at)
        if _not_digits(word) != U64(0):
            break
        mantissa = mantissa * U64(10**8) + _eight_digits(word - _ZEROS)
        at += 8
    while at < end:
        digit = U64(buffer[at]) - U64(_ZERO)  # wraps around below "0"
        if digit > U64(9):
            break
        if mantissa < U64(10**18):
            mantissa = mantissa * U64(10) + digit
        else:
            left_out += 1
            is_cut |= digit != U64(0)
        at += 1
    return mantissa, left_out, is_cut, at


@helper
def _not_digits(word: np.uint64) -> np.uint64:
    """The top bit of each byte that isn't a digit; right up to the first such byte."""
    return ((word + _ABOVE_NINE) | (word - _ZEROS)) & HIGH_BITS


@helper
def _digits_before(others: np.uint64) -> np.uint64:
    """How many bytes are below the lowest of these top bits."""
    lowest = (others & (~others + U64(1))) >> U64(7)  # 1 << 8 * digits
    return lowest * U64(0x0001020304050607) >> U64(56)


@helper
def _eight_digits(values: np.uint64) -> np.uint64:
    """The number that eight bytes 0..9 make, the lowest byte its first digit: pairs, then fours,
    then all, each in the bits that the step before left free."""
    values = values * U64(10) + (values >> U64(8))
    mask = U64(0x000000FF000000FF)
    high = (values & mask) * U64(100 + (10**6 << 32))
    low = (values >> U64(16) & mask) * U64(1 + (10**4 << 32))
    return (high + low) >> U64(32)


@helper
def _nearest(mantissa: np.uint64, power: int) -> tuple[float, bool]:
    """mantissa * 10**power rounded once to float64, and whether that is sure.

    Source: W. D. Clinger 1990, How to read floating point numbers accurately (one operation on two
    exact values is rounded correctly); D. Lemire 2021, Number parsing at a gigabyte per second."""
    if mantissa == U64(0):
        return 0.0, True
    if mantissa <= _EXACT and -_EXACT_POWER <= power <= _EXACT_POWER:
        if power < 0:
            return I64(mantissa) / _FLOAT_POWERS[-power], True
        return I64(mantissa) * _FLOAT_POWERS[power], True
    if not -_WIDE_POWER <= power <= _WIDE_POWER:
        return 0.0, False
    exponent = power + _WIDE_EXPONENT[power + _WIDE_POWER]
    for step in (32, 16, 8, 4, 2, 1):
        if mantissa >> U64(64 - step) == U64(0):
            mantissa <<= U64(step)
            exponent -= step
    # The true product lies less than 2 above (high, low): 1 for the power's cut, 1 for `_`.
    high, low = _product(mantissa, _WIDE_HIGH[power + _WIDE_POWER])
    more, _ = _product(mantissa, _WIDE_LOW[power + _WIDE_POWER])
    low += more
    high += U64(low < more)
    spare = U64(10) + (high >> U64(63))  # bits beyond the 53 of a float64
    half = U64(1) << (spare - U64(1))
    rest = high & ((U64(1) << spare) - U64(1))
    is_half = rest == half and low == U64(0)
    is_below = rest == half - U64(1) and low == ~U64(0)
    rounded = (high >> spare) + U64(rest >= half)
    scale = U64(exponent + I64(spare) + 128 + 1023) << U64(52)  # 2**(...) as a float64's bits
    return I64(rounded) * U64(scale).view(np.float64), not (is_half or is_below)


@helper
def _product(a: np.uint64, b: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The upper and the lower 64 bits of a * b."""
    a_high, a_low, b_high, b_low = a >> U64(32), a & _LOW_HALF, b >> U64(32), b & _LOW_HALF
    middle = a_high * b_low + (a_low * b_low >> U64(32))
    other = a_low * b_high + (middle & _LOW_HALF)
    return a_high * b_high + (middle >> U64(32)) + (other >> U64(32)), a * b
