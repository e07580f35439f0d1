"""A few kills of the ETL, and proof that the harness would notice what one must not leave."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etl_check import (
    left_by_comet,
    left_by_python,
    left_running,
    problems_after,
    problems_while_dead,
)
from etl_input import SCENARIOS
from etl_kills import Bench, run
from etl_phases import paths_below, phase_of
from kills import Moment, Place, end_of

SEED, KILLS, MEGABYTES = 7, 4, 3.0


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(SCENARIOS[1], tmp_path_factory.mktemp("kills"), megabytes=MEGABYTES, seed=SEED)
    bench.measure()
    return bench


def test_a_killed_etl_that_is_rerun_ends_as_if_undisturbed(bench, tmp_path):
    outcomes = list(run([bench], tmp_path, kills=KILLS, seed=SEED))
    assert [outcome.problems for outcome in outcomes] == [[]] * KILLS, outcomes


def test_the_input_puts_pass_two_and_every_kind_of_reject_to_work(bench):
    rejects = (bench.directory / "undisturbed/out/dataset/cap_data/1.0.0/rejects.csv").read_text()
    for reason in (
        "not a number",
        "duplicate read_id",
        "wrong field count",
        "class differs from file",
        "empty signal",
        "conflicting classes",
    ):
        assert reason in rejects
    reasons = {line.split(",")[1]: line for line in rejects.splitlines()}
    for path in bench.caps.glob("data__*.csv"):
        lines = path.read_text().splitlines()
        assert any("1.2.3" in lines[int(number) - 1] for number in reasons if number.isdigit())


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILT = {
    "other bytes: dataset/cap_data/1.0.0/cap_data-train": lambda out: _flip(
        next(out.glob("dataset/cap_data/1.0.0/*-train.*"))
    ),
    "missing: dataset/cap_data/1.0.0/features.json": lambda out: (
        out / "dataset/cap_data/1.0.0/features.json"
    ).unlink(),
    "other bytes: dataset/cap_data/1.0.0/manifest.json": lambda out: (
        out / "dataset/cap_data/1.0.0/manifest.json"
    ).write_text("{}"),
    "debris: dataset/cap_data/1.1.0/": lambda out: (out / "dataset/cap_data/1.1.0").mkdir(),
    "debris: dataset/cap_data/.partial-x/bucket-1": lambda out: _touch(
        out / "dataset/cap_data/.partial-x/bucket-1"
    ),
    "debris: .partial-run.json-1.json": lambda out: _touch(out / ".partial-run.json-1.json"),
    "debris: tmpabc (system temp)": lambda out: _touch(out.parent / "tmp" / "tmpabc"),
}


def _touch(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()


@pytest.mark.parametrize("problem", SPOILT)
def test_what_a_kill_must_not_leave_is_noticed(bench, tmp_path, problem):
    out = tmp_path / "out"
    (tmp_path / "tmp").mkdir()
    shutil.copytree(bench.directory / "undisturbed" / "out", out)
    assert problems_after(bench.expected, out, tmp_path / "tmp") == []
    SPOILT[problem](out)
    found = problems_after(bench.expected, out, tmp_path / "tmp")
    assert [text for text in found if text.startswith(problem)], found
    if "1.0.0" in problem:
        assert problems_while_dead(bench.expected, out)


def test_a_run_is_killed_just_before_the_step_asked_for(bench, tmp_path):
    place = Place(tmp_path)
    assert bench.kill(place, Moment.parse("step 1")) == []
    assert not place.output_dir.exists()  # its making was to be the first step
    assert bench.kill(place, Moment.parse("step 2")) == []
    assert place.output_dir.exists()
    assert paths_below(place.output_dir) == []


def test_only_what_a_kill_in_comets_time_left_is_put_down_to_comet(tmp_path):
    (tmp_path / "tmpab12_xyz").mkdir()
    (tmp_path / "bucket-1").touch()
    assert left_by_comet("run record, archive", tmp_path) == ["tmpab12_xyz/"]
    assert left_by_comet("parse, spilled", tmp_path) == []


def test_only_what_python_tries_the_temporary_directory_with_is_put_down_to_it(tmp_path):
    for name, content in {"j7f25mmk": "blat", "a_1b2c3d": "", "abcdefgh": "0", "x": ""}.items():
        (tmp_path / name).write_text(content)
    assert left_by_python(tmp_path) == ["a_1b2c3d", "j7f25mmk"]


def test_moments_are_read_as_they_are_shown():
    for text in ("step 12", "train step 3", "rejects, manifest, sync + 0.125 s", "scan + 3.000 s"):
        assert str(Moment.parse(text)) == text


def test_phases_are_told_by_what_lies_on_disk():
    version = "dataset/cap_data/.partial-1.0.0-77/"
    grown = {
        "start-up": "logs/x.log",
        "lock, estimate": "dataset/.lock",
        "scan": "dataset/cap_data/.partial-ab_1/",
        "scan, spilled": "dataset/cap_data/.partial-ab_1/identities-3",
        "plan and parse": version,
        "parse, spilled": "dataset/cap_data/.partial-ab_1/tmp9/bucket-0",
        "shards and checks": version + "cap_data-test.tfrecord-00000-of-00001",
        "metadata": version + "features.json",
        "rejects, manifest, sync": version + "rejects.csv",
        "renamed": "dataset/cap_data/1.0.0/",
        "index, cache": "dataset/sources.json",
        "run record, archive": "run.json",
    }
    paths: list[str] = []
    for phase, path in grown.items():
        paths.append(path)
        assert phase_of(paths) == phase


def test_a_failed_run_and_one_that_lives_on_are_told(tmp_path):
    place = Place(tmp_path)
    program = (
        "import subprocess; subprocess.Popen(['sleep', '30']); print('no'); raise SystemExit(3)"
    )
    with place.output.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=output, start_new_session=True
        )
    assert end_of(process, place) == "exit code 3: no"
    (child,) = left_running(process.pid, seconds=0.2)
    subprocess.run(["kill", str(child)], check=True)
    assert left_running(process.pid, seconds=5) == []
