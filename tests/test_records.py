"""Shards: readable by TensorFlow Datasets alone, exact to the byte, reproducible."""

import hashlib
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capfinder import libraries
from capfinder.data import records
from capfinder.data.crc32c import crc32c
from capfinder.errors import InputError

DTYPES = ("float16", "float32", "float64")


def make_records(n: int, target_length: int, dtype: str, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "signals": rng.normal(size=(n, target_length)).astype(dtype),
        "cap_classes": rng.integers(0, 200, n),
        "read_ids": np.array([f"read-{seed}-é-{'x' * (i % 5)}{i}".encode() for i in range(n)], "S"),
        "lengths": rng.integers(1, 100_000, n),
    }


def read_shard(path: Path, *, target_length: int, dtype: Any) -> records.Block:
    """All blocks of a shard as one."""
    blocks = list(records.read_shard_blocks(path, target_length=target_length, dtype=dtype))
    empty = records.Block(
        np.empty((0, target_length), dtype),
        np.empty(0, np.int64),
        np.empty(0, "S1"),
        np.empty(0, np.int64),
    )
    columns = zip(*(vars(block).values() for block in [empty, *blocks]), strict=True)
    return records.Block(*(np.concatenate(column) for column in columns))


def write_dataset(directory: Path, dtype: str, *, version: str = "1.0.0", target_length: int = 7):
    """Three splits of 5, 3 and 2 records a shard, two shards each; returns what was written."""
    directory.mkdir(parents=True)
    written, lengths, sizes = {}, {}, {}
    for number, (split, n) in enumerate(zip(records.SPLITS, (5, 3, 2), strict=True)):
        shards = [make_records(n, target_length, dtype, 10 * number + i) for i in range(2)]
        sizes[split] = [
            records.write_shard(directory / records.shard_name(split, i, 2), **shard).size
            for i, shard in enumerate(shards)
        ]
        lengths[split] = [n, n]
        written[split] = shards
    records.write_metadata(
        directory,
        version=version,
        target_length=target_length,
        dtype=dtype,
        shard_lengths=lengths,
        shard_bytes=sizes,
    )
    return written


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorflow_datasets_reads_every_record_exactly(tmp_path, dtype):
    import tensorflow_datasets as tfds

    directory = tmp_path / "cap_data" / "1.0.0"
    written = write_dataset(directory, dtype)
    builder = tfds.builder_from_directory(directory)
    assert str(builder.version) == "1.0.0" and builder.name == "cap_data"
    for split, shards in written.items():
        rows = list(tfds.as_numpy(builder.as_dataset(split=split)))
        assert len(rows) == builder.info.splits[split].num_examples == sum(map(_count, shards))
        for row, (signal, cap_class, read_id, length) in zip(rows, _rows(shards), strict=True):
            assert row["signal"].dtype == dtype and row["signal"].shape == (7, 1)
            assert row["signal"].tobytes() == signal.tobytes()
            assert row["cap_class"] == cap_class and row["length"] == length
            assert row["read_id"] == read_id


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_byte_is_what_tensorflow_itself_writes(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("golden")
    n = data.draw(st.integers(0, 4))
    target_length = data.draw(st.sampled_from([1, 52, 63, 64, 100, 8191, 8192]))
    shard = make_records(n, target_length, data.draw(st.sampled_from(DTYPES)))
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200)
    shard["read_ids"] = np.array([data.draw(text).encode() for _ in range(n)], "S")
    near_a_power = st.builds(lambda k, d: max(0, 2**k + d), st.integers(0, 62), st.integers(-1, 0))
    for name in ("cap_classes", "lengths"):
        shard[name] = np.array([data.draw(near_a_power) for _ in range(n)], np.int64)
    ours, theirs = directory / "ours", directory / "theirs"
    written = records.write_shard(ours, **shard)
    write_with_tensorflow(theirs, shard)
    assert ours.read_bytes() == theirs.read_bytes()
    assert written.size == ours.stat().st_size
    assert written.sha256 == hashlib.sha256(ours.read_bytes()).hexdigest()


def feature_of(value) -> Any:
    train = libraries.tensorflow().train
    if isinstance(value, bytes):
        return train.Feature(bytes_list=train.BytesList(value=[value]))
    return train.Feature(int64_list=train.Int64List(value=[value]))


def examples(shard: dict) -> list[dict[str, Any]]:
    return [
        {"signal": signal.tobytes(), "cap_class": int(c), "read_id": bytes(r), "length": int(n)}
        for signal, c, r, n in _rows([shard])
    ]


def write_with_tensorflow(path: Path, shard: dict, *, order: Sequence[str] = ()) -> None:
    """Features by name, or in `order`, which protobuf's own serialiser doesn't offer: messages
    that follow one another are one message."""
    tf = libraries.tensorflow()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples(shard):
            if not order:
                features = {name: feature_of(value) for name, value in example.items()}
                whole = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(whole.SerializeToString(deterministic=True))
                continue
            parts = [
                tf.train.Example(features=tf.train.Features(feature={n: feature_of(example[n])}))
                for n in order
            ]
            writer.write(b"".join(part.SerializeToString() for part in parts))


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and the next three: RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_checksum_is_crc_32c(data, crc):
    for before in range(3):
        array = np.frombuffer(b"x" * before + data + b"yz", np.uint8)
        assert crc32c(array, before, before + len(data)) == crc


@given(st.binary(max_size=100), st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_the_checksum_is_that_of_the_definition_at_any_length(data, seed, repeats):
    data += np.random.default_rng(seed).bytes(50) * repeats  # long ones go another way
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(np.frombuffer(data, np.uint8), 0, len(data)) == crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    "order",
    [
        (),
        ("signal", "read_id", "length", "cap_class"),
        ("cap_class", "length", "signal", "read_id"),
    ],
)
def test_what_another_writer_wrote_is_read_alike(tmp_path, order):
    shard = make_records(9, 6, "float32")
    write_with_tensorflow(tmp_path / "shard", shard, order=order)
    check_same(read_shard(tmp_path / "shard", target_length=6, dtype="float32"), shard)


def test_a_shard_of_two_writers_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK_BYTES", 400)
    parts = [make_records(5, 6, "float64", seed) for seed in range(4)]
    for number, part in enumerate(parts):
        order = ("signal", "length", "cap_class", "read_id") if number % 2 else ()
        write_with_tensorflow(tmp_path / f"part{number}", part, order=order)
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join((tmp_path / f"part{k}").read_bytes() for k in range(4)))
    shard = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    check_same(read_shard(whole, target_length=6, dtype="float64"), shard)


def test_a_record_that_is_no_read_is_named(tmp_path):
    shard = make_records(5, 6, "float16")
    path = tmp_path / "shard"
    records.write_shard(path, **shard)
    with pytest.raises(InputError, match=r"shard: record 1 .* signal has 12 bytes, not 14"):
        read_shard(path, target_length=7, dtype="float16")
    records.write_shard(tmp_path / "good", **make_records(3, 6, "float16"))
    write_with_tensorflow(path, shard, order=("signal", "cap_class", "length"))
    path.write_bytes((tmp_path / "good").read_bytes() + path.read_bytes())
    with pytest.raises(InputError, match=r"shard: record 4 .*read_id"):
        read_shard(path, target_length=6, dtype="float16")


def test_tensorflow_is_not_needed_to_write_and_read(tmp_path):
    program = f"""
        import sys
        from pathlib import Path
        import numpy as np
        from capfinder.data import records
        path = Path({str(tmp_path / "shard")!r})
        records.write_shard(path, signals=np.zeros((3, 5), "float16"), lengths=np.ones(3, int),
                            cap_classes=np.arange(3), read_ids=np.array([b"a", b"b", b"c"]))
        blocks = records.read_shard_blocks(path, target_length=5, dtype="float16")
        assert sum(len(block.lengths) for block in blocks) == 3
        assert not {{"tensorflow", "tensorflow_datasets", "jax"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_a_version_still_under_its_temporary_name_gets_its_own_version(tmp_path):
    import tensorflow_datasets as tfds

    partial = tmp_path / "cap_data" / ".partial-1.3.0-17"
    write_dataset(partial, "float16", version="1.3.0")
    partial.rename(tmp_path / "cap_data" / "1.3.0")
    builder = tfds.builder_from_directory(tmp_path / "cap_data" / "1.3.0")
    assert str(builder.version) == "1.3.0"
    assert len(list(builder.as_dataset(split="test"))) == 4


def test_equal_input_gives_equal_bytes_in_every_file(tmp_path):
    directories = [tmp_path / name / "cap_data" / "1.0.0" for name in "ab"]
    for directory in directories:
        write_dataset(directory, "float32")
    first, second = ({p.name: p.read_bytes() for p in d.iterdir()} for d in directories)
    assert first == second and len(first) == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_blocks_gives_back_what_was_written_in_order(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK_BYTES", 300)
    written = write_dataset(tmp_path / "d", dtype)
    for split, shards in written.items():
        blocks = list(records.read_blocks(tmp_path / "d", split))
        signals = np.concatenate([block.signals for block in blocks])
        assert signals.dtype == dtype
        assert signals.tobytes() == b"".join(shard["signals"].tobytes() for shard in shards)
        expected = list(_rows(shards))
        assert [c for b in blocks for c in b.cap_classes] == [row[1] for row in expected]
        assert [r for b in blocks for r in b.read_ids] == [row[2] for row in expected]
        assert [n for b in blocks for n in b.lengths] == [row[3] for row in expected]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    signals=st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(0, 9), st.integers(1, 40)))
    ),
    block_bytes=st.integers(1, 3000),
    data=st.data(),
)
def test_any_record_survives_the_round_trip(tmp_path_factory, signals, block_bytes, data):
    path = tmp_path_factory.mktemp("round_trip") / "shard"
    n, target_length = signals.shape
    whole = st.integers(0, 2**63 - 1)
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    repeats = st.sampled_from([1, 1, 1, 300])  # some records are larger than a block
    shard = {
        "signals": signals,
        "cap_classes": np.array([data.draw(whole) for _ in range(n)], np.int64),
        "read_ids": np.array(
            [data.draw(text).encode() * data.draw(repeats) for _ in range(n)], "S"
        ),
        "lengths": np.array([data.draw(whole) for _ in range(n)], np.int64),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_BLOCK_BYTES", block_bytes)
        records.write_shard(path, **shard)
        check_same(read_shard(path, target_length=target_length, dtype=signals.dtype), shard)


def check_same(block: records.Block, shard: dict) -> None:
    assert block.signals.dtype == shard["signals"].dtype
    assert block.signals.shape == shard["signals"].shape
    assert block.signals.tobytes() == shard["signals"].tobytes()
    assert block.cap_classes.tolist() == shard["cap_classes"].tolist()
    assert block.read_ids.tolist() == shard["read_ids"].tolist()
    assert block.lengths.tolist() == shard["lengths"].tolist()


def test_rows_need_not_lie_side_by_side(tmp_path):
    shard = make_records(8, 6, "float16")
    rows = np.empty(8, [("length", "<i8"), ("signal", "float16", 6), ("read_id", "S40")])
    rows["length"], rows["signal"], rows["read_id"] = (
        shard[name] for name in ("lengths", "signals", "read_ids")
    )
    records.write_shard(tmp_path / "a", **shard)
    records.write_shard(
        tmp_path / "b",
        signals=rows["signal"],
        lengths=rows["length"],
        read_ids=rows["read_id"],
        cap_classes=np.repeat(shard["cap_classes"].astype(np.int32), 2)[::2],
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_that_do_not_belong_together_are_refused(tmp_path):
    shard = make_records(3, 5, "float16")
    with pytest.raises(ValueError, match="don't belong together"):
        records.write_shard(tmp_path / "x", **{**shard, "lengths": shard["lengths"][:2]})
    for name in ("cap_classes", "lengths"):
        with pytest.raises(ValueError, match="must not be negative"):
            records.write_shard(tmp_path / "x", **{**shard, name: np.array([1, -1, 2])})
    with pytest.raises(ValueError, match="must be bytes"):
        records.write_shard(tmp_path / "x", **{**shard, "read_ids": np.array(list("abc"))})


@pytest.mark.parametrize("block_bytes", [1, 1 << 22])
def test_no_changed_byte_passes(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(records, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "shard"
    records.write_shard(path, **make_records(4, 3, "float16"))
    whole = path.read_bytes()
    ends = np.cumsum([16 + int.from_bytes(whole[at : at + 8], "little") for at in starts(whole)])
    for place in range(len(whole)):
        for change in (1 << place % 8, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            number = 1 + np.searchsorted(ends, place, side="right")
            with pytest.raises(InputError, match=rf"shard: record {number} is damaged"):
                read_shard(path, target_length=3, dtype="float16")


def test_a_shard_that_was_cut_is_an_error_that_names_the_record(tmp_path):
    path = tmp_path / "shard"
    records.write_shard(path, **make_records(4, 3, "float16"))
    whole = path.read_bytes()
    borders = [*starts(whole), len(whole)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        if size in borders:  # the manifest's count of records tells
            block = read_shard(path, target_length=3, dtype="float16")
            assert len(block.lengths) == borders.index(size)
            continue
        number = np.searchsorted(borders, size)
        with pytest.raises(InputError, match=rf"shard: record {number} is damaged .*ends within"):
            read_shard(path, target_length=3, dtype="float16")


def starts(whole: bytes) -> list[int]:
    found, at = [], 0
    while at < len(whole):
        found.append(at)
        at += 16 + int.from_bytes(whole[at : at + 8], "little")
    return found


def test_a_missing_or_damaged_shard_of_a_split_is_named_not_skipped(tmp_path):
    write_dataset(tmp_path / "d", "float16")
    victim = tmp_path / "d" / records.shard_name("train", 1, 2)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(InputError, match=rf"{victim}: record 1 is damaged"):
        list(records.read_blocks(tmp_path / "d", "train"))
    victim.unlink()
    with pytest.raises(InputError, match="missing or incomplete"):
        list(records.read_blocks(tmp_path / "d", "train"))
    with pytest.raises(InputError, match="can't be read"):
        read_shard(victim, target_length=7, dtype="float16")


def test_a_directory_that_is_no_dataset_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        records.signal_spec(tmp_path)
    (tmp_path / "features.json").write_text("[]")
    with pytest.raises(InputError, match="doesn't describe"):
        records.signal_spec(tmp_path)


def test_tensorflow_leaves_the_gpu_alone():
    assert libraries.tensorflow().config.get_visible_devices("GPU") == []
    assert "tensorflow" in sys.modules


def _count(shard: dict) -> int:
    return len(shard["read_ids"])


def _rows(shards: list[dict]):
    for shard in shards:
        yield from zip(
            shard["signals"],
            shard["cap_classes"],
            shard["read_ids"],
            shard["lengths"],
            strict=True,
        )
