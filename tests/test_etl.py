import csv
import gzip
import hashlib
import json
import logging
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from csv_input import HEADER, read_id, row, rows, write, write_classes

from capfinder import files, settings, simulate
from capfinder.data import records
from capfinder.errors import InputError, SettingsError, StageFailedError
from capfinder.etl import plan, preprocess, scan, shuffle, spill
from capfinder.stages import etl

TARGET_LENGTH = 24


def make_config(data_dir, output_dir, **overrides):
    """Settings for small data; `a__b=v` sets a.b."""
    values = {
        "etl_params.caps_data_dir": str(data_dir),
        "etl_params.examples_per_class": None,
        "shared_params.output_dir": str(output_dir),
        "shared_params.num_classes": 2,
        "shared_params.target_length": TARGET_LENGTH,
        "shared_params.train_test_fraction": 0.8,
        "shared_params.train_val_fraction": 0.75,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return settings.checked(settings.default_config(), values)


def run(data_dir, output_dir, **overrides):
    return etl.run(make_config(data_dir, output_dir, **overrides))


def read_back(dataset):
    """Per split: {read_id: (cap_class, length, signal)} in stored order."""
    return {
        split: {
            name.decode(): (int(label), int(length), signal)
            for block in records.read_blocks(dataset.directory, split)
            for name, label, length, signal in zip(
                block.read_ids.tolist(),
                block.cap_classes,
                block.lengths,
                block.signals,
                strict=True,
            )
        }
        for split in records.SPLITS
    }


def shard_digests(dataset):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in dataset.directory.glob("*.tfrecord-*")
    }


def rejects_of(dataset):
    with (dataset.directory / "rejects.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def ids_of(dataset):
    return {split: set(reads) for split, reads in read_back(dataset).items()}


def debris(output_dir: Path):
    """What a run must not leave: versions half-written, or whole after an error."""
    root = output_dir / "dataset" / "cap_data"
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


# The dataset


def test_every_stored_signal_is_its_row_fitted_and_cast(tmp_path):
    data = write_classes(tmp_path / "caps")
    source = {}
    for path in data.glob("*.csv"):
        with path.open(newline="") as stream:
            for fields in csv.DictReader(stream):
                source[fields["read_id"]] = fields
    for dtype in ("float16", "float32", "float64"):
        result = run(data, tmp_path / dtype, shared_params__dtype=dtype)
        stored = read_back(result.dataset)
        assert sum(len(reads) for reads in stored.values()) == len(source) == 80
        for name, (label, length, signal) in (
            item for reads in stored.values() for item in reads.items()
        ):
            values = np.array([float(text) for text in source[name]["timeseries"].split(",")])
            if dtype != "float64":
                values = values.astype(np.float32)
            assert label == int(source[name]["cap_class"])
            assert length == len(values)
            expected = preprocess.fit_length(values.astype(dtype), TARGET_LENGTH)
            assert signal.tobytes() == expected.tobytes()


def test_counts_are_exact_classes_in_turn_and_the_manifest_tells(tmp_path):
    data = write_classes(tmp_path / "caps", classes=3, reads=25)
    result = run(data, tmp_path / "out", shared_params__num_classes=3)
    dataset, stored = result.dataset, read_back(result.dataset)
    expected = {"train": 30, "validation": 10, "test": 10}  # of 50 a class
    assert not result.reused
    for split, count in expected.items():
        labels = [label for label, _, _ in stored[split].values()]
        assert labels == [0, 1, 2] * count
        assert dataset.manifest["counts"][split] == {"0": count, "1": count, "2": count}
    manifest = dataset.manifest
    assert files.read_json(dataset.directory / "manifest.json") == manifest
    assert manifest["version"] == dataset.version == "1.0.0"
    assert (manifest["num_classes"], manifest["target_length"]) == (3, TARGET_LENGTH)
    assert (manifest["dtype"], manifest["examples_per_class"]) == ("float16", 50)
    assert (manifest["seed"], manifest["hash"]) == (42, {"name": "blake2b-256", "version": 2})
    assert (manifest["rejects"], manifest["warnings"]) == ({}, [])
    assert [s["file"] for s in manifest["sources"]] == sorted(p.name for p in data.iterdir())
    for source in manifest["sources"]:
        path = data / source["file"]
        assert source["size"] == path.stat().st_size
        assert source["sha256"] == files.sha256_file(path)
        assert (source["rows"], source["good"]) == (25, 25)
        assert source["cap_class"] == source["dataset_class"] == int(source["file"][10])
    shards = {shard["name"]: shard for shard in manifest["shards"]}
    assert {name: shard["sha256"] for name, shard in shards.items()} == shard_digests(dataset)
    assert sum(shard["num_examples"] for shard in shards.values()) == 150
    assert json.loads((dataset.directory / "dataset_info.json").read_text())["version"] == "1.0.0"


def test_file_names_and_row_order_leave_the_shards_unchanged(tmp_path):
    """Fewer reads than there are, bad rows, duplicates: every choice is put to the test."""
    rng = random.Random(1)
    contents = {}
    for cap_class in range(2):
        for number in range(3):
            lines = rows(cap_class, number, 30 + 5 * number)
            lines.append(row(read_id(9, number), cap_class, "1,nan"))
            lines.append(row(read_id(cap_class, number, 4), cap_class, [0.25, number]))
            contents[cap_class, number] = lines
    for key, lines in contents.items():
        write(tmp_path / "a" / f"data__cap_{key[0]}_run{key[1]}.csv", lines)
    names = [f"data__{i}.csv" for i in range(6)]
    rng.shuffle(names)
    for lines, name in zip(contents.values(), names, strict=True):
        mixed = rng.sample(lines, len(lines))
        write(tmp_path / "b" / name, mixed, end="\n")
    first = tmp_path / "b" / names[0]
    (tmp_path / "b" / "z.csv.gz").write_bytes(gzip.compress(first.read_bytes()))
    first.unlink()
    overrides = {"etl_params__examples_per_class": 70, "etl_params__max_reject_fraction": 0.1}
    digests = []
    for group_by in ("read", "file"):
        overrides["split_params__group_by"] = group_by
        one = run(tmp_path / "a", tmp_path / f"out_a_{group_by}", **overrides).dataset
        two = run(tmp_path / "b", tmp_path / f"out_b_{group_by}", **overrides).dataset
        assert one.fingerprint != two.fingerprint  # other bytes on disk, the same reads
        assert one.manifest["rejects"] == two.manifest["rejects"]
        assert one.manifest["rejects"] == {"duplicate read_id": 6, "not finite": 6}
        assert shard_digests(one) == shard_digests(two)
        digests.append(shard_digests(one))
    assert digests[0] != digests[1]


def test_two_runs_and_other_block_and_shard_sizes_give_the_same_reads(tmp_path, monkeypatch):
    data = write_classes(tmp_path / "caps", reads=40)
    one = run(data, tmp_path / "one").dataset
    assert shard_digests(run(data, tmp_path / "two").dataset) == shard_digests(one)
    monkeypatch.setattr(scan, "BLOCK_BYTES", 100)
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 700)
    # As with an input far larger than memory: many parts of everything, all of them in files.
    monkeypatch.setattr(spill, "BUFFER_BYTES", 1)
    monkeypatch.setattr(scan, "READS_PER_PART", 9)
    monkeypatch.setattr(scan, "LINES_PER_SEGMENT", 5)
    monkeypatch.setattr("capfinder.etl.plan.READS_PER_PART", 7)
    monkeypatch.setattr("capfinder.etl.leaks._ENTRIES_PER_PART", 9)
    assert shard_digests(run(data, tmp_path / "three").dataset) == shard_digests(one)
    monkeypatch.setattr("capfinder.etl.plan.SHARD_BYTES", 2000)
    four = run(data, tmp_path / "four").dataset
    lengths = [s["num_examples"] for s in four.manifest["shards"] if "-train." in s["name"]]
    assert len(lengths) > 5
    assert all(length % 2 == 0 for length in lengths)
    for split, reads in read_back(one).items():
        assert list(reads) == list(read_back(four)[split])


def test_a_quota_is_drawn_evenly_from_all_runs(tmp_path):
    data = tmp_path / "caps"
    for number, count in enumerate((5, 40, 60)):
        write(data / f"data__cap_0_run{number}.csv", rows(0, number, count))
    write(data / "data__cap_1.csv", rows(1, 0, 35))
    dataset = run(data, tmp_path / "out", etl_params__examples_per_class=35).dataset
    used = Counter()
    for reads in ids_of(dataset).values():
        for number, count in enumerate((5, 40, 60)):
            used[number] += len(reads & {read_id(0, number, i) for i in range(count)})
    assert used == {0: 5, 1: 15, 2: 15}


# Splits


def test_fewer_reads_than_asked_are_a_recorded_warning(tmp_path, caplog):
    data = write_classes(tmp_path / "caps", runs=1, reads=30)
    write(data / "data__cap_1_run1.csv", rows(1, 1, 10))
    with caplog.at_level(logging.WARNING, "capfinder"):
        dataset = run(data, tmp_path / "out", etl_params__examples_per_class=50).dataset
    warning, confounded = dataset.manifest["warnings"]
    assert "class 0 has only 30 good reads" in warning
    assert "class 0 from data__cap_0_run0.csv alone" in confounded
    assert warning in caplog.text
    assert dataset.manifest["examples_per_class"] == 30
    assert dataset.manifest["counts"]["train"] == {"0": 18, "1": 18}


def test_keep_all_uses_every_read_up_to_a_limit(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1, reads=20)
    write(data / "data__cap_1_run1.csv", rows(1, 1, 60))
    everything = run(data, tmp_path / "out", split_params__keep_all=True).dataset
    assert everything.manifest["counts"] == {
        "train": {"0": 12, "1": 48},
        "validation": {"0": 4, "1": 16},
        "test": {"0": 4, "1": 16},
    }
    assert everything.manifest["examples_per_class"] == {"0": 20, "1": 80}
    limited = run(
        data, tmp_path / "out", split_params__keep_all=True, etl_params__examples_per_class=50
    ).dataset
    assert limited.manifest["counts"]["test"] == {"0": 4, "1": 10}


def write_metadata(path: Path, parents: dict[str, str]) -> None:
    lines = ["read_id,parent_read_id,pod5_file", *(f"{a},{b},x.pod5" for a, b in parents.items())]
    path.write_text("\n".join(lines) + "\n")


def test_no_parent_read_crosses_splits_when_grouped_by_it(tmp_path):
    """Adversarial: parents of very different sizes, children spread over the files of a class."""
    data = write_classes(tmp_path / "caps", reads=60)
    rng = np.random.default_rng(3)
    parents = {}
    for cap_class in range(2):
        for number in range(2):
            for i in range(60):
                parent = f"parent{cap_class}-{int(rng.exponential(4))}"
                parents[read_id(cap_class, number, i)] = parent
    write_metadata(data / "metadata__all.csv", parents)
    for seed in range(3):
        by_parent = run(
            data,
            tmp_path / "out",
            split_params__group_by="parent_read",
            split_params__seed=seed,
        ).dataset
        found = {s: {parents[i] for i in ids} for s, ids in ids_of(by_parent).items()}
        assert all(found.values())
        assert not found["train"] & found["validation"]
        assert not found["train"] & found["test"]
        assert not found["validation"] & found["test"]
        for counts in by_parent.manifest["counts"].values():
            assert min(counts.values()) > 0
    by_read = ids_of(run(data, tmp_path / "read").dataset)
    assert {parents[i] for i in by_read["train"]} & {parents[i] for i in by_read["test"]}


def test_whole_runs_go_to_one_split_when_grouped_by_file(tmp_path):
    data = write_classes(tmp_path / "caps", runs=5, reads=12)
    dataset = run(data, tmp_path / "out", split_params__group_by="file").dataset
    stored = ids_of(dataset)
    for cap_class in range(2):
        homes = []
        for number in range(5):
            names = {read_id(cap_class, number, i) for i in range(12)}
            homes += [split for split, ids in stored.items() if ids & names]
        assert Counter(homes) == {"train": 3, "validation": 1, "test": 1}


def test_a_split_by_file_or_parent_that_cannot_be_is_an_error(tmp_path):
    data = write_classes(tmp_path / "caps", runs=3)
    (data / "data__cap_1_run1.csv").unlink()
    (data / "data__cap_1_run2.csv").unlink()
    with pytest.raises(InputError, match="class 1 has a single run"):
        run(data, tmp_path / "out", split_params__group_by="file")
    by_parent = {"split_params__group_by": "parent_read"}
    with pytest.raises(InputError, match=r"needs metadata__\*\.csv in .*caps, found none"):
        run(data, tmp_path / "out", **by_parent)
    known = {read_id(0, run_number, i): f"p{i}" for run_number in range(3) for i in range(20)}
    write_metadata(data / "metadata__cap_0.csv", known)
    with pytest.raises(InputError, match=r"gives no parent_read_id for 20 of 40 reads, such as"):
        run(data, tmp_path / "out", **by_parent)
    for parent in ("", "q" * 257):  # a name is 256 bytes at most
        write_metadata(data / "metadata__cap_1.csv", {read_id(1, 0, i): parent for i in range(20)})
        with pytest.raises(InputError, match=r"gives no parent_read_id for 20 of 40 reads"):
            run(data, tmp_path / "out", **by_parent)
    write_metadata(data / "metadata__cap_1.csv", {read_id(1, 0, i): f"q{i % 2}" for i in range(20)})
    with pytest.raises(InputError, match="class 1 has 2 parent reads; 3 or more"):
        run(data, tmp_path / "out", **by_parent)
    write_metadata(data / "metadata__more.csv", {read_id(1, 0, 3): "other"})
    with pytest.raises(InputError, match=f"read_id {read_id(1, 0, 3)} more than one parent"):
        run(data, tmp_path / "out", **by_parent)
    (data / "metadata__more.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"metadata__more\.csv: can't be read as CSV with the"):
        run(data, tmp_path / "out", **by_parent)
    assert debris(tmp_path / "out") == []


def test_a_separate_test_directory_is_the_test_set_whole(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1, reads=20)
    held_out = tmp_path / "new_run"
    write(held_out / "data__cap_0_run0.csv", rows(0, 7, 9))
    write(held_out / "data__cap_1_run0.csv", rows(1, 7, 4))
    overrides = {"split_params__test_caps_data_dir": str(held_out)}
    dataset = run(data, tmp_path / "out", etl_params__examples_per_class=16, **overrides).dataset
    assert dataset.manifest["counts"] == {
        "train": {"0": 12, "1": 12},
        "validation": {"0": 4, "1": 4},
        "test": {"0": 9, "1": 4},
    }
    names = {read_id(0, 7, i) for i in range(9)} | {read_id(1, 7, i) for i in range(4)}
    assert ids_of(dataset)["test"] == names
    assert [s["file"] for s in dataset.manifest["sources"] if s["is_test"]] == [
        "new_run/data__cap_0_run0.csv",
        "new_run/data__cap_1_run0.csv",
    ]
    write(held_out / "data__more.csv", [row(read_id(0, 0, 5), 0, [1.0])])
    with pytest.raises(InputError, match=f"1 reads are both in .* {read_id(0, 0, 5)}.*line 7"):
        run(data, tmp_path / "out", **overrides)
    (held_out / "data__cap_1_run0.csv").unlink()
    with pytest.raises(InputError, match=r"test_caps_data_dir=.*missing class 1"):
        run(data, tmp_path / "out", **overrides)


def test_a_parent_read_in_both_directories_is_an_error(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1, reads=20)
    held_out = tmp_path / "new_run"
    parents = {read_id(c, 0, i): f"p{c}{i % 5}" for c in range(2) for i in range(20)}
    for cap_class in range(2):
        write(held_out / f"data__cap_{cap_class}.csv", rows(cap_class, 7, 4))
        parents |= {read_id(cap_class, 7, i): f"p{cap_class}{i}" for i in range(4)}
    write_metadata(data / "metadata__all.csv", parents)
    overrides = {
        "split_params__test_caps_data_dir": str(held_out),
        "split_params__group_by": "parent_read",
    }
    shared = {name for name, parent in parents.items() if parent in ("p00", "p01", "p02", "p03")}
    shared |= {name for name, parent in parents.items() if parent in ("p10", "p11", "p12", "p13")}
    with pytest.raises(InputError, match=r"group_by=parent_read: the parent of read_id") as caught:
        run(data, tmp_path / "out", **overrides)
    named = re.search(r"read_id (\S+), in", str(caught.value))
    assert named is not None
    assert named[1] in shared & {read_id(c, 7, i) for c in range(2) for i in range(4)}


def test_a_class_with_too_few_reads_for_three_splits_is_an_error(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1, reads=3)
    with pytest.raises(InputError, match="class 0 gets 0 reads for training, 2 for validation and"):
        run(data, tmp_path / "out", shared_params__train_val_fraction=0.4)
    assert debris(tmp_path / "out") == []


def test_class_map_picks_and_renumbers(tmp_path):
    data = write_classes(tmp_path / "caps", classes=4, runs=1)
    dataset = run(data, tmp_path / "out", etl_params__class_map={"3": 0, "1": 1}).dataset
    labels = {
        name: label for reads in read_back(dataset).values() for name, (label, *_) in reads.items()
    }
    assert labels == {
        **{read_id(3, 0, i): 0 for i in range(20)},
        **{read_id(1, 0, i): 1 for i in range(20)},
    }
    facts = [(s["cap_class"], s["dataset_class"]) for s in dataset.manifest["sources"]]
    assert facts == [(1, 1), (3, 0)]


def test_what_was_written_is_checked_not_what_was_planned(tmp_path, monkeypatch):
    data = write_classes(tmp_path / "caps")
    write_shard, seen = records.write_shard, []

    def leaking(path, *, read_ids, **arrays):
        seen.append(read_ids[0])
        return write_shard(path, read_ids=np.array([seen[0], *read_ids[1:]]), **arrays)

    monkeypatch.setattr(records, "write_shard", leaking)
    with pytest.raises(StageFailedError, match="don't hold the reads planned"):
        run(data, tmp_path / "out")
    assert debris(tmp_path / "out") == []


# Bad rows

BAD_LINES = {
    "wrong field count": "{id},0",
    "not a number": '{id},0,"1,x"',
    "not finite": '{id},0,"1,nan"',
    "empty signal": '{id},0,""',
    "bad UTF-8": '{id}\udcff,0,"1"',
    "truncated line": '{id},0,"1,2',
    "class differs from file": '{id},1,"1"',
    "bad cap_class": '{id},one,"1"',
    "bad read_id": '{id} ,0,"1"',
}


def test_every_bad_row_is_counted_by_reason_and_listed(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1, reads=100)
    lines = rows(0, 0, 100)
    for number, line in enumerate(BAD_LINES.values()):
        for copy in range(number + 1):
            lines.insert(10 * number, line.format(id=f"bad{number}-{copy}"))
    lines[77:77] = [row(read_id(0, 0, 50), 0, [9.0]), row(read_id(1, 0, 0), 0, [9.0])]
    path = data / "data__cap_0_run0.csv"
    text = "\n".join([HEADER, *lines, ""])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    dataset = run(data, tmp_path / "out", etl_params__max_reject_fraction=0.5).dataset
    counts = {reason: number + 1 for number, reason in enumerate(BAD_LINES)}
    counts |= {"duplicate read_id": 1, "conflicting classes": 2}
    assert dataset.manifest["rejects"] == counts
    listed = rejects_of(dataset)
    assert Counter(reject["reason"] for reject in listed) == counts
    raw = path.read_bytes().split(b"\n")
    for reject in listed:
        where = (
            raw
            if reject["file"] == path.name
            else (data / reject["file"]).read_bytes().split(b"\n")
        )
        line = where[int(reject["line"]) - 1].decode("utf-8", "replace")
        assert reject["read_id"].replace("?", "") in line
    conflicts = [reject for reject in listed if reject["reason"] == "conflicting classes"]
    assert {reject["read_id"] for reject in conflicts} == {read_id(1, 0, 0)}
    assert {reject["file"] for reject in conflicts} == {path.name, "data__cap_1_run0.csv"}
    facts = dataset.manifest["sources"][0]
    assert facts["rows"] == len(lines)
    assert facts["good"] == len(lines) - sum(counts.values()) + 1
    stored = set().union(*ids_of(dataset).values())
    assert read_id(1, 0, 0) not in stored


def test_rejects_up_to_the_fraction_are_kept_and_one_more_stops_the_run(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1, reads=98)
    bad = [row(f"bad{i}", 0, "1,,2") for i in range(2)]
    path = write(data / "data__cap_0_run0.csv", [*rows(0, 0, 98), *bad])
    overrides = {"etl_params__max_reject_fraction": 0.02}
    assert run(data, tmp_path / "out", **overrides).dataset.manifest["rejects"] == {
        "not a number": 2
    }
    with pytest.raises(InputError) as caught:
        run(data, tmp_path / "strict")
    assert str(caught.value) == (
        f"{path}: 2 of 100 rows rejected (1.0% allowed), first at line 100, read_id bad0: not a "
        "number ('' in timeseries, expected numbers with commas between them). "
        "Correct the file or raise etl_params.max_reject_fraction."
    )
    assert debris(tmp_path / "strict") == []
    write(path, [*rows(0, 0, 98), *bad, row("bad2", 0, "")])
    with pytest.raises(InputError, match="3 of 101 rows rejected"):
        run(data, tmp_path / "out", **overrides)
    assert debris(tmp_path / "out") == ["1.0.0"]


def test_a_read_that_fails_to_parse_is_replaced_by_the_next_hash(tmp_path):
    """1.2.3 has only bytes that numbers have, so that pass two is the first to see it."""
    data = write_classes(tmp_path / "caps", runs=1, reads=60)
    whole = run(data, tmp_path / "out", etl_params__examples_per_class=20).dataset
    used = set().union(*ids_of(whole).values())
    lines = rows(0, 0, 60)
    broken = sorted(read_id(0, 0, i) for i in range(60) if read_id(0, 0, i) in used)[:3]
    spoiled = [row(line[:36], 0, "1,1.2.3") if line[:36] in broken else line for line in lines]
    write(data / "data__cap_0_run0.csv", spoiled)
    overrides = {
        "etl_params__examples_per_class": 20,
        "etl_params__max_reject_fraction": 0.1,
    }
    dataset = run(data, tmp_path / "spoiled", **overrides).dataset
    assert dataset.manifest["rejects"] == {"not a number": 3}
    assert sorted(reject["read_id"] for reject in rejects_of(dataset)) == broken
    again = set().union(*ids_of(dataset).values())
    assert len(again) == 40
    assert used - again == set(broken)
    # Just what a file without those rows would have given.
    write(data / "data__cap_0_run0.csv", [line for line in lines if line[:36] not in broken])
    without = run(data, tmp_path / "without", **overrides).dataset
    assert shard_digests(without) == shard_digests(dataset)
    write(data / "data__cap_0_run0.csv", spoiled)
    with pytest.raises(InputError, match="3 of 60 rows rejected"):
        run(data, tmp_path / "strict", etl_params__examples_per_class=20)
    assert debris(tmp_path / "strict") == []


def test_however_many_rows_fail_to_parse_a_few_rounds_find_enough_good_ones(tmp_path, monkeypatch):
    data = write_classes(tmp_path / "caps", reads=30)
    bad = [row(f"bad{number}", 0, "1.2.3") for number in range(3000)]
    write(data / "data__cap_0_run0.csv", rows(0, 0, 30) + bad)
    plans, make_plan = [], plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda *a, **k: plans.append(1) or make_plan(*a, **k))
    options = {"etl_params__examples_per_class": 20, "etl_params__max_reject_fraction": 1.0}
    dataset = run(data, tmp_path / "out", **options).dataset
    assert 3 < len(plans) < 25
    assert not any(name.startswith("bad") for ids in ids_of(dataset).values() for name in ids)
    assert {sum(counts.values()) for counts in dataset.manifest["counts"].values()} == {24, 8}
    assert dataset.manifest["rejects"] == {"not a number": len(rejects_of(dataset))}


def test_a_class_whose_rows_are_all_rejects_is_said_with_their_reasons(tmp_path):
    data = write_classes(tmp_path / "caps", runs=3)
    for path in data.glob("data__cap_0_*"):
        other = data / path.name.replace("cap_0", "cap_1")
        other.write_text(path.read_text().replace(",0,", ",1,"))
    parents = {read_id(0, n, i): f"p{n}{i}" for n in range(3) for i in range(20)}
    write_metadata(data / "metadata__all.csv", parents)
    for group_by in ("read", "file", "parent_read"):
        overrides = {"etl_params__max_reject_fraction": 1.0, "split_params__group_by": group_by}
        with pytest.raises(InputError, match=r"class 0, 1 has no good reads.*120 conflicting"):
            run(data, tmp_path / "out", **overrides)


def test_an_empty_parent_is_none(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1)
    parents = {read_id(c, 0, i): f"p{c}{i}" for c in range(2) for i in range(20)}
    write_metadata(data / "metadata__all.csv", {**parents, read_id(0, 0, 3): '""'})
    with pytest.raises(InputError, match="no parent_read_id for 1 of 40 reads"):
        run(data, tmp_path / "out", split_params__group_by="parent_read")


def test_endings_in_capitals_count(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1)
    (data / "data__cap_0_run0.csv").rename(data / "data__cap_0_run0.CSV")
    path = data / "data__cap_1_run0.csv"
    (data / "DATA.CSV.GZ").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert len(run(data, tmp_path / "out").dataset.manifest["sources"]) == 2


def test_a_number_beyond_float16_is_not_finite(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1)
    write(data / "data__cap_0_run0.csv", [*rows(0, 0, 20), row("big", 0, [70000.0])])
    small = run(data, tmp_path / "out", etl_params__max_reject_fraction=0.1).dataset
    assert small.manifest["rejects"] == {"not finite": 1}
    large = run(data, tmp_path / "out", shared_params__dtype="float32").dataset
    assert large.manifest["rejects"] == {}


def test_a_copied_file_is_said_to_be_duplicates(tmp_path):
    data = write_classes(tmp_path / "caps", runs=1)
    copy = data / "data__copy.csv"
    copy.write_bytes((data / "data__cap_1_run0.csv").read_bytes())
    with pytest.raises(InputError, match=r"20 of 20 rows rejected.*line 2.*duplicate read_id"):
        run(data, tmp_path / "out")


# Bad input


def no_directory(data):
    return data / "absent"


def directory_is_a_file(data):
    return data / "data__cap_0_run0.csv"


def empty_directory(data):
    (data / "nothing").mkdir()
    return data / "nothing"


def only_metadata(data):
    for path in data.glob("data__*"):
        path.rename(path.with_name(f"metadata__{path.name}"))


def empty_file(data):
    (data / "data__x.csv").touch()


def header_only(data):
    (data / "data__x.csv").write_text(HEADER + "\n")


def wrong_header(data):
    (data / "data__x.csv").write_text("read_id,timeseries\n")


def nothing_good(data):
    (data / "data__x.csv").write_text(f"{HEADER}\nr1,0,nan\nr2,0,nan\n")


def labels_with_a_fraction(data):
    write(data / "data__x.csv", [row("r1", "1.0", "1,2"), row("r2", "1.0", "1,2")])


def two_classes_in_a_file(data):
    for path in data.iterdir():
        path.unlink()
    write(data / "all.csv", [*rows(0, 0, 5), *rows(1, 0, 5)])


def missing_class(data):
    (data / "data__cap_1_run0.csv").unlink()
    (data / "data__cap_1_run1.csv").unlink()


def surplus_class(data):
    write(data / "data__x.csv", rows(5, 0, 3))


def not_gzip(data):
    (data / "data__x.csv.gz").write_text(HEADER)


BAD_INPUT = {
    no_directory: "caps_data_dir=.*absent: no such directory, and no dataset version",
    directory_is_a_file: "caps_data_dir=.*not a directory",
    empty_directory: r"no \*\.csv or \*\.csv\.gz file there",
    only_metadata: r"no \*\.csv or \*\.csv\.gz file there",
    empty_file: r"data__x\.csv: is empty",
    header_only: r"data__x\.csv: has a header but no rows",
    wrong_header: r"data__x\.csv, line 1: found 'read_id,timeseries'",
    nothing_good: r"data__x\.csv: no row can be used, first at line 2, read_id 'r1': not finite "
    r"\('nan' in timeseries\)\. Correct",
    labels_with_a_fraction: r"first at line 2, read_id 'r1': bad cap_class '1\.0', expected a "
    "whole number from 0 to 999999999. Correct",
    two_classes_in_a_file: r"missing class 1,.*all\.csv: 0\. A file holds one class, that of its "
    "first good row",
    missing_class: "missing class 1, expected exactly 0 to 1.*data__cap_0_run0.csv: 0",
    surplus_class: "surplus class 5, expected exactly 0 to 1.*data__x.csv: 5",
    not_gzip: r"data__x\.csv\.gz: can't be decompressed",
}


@pytest.mark.parametrize("spoil", BAD_INPUT, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, spoil):
    data = write_classes(tmp_path / "caps")
    data = spoil(data) or data
    with pytest.raises(InputError, match=BAD_INPUT[spoil]) as caught:
        run(data, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert debris(tmp_path / "out") == []


def test_hidden_and_other_files_are_ignored(tmp_path):
    data = write_classes(tmp_path / "caps")
    for name in (".hidden.csv", "metadata__x.csv", "notes.txt", "data.csv.bak"):
        (data / name).write_text("anything")
    (data / "folder.csv").mkdir()
    assert len(run(data, tmp_path / "out").dataset.manifest["sources"]) == 4


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    data = write_classes(tmp_path / "caps")
    target, parse = data / "data__cap_1_run1.csv", shuffle.parse_rows

    def disturb(*arguments, **named):
        target.write_bytes(target.read_bytes()[:500])
        return parse(*arguments, **named)

    monkeypatch.setattr(shuffle, "parse_rows", disturb)
    with pytest.raises(InputError, match=r"data__cap_1_run1\.csv: changed while it was read"):
        run(data, tmp_path / "out")
    assert debris(tmp_path / "out") == []


@pytest.mark.parametrize("where", ["scan", "parse", "write"])
def test_an_interrupt_leaves_nothing_and_the_rerun_is_undisturbed(tmp_path, monkeypatch, where):
    data = write_classes(tmp_path / "caps")
    undisturbed = run(data, tmp_path / "other").dataset

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = {
            "scan": "capfinder.etl.csv_reader.scan_block",
            "parse": "capfinder.etl.shuffle.parse_signals",
            "write": "capfinder.data.records.write_metadata",
        }[where]
        patch.setattr(target, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "out")
    assert debris(tmp_path / "out") == []
    assert shard_digests(run(data, tmp_path / "out").dataset) == shard_digests(undisturbed)


# Versions


def test_the_same_content_and_settings_are_reused_and_say_why(tmp_path, caplog):
    data = write_classes(tmp_path / "caps")
    first = run(data, tmp_path / "out")
    again = run(data, tmp_path / "out")
    assert (first.reused, again.reused) == (False, True)
    assert again.dataset == first.dataset
    assert "same content and settings" in again.why
    for number, path in enumerate(sorted(data.glob("*.csv"))):  # other names, other times
        path.rename(data / f"x{9 - number}.csv")
    assert run(data, tmp_path / "out").dataset == first.dataset


def test_a_rerun_reads_no_csv_and_a_touched_index_only_costs_time(tmp_path, monkeypatch):
    data = write_classes(tmp_path / "caps")
    first = run(data, tmp_path / "out").dataset

    def forbidden(*_, **__):
        raise AssertionError("the files were read")

    with monkeypatch.context() as patch:
        patch.setattr(scan, "scan_sources", forbidden)
        assert run(data, tmp_path / "out").dataset == first
        index = tmp_path / "out" / "dataset" / "sources.json"
        for content in ("{", "[]", '{"a": 1}'):
            index.write_text(content)
            assert run(data, tmp_path / "out").dataset == first
        patch.setattr(files, "sha256_file", forbidden)
        assert run(data, tmp_path / "out").dataset == first


CHANGES = {
    "etl_params__examples_per_class": 30,
    "etl_params__max_reject_fraction": 0.5,
    "etl_params__class_map": {"0": 1, "1": 0},
    "shared_params__target_length": 30,
    "shared_params__dtype": "float32",
    "shared_params__train_test_fraction": 0.7,
    "shared_params__train_val_fraction": 0.5,
    "split_params__keep_all": True,
    "split_params__group_by": "file",
    "split_params__seed": 7,
    "tune_params__seed": 7,
}


def test_each_setting_that_matters_makes_a_version_of_its_own(tmp_path):
    data = write_classes(tmp_path / "caps", runs=3)
    write(data / "data__cap_1_more.csv", rows(1, 3, 5))
    base = run(data, tmp_path / "out").dataset
    assert base.version == "1.0.0"
    seen = {base.fingerprint}
    for number, (key, value) in enumerate(CHANGES.items(), start=1):
        result = run(data, tmp_path / "out", **{key: value})
        if key == "tune_params__seed":
            assert result.reused  # the same seed as split_params.seed gave
            continue
        assert result.dataset.version == f"1.{number}.0"
        seen.add(result.dataset.fingerprint)
        if key != "etl_params__max_reject_fraction":
            assert shard_digests(result.dataset) != shard_digests(base)
    assert len(seen) == len(CHANGES)
    with (data / "data__cap_0_run0.csv").open("a") as stream:
        stream.write(row("new", 0, [1.0]) + "\n")
    changed = run(data, tmp_path / "out")
    assert changed.dataset.version == f"1.{len(CHANGES)}.0"
    assert run(data, tmp_path / "out").reused


def test_a_named_version_is_used_whatever_the_data_and_must_fit(tmp_path):
    data = write_classes(tmp_path / "caps")
    out = tmp_path / "out"
    run(data, out)
    run(data, out, split_params__seed=1)
    wanted = {"etl_params__use_remote_dataset_version": "1.0.0"}
    for directory in (data, tmp_path / "absent"):
        result = run(directory, out, **wanted)
        assert (result.dataset.version, result.reused) == ("1.0.0", True)
        assert "asked for" in result.why
    with pytest.raises(InputError, match=r"has dtype float16, but shared_params\.dtype=float64"):
        run(data, out, shared_params__dtype="float64", **wanted)
    with pytest.raises(
        SettingsError, match=r"1\.7\.0: no such version .*1\.0\.0, 1\.1\.0.*COMET_API_KEY"
    ):
        run(data, out, etl_params__use_remote_dataset_version="1.7.0")


@pytest.mark.parametrize("wanted", ["", "latest"])
def test_without_data_the_newest_local_version_is_used_and_said(tmp_path, wanted, caplog):
    data = write_classes(tmp_path / "caps")
    out = tmp_path / "out"
    run(data, out)
    newest = run(data, out, split_params__seed=1)
    overrides = {"etl_params__use_remote_dataset_version": wanted}
    with caplog.at_level(logging.WARNING, "capfinder"):
        result = run(tmp_path / "absent", out, **overrides)
    assert (result.dataset, result.reused) == (newest.dataset, True)
    assert re.search("newest local version.*absent doesn't exist", result.why)
    assert "absent doesn't exist" in caplog.text
    with pytest.raises(InputError, match="no such directory, and no dataset version"):
        run(tmp_path / "absent", tmp_path / "empty", **overrides)


def test_what_a_killed_run_left_is_removed_when_nobody_else_holds_the_lock(tmp_path, caplog):
    data = write_classes(tmp_path / "caps")
    out = tmp_path / "out"
    left = out / "dataset" / "cap_data" / f"{files.PARTIAL}1.0.0-99999"
    left.mkdir(parents=True)
    (left / "shard").touch()
    with (
        ThreadPoolExecutor(1) as other,
        caplog.at_level(logging.INFO, "capfinder"),
        files.exclusive_lock(out / "dataset" / ".lock", holder="a test"),
    ):
        waits = other.submit(run, data, out)
        while "Waiting for a test" not in caplog.text:
            assert not waits.done()
            time.sleep(0.01)
        assert left.exists()
    waits.result()
    assert debris(out) == ["1.0.0"]


def test_a_damaged_version_is_not_reused(tmp_path):
    data = write_classes(tmp_path / "caps")
    first = run(data, tmp_path / "out").dataset
    next(first.directory.glob("*.tfrecord-*")).unlink()
    second = run(data, tmp_path / "out")
    assert (second.reused, second.dataset.version) == (False, "1.1.0")


SQUIGGLES = Path(__file__).parents[2] / "shared" / "data" / "squiggles"


@pytest.mark.skipif(not SQUIGGLES.is_dir(), reason="the real squiggles aren't part of the project")
@pytest.mark.parametrize("group_by", ["read", "parent_read"])
def test_real_squiggles_go_through(tmp_path, group_by):
    dataset = run(SQUIGGLES, tmp_path / "out", split_params__group_by=group_by).dataset
    assert dataset.manifest["rejects"] == {}
    assert all(min(counts.values()) > 0 for counts in dataset.manifest["counts"].values())


def test_simulated_input_is_said_in_the_manifest(tmp_path):
    (real, other) = simulate.run(
        output_dir=tmp_path / "caps",
        reads_per_class=12,
        num_classes=2,
        runs_per_class=1,
        effect=1.0,
        seed=1,
    )
    simulated = run(real.parent, tmp_path / "out")
    assert any("SIMULATED" in text for text in simulated.dataset.manifest["warnings"])
    (real.parent / "README.txt").unlink()
    warnings = run(other.parent, tmp_path / "other").dataset.manifest["warnings"]
    assert not any("SIMULATED" in text for text in warnings)
