"""A split's arrays: the cache beside the shards, and the shards themselves."""

import fcntl
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from capfinder import files
from capfinder.data import cache as cache_module
from capfinder.data import records
from capfinder.data.cache import Split, open_shards, open_split, read_ids
from capfinder.errors import InputError

T = 30


def make_split(classes, *, dtype: str = "float16", shards: int = 3, seed: int = 0) -> Split:
    """A split in memory; each signal fills its own length of the row, centred."""
    rng = np.random.default_rng(seed)
    n = len(classes)
    length = rng.integers(5, 2 * T, n).astype(np.int32)
    left = np.maximum(T - length, 0)[:, None] // 2
    place = np.arange(T) - left
    signal = np.where((place >= 0) & (place < length[:, None]), rng.normal(size=(n, T)), 0)
    return Split(
        signal=signal.astype(dtype),
        cap_class=np.asarray(classes, np.int32),
        length=length,
        read_id=np.array([f"read{i}".encode() for i in range(n)], "S"),
        shard_lengths=tuple(len(part) for part in np.array_split(np.arange(n), shards)),
    )


def write_version(directory: Path, split: Split, *, width: int = 0) -> None:
    """A dataset version whose three splits hold `split`, with the manifest keys that are used."""
    directory.mkdir(parents=True)
    ends = np.cumsum(split.shard_lengths)
    shards, sizes = [], []
    for name in records.SPLITS:
        for i, (n, end) in enumerate(zip(split.shard_lengths, ends, strict=True)):
            part = slice(end - n, end)
            path = directory / records.shard_name(name, i, len(ends))
            sizes.append(
                records.write_shard(
                    path,
                    signals=split.signal[part],
                    cap_classes=split.cap_class[part],
                    read_ids=np.array([r + b"x" * (width * i) for r in split.read_id[part]], "S"),
                    lengths=split.length[part],
                ).size
            )
            shards.append({"name": path.name, "num_examples": n})
    records.write_metadata(
        directory,
        version=directory.name,
        target_length=split.signal.shape[1],
        dtype=split.signal.dtype.name,
        shard_lengths={name: split.shard_lengths for name in records.SPLITS},
        shard_bytes={name: sizes[: len(ends)] for name in records.SPLITS},
    )
    files.write_json(directory / "manifest.json", {"fingerprint": "f00d", "shards": shards})


def test_the_cache_holds_what_the_shards_hold_and_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK_BYTES", 1000)  # some records
    monkeypatch.setattr(cache_module, "_CHUNK_RECORDS", 5)
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    split = make_split([0, 1] * 20)
    write_version(version, split, width=3)  # later shards have longer read_ids
    opened = open_split(version, "train")
    cache = tmp_path / "dataset" / "cache" / "f00d" / "train"
    assert sorted(path.name for path in cache.iterdir()) == [
        "cap_class.npy",
        "length.npy",
        "read_id.npy",
        "signal.npy",
    ]
    assert isinstance(opened.signal, np.memmap)
    assert opened.signal.dtype == np.float16 and opened.signal.tobytes() == split.signal.tobytes()
    assert opened.cap_class.dtype == np.int32
    np.testing.assert_array_equal(opened.cap_class, split.cap_class)
    np.testing.assert_array_equal(opened.length, split.length)
    assert opened.shard_lengths == split.shard_lengths == (14, 13, 13)
    shard = np.repeat(range(3), opened.shard_lengths)
    expected = [r + b"x" * (3 * i) for r, i in zip(split.read_id, shard, strict=True)]
    assert list(opened.read_id) == expected
    assert opened.read_id.dtype == "S12"
    assert_blocks_are(opened.blocks(), split, expected)

    for path in version.glob("*.tfrecord*"):
        path.unlink()
    again = open_split(version, "train")
    assert again.signal.tobytes() == split.signal.tobytes()
    with pytest.raises(InputError, match="missing or incomplete"):
        open_split(version, "test")


def test_a_cache_that_does_not_fit_is_built_anew(tmp_path):
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    split = make_split([0, 1] * 5)
    write_version(version, split)
    open_split(version, "test")
    cached = tmp_path / "dataset" / "cache" / "f00d" / "test" / "signal.npy"
    cached.write_bytes(cached.read_bytes()[:-8])
    assert open_split(version, "test").signal.tobytes() == split.signal.tobytes()
    np.save(cached, split.signal[:3])
    assert open_split(version, "test").signal.tobytes() == split.signal.tobytes()


def test_the_cache_is_numpys_own_format(tmp_path):
    """Byte by byte what np.save writes."""
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    split = make_split([0, 1] * 5, dtype="float64")
    write_version(version, split)
    open_split(version, "validation")
    for path in (tmp_path / "dataset" / "cache" / "f00d" / "validation").iterdir():
        np.save(tmp_path / "saved.npy", getattr(split, path.stem))
        assert path.read_bytes() == (tmp_path / "saved.npy").read_bytes()


@pytest.mark.parametrize(
    "open_it",
    [open_split, lambda *a: open_shards(*a).cap_class, lambda *a: list(read_ids(*a))],
)
@pytest.mark.parametrize("claimed", [13, 15])
def test_shards_that_differ_from_the_manifest_are_refused(tmp_path, open_it, claimed):
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    write_version(version, make_split([0, 1] * 20))
    manifest = files.read_json(version / "manifest.json")
    manifest["shards"][0]["num_examples"] = claimed
    files.write_json(version / "manifest.json", manifest)
    message = r"00000-of-00003: holds (at least )?14 records, manifest\.json says 1[35]"
    with pytest.raises(InputError, match=message):
        open_it(version, "train")
    assert not list((tmp_path / "dataset").glob("cache/f00d/*train"))
    manifest["shards"] = manifest["shards"][1:]
    files.write_json(version / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"holds 3 shards .* lists 2"):
        open_it(version, "train")


def test_shards_are_opened_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK_BYTES", 1000)
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    split = make_split([0, 1, 2] * 20, dtype="float32")
    write_version(version, split)
    opened = open_shards(version, "train")
    assert opened.cap_class.dtype == np.int32 and opened.row == (T, np.float32)
    np.testing.assert_array_equal(opened.cap_class, split.cap_class)
    assert opened.shard_lengths == split.shard_lengths and len(opened) == 60
    assert_blocks_are(opened.blocks(), split, split.read_id)
    assert not (tmp_path / "dataset" / "cache").exists()


def assert_blocks_are(blocks, split: Split, read_id) -> None:
    blocks = list(blocks)
    assert len(blocks) > 3
    assert np.concatenate([b.signals for b in blocks]).tobytes() == split.signal.tobytes()
    assert [c for b in blocks for c in b.cap_classes] == split.cap_class.tolist()
    assert [n for b in blocks for n in b.lengths] == split.length.tolist()
    assert [r for b in blocks for r in b.read_ids] == list(read_id)


def test_read_ids_are_the_same_from_the_shards_and_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_CHUNK_RECORDS", 7)
    monkeypatch.setattr(records, "_BLOCK_BYTES", 1000)
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    split = make_split([0, 1] * 20)
    write_version(version, split, width=2)
    from_shards = list(read_ids(version, "test"))
    assert not (tmp_path / "dataset" / "cache").exists()
    expected = list(open_split(version, "test").read_id)
    for path in version.glob("*-test.*"):
        path.unlink()
    from_cache = list(read_ids(version, "test"))
    for chunks in (from_shards, from_cache):
        assert max(map(len, chunks)) < 20
        assert np.concatenate(chunks).tolist() == expected


def test_a_cache_that_another_process_builds_is_waited_for(tmp_path):
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    split = make_split([0, 1] * 20)
    write_version(version, split)
    cache = tmp_path / "dataset" / "cache" / "f00d" / "train"
    cache.parent.mkdir(parents=True)
    debris = cache.parent / f"{files.PARTIAL}train-1"
    debris.mkdir()
    with ThreadPoolExecutor() as pool, (cache.parent / "train.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(open_split, version, "train")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        assert not cache.exists() and debris.exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result().signal.tobytes() == split.signal.tobytes()
    assert cache.exists() and not debris.exists()


def test_building_a_cache_and_reading_ids_takes_little_memory(tmp_path):
    """A writable map would hold all 80 MB of it."""
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    n = 20_000
    signal = np.broadcast_to(np.arange(2000, dtype=np.float16), (n, 2000))
    write_version(version, replace(make_split(np.arange(n) % 2, shards=2), signal=signal))
    program = f"""
        import resource
        from pathlib import Path
        from capfinder.data import cache
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        version = Path({str(version)!r})
        cache.open_split(version, "test")  # compiles
        before = peak()
        cache.open_split(version, "train")
        assert sum(map(len, cache.read_ids(version, "train"))) == {n}
        assert sum(map(len, cache.read_ids(version, "validation"))) == {n}
        assert len(cache.open_shards(version, "train").cap_class) == {n}
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout.split()[-1]) < 30


def test_training_needs_no_tensorflow(tmp_path):
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    write_version(version, make_split([0, 1] * 5))
    program = f"""
        import sys
        from pathlib import Path
        from capfinder.data import loader
        version = Path({str(version)!r})
        for residency, opened in ("host", loader.open_split), ("stream", loader.open_shards):
            split = opened(version, "train")
            batches = loader.TrainBatches(
                split, batch_size=4, seed=0, augment=False, residency=residency)
            assert len(list(batches.epoch(0))) == 3
            assert len(list(loader.EvaluationBatches(split, batch_size=4))) == 3
        assert not {{"tensorflow", "tensorflow_datasets"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
