"""Shards: readable by TensorFlow Datasets alone, exact to the byte, reproducible."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capfinder import libraries
from capfinder.data import records
from capfinder.errors import InputError

DTYPES = ("float16", "float32", "float64")


def make_records(n: int, target_length: int, dtype: str, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "signals": rng.normal(size=(n, target_length)).astype(dtype),
        "cap_classes": rng.integers(0, 200, n),
        "read_ids": [f"read-{seed}-é-{'x' * (i % 5)}{i}" for i in range(n)],
        "lengths": rng.integers(1, 100_000, n),
    }


def write_dataset(directory: Path, dtype: str, *, version: str = "1.0.0", target_length: int = 7):
    """Three splits of 5, 3 and 2 records a shard, two shards each; returns what was written."""
    directory.mkdir(parents=True)
    written, lengths, sizes = {}, {}, {}
    for number, (split, n) in enumerate(zip(records.SPLITS, (5, 3, 2), strict=True)):
        shards = [make_records(n, target_length, dtype, 10 * number + i) for i in range(2)]
        sizes[split] = [
            records.write_shard(directory / records.shard_name(split, i, 2), **shard)
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
            assert row["read_id"].decode() == read_id


def test_tensorflow_datasets_serialiser_finds_the_same_example_in_the_bytes(tmp_path):
    """The hand-written encoding, parsed by protobuf itself and written again, is unchanged."""
    tf = libraries.tensorflow()
    shard = make_records(20, 9, "float16")
    path = tmp_path / "shard.tfrecord"
    assert records.write_shard(path, **shard) == path.stat().st_size
    for raw, row in zip(
        tf.data.TFRecordDataset(str(path)).as_numpy_iterator(), _rows([shard]), strict=True
    ):
        example = tf.train.Example.FromString(raw)
        assert len(example.SerializeToString()) == len(raw)
        feature = example.features.feature
        assert feature["signal"].bytes_list.value == [row[0].tobytes()]
        assert feature["cap_class"].int64_list.value == [row[1]]
        assert feature["read_id"].bytes_list.value == [row[2].encode()]
        assert feature["length"].int64_list.value == [row[3]]


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
    monkeypatch.setattr(records, "_BLOCK_RECORDS", 4)  # blocks that cross the shards' borders
    written = write_dataset(tmp_path / "d", dtype)
    for split, shards in written.items():
        blocks = list(records.read_blocks(tmp_path / "d", split))
        signals = np.concatenate([block.signals for block in blocks])
        assert signals.dtype == dtype
        assert signals.tobytes() == b"".join(shard["signals"].tobytes() for shard in shards)
        expected = list(_rows(shards))
        assert [c for b in blocks for c in b.cap_classes] == [row[1] for row in expected]
        assert [r.decode() for b in blocks for r in b.read_ids] == [row[2] for row in expected]
        assert [n for b in blocks for n in b.lengths] == [row[3] for row in expected]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    signals=st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(0, 4), st.integers(1, 40)))
    ),
    data=st.data(),
)
def test_any_record_survives_the_round_trip(tmp_path_factory, signals, data):
    directory = tmp_path_factory.mktemp("round_trip")
    n, target_length = signals.shape
    whole = st.integers(0, 2**62)
    shard = {
        "signals": signals,
        "cap_classes": np.array([data.draw(whole) for _ in range(n)], np.int64),
        "read_ids": [data.draw(st.text(st.characters(codec="utf-8"))) + "." for _ in range(n)],
        "lengths": np.array([data.draw(whole) for _ in range(n)], np.int64),
    }
    size = records.write_shard(directory / records.shard_name("train", 0, 1), **shard)
    for split in ("validation", "test"):
        shutil.copy(
            directory / records.shard_name("train", 0, 1),
            directory / records.shard_name(split, 0, 1),
        )
    records.write_metadata(
        directory,
        version="1.0.0",
        target_length=target_length,
        dtype=signals.dtype.name,
        shard_lengths={split: [n] for split in records.SPLITS},
        shard_bytes={split: [size] for split in records.SPLITS},
    )
    blocks = list(records.read_blocks(directory, "test"))
    assert b"".join(block.signals.tobytes() for block in blocks) == signals.tobytes()
    assert [c for b in blocks for c in b.cap_classes] == shard["cap_classes"].tolist()
    assert [r.decode() for b in blocks for r in b.read_ids] == shard["read_ids"]
    assert [n for b in blocks for n in b.lengths] == shard["lengths"].tolist()


def test_arrays_that_do_not_belong_together_are_refused(tmp_path):
    shard = make_records(3, 5, "float16")
    with pytest.raises(ValueError, match="don't belong together"):
        records.write_shard(tmp_path / "x", **{**shard, "lengths": shard["lengths"][:2]})


def test_a_missing_or_damaged_shard_is_named_not_skipped(tmp_path):
    write_dataset(tmp_path / "d", "float16")
    victim = tmp_path / "d" / records.shard_name("train", 1, 2)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(InputError, match="damaged"):
        list(records.read_blocks(tmp_path / "d", "train"))
    victim.write_bytes(whole[:-3])
    with pytest.raises(InputError, match="damaged"):
        list(records.read_blocks(tmp_path / "d", "train"))
    victim.unlink()
    with pytest.raises(InputError, match="missing or incomplete"):
        list(records.read_blocks(tmp_path / "d", "train"))


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
