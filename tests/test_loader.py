"""The cache beside the shards, the order of an epoch, and the batches."""

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder import files
from capfinder.data import order as order_module
from capfinder.data import records
from capfinder.data.loader import (
    EvaluationBatches,
    Split,
    TrainBatches,
    epoch_order,
    open_split,
)
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
        read_id=np.array([f"read{i}".encode() for i in range(n)]),
        shard_lengths=tuple(len(part) for part in np.array_split(np.arange(n), shards)),
    )


def write_version(directory: Path, split: Split, *, width: int = 0) -> None:
    """A dataset version whose three splits hold `split`, with the manifest keys the loader uses."""
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
                    read_ids=[r.decode() + "x" * (width * i) for r in split.read_id[part]],
                    lengths=split.length[part],
                )
            )
            shards.append({"name": path.name, "num_examples": n})
    records.write_metadata(
        directory,
        version=directory.name,
        target_length=T,
        dtype=split.signal.dtype.name,
        shard_lengths={name: split.shard_lengths for name in records.SPLITS},
        shard_bytes={name: sizes[: len(ends)] for name in records.SPLITS},
    )
    files.write_json(directory / "manifest.json", {"fingerprint": "f00d", "shards": shards})


# --- the cache


def test_the_cache_holds_what_the_shards_hold_and_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK_RECORDS", 7)
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


@pytest.mark.parametrize("claimed", [13, 15])
def test_shards_that_differ_from_the_manifest_leave_no_cache(tmp_path, claimed):
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    write_version(version, make_split([0, 1] * 20))
    manifest = files.read_json(version / "manifest.json")
    manifest["shards"][0]["num_examples"] = claimed
    files.write_json(version / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"hold (39|more than 39|40) records, manifest\.json says"):
        open_split(version, "train")
    assert not list((tmp_path / "dataset" / "cache" / "f00d").glob("*train"))
    manifest["shards"] = manifest["shards"][1:]
    files.write_json(version / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"holds 3 shards .* lists 2"):
        open_split(version, "train")


def test_tensorflow_is_not_imported_when_the_cache_is_there(tmp_path):
    version = tmp_path / "dataset" / "cap_data" / "1.0.0"
    write_version(version, make_split([0, 1] * 5))
    open_split(version, "train")
    program = f"""
        import sys
        from pathlib import Path
        from capfinder.data.loader import EvaluationBatches, TrainBatches, open_split
        split = open_split(Path({str(version)!r}), "train")
        batches = TrainBatches(split, batch_size=4, seed=0, augment=False, residency="host")
        assert len(list(batches.epoch(0))) == 3
        assert len(list(EvaluationBatches(split, batch_size=4))) == 3
        assert not {{"tensorflow", "tensorflow_datasets"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


# --- the order of an epoch

equal_classes = st.tuples(st.integers(1, 5), st.integers(1, 40)).flatmap(
    lambda shape: st.permutations(list(range(shape[0])) * shape[1])
)
any_classes = st.lists(st.integers(0, 4), min_size=1, max_size=80)
batch_sizes = st.integers(1, 100)


def an_order(classes, batch_size, *, seed=0, epoch=0, shards=3) -> np.ndarray:
    lengths = [len(part) for part in np.array_split(np.arange(len(classes)), shards)]
    return epoch_order(np.asarray(classes), lengths, seed=seed, epoch=epoch, batch_size=batch_size)


@settings(deadline=None)
@given(any_classes, batch_sizes, st.integers(0, 3), st.integers(1, 6))
def test_every_batch_is_balanced_to_one_and_every_record_comes(classes, batch_size, epoch, shards):
    order = an_order(classes, batch_size, epoch=epoch, shards=shards)
    labels = np.unique(classes)
    assert order.dtype == np.int64 and order.shape[1] == min(batch_size, len(classes))
    counts = np.stack([(np.asarray(classes)[order] == label).sum(axis=1) for label in labels])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    assert set(order.ravel()) == set(range(len(classes)))
    largest = max(map(classes.count, labels))
    assert len(order) == -(-len(labels) * largest // order.shape[1])


@settings(deadline=None)
@given(equal_classes, batch_sizes, st.integers(0, 3))
def test_equal_classes_come_exactly_once_but_for_the_top_up(classes, batch_size, epoch):
    flat = an_order(classes, batch_size, epoch=epoch).ravel()
    n = len(classes)
    assert len(np.unique(flat[:n])) == n
    assert set(flat[n:]) <= set(flat[: len(flat) - n])  # topped up from the epoch's beginning


def test_smaller_classes_go_round_again_evenly():
    classes = np.repeat([0, 1, 2], [90, 30, 45])
    times = np.bincount(an_order(classes, 18).ravel(), minlength=len(classes))
    assert set(times[:90]) == {1} and set(times[90:120]) == {3} and set(times[120:]) == {2}


def test_the_order_is_a_function_of_seed_and_epoch():
    classes = np.tile(np.arange(4), 50)
    orders = {
        (seed, epoch): an_order(classes, 32, seed=seed, epoch=epoch)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len({order.tobytes() for order in orders.values()}) == 9
    for (seed, epoch), order in orders.items():
        np.testing.assert_array_equal(order, an_order(classes, 32, seed=seed, epoch=epoch))


def test_the_order_is_the_same_on_every_platform_and_version():
    """Kept figures: a change here breaks the resuming of runs made by earlier versions."""
    order = an_order(np.tile(np.arange(3), 4), 5, seed=42, epoch=1)
    assert order.tolist() == [[11, 6, 1, 2, 3], [7, 5, 9, 4, 8], [0, 10, 11, 6, 1]]


def test_shards_are_permuted_and_records_shuffled_within_windows(monkeypatch):
    monkeypatch.setattr(order_module, "_WINDOW_RECORDS", 20)  # 10 of each of 2 classes
    classes = np.tile([0, 1], 200)
    order = epoch_order(classes, [40] * 10, seed=3, epoch=0, batch_size=40)
    shards = order // 40  # (10 batches, 40): windows never cross a shard here
    assert (shards == shards[:, :1]).all()
    assert sorted(shards[:, 0]) == list(range(10)) and list(shards[:, 0]) != list(range(10))
    for label in (0, 1):
        windows = order.ravel()[classes[order.ravel()] == label].reshape(-1, 10)
        firsts = np.sort(windows, axis=1)
        assert (firsts[:, -1] - firsts[:, 0] == 18).all()  # ten neighbours of one class
        assert (windows != firsts).any(axis=1).all()  # shuffled among themselves


def test_a_shuffle_is_uniform_within_its_window():
    classes = np.zeros(10, int)
    first = [an_order(classes, 10, seed=seed)[0, 0] for seed in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi squared, 9 degrees, 0.1 % point


def test_labels_and_shards_must_belong_together():
    with pytest.raises(ValueError, match="records in shards"):
        epoch_order(np.zeros(5, int), [3], seed=0, epoch=0, batch_size=2)
    with pytest.raises(ValueError, match="no records"):
        epoch_order(np.zeros(0, int), [], seed=0, epoch=0, batch_size=2)


# --- training batches


def train_batches(split: Split, residency: str, *, augment: bool = False, batch_size: int = 8):
    return TrainBatches(split, batch_size=batch_size, seed=5, augment=augment, residency=residency)


def as_bytes(batches) -> list[tuple[bytes, bytes]]:
    return [
        (np.asarray(b["signal"]).tobytes(), np.asarray(b["cap_class"]).tobytes()) for b in batches
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("augment", [False, True])
def test_device_and_host_residency_give_the_same_bits(dtype, augment):
    split = make_split([0, 1, 2] * 11, dtype=dtype)
    device = train_batches(split, "device", augment=augment)
    host = train_batches(split, "host", augment=augment)
    assert device.steps_per_epoch == host.steps_per_epoch == (13 if augment else 5)
    for epoch in (0, 1):
        assert as_bytes(device.epoch(epoch)) == as_bytes(host.epoch(epoch))


@pytest.mark.parametrize("residency", ["device", "host"])
def test_an_epoch_goes_on_from_any_step_exactly(residency):
    batches = train_batches(make_split([0, 1] * 20), residency, augment=True)
    whole = as_bytes(batches.epoch(3))
    assert len(whole) == batches.steps_per_epoch == 15
    for start in (0, 1, 9, 14, 15):
        assert as_bytes(batches.epoch(3, start_step=start)) == whole[start:]


@pytest.mark.parametrize("residency", ["device", "host"])
def test_a_batch_holds_the_records_that_the_order_names(residency):
    split = make_split([0, 1] * 20)
    batches = train_batches(split, residency)
    assert batches.batch_size == 8 and batches.num_examples == 40
    expected = epoch_order(split.cap_class, split.shard_lengths, seed=5, epoch=2, batch_size=8)
    for batch, ids in zip(batches.epoch(2), expected, strict=True):
        assert batch["signal"].shape == (8, T, 1) and batch["signal"].dtype == np.float32
        assert batch["cap_class"].dtype == np.int32
        np.testing.assert_array_equal(batch["signal"][:, :, 0], split.signal[ids])
        np.testing.assert_array_equal(batch["cap_class"], split.cap_class[ids])


def test_augmentation_triples_the_examples_and_keeps_the_originals():
    split = make_split([0, 1] * 20, dtype="float32")
    batches = train_batches(split, "device", augment=True)
    assert batches.num_examples == 120
    seen = {0: set(), 1: set(), 2: set()}
    warped = 0
    for batch, ids in zip(batches.epoch(0), batches.order(0), strict=True):
        signal = np.asarray(batch["signal"])[:, :, 0]
        np.testing.assert_array_equal(batch["cap_class"], split.cap_class[ids // 3])
        for row, example in zip(signal, ids, strict=True):
            record, version = divmod(int(example), 3)
            seen[version].add(record)
            same = np.array_equal(row, split.signal[record])
            assert version != 0 or same
            warped += not same
            true, new = np.count_nonzero(split.signal[record]), np.count_nonzero(row)
            assert version != 1 or new <= true
            assert version != 2 or new >= true
    assert all(records == set(range(40)) for records in seen.values())
    assert warped > 40  # of 80; a short signal may round back to its own length


def test_an_example_is_warped_alike_in_any_batch_and_afresh_in_the_next_epoch():
    split = make_split([0, 1] * 20, dtype="float32")

    def by_example(batch_size: int, epoch: int) -> dict[int, bytes]:
        batches = train_batches(split, "device", augment=True, batch_size=batch_size)
        rows = {}
        for batch, ids in zip(batches.epoch(epoch), batches.order(epoch), strict=True):
            for row, example in zip(np.asarray(batch["signal"]), ids, strict=True):
                rows[int(example)] = row.tobytes()
        return rows

    first = by_example(8, 0)
    assert first == by_example(20, 0)
    second = by_example(8, 1)
    changed = [example for example in first if first[example] != second[example]]
    assert len(changed) > 40 and all(example % 3 for example in changed)


def test_float64_storage_gives_float64_when_it_is_enabled():
    split = make_split([0, 1] * 4, dtype="float64")
    for residency in ("device", "host"):
        batch = next(train_batches(split, residency, augment=True).epoch(0))
        assert batch["signal"].dtype == np.float32
        with jax.enable_x64(True):
            (batch,) = train_batches(split, residency).epoch(0)
            (ids,) = train_batches(split, residency).order(0)
        assert batch["signal"].dtype == np.float64
        np.testing.assert_array_equal(batch["signal"][:, :, 0], split.signal[ids])


def test_batches_are_never_larger_than_the_split():
    batches = train_batches(make_split([0, 1, 1, 0, 0, 1]), "host", batch_size=1024)
    assert batches.batch_size == 6 and batches.steps_per_epoch == 1
    (batch,) = batches.epoch(0)
    assert batch["signal"].shape == (6, T, 1)


# --- evaluation batches


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 25), st.integers(1, 30))
def test_evaluation_sees_every_record_once_in_stored_order(n, batch_size):
    split = make_split(np.arange(n) % 3)
    batches = EvaluationBatches(split, batch_size=batch_size)
    for _ in range(2):  # iterable again
        got = list(batches)
        assert len(got) == len(batches)
        assert len({batch["signal"].shape for batch in got}) == 1
        weight = np.concatenate([batch["weight"] for batch in got])
        assert weight.dtype == np.float32 and weight.tolist() == [1.0] * n + [0.0] * (
            len(weight) - n
        )
        signal = np.concatenate([batch["signal"] for batch in got])
        assert signal.dtype == np.float32
        np.testing.assert_array_equal(signal[:n, :, 0], split.signal)
        assert (signal[n:] == 0).all()
        cap_class = np.concatenate([batch["cap_class"] for batch in got])
        assert cap_class.dtype == np.int32
        np.testing.assert_array_equal(cap_class[:n], split.cap_class)


def test_an_empty_split_gives_no_batch():
    empty = EvaluationBatches(make_split([], shards=1), batch_size=4)
    assert len(empty) == 0 and list(empty) == []
