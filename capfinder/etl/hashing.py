"""Keyed hashes of read_ids: what every choice of the dataset hangs on, and nothing else.

BLAKE2b in a compiled kernel: hashlib gives the same bytes, but with a call of Python for each read.
"""

import numpy as np

from capfinder.compiled import helper, kernel

# The four words of a read's hash, one for each use, so that no choice says anything of another.
CHOOSE, SPLIT, ORDER, IDENTITY = range(4)
HASH = {"name": "blake2b-256", "version": 2}

_DIGEST_BYTES, _BLOCK_BYTES, _MAX_KEY_BYTES = 32, 128, 64
_START = np.array(  # fractional parts of the square roots of the first eight primes
    [
        *(0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1),
        *(0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179),
    ],
    np.uint64,
)
_SIGMA = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
        [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
        [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
        [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
        [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
        [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
        [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
        [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
        [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
    ],
    np.uint8,
)


def keyed_hash(ids: np.ndarray, *, seed: int) -> np.ndarray:
    """(n,) 'S' of any width -> (n, 4) uint64: BLAKE2b-256 of each id, keyed by the seed's decimal
    digits, as four big-endian words; columns CHOOSE, SPLIT, ORDER, IDENTITY.

    Source: RFC 7693."""
    key = str(seed).encode()
    if len(key) > _MAX_KEY_BYTES:
        raise ValueError(f"seed has {len(key)} digits, BLAKE2b takes {_MAX_KEY_BYTES}")
    width = ids.dtype.itemsize
    words = np.zeros((len(ids), -(-width // _BLOCK_BYTES) * (_BLOCK_BYTES // 8)), "<u8")
    letters = np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), width)
    words.view(np.uint8)[:, :width] = letters
    key_block = np.frombuffer(key.ljust(_BLOCK_BYTES, b"\0"), "<u8").copy()
    hashes = np.empty((len(ids), 4), np.uint64)
    _hash_rows(words, key_block, len(key), hashes)
    return hashes.byteswap()  # BLAKE2b's own words are little-endian


@kernel
def _hash_rows(
    words: np.ndarray, key_block: np.ndarray, key_bytes: int, hashes: np.ndarray
) -> None:
    """words (n, 16 * blocks) uint64 ids, zero-padded; key_block (16,) uint64 -> hashes (n, 4)."""
    keyed = _START.copy()
    keyed[0] ^= np.uint64(0x01010000 | key_bytes << 8 | _DIGEST_BYTES)
    only_key = keyed.copy()
    _compress(only_key, key_block, _BLOCK_BYTES, True)
    _compress(keyed, key_block, _BLOCK_BYTES, False)
    state = np.empty_like(keyed)
    for row in range(len(words)):
        size = _size(words[row])
        for word in range(8):  # a slice's assignment would take seconds more to compile
            state[word] = keyed[word] if size else only_key[word]
        for at in range(0, size, _BLOCK_BYTES):
            hashed = _BLOCK_BYTES + min(size, at + _BLOCK_BYTES)
            block = words[row, at // 8 : at // 8 + 16]
            _compress(state, block, hashed, at + _BLOCK_BYTES >= size)
        for word in range(4):
            hashes[row, word] = state[word]


@helper
def _size(words: np.ndarray) -> int:
    """Bytes before the zeros at the end."""
    for at in range(len(words) - 1, -1, -1):
        word = words[at]
        if word:
            size = 8 * at
            while word:
                word >>= np.uint64(8)
                size += 1
            return size
    return 0


@helper
def _compress(state: np.ndarray, block: np.ndarray, hashed: int, is_last: bool) -> None:
    """One block of 128 bytes into the state; hashed: bytes so far, this block's among them."""
    a0, a1, a2, a3, b0, b1, b2, b3 = state
    c0, c1, c2, c3, d0, d1, d2, d3 = _START
    d0 ^= np.uint64(hashed)
    if is_last:
        d2 = ~d2
    for turn in range(12):
        s = _SIGMA[turn % 10]
        a0, b0, c0, d0 = _mix(a0, b0, c0, d0, block[s[0]], block[s[1]])
        a1, b1, c1, d1 = _mix(a1, b1, c1, d1, block[s[2]], block[s[3]])
        a2, b2, c2, d2 = _mix(a2, b2, c2, d2, block[s[4]], block[s[5]])
        a3, b3, c3, d3 = _mix(a3, b3, c3, d3, block[s[6]], block[s[7]])
        a0, b1, c2, d3 = _mix(a0, b1, c2, d3, block[s[8]], block[s[9]])
        a1, b2, c3, d0 = _mix(a1, b2, c3, d0, block[s[10]], block[s[11]])
        a2, b3, c0, d1 = _mix(a2, b3, c0, d1, block[s[12]], block[s[13]])
        a3, b0, c1, d2 = _mix(a3, b0, c1, d2, block[s[14]], block[s[15]])
    for at, half in enumerate((a0 ^ c0, a1 ^ c1, a2 ^ c2, a3 ^ c3)):
        state[at] ^= half
    for at, half in enumerate((b0 ^ d0, b1 ^ d1, b2 ^ d2, b3 ^ d3)):
        state[4 + at] ^= half


@helper
def _mix(
    a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64, x: np.uint64, y: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    a = a + b + x
    d = _rotate(d ^ a, 32)
    c = c + d
    b = _rotate(b ^ c, 24)
    a = a + b + y
    d = _rotate(d ^ a, 16)
    c = c + d
    return a, _rotate(b ^ c, 63), c, d


@helper
def _rotate(word: np.uint64, bits: int) -> np.uint64:
    """To the right."""
    return word >> np.uint64(bits) | word << np.uint64(64 - bits)
