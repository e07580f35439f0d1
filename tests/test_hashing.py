import hashlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capfinder.etl.hashing import CHOOSE, HASH, IDENTITY, ORDER, SPLIT, keyed_hash


def hashlib_words(read_id: bytes, seed: int) -> list[int]:
    digest = hashlib.blake2b(read_id, digest_size=32, key=str(seed).encode()).digest()
    return np.frombuffer(digest, ">u8").tolist()


# numpy's fixed-width bytes can't end with a zero, but can have them elsewhere.
read_ids = st.binary(max_size=300).map(lambda name: name.rstrip(b"\0"))


@given(st.lists(read_ids, min_size=1, max_size=6), st.integers(-(10**20), 10**40))
@example([b"", b"a" * 127, b"b" * 128, b"c" * 129, b"d" * 256, b"e" * 257], 0)
@example([b"\0\0x", b"y" * 8, b"z" * 16], 10**64 - 1)
def test_hashes_are_those_of_hashlib(names, seed):
    hashes = keyed_hash(np.array(names, "S"), seed=seed)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [hashlib_words(name, seed) for name in names]


def test_the_columns_are_the_four_words_of_the_digest_in_order():
    assert (CHOOSE, SPLIT, ORDER, IDENTITY) == (0, 1, 2, 3)
    digest = hashlib.blake2b(b"read", digest_size=32, key=b"42").digest()
    found = keyed_hash(np.array([b"read"]), seed=42)[0, IDENTITY]
    assert int(found) == int.from_bytes(digest[24:], "big")
    assert HASH == {"name": "blake2b-256", "version": 2}


@given(st.lists(read_ids, min_size=2, max_size=9), st.integers(1, 400))
def test_a_hash_hangs_on_nothing_but_seed_and_id(names, width):
    together = keyed_hash(np.array(names, "S"), seed=7)
    wide = np.array(names, f"S{max(width, *(len(name) for name in names))}")
    np.testing.assert_array_equal(keyed_hash(wide[::-1], seed=7), together[::-1])
    np.testing.assert_array_equal(keyed_hash(np.repeat(wide, 2)[::2], seed=7), together)


def test_no_ids_have_no_hashes():
    assert keyed_hash(np.array([], "S36"), seed=1).shape == (0, 4)


def test_a_seed_beyond_the_key_size_is_refused():
    with pytest.raises(ValueError, match="seed has 65 digits"):
        keyed_hash(np.array([b"a"]), seed=10**64)
