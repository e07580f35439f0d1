"""Disks that are full, directories that are read-only, files that are damaged or gone, two runs in
one directory, a clock that jumps, a network that is lost: injected for real into whole runs.

Each ends in one clear line or goes on; the same command then ends as if nothing had happened."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jax_settings
import optuna
import pytest
from csv_input import write_classes
from in_process import shown_by
from optuna.storages.journal import JournalFileBackend
from tiny_training import assert_same

from capfinder import cli, files, log, models, run_record
from capfinder.data import cache
from capfinder.errors import InputError
from capfinder.evaluation import report
from capfinder.exporting import keras
from capfinder.run_record import RunRecord
from capfinder.stages import etl_build, evaluate, export
from capfinder.stages.storage import open_storage
from capfinder.tracking import sender
from capfinder.training import reading
from capfinder.training.checkpoint import Checkpoints
from tests.comet_server import Server

TESTS = Path(__file__).parent
EPOCHS = 12
LATER = "train,evaluate,export"  # the stages after those that make the input of a training
SECONDS = 300  # after which a process that should have ended hangs
MEGABYTES = 90  # of a small disk: the ETL starts with some 50 free, and no less


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """CSV files and settings; a home of its own, no Comet key, the tiny model as cnn_lstm."""
    root = tmp_path_factory.mktemp("faults")
    write_classes(root / "caps", classes=3, runs=2, reads=40)
    values: dict[str, Any] = {
        "etl_params": {
            "use_remote_dataset_version": "",
            "examples_per_class": None,
            "caps_data_dir": str(root / "caps"),
        },
        "tune_params": {"max_trials": 2, "max_epochs_hpt": 2, "tuning_strategy": "random_search"},
        "train_params": {"max_epochs_final_model": EPOCHS, "patience": EPOCHS},
        "shared_params": {
            "num_classes": 3,
            "batch_size": 16,
            "target_length": 24,
            "train_test_fraction": 0.8,
            "train_val_fraction": 0.75,
        },
        "search_params": {"layers": {"choices": [1]}, "units": {"choices": [8]}},
        "runtime_params": {"compilation_cache_dir": str(root / "xla")},
        "tracking_params": {"mode": "off"},
        "export_params": {"formats": ["keras", "h5"]},
    }
    (root / "train.json").write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        for name in [name for name in os.environ if name.startswith("COMET_")]:
            patched.delenv(name)
        patched.setenv("HOME", str(root / "home"))
        patched.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")
        reading.hush_orbax()  # beyond a run too: what it drops may be heard of after its end
        yield root


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    shown: str

    def assert_one_line(self, code: int, *words: str) -> None:
        """It failed with `code` and one line that says all this."""
        lines = [line for line in self.shown.splitlines() if line.startswith("error: ")]
        assert (self.code, len(lines)) == (code, 1), self.shown
        assert "Traceback" not in self.shown and "Logging error" not in self.shown, self.shown
        assert "unexpected" not in lines[0], lines[0]
        for word in words:
            assert word in lines[0], lines[0]


def launch(root: Path, output_dir: Path, *options: str) -> Ended:
    """launch.py's function, in this process."""
    arguments = [f"--config={root / 'train.json'}", f"--output_dir={output_dir}", *options]
    return captured(lambda: cli.launch(arguments))


def captured(command: Callable[[], int]) -> Ended:
    def run() -> int:
        code = command()
        gc.collect()  # what a failed run's frames hold, locks among it, goes as with its process
        return code

    return Ended(*shown_by(run))


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    output_dir = root / "undisturbed"
    ended = launch(root, output_dir)
    assert ended.code == 0, ended.shown
    # Long after its best epoch: no state of the end holds those weights as its own.
    assert outcome(output_dir)["best_epoch"] < EPOCHS - 2
    return output_dir


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """The finished run elsewhere."""
    return Path(shutil.copytree(undisturbed, tmp_path / "out"))


@pytest.fixture
def unfinished(copy: Path) -> Path:
    """It elsewhere, as if killed after the last epoch's checkpoint."""
    (training(copy) / "outcome.json").unlink()
    for name in ("evaluation", "best_model"):
        shutil.rmtree(copy / name)
    return copy


def training(output_dir: Path) -> Path:
    (directory,) = output_dir.glob("checkpoints/*")
    return directory


def newest(output_dir: Path, kind: str) -> Path:
    return max((training(output_dir) / kind).iterdir(), key=lambda path: int(path.name))


def outcome(output_dir: Path) -> dict[str, Any]:
    return files.read_json(training(output_dir) / "outcome.json")


def assert_same_result(output_dir: Path, expected: Path) -> None:
    """Data, study, weights, curves, predictions and export are those of the undisturbed run."""
    one, other = (results(directory) for directory in (output_dir, expected))
    variables = [one.pop("variables"), other.pop("variables")]
    assert one == other
    assert_same(*variables)
    assert not [path for path in output_dir.rglob(f"{files.PARTIAL}*") if path.exists()]
    assert not (output_dir / "previous").exists()


def results(output_dir: Path) -> dict[str, Any]:
    record = files.read_json(output_dir / "run.json")
    ended = outcome(output_dir)
    timed = ("seconds", "examples_per_second", "idle_share")
    history = [{k: v for k, v in row.items() if k not in timed} for row in ended["history"]]
    (best,) = output_dir.glob("tuner_models/*/best_hyperparameters.json")
    study = files.read_json(best)
    (classifier,) = output_dir.glob("best_model/classifier/*.keras")
    evaluation = output_dir / "evaluation"
    about = keras.read_about(classifier)
    assert about is not None
    del about["facts"]["dataset"]["version"]  # of the same reads, built anew
    return {
        "shards": files.read_json(output_dir / record["dataset"]["directory"] / "manifest.json")[
            "shards"
        ],
        "study": [study[name] for name in ("hyperparameters", "value", "trial", "fingerprint")],
        "history": history,
        "best": ended["best_epoch"],
        "variables": Checkpoints(training(output_dir)).restore_variables(ended["best_epoch"]),
        "test": files.read_json(evaluation / "metrics.json")["test"],
        "predictions": (evaluation / "predictions_test.csv").read_bytes(),
        "classifier": about,
        "is reported": (output_dir / "report.html").is_file(),
    }


def flip(path: Path, byte: int, bit: int = 3) -> None:
    with path.open("r+b") as stream:
        stream.seek(byte)
        value = stream.read(1)[0]
        stream.seek(byte)
        stream.write(bytes([value ^ 1 << bit]))


def flip_in(directory: Path) -> None:
    """A bit in the middle of each file."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip(path, path.stat().st_size // 2)


def at_call(
    patched: pytest.MonkeyPatch, owner: Any, name: str, number: int, act: Callable[[], None]
) -> None:
    """Acts just before a function is called for the `number`-th time; it then runs as ever."""
    original, calls = getattr(owner, name), []

    def wrapper(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            act()
        return original(*arguments, **named)

    patched.setattr(owner, name, wrapper)


# Disks


def mounted(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not mount: {done.stderr.strip()}")


@contextlib.contextmanager
def unmounted_after(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A directory that nobody can write to; root, whom chmod doesn't stop, included."""
    if os.geteuid():
        path.chmod(0o555)
        try:
            yield
        finally:
            path.chmod(0o755)
        return
    mounted("--bind", str(path), str(path))
    with unmounted_after(path):
        mounted("-o", "remount,bind,ro", str(path))
        yield


class SmallDisk:
    """A disk that something else fills up at a moment of our choice."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def fill(self) -> None:
        """To the last block."""
        with self._filler.open("wb", buffering=0) as stream:
            for block in (b" " * 10**6, b" " * 512):
                with contextlib.suppress(OSError):
                    while True:
                        stream.write(block)

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(path))
    with unmounted_after(path):
        yield SmallDisk(path)


FILLED_AT: dict[str, tuple[Any, str, int]] = {  # in the order in which a run comes by
    "shards": (etl_build.Builder, "_try", 1),
    "run.json": (RunRecord, "update", 1),
    "cache": (cache, "_build_cache", 1),
    "journal": (JournalFileBackend, "append_logs", 6),
    "the next line of the journal": (JournalFileBackend, "append_logs", 3),
    "checkpoint": (Checkpoints, "save_latest", 3),
    "the next checkpoint": (Checkpoints, "save_latest", 2),
    "evaluation": (evaluate, "write_predictions", 1),
    "classifier": (keras, "write_keras", 1),
    "weights": (keras, "write_weights", 1),
    "report": (report, "render", 1),
}


def test_a_disk_that_is_full_at_any_stage_is_one_line_and_the_run_goes_on_once_it_is_not(
    root: Path, undisturbed: Path, small_disk: SmallDisk
):
    """One run that meets a full disk again and again, each time a little further on."""
    output_dir = small_disk.path / "out"
    for moment, (owner, name, number) in FILLED_AT.items():
        with pytest.MonkeyPatch.context() as patched:
            at_call(patched, owner, name, number, small_disk.fill)
            ended = launch(root, output_dir)
        assert "error: " in ended.shown, f"{moment}: {ended.shown}"
        ended.assert_one_line(1)
        assert any(
            text in ended.shown for text in ("the disk is full", "No space left on device")
        ), ended.shown
        small_disk.free()
    ended = launch(root, output_dir)
    assert ended.code == 0, ended.shown
    assert_same_result(output_dir, undisturbed)


def test_too_little_space_for_the_dataset_is_said_before_anything_is_written(
    root: Path, tmp_path: Path
):
    path = tmp_path / "disk"
    path.mkdir()
    mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path))
    with unmounted_after(path):
        launch(root, path / "out").assert_one_line(2, "of disk", "are free", "Free some space")


def test_a_read_only_output_directory_is_one_line_and_the_run_goes_on_once_it_is_not(
    root: Path, undisturbed: Path, unfinished: Path
):
    with read_only(unfinished):
        ended = launch(root, unfinished)
        ended.assert_one_line(2, str(unfinished), "can't be written to")
    ended = launch(root, unfinished)
    assert ended.code == 0, ended.shown
    assert_same_result(unfinished, undisturbed)


def test_a_read_only_dataset_can_be_trained_on_and_read_only_input_is_no_matter(
    root: Path, undisturbed: Path, unfinished: Path
):
    dataset, later = unfinished / "dataset", f"--stage={LATER}"
    with read_only(root / "caps"):
        ended = launch(root, unfinished, "--stage=etl")
        assert ended.code == 0, ended.shown
    with read_only(dataset):
        launch(root, unfinished).assert_one_line(2, str(dataset), "can't be written to")
        ended = launch(root, unfinished, later)
        assert ended.code == 0, ended.shown
    assert_same_result(unfinished, undisturbed)


def test_a_read_only_dataset_without_a_cache_can_be_streamed(
    root: Path, undisturbed: Path, unfinished: Path
):
    dataset, later = unfinished / "dataset", f"--stage={LATER}"
    shutil.rmtree(dataset / "cache")
    with read_only(dataset):
        launch(root, unfinished, later).assert_one_line(
            2, str(dataset / "cache"), "can't be written to", "data_residency=stream"
        )
        ended = launch(root, unfinished, later, "--config.runtime_params.data_residency=stream")
        assert ended.code == 0, ended.shown
    assert not (dataset / "cache").exists()
    assert_same_result(unfinished, undisturbed)


# Shards


def shard(output_dir: Path, split: str = "train") -> Path:
    (path,) = (output_dir / "dataset/cap_data/1.0.0").glob(f"*-{split}.*")
    return path


def test_a_shard_that_is_gone_is_named_and_the_etl_builds_the_same_again(
    root: Path, undisturbed: Path, unfinished: Path
):
    path = shard(unfinished)
    path.unlink()
    launch(root, unfinished, f"--stage={LATER}").assert_one_line(
        2, str(path.parent), path.name, "missing", "etl stage"
    )
    ended = launch(root, unfinished)
    assert ended.code == 0, ended.shown
    assert path.name in ended.shown and "passed over" in ended.shown
    assert files.read_json(unfinished / "run.json")["dataset"]["version"] == "1.1.0"
    assert_same_result(unfinished, undisturbed)


@pytest.mark.parametrize("residency", ["device", "host", "stream"])
def test_a_flipped_bit_in_a_shard_is_never_trained_on(
    root: Path, undisturbed: Path, unfinished: Path, residency: str
):
    shutil.rmtree(unfinished / "dataset" / "cache")
    path = shard(unfinished)
    flip(path, path.stat().st_size // 2)
    option = f"--config.runtime_params.data_residency={residency}"
    for stages in ("etl", LATER):
        ended = launch(root, unfinished, option, f"--stage={stages}")
        ended.assert_one_line(2, str(path), "is damaged", "etl stage")
    shutil.rmtree(path.parent)
    ended = launch(root, unfinished, option)
    assert ended.code == 0, ended.shown
    assert_same_result(unfinished, undisturbed)


def test_a_bit_that_flips_while_shards_are_streamed_stops_the_training(
    root: Path, undisturbed: Path, unfinished: Path
):
    shutil.rmtree(training(unfinished))
    path = shard(unfinished)
    place = path.stat().st_size // 3
    options = (f"--stage={LATER}", "--config.runtime_params.data_residency=stream")
    with pytest.MonkeyPatch.context() as patched:
        at_call(patched, Checkpoints, "save_latest", 4, lambda: flip(path, place))
        launch(root, unfinished, *options).assert_one_line(2, str(path), "is damaged")
    assert len(list((training(unfinished) / "latest").iterdir())) == 2
    flip(path, place)  # the whole file again
    ended = launch(root, unfinished, *options)
    assert ended.code == 0 and "training resumed" in ended.shown, ended.shown
    assert_same_result(unfinished, undisturbed)


def test_a_csv_file_changed_under_the_same_size_and_time_is_read_again(root: Path, tmp_path: Path):
    caps, out = write_classes(tmp_path / "caps", classes=3, runs=1, reads=20), tmp_path / "out"
    options = (f"--config.etl_params.caps_data_dir={caps}", "--stage=etl")
    assert launch(root, out, *options).code == 0
    path = next(caps.glob("*.csv"))
    before, at = path.stat(), path.read_bytes().rindex(b".") + 1
    flip(path, at, bit=0)  # another digit
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    ended = launch(root, out, *options)
    assert ended.code == 0 and (out / "dataset/cap_data/1.1.0").is_dir(), ended.shown
    for year in (1990, 2090):  # and no time of a file makes it another
        os.utime(path, (datetime(year, 1, 1).timestamp(),) * 2)
        ended = launch(root, out, *options)
        assert ended.code == 0 and "reused" in ended.shown, ended.shown
    assert len(list((out / "dataset/cap_data").iterdir())) == 2


# Checkpoints

DAMAGED = {
    "the state": ["latest/state"],
    "the state's meta": ["latest/meta"],
    "the best weights": ["best/variables"],
    "the best weights' meta": ["best/meta"],
    "everything newest": ["latest/state", "latest/meta", "best/variables", "best/meta"],
}


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_flipped_bit_in_a_checkpoint_is_said_and_changes_nothing(
    root: Path, undisturbed: Path, unfinished: Path, damaged: str
):
    for kind, item in (place.split("/") for place in DAMAGED[damaged]):
        flip_in(newest(unfinished, kind) / item)
    ended = launch(root, unfinished)
    assert ended.code == 0, ended.shown
    for kind in {place.split("/")[0] for place in DAMAGED[damaged]}:
        assert f"{kind}/" in ended.shown
    assert "can't be read" in ended.shown
    assert_same_result(unfinished, undisturbed)


def test_a_best_epoch_that_is_gone_comes_back(root: Path, undisturbed: Path, unfinished: Path):
    shutil.rmtree(training(unfinished) / "best")
    ended = launch(root, unfinished)
    assert ended.code == 0, ended.shown
    assert_same_result(unfinished, undisturbed)


def test_a_damaged_best_epoch_is_never_scored_with(root: Path, copy: Path, tmp_path: Path):
    shutil.rmtree(copy / "evaluation")
    path = training(copy) / "best" / str(outcome(copy)["best_epoch"])
    flip_in(path / "variables")
    said = (str(path), "can't be read", "Run the train stage again")
    launch(root, copy, "--stage=evaluate,export").assert_one_line(2, *said)
    arguments = ["--model", copy, "--caps_data_dir", root / "caps", "--output_dir", tmp_path / "to"]
    captured(lambda: cli.main(["predict", *map(str, arguments)])).assert_one_line(2, *said)
    assert not (copy / "evaluation").exists() and not list((tmp_path / "to").glob("*.csv"))


def test_a_finished_training_that_was_damaged_is_made_whole_again(
    root: Path, undisturbed: Path, copy: Path
):
    flip_in(training(copy) / "best" / str(outcome(copy)["best_epoch"]))
    path = training(copy) / "outcome.json"
    best = f'"best_epoch": {outcome(copy)["best_epoch"]},'
    for damage in (lambda text: text, lambda text: text[:-20], lambda text: text.replace(best, "")):
        path.write_text(damage(path.read_text()))
        shutil.rmtree(copy / "evaluation")
        ended = launch(root, copy)
        assert ended.code == 0, ended.shown
        assert_same_result(copy, undisturbed)
    other = f'"best_epoch": {outcome(copy)["best_epoch"] - 1},'  # it is there, too
    path.write_text(path.read_text().replace(best, other))
    launch(root, copy, "--stage=evaluate,export").assert_one_line(2, str(path), "train stage")
    ended = launch(root, copy)
    assert ended.code == 0 and str(path) in ended.shown, ended.shown
    assert_same_result(copy, undisturbed)


def test_a_damaged_line_of_a_study_is_named_and_nothing_is_lost(
    root: Path, undisturbed: Path, copy: Path
):
    (journal,) = copy.glob("tuner_models/*/journal.log")
    (journal.parent / "best_hyperparameters.json").unlink()
    lines = journal.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2
    place = sum(map(len, lines[: middle - 1]))
    flip(journal, place)
    before = journal.read_bytes()
    launch(root, copy).assert_one_line(
        2, str(journal), f"damaged (line {middle:,})", "move it elsewhere"
    )
    assert journal.read_bytes() == before
    flip(journal, place)
    ended = launch(root, copy)
    assert ended.code == 0, ended.shown
    assert_same_result(copy, undisturbed)


def test_what_a_full_disk_left_of_a_line_is_dropped_by_the_next_writer(tmp_path: Path):
    (tmp_path / "locks").mkdir()
    one = open_storage(tmp_path, None)
    study = optuna.create_study(study_name="a", storage=one)
    with (tmp_path / "journal.log").open("ab") as stream:
        stream.write(b'{"op_code": 4, "work')
    study.set_user_attr("b", 1)
    assert optuna.load_study(study_name="a", storage=open_storage(tmp_path, None)).user_attrs == {
        "b": 1
    }


def test_a_part_of_the_output_that_is_read_only_is_one_line(
    root: Path, undisturbed: Path, unfinished: Path
):
    (unfinished / "evaluation").mkdir()
    with read_only(unfinished / "evaluation"):
        launch(root, unfinished).assert_one_line(1, str(unfinished / "evaluation"), "Give access")
    ended = launch(root, unfinished)
    assert ended.code == 0, ended.shown
    assert_same_result(unfinished, undisturbed)


def test_when_no_state_is_left_the_error_says_what_to_remove(
    root: Path, undisturbed: Path, unfinished: Path
):
    for path in (training(unfinished) / "latest").iterdir():
        flip_in(path / "state")
    directory = training(unfinished)
    launch(root, unfinished).assert_one_line(
        1, "none of its checkpoints can be read", f"Remove {directory}"
    )
    shutil.rmtree(directory)
    ended = launch(root, unfinished)
    assert ended.code == 0, ended.shown
    assert_same_result(unfinished, undisturbed)


# Two runs, and the clock

JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* After 50 questions the clock on the wall goes 400 days back, after 50 more forward again. */
static long off(void) {
  static unsigned asked;
  return __atomic_fetch_add(&asked, 1, __ATOMIC_RELAXED) / 50 % 2 ? -400 * 86400L : 0;
}
int clock_gettime(clockid_t clock, struct timespec *found) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(clock, found);
  if (!code && clock == CLOCK_REALTIME) found->tv_sec += off();
  return code;
}
int gettimeofday(struct timeval *found, void *zone) {
  struct timespec now;
  int code = clock_gettime(CLOCK_REALTIME, &now);
  found->tv_sec = now.tv_sec;
  found->tv_usec = now.tv_nsec / 1000;
  return code;
}
time_t time(time_t *found) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (found) *found = now.tv_sec;
  return now.tv_sec;
}
"""


def jumping_clock(directory: Path) -> str:
    """The library to preload; "" where no C compiler is."""
    source, library = directory / "clock.c", directory / "clock.so"
    source.write_text(JUMPING_CLOCK)
    if shutil.which("cc") is None:
        return ""
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return str(library)


def test_a_second_run_is_told_who_holds_the_directory_and_the_first_goes_on_by_any_clock(
    root: Path, undisturbed: Path, tmp_path: Path
):
    output_dir, shown = tmp_path / "out", tmp_path / "shown"
    command = [
        sys.executable,
        TESTS / "host_process.py",
        f"--config={root / 'train.json'}",
        f"--output_dir={output_dir}",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "PYTHONUNBUFFERED": "1",
        "LD_PRELOAD": jumping_clock(tmp_path),
    }
    with shown.open("w") as stream:
        first = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        deadline = time.monotonic() + SECONDS
        while "epoch 2/" not in (text := shown.read_text(errors="replace")):  # half a character
            assert time.monotonic() < deadline and first.poll() is None, text
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        assert first.poll() is None
        second = launch(root, output_dir)
        second.assert_one_line(
            2,
            f"{output_dir}: in use by another training run, process {first.pid} on "
            f"{socket.gethostname()}, since ",
            "choose another shared_params.output_dir",
        )
        first.send_signal(signal.SIGCONT)
        assert first.wait(SECONDS) == 0, shown.read_text()
    finally:
        first.kill()
        first.wait()
    if environment["LD_PRELOAD"]:
        lines = "\n".join(path.read_text() for path in output_dir.glob("logs/*")).splitlines()
        assert len({line[:4] for line in lines if line[:4].isdigit()}) > 1  # the clock did jump
    assert len(list(output_dir.glob("logs/*"))) == 2
    assert_same_result(output_dir, undisturbed)
    ended = launch(root, output_dir)
    assert ended.code == 0 and "already done" in ended.shown, ended.shown


def test_a_clock_that_stands_still_or_goes_back_overwrites_nothing(
    root: Path, undisturbed: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    """Everything that is named by the time, at one and the same time."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return cls(2001, 1, 1, tzinfo=tz)

    for module in (log, run_record, export):
        monkeypatch.setattr(module, "datetime", Stopped)
    predictions = (undisturbed / "evaluation" / "predictions_test.csv").read_bytes()
    logs = set((copy / "logs").iterdir())
    for patience in (5, 7, 9):
        option = f"--config.train_params.patience={patience}"
        ended = launch(root, copy, "--stage=etl", option)
        assert ended.code == 0, ended.shown
    previous = sorted((copy / "previous").iterdir())
    assert [path.name for path in previous] == [f"20010101_000000{n}" for n in ("", "_2", "_3")]
    assert (previous[0] / "evaluation" / "predictions_test.csv").read_bytes() == predictions
    assert len(list(previous[0].glob("best_model/classifier/*.keras"))) == 1
    assert all((path / "run.json").is_file() for path in previous)
    assert len(set((copy / "logs").iterdir()) - logs) == 3


def test_a_stage_that_finds_nothing_to_work_on_moves_no_results(
    root: Path, undisturbed: Path, copy: Path
):
    for changed in ("train_params.patience=7", "model_params.learning_rate=0.02"):
        ended = launch(root, copy, "--stage=evaluate,export", f"--config.{changed}")
        assert ended.code != 0 and "run the train stage first" in ended.shown, ended.shown
    assert_same_result(copy, undisturbed)


def test_a_writer_s_files_are_cleared_by_its_own_machine_alone(tmp_path: Path):
    """Process ids say nothing about the processes of another one."""
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = tmp_path / f"{files.PARTIAL}run.json-{dead}+{socket.gethostname()}.json"
    elsewhere = tmp_path / f"{files.PARTIAL}run.json-{dead}+node-{dead}.json"
    for path in (here, elsewhere):
        path.touch()
    files.remove_dead(tmp_path)
    assert list(tmp_path.iterdir()) == [elsewhere]


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "ü"]}, {}])
def test_a_sealed_object_opens_as_it_was_and_not_once_it_was_changed(tmp_path: Path, value: Any):
    path = tmp_path / "value.json"
    files.write_json(path, files.sealed(value))
    assert files.unsealed(files.read_json(path)) == value
    changed = {**files.read_json(path), "b": 1}
    with pytest.raises(ValueError, match="checksum is wrong"):
        files.unsealed(changed)
    with pytest.raises(ValueError, match="no checksum"):
        files.unsealed(value)


def test_a_full_disk_s_error_names_the_file_that_was_to_be_written(small_disk: SmallDisk):
    small_disk.fill()
    with pytest.raises(OSError) as raised:
        files.write_text(small_disk.path / "run.json", "x" * 5000)
    assert raised.value.filename == str(small_disk.path / "run.json")
    assert [path.name for path in small_disk.path.iterdir()] == ["filler"]


def test_a_lock_in_a_read_only_directory_is_a_clear_error(tmp_path: Path):
    with (
        read_only(tmp_path),
        pytest.raises(InputError, match="can't be written to"),
        files.exclusive_lock(tmp_path / ".lock", holder="a test"),
    ):
        pass


# The network


def test_a_network_lost_while_training_loses_nothing(
    root: Path, undisturbed: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
):
    server = Server()
    monkeypatch.setenv("COMET_API_KEY", "k3y")
    monkeypatch.setenv("COMET_URL_OVERRIDE", server.url)
    monkeypatch.setenv("COMET_HTTP_SESSION_RETRY_TOTAL", "0")
    monkeypatch.setattr(sender, "START_DELAY_SECONDS", 0.0)
    shutil.rmtree(training(unfinished))

    def lose() -> None:
        deadline = time.monotonic() + 30
        while not server.saw("log-other") and time.monotonic() < deadline:
            time.sleep(0.05)
        server.stop()

    at_call(monkeypatch, Checkpoints, "save_latest", 3, lose)
    ended = launch(root, unfinished, f"--stage={LATER}", "--config.tracking_params.mode=online")
    assert ended.code == 0, ended.shown
    assert server.saw("log-other")
    assert ended.shown.count("The run goes on") == 1
    assert "comet upload --force-reupload" in ended.shown
    assert len(list((unfinished / "comet").glob("*.zip"))) == 1
    assert_same_result(unfinished, undisturbed)
