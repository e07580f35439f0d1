"""CRC-32C (Castagnoli), the checksum of TFRecord files, compiled.

Source: Kounavis and Berry 2005, 'A systematic approach to building high performance software-based
CRC generators': 16 bytes at a time, each through a table of its own. On top of it two stretches of
_LANE bytes are taken side by side, since one alone waits for its own last look-up."""

import numpy as np

from capfinder.compiled import helper

_ONES = 0xFFFFFFFF
_LANE = 256  # bytes


def _past_zeros(values: np.ndarray, count: int) -> np.ndarray:
    """The checksums after `count` more bytes, all zero."""
    for _ in range(8 * count):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(0x82F63B78), values >> 1)
    return values


_BYTES = np.arange(256, dtype=np.uint32)
_T = np.stack([_past_zeros(_BYTES, k) for k in range(1, 17)])  # (16, 256)
# Of each byte of a checksum, lowest first: itself, _LANE bytes later. (4, 256)
_PAST_LANE = _past_zeros(_BYTES << np.array([[0], [8], [16], [24]], np.uint32), _LANE)


@helper
def _step(crc: int, b: np.ndarray) -> int:
    """Past the 16 bytes of b."""
    word = crc ^ (
        np.int64(b[0]) | np.int64(b[1]) << 8 | np.int64(b[2]) << 16 | np.int64(b[3]) << 24
    )
    low = _T[15, word & 255] ^ _T[14, word >> 8 & 255]
    low ^= _T[13, word >> 16 & 255] ^ _T[12, word >> 24 & 255]
    low ^= _T[11, b[4]] ^ _T[10, b[5]] ^ _T[9, b[6]] ^ _T[8, b[7]]
    high = _T[7, b[8]] ^ _T[6, b[9]] ^ _T[5, b[10]] ^ _T[4, b[11]]
    high ^= _T[3, b[12]] ^ _T[2, b[13]] ^ _T[1, b[14]] ^ _T[0, b[15]]
    return int(np.int64(low ^ high))


@helper
def crc32c(data: np.ndarray, start: int, end: int) -> int:
    """Of data[start:end] (uint8)."""
    crc = _ONES
    at = start
    while at + 2 * _LANE <= end:
        second = 0
        for k in range(at, at + _LANE, 16):
            crc = _step(crc, data[k : k + 16])
            second = _step(second, data[k + _LANE : k + _LANE + 16])
        moved = _PAST_LANE[0, crc & 255] ^ _PAST_LANE[1, crc >> 8 & 255]
        moved ^= _PAST_LANE[2, crc >> 16 & 255] ^ _PAST_LANE[3, crc >> 24 & 255]
        crc = int(np.int64(moved)) ^ second
        at += 2 * _LANE
    while at + 16 <= end:
        crc = _step(crc, data[at : at + 16])
        at += 16
    while at < end:
        crc = crc >> 8 ^ int(np.int64(_T[0, (crc ^ data[at]) & 255]))
        at += 1
    return crc ^ _ONES
