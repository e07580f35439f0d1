"""`capfinder predict` that is stopped, killed, run twice, or run again."""

import contextlib
import csv
import fcntl
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import predicting
import pytest
from csv_input import row, rows, write
from predicting import CLASSES, Ended, evaluate, predict, trained_run

from capfinder.etl.csv_files import read_blocks
from capfinder.evaluation import predictions
from capfinder.prediction import reads, scoring
from capfinder.prediction.unfinished import Unfinished

RESULTS = ("predictions.csv", "rejects.csv", "composition.json")
FIGURES = ("metrics.json", "confusion_matrix.csv")
PROCESS = Path(__file__).with_name("predict_process.py")


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with predicting.surroundings(tmp_path_factory) as root:
        yield root


@pytest.fixture(scope="module")
def run_dir(surroundings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory)[1]


def make_input(directory: Path, reads_each: int) -> Path:
    """Files of each class, one gzipped, one of metadata; a tenth of the rows can't be used."""
    for number in range(CLASSES):
        lines = rows(number, 7, reads_each)
        lines[::10] = [row(f"bad-{number}-{k}", number, "1.0,x") for k in range(len(lines[::10]))]
        write(directory / f"data_{number}.csv", lines)
    packed = directory / "data_1.csv"
    packed.with_suffix(".csv.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    parents = [f"{line.split(',')[0]},parent of {k},x.pod5" for k, line in enumerate(rows(0, 7, 9))]
    text = "\r\n".join(["read_id,parent_read_id,pod5_file", *parents])
    (directory / "metadata__x.csv").write_text(text)
    return directory


@pytest.fixture(scope="module")
def caps(surroundings: Path) -> Path:
    return make_input(surroundings / "stops", 120)


@pytest.fixture(scope="module")
def undisturbed(run_dir: Path, caps: Path, surroundings: Path) -> dict[str, bytes]:
    ended = predict(run_dir, caps, surroundings / "undisturbed", "--batch_size", 50)
    assert ended.code == 0, ended.shown
    assert len(ended.lines) == 1 + 3 * 108 and len(ended.rejects) == 36
    return contents(ended.output_dir, RESULTS)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some fifty blocks, and a note of where it is after each."""
    monkeypatch.setattr(reads, "BLOCK_BYTES", 1 << 11)
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)


def contents(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    assert not (directory / ".unfinished").exists()
    return {name: (directory / name).read_bytes() for name in names}


class Killed(BaseException):
    """Nothing handles it, as nothing handles a kill."""


def stop_at(patch: pytest.MonkeyPatch, call: int, *, how: BaseException | int) -> list[int]:
    """At that one of the calls that change a file: raises, or sends the signal to this process.
    Returns a list of one number, that of the calls so far."""
    count = [0]

    def counted(function):
        def wrapper(*given, **more):
            count[0] += 1
            if count[0] == call and isinstance(how, int):
                signal.raise_signal(how)
            elif count[0] == call:
                raise how
            return function(*given, **more)

        return wrapper

    patch.setattr(Unfinished, "write", counted(Unfinished.write))
    patch.setattr(Unfinished, "append", counted(Unfinished.append))
    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(Path, "replace", counted(Path.replace))
    return count


def begun(
    run_dir: Path, caps: Path, output_dir: Path, call: int, how: BaseException | int
) -> Ended:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, call, how=how)
        return predict(run_dir, caps, output_dir, "--batch_size", 50)


# Stopped


@pytest.mark.usefixtures("small_blocks")
def test_ctrl_c_stops_it_and_the_same_command_goes_on_from_there(
    run_dir, caps, undisturbed, tmp_path
):
    ended = begun(run_dir, caps, tmp_path, 100, signal.SIGINT)
    assert ended.code == 130
    assert "Ctrl-C: stopping" in ended.shown
    assert "% of the input; the same command goes on from there" in ended.shown
    assert not list(tmp_path.glob("*.csv"))
    done = int(ended.shown.split("stopped after ")[1].split(" ")[0])
    assert 0 < done < 3 * 108
    ended = predict(run_dir, caps, tmp_path, "--batch_size", 50)
    assert ended.code == 0, ended.shown
    assert f"Going on where a stopped run was: {done} reads" in ended.shown
    assert f"{3 * 108 - done} reads in" in ended.shown
    assert contents(tmp_path, RESULTS) == undisturbed


def test_what_is_done_is_not_done_again(run_dir, caps, tmp_path, monkeypatch):
    monkeypatch.setattr(reads, "BLOCK_BYTES", 1 << 11)
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)
    written: list[bytes] = []
    lines = predictions.lines

    def noted(*given):
        written.append(lines(*given))
        return written[-1]

    monkeypatch.setattr(predictions, "lines", noted)
    assert begun(run_dir, caps, tmp_path, 150, signal.SIGINT).code == 130
    assert written
    assert predict(run_dir, caps, tmp_path, "--batch_size", 50).code == 0
    header = (tmp_path / "predictions.csv").read_bytes().partition(b"\n")[0] + b"\n"
    assert header + b"".join(written) == (tmp_path / "predictions.csv").read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_whenever_it_breaks_off_a_rerun_makes_the_very_same_files(
    run_dir, caps, undisturbed, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        count = stop_at(patch, 10**9, how=0)
        assert predict(run_dir, caps, tmp_path / "all", "--batch_size", 50).code == 0
    assert contents(tmp_path / "all", RESULTS) == undisturbed
    (total,) = count
    # At random moments, and at the last ones, when files get their names.
    calls = [*random.Random(1).sample(range(1, total - 8), 2), total - 8, total - 3, total]
    for call in calls:
        output_dir = tmp_path / str(call)
        with pytest.raises(Killed):
            begun(run_dir, caps, output_dir, call, Killed())
        with contextlib.suppress(Killed):  # a second time, soon after, if there is much to do
            begun(run_dir, caps, output_dir, 5, Killed())
        ended = predict(run_dir, caps, output_dir, "--batch_size", 50)
        assert ended.code == 0, ended.shown
        assert contents(output_dir, RESULTS) == undisturbed, call
        assert "anew" not in ended.shown


def test_a_process_that_is_ended_or_killed_goes_on_where_it_was(run_dir, surroundings, tmp_path):
    caps = make_input(surroundings / "killed", 6000)
    assert predict(run_dir, caps, tmp_path / "whole").code == 0
    output_dir = tmp_path / "killed"
    ended, said = stopped_process(run_dir, caps, output_dir, signal.SIGTERM)
    assert ended == 143 and "the same command goes on from there" in said
    ended, said = stopped_process(run_dir, caps, output_dir, signal.SIGKILL)
    assert ended == -signal.SIGKILL and "Going on where a stopped run was" in said
    assert not list(output_dir.glob("*.csv"))
    last = predict(run_dir, caps, output_dir)
    assert last.code == 0 and "Going on where a stopped run was" in last.shown, last.shown
    assert contents(output_dir, RESULTS) == contents(tmp_path / "whole", RESULTS)


def stopped_process(run_dir: Path, caps: Path, output_dir: Path, how: int) -> tuple[int, str]:
    """Gets the signal at a random moment after it has first noted where it is."""
    state = output_dir / ".unfinished" / "state.json"
    seen = state.read_bytes() if state.exists() else b""
    given = ["predict", "-m", run_dir, "-c", caps, "-o", output_dir]
    said = output_dir.with_name("said.txt")
    with said.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, PROCESS, *map(str, given)], stdout=stream, stderr=stream
        )
    try:
        while process.poll() is None and not (state.exists() and state.read_bytes() != seen):
            time.sleep(0.005)
        time.sleep(random.Random(how).uniform(0, 0.2))
        process.send_signal(how)
        return process.wait(60), said.read_text()
    finally:
        process.kill()


@pytest.mark.usefixtures("small_blocks")
def test_a_stopped_evaluation_ends_with_the_very_same_figures(run_dir, caps, tmp_path):
    given = ("--batch_size", 50)
    assert evaluate(run_dir, caps, tmp_path / "whole", *given).code == 0
    for call in (60, 170):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, call, how=signal.SIGINT)
            assert evaluate(run_dir, caps, tmp_path / "stopped", *given).code == 130
    ended = evaluate(run_dir, caps, tmp_path / "stopped", *given)
    assert ended.code == 0 and "Going on" in ended.shown
    made = contents(tmp_path / "stopped", RESULTS + FIGURES)
    assert made == contents(tmp_path / "whole", RESULTS + FIGURES)


# Anew


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("file", "the input file data_0.csv has changed"),
        ("metadata", "the input file metadata__x.csv has changed"),
        ("batch size", "the batch size has changed"),
        ("names", "mapping of cap names has changed"),
        ("outputs", "predictions.csv isn't as long as it was"),
        ("state", "state.json can't be read (the checksum is wrong"),
    ],
)
def test_what_has_changed_is_said_and_it_starts_anew(run_dir, caps, tmp_path, change, said):
    model, own = run_dir, tmp_path / "caps"
    shutil.copytree(caps, own)
    output_dir = tmp_path / "out"
    assert begun(run_dir, own, output_dir, 100, signal.SIGINT).code == 130
    match change:
        case "file":
            os.utime(own / "data_0.csv", (1, 1))
        case "metadata":
            (own / "metadata__x.csv").write_text("read_id,pod5_file\n")
        case "names":
            model = tmp_path / "run"
            shutil.copytree(run_dir, model)
            record = json.loads((run_dir / "run.json").read_text())
            record["class_names"] = ["a", "b", "c"]
            (model / "run.json").write_text(json.dumps(record))
        case "outputs":
            (output_dir / ".unfinished" / "predictions.csv").write_bytes(b"")
        case "state":
            state = output_dir / ".unfinished" / "state.json"
            state.write_text(state.read_text().replace('"passed": ', '"passed": 1'))
    size = 48 if change == "batch size" else 50
    ended = predict(model, own, output_dir, "--batch_size", size)
    assert ended.code == 0, ended.shown
    assert "Starting anew" in ended.shown and said in ended.shown
    if change == "file":
        again = predict(model, own, tmp_path / "again", "--batch_size", size)
        assert contents(output_dir, RESULTS) == contents(again.output_dir, RESULTS)


def test_an_input_that_changes_meanwhile_is_an_error(run_dir, caps, tmp_path, monkeypatch):
    own = tmp_path / "caps"
    shutil.copytree(caps, own)
    lines = predictions.lines

    def changing(*given):
        os.utime(own / "data_2.csv", (1, 1))
        return lines(*given)

    monkeypatch.setattr(predictions, "lines", changing)
    ended = predict(run_dir, own, tmp_path / "out")
    assert ended.code == 2 and "a file has changed while it was read" in ended.shown
    assert not list((tmp_path / "out").glob("*.csv"))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_input_that_is_removed_meanwhile_is_an_error(run_dir, caps, tmp_path, monkeypatch, when):
    own = tmp_path / "caps"
    shutil.copytree(caps, own)
    where, name = (reads, "check_headers") if when == "before" else (predictions, "lines")
    work = getattr(where, name)

    def removing(*given):
        found = work(*given)
        (own / "data_0.csv").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(where, name, removing)
    ended = predict(run_dir, own, tmp_path / "out")
    assert ended.code == 2 and "a file has changed while it was read (data_0.csv" in ended.shown
    assert not list((tmp_path / "out").glob("*.csv"))


# There already


def test_a_result_that_is_there_is_left_as_it_is(run_dir, caps, tmp_path):
    first = predict(run_dir, caps, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in map(tmp_path.joinpath, RESULTS)}
    again = predict(run_dir, caps, tmp_path)
    assert again.code == 0 and "has these predictions already" in again.shown
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert predicting.table(again) == predicting.table(first)
    other = predict(run_dir, caps, tmp_path, "--batch_size", 48)
    assert "is replaced" in other.shown and "already" not in other.shown
    with (tmp_path / "predictions.csv").open("ab") as stream:
        stream.write(b"x")
    mended = predict(run_dir, caps, tmp_path, "--batch_size", 48)
    assert "already" not in mended.shown and "is replaced" in mended.shown
    (tmp_path / "composition.json").write_text("{}")
    assert "would be replaced" in predict(run_dir, caps, tmp_path, "--batch_size", 48).shown
    (tmp_path / "composition.json").unlink()
    (tmp_path / "rejects.csv").unlink()
    ended = predict(run_dir, caps, tmp_path, "--batch_size", 48)
    assert ended.code == 2 and f"{tmp_path / 'predictions.csv'}: would be replaced" in ended.shown


@pytest.mark.usefixtures("small_blocks")
def test_files_that_had_their_names_when_it_broke_off_stay_its_own(run_dir, caps, tmp_path):
    """Whatever comes next: here the input changes, and it breaks off once more."""
    own = tmp_path / "caps"
    shutil.copytree(caps, own)
    replace = Path.replace

    def killed_at(last: str, patch: pytest.MonkeyPatch) -> None:
        def counted(path: Path, target: Path) -> Path:
            found = replace(path, target)
            if target.name == last:
                raise Killed
            return found

        patch.setattr(Path, "replace", counted)

    for last in ("predictions.csv", "state.json"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            killed_at(last, patch)
            predict(run_dir, own, tmp_path / "out")
        os.utime(own / "data_0.csv", (1, 1))
    assert list((tmp_path / "out").glob("*.csv"))
    assert predict(run_dir, own, tmp_path / "out").code == 0


def test_an_evaluation_leaves_no_figures_beside_other_predictions(run_dir, caps, tmp_path):
    assert evaluate(run_dir, caps, tmp_path).code == 0
    assert all((tmp_path / name).exists() for name in FIGURES)
    assert "already" in evaluate(run_dir, caps, tmp_path).shown
    assert predict(run_dir, caps, tmp_path).code == 0
    assert not any((tmp_path / name).exists() for name in FIGURES)


def test_two_at_once_in_one_directory_are_refused(run_dir, caps, tmp_path):
    with (tmp_path / ".predict.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ended = predict(run_dir, caps, tmp_path)
    assert ended.code == 2 and f"{tmp_path}: in use by" in ended.shown
    assert not list(tmp_path.glob("*.csv"))


# Where reading goes on


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_from_a_place_in_a_file_are_those_that_follow_it(tmp_path, packed):
    path = write(tmp_path / "a.csv", rows(0, 0, 60))
    whole = path.read_bytes()
    if packed:
        path = path.with_suffix(".csv.gz")
        path.write_bytes(gzip.compress(whole))
    blocks = [block for block, _ in read_blocks(path, block_bytes=1 << 10)]
    for block in blocks:
        begin = (block.offset, block.line)
        found = [each for each, _ in read_blocks(path, block_bytes=1 << 12, begin=begin)]
        assert b"".join(each.data for each in found) == whole[block.offset :]
        assert (found[0].offset, found[0].line) == begin
    assert len(blocks) > 10


def test_a_place_after_a_line_that_is_too_long_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr("capfinder.etl.csv_files.MAX_ROW_BYTES", 1 << 12)
    monkeypatch.setattr(reads, "BLOCK_BYTES", 1 << 10)
    lines = rows(0, 0, 6)
    lines[3:3] = [row("long", 0, ",".join(["1.0"] * 3000))]
    path = write(tmp_path / "a.csv", lines)
    blocks = list(reads.read([path], target_length=8, dtype="float32"))
    for at, block in enumerate(blocks):
        rest = list(reads.read([path], target_length=8, dtype="float32", begin=block.following))
        assert names(rest) == names(blocks[at + 1 :])
    assert names(blocks) == [next(csv.reader([line]))[0] for line in lines]


def names(blocks: list[reads.Reads]) -> list[str]:
    found = [(name, line) for block in blocks for name, line in each_row(block)]
    return [name for name, _ in sorted(found, key=lambda pair: pair[1])]


def each_row(block: reads.Reads) -> list[tuple[str, int]]:
    good = zip(map(bytes.decode, block.read_ids.tolist()), block.lines.tolist(), strict=True)
    return [*good, *((reject.read_id, reject.line) for reject in block.rejects)]
