"""The ETL on Apache Beam gives the dataset that this machine gives, byte for byte."""

import gzip
import hashlib
import importlib.util
import io
import itertools
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from csv_input import read_id, row, rows, write
from hypothesis import given
from hypothesis import strategies as st

from capfinder import files, settings
from capfinder.errors import InputError, SettingsError, StageFailedError
from capfinder.etl import csv_files, plan
from capfinder.etl.beam import exchange, options, parts, ranges
from capfinder.etl.beam.engine import BeamEngine
from capfinder.etl.beam.exchange import Exchange, WorkerFile
from capfinder.etl.csv_reader import scan_block
from capfinder.stages import etl

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is an extra"
)
ROWS = 500  # of each of four files


def make_config(data_dir, output_dir, **overrides):
    """Settings for small data; `a__b=v` sets a.b."""
    values = {
        "etl_params.caps_data_dir": str(data_dir),
        "etl_params.examples_per_class": 700,
        "etl_params.max_reject_fraction": 0.05,
        "shared_params.output_dir": str(output_dir),
        "shared_params.num_classes": 2,
        "shared_params.target_length": 24,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return settings.checked(settings.default_config(), values)


def build(data_dir, output_dir, **overrides):
    result = etl.run(make_config(data_dir, output_dir, **overrides))
    assert not result.reused
    return result.dataset.directory


def build_on_beam(data_dir, output_dir, *flags, **overrides):
    beam = {"etl_params__engine": "beam", "etl_params__beam_options": list(flags)}
    return build(data_dir, output_dir, **beam, **overrides)


@pytest.fixture(scope="module")
def caps(tmp_path_factory):
    """2,000 good rows in four files, one of them compressed; among them rows of every bad kind."""
    data = tmp_path_factory.mktemp("beam") / "caps"
    parents = []
    for cap_class in range(2):
        for number in range(2):
            lines = rows(cap_class, number, ROWS)
            parents += [
                (read_id(cap_class, number, i), f"{cap_class}-{i // 3}") for i in range(ROWS)
            ]
            lines[40:40] = [
                "",
                row("bad", cap_class, "1,nan"),
                "no,row",
                row("b", 1 - cap_class, [1]),
            ]
            lines.insert(90, row(read_id(cap_class, number, 7), cap_class, [0.5]))  # duplicates
            lines.append(row(read_id(cap_class, 1 - number, 9), cap_class, [0.25]))
            # Beyond float16: found when it is parsed, so others take their places.
            for at in (100, 101, 300):
                lines[at] = row(lines[at].split(",")[0], cap_class, "1.5,70000")
            lines[200] = row(read_id(0, 0, 0), cap_class, [0.125])  # in both classes
            path = write(data / f"data__cap_{cap_class}_run{number}.csv", lines)
            if number:
                path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    text = "".join(f"{read},{parent}\n" for read, parent in parents)
    (data / "metadata__all.csv").write_text("read_id,parent_read_id\n" + text)
    return data


def content(version: Path):
    """All that a version is, but for when it was made."""
    manifest = files.read_json(version / "manifest.json")
    manifest.pop("created")
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in version.iterdir()
        if path.name != "manifest.json"
    }
    return manifest, digests


@pytest.fixture(scope="module")
def expected(caps, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", 20_000)
        made = {
            group_by: content(
                build(caps, tmp_path_factory.mktemp("local"), split_params__group_by=group_by)
            )
            for group_by in ("read", "parent_read")
        }
    manifest, digests = made["read"]
    assert set(manifest["rejects"]) == {
        "class differs from file",
        "conflicting classes",
        "duplicate read_id",
        "not finite",
        "wrong field count",
    }
    assert manifest["rejects"]["not finite"] > 4  # the rows with nan, and some found in pass two
    assert sum("tfrecord" in name for name in digests) > 6
    return made


@pytest.fixture
def small_pieces(monkeypatch):
    """Many ranges, parts and shards, as large inputs have."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 15_000)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 4_000)
    monkeypatch.setattr(parts, "GROUP_BYTES", 3_000)
    monkeypatch.setattr("capfinder.etl.scan.READS_PER_PART", 300)
    monkeypatch.setattr("capfinder.etl.scan.LINES_PER_SEGMENT", 100)
    monkeypatch.setattr(plan, "SHARD_BYTES", 20_000)


def left_over(output_dir: Path):
    return sorted(path.name for path in (output_dir / "dataset" / "cap_data").iterdir())


@needs_beam
@pytest.mark.parametrize("group_by", ["read", "parent_read"])
def test_beam_builds_the_dataset_that_this_machine_builds(
    caps, expected, small_pieces, tmp_path, group_by
):
    version = build_on_beam(caps, tmp_path, split_params__group_by=group_by)
    assert content(version) == expected[group_by]
    assert left_over(tmp_path) == ["1.0.0"]


@needs_beam
def test_workers_of_their_own_processes_give_the_same(caps, monkeypatch, tmp_path):
    """All that the workers need travels with the tasks; ranges have their real size here."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    flags = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
    dtype = {"shared_params__dtype": "float32"}
    here, there = (
        build(caps, tmp_path / "a", **dtype),
        build_on_beam(caps, tmp_path / "b", *flags, **dtype),
    )
    assert content(there) == content(here)


def elsewhere(root: Path) -> list[str]:
    """Gives Beam a file system of its own, elsewhere://, that only Beam can reach; what is read
    there is in the list."""
    from apache_beam.io.localfilesystem import LocalFileSystem

    opened = []

    def inner(path):
        return str(root / path.removeprefix("elsewhere://"))

    class Elsewhere(LocalFileSystem):
        @classmethod
        def scheme(cls):
            return "elsewhere"

        def create(self, path, *args, **kwargs):
            return super().create(inner(path), *args, **kwargs)

        def open(self, path, *args, **kwargs):
            opened.append(path)
            return super().open(inner(path), *args, **kwargs)

        def exists(self, path):
            return super().exists(inner(path))

        def rename(self, sources, targets):
            return super().rename(list(map(inner, sources)), list(map(inner, targets)))

        def delete(self, paths):
            return super().delete([inner(path).rstrip("/") for path in paths])

    elsewhere.kept = Elsewhere  # Beam finds it among the subclasses while it lives
    return opened


@needs_beam
def test_workers_may_know_the_files_by_other_names(caps, expected, small_pieces, tmp_path):
    """As on Dataflow: the data and the exchange are in a bucket, mounted on this machine alone."""
    opened = elsewhere(tmp_path)
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "caps").symlink_to(caps)
    flags = (
        f"--worker_path={caps}=elsewhere://bucket/caps",
        "--exchange_dir=elsewhere://bucket/exchange",
    )
    version = build_on_beam(caps, tmp_path / "out", *flags)
    assert content(version) == expected["read"]
    assert {f"elsewhere://bucket/caps/{path.name}" for path in caps.glob("data*")} <= set(opened)
    assert [path for path in (tmp_path / "bucket" / "exchange").rglob("*") if path.is_file()] == []


@needs_beam
def test_what_a_killed_run_left_in_the_exchange_is_cleared_by_the_next(tmp_path):
    flags, scratch = [f"--exchange_dir={tmp_path}/exchange"], tmp_path / "cap_data" / "scratch"
    killed = BeamEngine(flags, scratch)
    with killed._exchange.put("scan") as stream:
        stream.write(b"left")
    other = BeamEngine(flags, tmp_path / "another output" / "scratch")
    with BeamEngine(flags, scratch) as again:
        assert not killed._exchange.has("scan")
        assert again._exchange != killed._exchange != other._exchange
        with again._exchange.put("scan") as stream:
            stream.write(b"new")
        assert again._exchange.has("scan")
    assert not again._exchange.has("scan")


@needs_beam
def test_what_the_workers_find_wrong_is_one_line(caps, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in caps.iterdir():
        (other / path.name).write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match=rf"{caps}.*, but a Beam worker finds .* in {other}"):
        build_on_beam(caps, tmp_path / "out", f"--worker_path={caps}={other}")
    packed = next(other.glob("*.csv.gz"))
    for path in caps.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"^{packed}: can't be decompressed .*\.$"):
        build_on_beam(other, tmp_path / "out")
    assert left_over(tmp_path / "out") == []


@needs_beam
def test_a_pipeline_that_fails_is_one_line_and_leaves_nothing(caps, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(ranges, "scan", broken)
    with pytest.raises(StageFailedError) as caught:
        build_on_beam(caps, tmp_path)
    assert re.fullmatch(
        r"Scanning CSV files on Beam: DirectRunner failed: .*luck.*", str(caught.value)
    )
    assert left_over(tmp_path) == []


@needs_beam
def test_ctrl_c_ends_the_workers_too_and_leaves_nothing(caps, tmp_path, monkeypatch):
    started, real_scan = threading.Event(), ranges.scan

    def slow(*args, **kwargs):
        started.set()
        time.sleep(0.1)
        return real_scan(*args, **kwargs)

    def press_ctrl_c():
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ranges, "scan", slow)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1_000)  # some 30 s of work
    user = threading.Thread(target=press_ctrl_c)
    user.start()
    with pytest.raises(KeyboardInterrupt):
        build_on_beam(caps, tmp_path)
    user.join()
    for thread in threading.enumerate():
        if thread.name == "beam":
            thread.join(5)
            assert not thread.is_alive()
    assert left_over(tmp_path) == []


@needs_beam
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runner=NoSuchRunner"], "NoSuchRunner"),
        (["--worker_path=/data"], "--worker_path=/data: must be /directory/here="),
        (["--worker_path=data=gs://b"], "must be /directory/here="),
        (["--exchange_dir"], "expected one argument"),
        (["--direct_num_workers=many"], "direct_num_workers"),
    ],
)
def test_options_that_cannot_be_are_one_line(caps, tmp_path, flags, message):
    with pytest.raises(SettingsError, match=message) as caught:
        build_on_beam(caps, tmp_path, *flags)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("etl_params.beam_options: ")


def test_without_beam_the_error_says_what_to_install(caps, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(SettingsError, match=r"pip install '\.\[beam\]'"):
        build_on_beam(caps, tmp_path)
    with pytest.raises(SettingsError, match=r"only for etl_params\.engine=beam"):
        make_config(caps, tmp_path, etl_params__beam_options=["--runner=DirectRunner"])
    with pytest.raises(SettingsError, match="a list of options such as"):
        make_config(caps, tmp_path, etl_params__engine="beam", etl_params__beam_options=["runner"])


def test_a_path_gets_the_name_that_the_workers_know_it_by():
    parsed = options.BeamOptions("R", (), None, (("/data", "gs://a/b"), ("/runs", "/mnt/runs")))
    assert parsed.for_workers(Path("/data/caps/x.csv")) == "gs://a/b/caps/x.csv"
    assert parsed.for_workers(Path("/data")) == "gs://a/b"
    assert parsed.for_workers(Path("/database/x.csv")) == "/database/x.csv"
    assert parsed.for_workers(Path("/runs/one")) == "/mnt/runs/one"


# Tasks by themselves


LINES = st.lists(
    st.one_of(
        st.integers(0, 30).map(lambda n: f'read{n},0,"1.5,-2"'.encode()),
        st.just(b""),
        st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"")),
        st.integers(30, 70).map(lambda n: b"r,0," + b"1" * n),
    ),
    max_size=20,
)


@given(LINES, st.booleans(), st.integers(3, 64), st.integers(1, 90))
def test_ranges_give_every_line_once_whatever_their_size(lines, is_ended, block_bytes, range_bytes):
    text = csv_files.HEADER + b"\r\n" + b"\n".join(lines) + (b"\n" if is_ended else b"")

    def scanned(start, end):
        stream = ranges.LineRange(io.BytesIO(text), start, end)
        if start == 0:
            stream.readline(csv_files.HEAD_BYTES)
        found = []
        line = 2 if start == 0 else 1
        for block in csv_files.whole_lines(stream, block_bytes, offset=stream.position, line=line):
            good, rejects, count = scan_block(block, cap_class=0)
            found.append((good, rejects, count))
            assert text[block.offset :].startswith(block.data)
        return found, stream.ended

    def summary(pieces):
        """Good rows and rejects with their lines in the file; rows counted."""
        good, bad, count, before = [], [], 0, 0
        for found, ended in pieces:
            for rows_, rejects, number in found:
                columns = (rows_.line + before, rows_.begin, rows_.start, rows_.end)
                ids = rows_.read_id.tolist()
                good += list(zip(*(column.tolist() for column in columns), ids, strict=True))
                bad += [each._replace(line=each.line + before) for each in rejects]
                count += number
            before += ended
        return good, bad, count

    bounds = list(range(0, len(text), range_bytes))
    pieces = [scanned(start, start + range_bytes) for start in bounds]
    assert summary(pieces) == summary([scanned(0, len(text))])
    assert sum(ended for _, ended in pieces) == text.count(b"\n")


def test_a_file_is_cut_into_ranges_that_follow_each_other(monkeypatch):
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10)
    assert ranges.ranges(25, is_packed=False) == [(0, 10), (10, 20), (20, 25)]
    assert ranges.ranges(20, is_packed=False) == [(0, 10), (10, 20)]
    assert ranges.ranges(25, is_packed=True) == [(0, 25)]
    assert ranges.ranges(7, is_packed=False) == [(0, 7)]


@needs_beam
def test_lines_longer_than_a_row_may_be_are_skipped_over_range_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "MAX_ROW_BYTES", 5_000)
    monkeypatch.setattr("capfinder.etl.csv_reader.MAX_ROW_BYTES", 5_000)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 1_000)
    lines = [row("a", 0, [1.0]), row("long", 0, "1," * 9_000 + "1"), row("b", 0, [2.0])]
    path = write(tmp_path / "x.csv", lines)
    size = path.stat().st_size
    text = WorkerFile(str(path), str(path), size)

    def scanned(bounds):
        good, bad, before = [], [], 0
        for start, end in bounds:
            *blocks, last = ranges.ScanRange("", 0, text, 0, 1, start, end).findings()
            for block in (ranges.shift(block, before) for block in blocks):
                good += block.records[["line", "begin"]].tolist()
                bad += block.rejects
            before += last.lines
        return good, bad

    whole = scanned([(0, size)])
    assert [reject.reason for reject in whole[1]] == ["line too long"]
    for range_bytes in (500, 4_000, 17_000):
        starts = [*range(0, size, range_bytes), size]
        assert scanned(list(itertools.pairwise(starts))) == whole


@needs_beam
def test_work_done_twice_or_broken_off_leaves_one_whole_file(tmp_path):
    place = Exchange(str(tmp_path / "x"), str(tmp_path / "x"))
    place.set_open()
    with pytest.raises(OSError, match="lost"), place.put("a") as stream:
        stream.write(b"half")
        raise OSError("lost")
    assert not place.has("a")
    for _ in range(2):
        exchange.record(place, "a", iter([1, "two"]))
    assert list(exchange.findings(place, "a")) == [1, "two"]
    assert sorted(os.listdir(tmp_path / "x")) == ["a", "open"]

    def spoilt():
        yield 1
        raise InputError("file.csv: damaged")

    exchange.record(place, "b", spoilt())
    found = exchange.findings(place, "b")
    assert next(found) == 1
    with pytest.raises(InputError, match=r"file\.csv: damaged"):
        next(found)
    with pytest.raises(StageFailedError, match="left no result"):
        list(exchange.findings(place, "c"))
    place.fetch("a", tmp_path / "home")
    assert not place.has("a")
    place.remove()
    assert not (tmp_path / "x").exists()


@needs_beam
@pytest.mark.parametrize("blocks", [0, 1, 500])
def test_a_worker_stops_when_the_exchange_is_closed(tmp_path, blocks):
    """Before it starts, or soon after: a killed run's workers don't go on for hours."""
    place, done = Exchange(str(tmp_path / "x"), str(tmp_path / "x")), []
    if blocks:
        place.set_open()

    def work():
        for number in range(10_000):
            if number == blocks:
                place.remove()
            done.append(number)
            yield number

    with pytest.raises(exchange.ClosedError, match="--exchange_dir"):
        exchange.record(place, "a", work())
    assert blocks <= len(done) <= (blocks + exchange.BLOCKS_PER_LOOK if blocks else 0)
    assert not place.has("a")


@needs_beam
def test_a_bundle_tried_again_writes_the_same_shard(tmp_path):
    place = Exchange(str(tmp_path), str(tmp_path))
    place.set_open()
    form = parts.Form(id_bytes=3, target_length=4, dtype="float16")
    found = np.zeros(5, form.row)
    found["place"], found["read_id"] = [3, 0, 1, 4, 2], [b"d", b"a", b"b", b"e", b"c"]
    write_shard = parts.WriteShard(place, form, (plan.Shard("train", 0, 1, 5),))
    write_shard((0, iter([found[:2].tobytes(), found[2:].tobytes()])))
    (first,) = exchange.findings(place, parts.result_name(0))
    kept = (tmp_path / first.name).read_bytes()
    (tmp_path / parts.result_name(0)).unlink()  # as if the worker had died just before
    write_shard((0, iter([found[3:].tobytes(), found[:3].tobytes()])))
    assert (tmp_path / first.name).read_bytes() == kept
    assert sorted(os.listdir(tmp_path)) == sorted([first.name, "open", parts.result_name(0)])
    assert hashlib.sha256(kept).hexdigest() == first.file.sha256
    write_shard((0, iter([])))  # done: nothing is read or written
