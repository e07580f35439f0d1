"""The order of an epoch, and the batches."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder.data import cache, loader, records
from capfinder.data import order as order_module
from capfinder.data.loader import (
    EvaluationBatches,
    ShardedSplit,
    Split,
    TrainBatches,
    epoch_order,
    open_shards,
)
from capfinder.errors import InputError
from tests.test_cache import T, make_split, write_version

RESIDENCIES = ("device", "host", "stream")

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


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=30), st.integers(1, 9))
def test_windows_are_shuffled_as_one_stable_sort_would(draws, size):
    """Also where keys are equal; 1.0 is what a draw below it rounds to in a far window."""

    class Drawn:
        def random(self, count: int) -> np.ndarray:
            return np.array(draws[:count], float)

    records = np.arange(100, 100 + len(draws))
    shuffled = order_module._shuffle_windows(records, size, Drawn())
    expected = sorted(range(len(draws)), key=lambda i: (i // size + draws[i], i))
    assert shuffled.tolist() == [100 + i for i in expected]


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


@pytest.fixture
def in_shards(tmp_path):
    """Writes a split's shards and opens them."""

    def write_and_open(split: Split) -> ShardedSplit:
        directory = tmp_path / str(len(list(tmp_path.iterdir()))) / "cap_data" / "1.0.0"
        write_version(directory, split)
        return open_shards(directory, "train")

    return write_and_open


def train_batches(split, residency: str, *, augment: bool = False, batch_size: int = 8):
    return TrainBatches(split, batch_size=batch_size, seed=5, augment=augment, residency=residency)


def as_bytes(batches) -> list[tuple[bytes, bytes]]:
    return [
        (np.asarray(b["signal"]).tobytes(), np.asarray(b["cap_class"]).tobytes()) for b in batches
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("augment", [False, True])
def test_every_residency_gives_the_same_bits(dtype, augment, in_shards, monkeypatch):
    monkeypatch.setattr(order_module, "_WINDOW_RECORDS", 12)
    split = make_split([0, 1, 2] * 11, dtype=dtype)
    device = train_batches(split, "device", augment=augment)
    host = train_batches(split, "host", augment=augment)
    stream = train_batches(in_shards(split), "stream", augment=augment)
    steps = {batches.steps_per_epoch for batches in (device, host, stream)}
    assert steps == {13 if augment else 5}
    for epoch in (0, 1):
        whole = as_bytes(device.epoch(epoch))
        assert whole == as_bytes(host.epoch(epoch)) == as_bytes(stream.epoch(epoch))


@settings(max_examples=40)
@given(data=st.data())
def test_the_stream_is_the_same_whatever_the_shape_of_the_data(tmp_path_factory, data):
    """Before JAX gets it, which then does the same with it."""
    classes = data.draw(st.one_of(any_classes, equal_classes))
    split = make_split(classes, shards=data.draw(st.integers(1, 6)))
    options = {"batch_size": data.draw(batch_sizes), "augment": data.draw(st.booleans())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "_WINDOW_RECORDS", data.draw(st.integers(1, 50)))
        patch.setattr(loader, "_RUN_BYTES", data.draw(st.integers(1, 50 * 2 * T)))
        patch.setattr(records, "_BLOCK_BYTES", data.draw(st.integers(1, 3000)))
        opened = write_shards(tmp_path_factory.mktemp("stream"), split)
        stream = train_batches(opened, "stream", **options)
        host = train_batches(split, "host", **options)
        order, start = host.order(4), data.draw(st.integers(0, host.steps_per_epoch))
        np.testing.assert_array_equal(stream.order(4), order)
        got = list(stream._from_host(order, start))
        expected = list(host._from_host(order, start))
    assert len(got) == len(expected) == stream.steps_per_epoch - start
    for columns in zip(got, expected, strict=True):
        for ours, theirs in zip(*columns, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert ours.tobytes() == theirs.tobytes()


def write_shards(directory: Path, split: Split) -> ShardedSplit:
    paths = []
    for number, end in enumerate(np.cumsum(split.shard_lengths)):
        part = slice(end - split.shard_lengths[number], end)
        paths.append(directory / str(number))
        records.write_shard(
            paths[-1],
            signals=split.signal[part],
            cap_classes=split.cap_class[part],
            read_ids=split.read_id[part],
            lengths=split.length[part],
        )
    row = (T, split.signal.dtype)
    return ShardedSplit(tuple(paths), split.shard_lengths, row)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_an_epoch_goes_on_from_any_step_exactly(residency, in_shards):
    split = make_split([0, 1] * 20)
    opened = in_shards(split) if residency == "stream" else split
    batches = train_batches(opened, residency, augment=True)
    whole = as_bytes(batches.epoch(3))
    assert len(whole) == batches.steps_per_epoch == 15
    for start in (0, 1, 9, 14, 15):
        assert as_bytes(batches.epoch(3, start_step=start)) == whole[start:]


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_pieces_end_at_multiples_of_their_size_wherever_they_begin(residency, in_shards):
    split = make_split([0, 1] * 20)
    batches = train_batches(in_shards(split) if residency == "stream" else split, residency)

    def sizes(start: int, size: int) -> list[int]:
        found = []
        for piece in batches.pieces(0, start, size=size):
            counts = {len(array) for array in piece.values()}
            found.append(counts.pop())
            assert not counts
        return found

    assert batches.steps_per_epoch == 5
    assert sizes(0, 2) == [2, 2, 1] and sizes(0, 5) == sizes(0, 9) == [5]
    assert sizes(1, 2) == [1, 2, 1] and sizes(4, 3) == [1] and sizes(3, 3) == [2]
    assert sizes(5, 2) == sizes(5, 1) == []


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_scan_over_a_piece_sees_the_epoch_s_batches(residency, augment, in_shards):
    """As the training uses them: jitted, with what is resident as an argument."""
    split = make_split([0, 1] * 20)
    batches = train_batches(
        in_shards(split) if residency == "stream" else split, residency, augment=augment
    )
    assert bool(jax.tree.leaves(batches.resident)) == (residency == "device")

    @jax.jit
    def made(resident, piece):
        return jax.lax.scan(lambda _, one: (None, batches.materialise(resident, one)), None, piece)

    scanned = []
    for piece in batches.pieces(3, 1, size=4):
        _, several = made(batches.resident, piece)
        scanned += [
            {name: array[number] for name, array in several.items()}
            for number in range(len(several["cap_class"]))
        ]
    whole = list(batches.epoch(3, 1))
    assert len(scanned) == len(whole) == batches.steps_per_epoch - 1
    for one, other in zip(scanned, whole, strict=True):
        np.testing.assert_array_equal(one["cap_class"], other["cap_class"])
        # A loop's body is compiled on its own, and may round the interpolation otherwise.
        np.testing.assert_allclose(one["signal"], other["signal"], rtol=0, atol=1e-6)
        assert one["signal"].dtype == other["signal"].dtype


def test_epochs_may_be_asked_for_in_any_order():
    """Though the order of the next one is made ahead."""
    batches = train_batches(make_split([0, 1] * 20), "device")
    for epoch in (0, 1, 2, 0, 7, 7, 8):
        given = [np.asarray(piece["example"][0]) for piece in batches.pieces(epoch)]
        np.testing.assert_array_equal(given, batches.order(epoch))


def test_all_batches_are_made_by_one_function_so_that_programs_are_shared():
    split = make_split([0, 1] * 20)
    one, other = train_batches(split, "device"), train_batches(split, "host", augment=True)
    assert one.materialise is one.materialise is other.materialise


class Half:
    """One of two processes, on one device each."""

    num_devices = 2

    def __init__(self, number: int) -> None:
        self.number = number

    def rows(self, batch_size: int) -> slice:
        share = batch_size // 2
        return slice(self.number * share, (self.number + 1) * share)

    def split(self, arrays, *, axis):
        return arrays

    def replicate(self, arrays):
        return arrays


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_processes_gather_their_own_rows_and_together_all(
    residency, augment, in_shards, monkeypatch
):
    monkeypatch.setattr(order_module, "_WINDOW_RECORDS", 12)
    split = make_split([0, 1] * 20)
    opened = in_shards(split) if residency == "stream" else split

    def pieces(placement):
        return list(
            TrainBatches(
                opened,
                batch_size=8,
                seed=5,
                augment=augment,
                residency=residency,
                place=lambda batch_size: placement,
            ).pieces(1, 2, size=3)
        )

    whole = pieces(loader.ONE_DEVICE)
    for piece, first, second in zip(whole, pieces(Half(0)), pieces(Half(1)), strict=True):
        assert piece.keys() == first.keys() == second.keys()
        for name in set(piece) - {"key"}:
            assert first[name].shape[1] == second[name].shape[1] == 4
            joined = np.concatenate((first[name], second[name]), axis=1)
            np.testing.assert_array_equal(joined, piece[name])
        assert ("key" in piece) == augment


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_batch_holds_the_records_that_the_order_names(residency, in_shards):
    split = make_split([0, 1] * 20)
    batches = train_batches(in_shards(split) if residency == "stream" else split, residency)
    assert batches.batch_size == 8 and batches.num_examples == 40
    expected = epoch_order(split.cap_class, split.shard_lengths, seed=5, epoch=2, batch_size=8)
    for batch, ids in zip(batches.epoch(2), expected, strict=True):
        assert batch["signal"].shape == (8, T, 1) and batch["signal"].dtype == np.float32
        assert batch["cap_class"].dtype == np.int32
        np.testing.assert_array_equal(batch["signal"][:, :, 0], split.signal[ids])
        np.testing.assert_array_equal(batch["cap_class"], split.cap_class[ids])


def test_streaming_reads_each_shard_about_once(in_shards, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(order_module, "_WINDOW_RECORDS", 200)
    split = make_split(rng.permutation(np.arange(4000) % 4), shards=40)
    opened = in_shards(split)
    read: list[Path] = []
    read_shard_blocks = records.read_shard_blocks

    def noted(path, **options):
        read.append(path)
        return read_shard_blocks(path, **options)

    monkeypatch.setattr(records, "read_shard_blocks", noted)
    batches = train_batches(opened, "stream", batch_size=64)
    read.clear()  # the labels
    assert len(list(batches.epoch(0))) == 63
    assert set(read) == set(opened.paths)
    # Now and then a class is so far behind that its window ends a shard earlier. The last one
    # tops up the last batch from the first ones.
    assert len(read) <= 46


def test_a_shard_that_is_damaged_while_it_is_streamed_is_named(in_shards):
    opened = in_shards(make_split([0, 1] * 20))
    batches = train_batches(opened, "stream")
    raw = opened.paths[1].read_bytes()
    opened.paths[1].write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    with pytest.raises(InputError, match=r"00001-of-00003: record 1 is damaged"):
        list(batches.epoch(0))
    with pytest.raises(InputError, match=r"00001-of-00003: record 1 is damaged"):
        list(EvaluationBatches(opened, batch_size=8))


def test_a_stream_that_is_left_early_leaves_no_thread(in_shards, monkeypatch):
    monkeypatch.setattr(order_module, "_WINDOW_RECORDS", 12)
    before = threading.active_count()
    batches = train_batches(in_shards(make_split([0, 1] * 20)), "stream")
    for made in (batches.epoch(0), iter(EvaluationBatches(batches._split, batch_size=3))):
        next(made)
        made.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # others may end meanwhile


def test_a_stream_that_is_still_open_when_the_program_ends_says_nothing(in_shards):
    opened = in_shards(make_split([0, 1] * 20))
    program = f"""
        from pathlib import Path
        from capfinder.data import loader
        split = loader.open_shards(Path({str(opened.paths[0].parent)!r}), "train")
        batches = iter(loader.EvaluationBatches(split, batch_size=3))
        print(next(batches)["signal"].shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"(3, {T}, 1)\n" and done.stderr == ""


def test_residency_and_the_way_a_split_is_opened_belong_together(in_shards):
    split = make_split([0, 1] * 20)
    for residency in ("device", "host"):
        with pytest.raises(ValueError, match="ShardedSplit doesn't go with"):
            train_batches(in_shards(split), residency)
    with pytest.raises(ValueError, match="Split doesn't go with residency 'stream'"):
        train_batches(split, "stream")


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


def test_float64_storage_gives_float64_when_it_is_enabled(in_shards):
    split = make_split([0, 1] * 4, dtype="float64")
    for residency in RESIDENCIES:
        opened = in_shards(split) if residency == "stream" else split
        batch = next(train_batches(opened, residency, augment=True).epoch(0))
        assert batch["signal"].dtype == np.float32
        with jax.enable_x64(True):
            (batch,) = train_batches(opened, residency).epoch(0)
            (ids,) = train_batches(opened, residency).order(0)
        assert batch["signal"].dtype == np.float64
        np.testing.assert_array_equal(batch["signal"][:, :, 0], split.signal[ids])


def test_batches_are_never_larger_than_the_split():
    batches = train_batches(make_split([0, 1, 1, 0, 0, 1]), "host", batch_size=1024)
    assert batches.batch_size == 6 and batches.steps_per_epoch == 1
    (batch,) = batches.epoch(0)
    assert batch["signal"].shape == (6, T, 1)


# --- evaluation batches


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 25), st.integers(1, 30), st.integers(1, 9), st.booleans())
def test_evaluation_sees_every_record_once_in_stored_order(
    tmp_path_factory, n, batch_size, chunk, from_shards
):
    split = make_split(np.arange(n) % 3)
    opened: Split | ShardedSplit = split
    if from_shards:
        opened = write_shards(tmp_path_factory.mktemp("evaluation"), split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_CHUNK_RECORDS", chunk)
        patch.setattr(records, "_BLOCK_BYTES", 200 * chunk)
        check_evaluation(EvaluationBatches(opened, batch_size=batch_size), split)


def check_evaluation(batches: EvaluationBatches, split: Split) -> None:
    n = len(split)
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


def test_devices_share_evaluation_batches_evenly():
    split = make_split([0, 1, 2] * 7)
    whole = list(EvaluationBatches(split, batch_size=14))
    halves = [list(EvaluationBatches(split, batch_size=13, placement=Half(n))) for n in (0, 1)]
    for batch, first, second in zip(whole, *halves, strict=True):
        for name, array in batch.items():
            assert len(first[name]) == len(second[name]) == 7
            np.testing.assert_array_equal(np.concatenate((first[name], second[name])), array)


def test_an_empty_split_gives_no_batch():
    empty = EvaluationBatches(make_split([], shards=1), batch_size=4)
    assert len(empty) == 0 and list(empty) == []
