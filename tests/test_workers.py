"""Several processes on one study, through the command line: each trial once, whoever dies."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax_settings
import optuna
import pytest
from csv_input import write_classes
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError

from capfinder import cli, models

TESTS = Path(__file__).parent
EPOCHS, TRIALS = 10, 5
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
SECONDS = 120  # after which a process that should have done something hangs
STUDY = "tuner_models/capfinder_tune_cnn_lstm"
SETTINGS: dict[str, Any] = {
    "etl_params": {"use_remote_dataset_version": "", "examples_per_class": None},
    "tune_params": {
        "max_trials": TRIALS,
        "max_epochs_hpt": EPOCHS,
        "patience": EPOCHS,
        "tuning_strategy": "random_search",  # no trial ends early
    },
    "shared_params": {
        "num_classes": 2,
        "batch_size": 16,
        "target_length": 24,
        "dtype": "float32",
        "train_test_fraction": 0.8,
    },
    "model_params": {"units": [8], "learning_rate": 0.01},
    "search_params": {"layers": {"choices": [1]}, "units": {"choices": [8]}},
    "tracking_params": {"mode": "off"},
}


class Process(subprocess.Popen):
    """One of the commands; what it says goes to a file."""

    def __init__(self, root: Path, *arguments: object) -> None:
        self.shown = root / f"shown_{time.monotonic_ns()}"
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        with self.shown.open("w") as stream:
            super().__init__(
                [sys.executable, str(TESTS / "worker_process.py"), *map(str, arguments)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            )

    @property
    def text(self) -> str:
        """So far: it may end within a character."""
        return self.shown.read_text(errors="replace")


def open_storage(place: Path) -> optuna.storages.BaseStorage:
    if place.suffix == ".db":
        # Looks only: making the tables would get into the way of the run that makes them.
        return optuna.storages.RDBStorage(
            f"sqlite:///{place}", skip_compatibility_check=True, skip_table_creation=True
        )
    return optuna.storages.JournalStorage(JournalFileBackend(str(place)))


def trials(place: Path) -> list[FrozenTrial]:
    """Of the one study in a journal or an SQLite file, none while it is being made."""
    if not place.exists() or (place.suffix == ".db" and not _is_made(place)):
        return []
    try:
        storage = open_storage(place)
        return optuna.load_study(study_name=None, storage=storage).get_trials(deepcopy=False)
    except (KeyError, ValueError, optuna.exceptions.StorageInternalError, OperationalError):
        return []


def _is_made(database: Path) -> bool:
    """Optuna, which notes its version last, would note it here before the run that makes the tables
    could."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        try:
            return bool(opened.execute("SELECT * FROM alembic_version").fetchall())
        except sqlite3.OperationalError:
            return False


def worker_of(trial: FrozenTrial) -> int:
    """The process that ran it last."""
    return int(trial.user_attrs.get("worker", ":0:").split(":")[1])


def in_the_middle_of(process: Process, place: Path) -> int:
    """Waits until the process has run some epochs of a trial; its number."""
    deadline = time.monotonic() + SECONDS
    while True:
        for trial in trials(place):
            is_running = trial.state == TrialState.RUNNING and len(trial.intermediate_values) > 2
            if is_running and worker_of(trial) == process.pid:
                return trial.number
        assert time.monotonic() < deadline and process.poll() is None, process.text
        time.sleep(0.1)


def assert_each_ran_once(found: list[FrozenTrial], taken_up: list[int], by: Process) -> None:
    """All trials are complete; those that lost their worker were ended by `by`."""
    assert [trial.number for trial in found] == list(range(TRIALS))
    assert {trial.state for trial in found} == {TrialState.COMPLETE}
    assert {len(trial.intermediate_values) for trial in found} == {EPOCHS}
    drawn = [tuple(trial.params.items()) for trial in found]
    assert len(set(drawn)) == TRIALS
    for trial in found:
        if trial.number in taken_up:
            assert worker_of(trial) == by.pid


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers")
    write_classes(root / "caps", classes=2, runs=1, reads=60)
    values = json.loads(json.dumps(SETTINGS))
    values["etl_params"]["caps_data_dir"] = str(root / "caps")
    values["runtime_params"] = {"compilation_cache_dir": str(root / "xla")}
    (root / "settings.json").write_text(json.dumps(values))
    return root


def launched(root: Path, stage: str, *options: str) -> Process:
    return Process(
        root,
        "launch",
        f"--config={root / 'settings.json'}",
        f"--output_dir={root / 'run'}",
        f"--stage={stage}",
        *options,
    )


def ended(processes: list[Process]) -> None:
    for process in processes:
        process.kill()
        process.wait()


@dataclass
class Shared:
    """A run and three workers on its study, which were stopped in the middle of a trial each."""

    main: Process
    workers: list[Process]
    lost: list[int]  # the trials of the workers
    record: dict[str, Any]  # run.json in the meantime


@pytest.fixture(scope="module")
def shared(root: Path) -> Shared:
    """The workers were started before there was anything; SIGNALS end them."""
    run, lost = root / "run", []
    main = launched(root, "etl,tune")
    workers = [
        Process(root, "capfinder", "tune-worker", "--run", run, "--wait_minutes", 5)
        for _ in SIGNALS
    ]
    try:
        for worker, signum in zip(workers, SIGNALS, strict=True):
            lost.append(in_the_middle_of(worker, run / STUDY / "journal.log"))
            worker.send_signal(signum)
        record = json.loads((run / "run.json").read_text())
        for process in (*workers, main):
            process.wait(SECONDS)
    finally:
        ended([main, *workers])
    return Shared(main, workers, lost, record)


def test_workers_share_a_study_and_what_they_leave_is_taken_up(root: Path, shared: Shared):
    run, main, lost = root / "run", shared.main, shared.lost
    _, interrupted, terminated = shared.workers
    codes = [process.returncode for process in (main, *shared.workers)]
    assert codes == [0, -signal.SIGKILL, 0, 143], main.text + interrupted.text + terminated.text
    found = trials(run / STUDY / "journal.log")
    assert_each_ran_once(found, lost, main)
    starts = {trial.number: trial.user_attrs["starts"] for trial in found}
    assert starts.pop(lost[0]) == 2
    assert set(starts.values()) == {1}  # the others left theirs on purpose

    for number, worker in zip(lost, shared.workers, strict=True):
        assert f"trial {number}: taken up again after process {worker.pid} on " in main.text
    best = json.loads((run / STUDY / "best_hyperparameters.json").read_text())
    assert best["value"] == max(trial.value for trial in found)
    assert "this worker ends; its trial is left to the others" in interrupted.text
    assert re.search(r"Study cnn_lstm-\w+: \d of 5 trials are finished", interrupted.text)
    assert "val_accuracy" in interrupted.text and "running" in interrupted.text  # the table
    assert "stopped by SIGTERM" in terminated.text
    logs = [path.read_text() for path in (run / "logs").glob("*.log")]
    assert len(logs) == 4
    assert sum("== tune-worker" in text for text in logs) == 3
    record = json.loads((run / "run.json").read_text())
    for name in ("settings", "dataset", "created"):
        assert record[name] == shared.record[name]
    assert not list(run.rglob(".partial-*"))


def test_a_worker_elsewhere_ends_the_study_of_a_run_that_was_killed(root: Path, shared: Shared):
    """They share a database alone: the worker has a copy of the run's directory, and sees by its
    heartbeat that the run is dead. The run, started again, takes the study as it is."""
    run, database, copy = root / "run", root / "study.db", root / "copy"
    shutil.rmtree(run / "tuner_models")  # of the other test
    shutil.copytree(run / "dataset", copy / "dataset")
    shutil.copy(run / "run.json", copy)
    storage = f"--config.tune_params.storage=sqlite:///{database}"
    main = launched(root, "tune", storage)
    worker = Process(
        root,
        *("capfinder", "tune-worker", "--run", copy, "--wait_minutes", 5),
        *("--storage", f"sqlite:///{database}"),
    )
    try:
        lost = [in_the_middle_of(main, database)]
        in_the_middle_of(worker, database)
        main.kill()
        assert worker.wait(SECONDS) == 0, worker.text
    finally:
        ended([main, worker])
    found = trials(database)
    assert_each_ran_once(found, lost, worker)
    assert [trial.user_attrs["starts"] for trial in found if trial.number in lost] == [2]
    assert "Study" in worker.text and "5 of 5 trials are finished" in worker.text

    again = launched(root, "tune", storage)
    assert again.wait(SECONDS) == 0, again.text
    assert [trial.user_attrs for trial in trials(database)] == [t.user_attrs for t in found]
    best = json.loads((run / STUDY / "best_hyperparameters.json").read_text())
    assert best["value"] == max(trial.value for trial in found)


@pytest.fixture
def run_dir(root: Path, shared: Shared, tmp_path: Path) -> Path:
    """A copy of the run's directory, with its study."""
    return Path(shutil.copytree(root / "run", tmp_path / "run"))


def test_a_worker_on_a_finished_study_says_that_it_is_finished(run_dir: Path, capsys, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")
    with jax_settings.restored():
        assert cli.main(["tune-worker", "--run", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "The study is finished: it has 5 of 5 trials" in shown and "goes on" not in shown


def change_settings(run_dir: Path, **changes: Any) -> None:
    """Of run.json; `group__name=value`."""
    record = json.loads((run_dir / "run.json").read_text())
    for key, value in changes.items():
        group, _, name = key.partition("__")
        record["settings"][group][name] = value
    (run_dir / "run.json").write_text(json.dumps(record))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a worker says that ends with exit code 2 and one line."""
    assert cli.main(["tune-worker", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_worker_says_what_there_is_not(run_dir: Path, tmp_path: Path, capsys, monkeypatch):
    def refused(*options: str) -> str:
        return refusal(capsys, "--run", run_dir, *options)

    absent = refusal(capsys, "--run", tmp_path / "absent")
    assert "has no run.json" in absent and "--wait_minutes" in absent
    waited = refusal(capsys, "--run", tmp_path / "absent", "--wait_minutes", "0.0001")
    assert "has no run.json" in waited and "--wait_minutes" not in waited
    assert "0 or more" in refused("--wait_minutes", "-1")
    assert "timeout_minutes=0" in refused("--timeout_minutes", "0")
    nowhere = tmp_path / "nowhere.db"
    assert "holds no study" in refused("--storage", f"sqlite:///{nowhere}")
    assert not nowhere.exists()

    change_settings(run_dir, shared_params__batch_size=8, tune_params__patience=3)
    differs = refused()
    assert "differs in batch_size (16 there, 8 here), patience (10 there, 3 here)" in differs
    change_settings(run_dir, tune_params__max_trials=0)
    assert "the run has no tuning" in refused()
    change_settings(run_dir, tune_params__max_trials=TRIALS, tune_params__colour="red")
    assert "must be the run's" in refused()
    (run_dir / "run.json").write_text('{"settings": 1}')
    assert "isn't the record of a run" in refused()


def test_a_password_comes_from_the_environment_or_the_command_line(
    run_dir: Path, capsys, monkeypatch
):
    change_settings(run_dir, tune_params__storage="postgresql://me:***@127.0.0.1:9/studies")
    monkeypatch.delenv("CAPFINDER_STORAGE", raising=False)
    asked = refusal(capsys, "--run", run_dir)
    assert "CAPFINDER_STORAGE" in asked and "--storage" in asked
    url = "postgresql://me:hush-hush@127.0.0.1:9/studies"
    monkeypatch.setenv("CAPFINDER_STORAGE", url)
    for options in ((), ("--storage", url.replace("hush-hush", "hush-again"))):
        answer = refusal(capsys, "--run", run_dir, *options)
        assert "can't be opened" in answer and "me:***@" in answer and "hush" not in answer
