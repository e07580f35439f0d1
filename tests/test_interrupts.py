"""Ctrl-C and SIGTERM in every stage of real, tiny runs: how they end, what is kept and said, and
that the same command then ends like a run that nothing disturbed.

The runs in this process get real signals at known moments. Those in processes of their own, which
SIGTERM ends for good, go on meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import jax_settings
import numpy as np
import pytest
from csv_input import read_id, row, write
from in_process import shown_by
from signalled import COMPILING, Signals

from capfinder import cli, log, models
from capfinder.errors import StoppedError
from capfinder.interrupts import Interrupt

TESTS = Path(__file__).parent
CLASSES, RUNS, READS, EPOCHS, TRIALS = 3, 2, 40, 4, 3
SLOW_RATE = 1e-6  # of the first trial, which learns nothing with it
VALUES: dict[str, Any] = {
    "etl_params": {"use_remote_dataset_version": "", "examples_per_class": None},
    "tune_params": {
        "tuning_strategy": "random_search",
        "max_trials": TRIALS,
        "max_epochs_hpt": 2,
        "patience": 5,
    },
    "train_params": {"max_epochs_final_model": EPOCHS, "patience": EPOCHS},
    "shared_params": {
        "num_classes": CLASSES,
        "batch_size": 16,
        "target_length": 24,
        "train_test_fraction": 0.8,
        "train_val_fraction": 0.75,
        "dtype": "float32",
    },
    "model_params": {"learning_rate": SLOW_RATE},
    "search_params": {
        "layers": {"choices": [1]},
        "units": {"choices": [8]},
        "dropout": {"choices": [0.1]},
        "learning_rate": {"choices": [SLOW_RATE, 0.02, 0.05]},
    },
    "tracking_params": {"mode": "off"},
    "export_params": {"formats": ["keras", "h5"]},
}
# Words of a line that is logged in the middle of each stage.
MIDDLE = {
    "etl": "Reading CSV files: ",
    "tune": "Tuning: 2 of ",
    "train": "epoch 2/",
    "evaluate": "evaluation: ",
    "export": "Exporting: 1 of ",
}


class Run:
    """The command with an output directory of its own, as often as a test likes."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.output_dir = root, root / name
        self.shown = ""

    def __call__(self, *options: str, signals: Mapping[str, Sequence[int]] | None = None) -> int:
        """In this process. signals: at the first line with these words, in this order."""
        handlers = [signal.getsignal(number) for number in (SIGINT, SIGTERM)]
        plan = Signals(*(signals or {}).items())
        with plan:
            code, self.shown = shown_by(lambda: cli.launch([*self._arguments(), *options]))
        assert plan.are_sent, self.shown
        assert [signal.getsignal(number) for number in (SIGINT, SIGTERM)] == handlers
        assert not list(self.output_dir.rglob(".partial-*"))
        return code

    def alone(self, *plan: tuple[str, Sequence[int]], before: str = "") -> tuple[int, str]:
        """In a process of its own: its exit code and what it showed. before: for the shell."""
        script = [sys.executable, str(TESTS / "signalled.py"), json.dumps(plan)]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        ended = subprocess.run(
            ["sh", "-c", f'{before} exec "$@"', "sh", *script, *self._arguments()],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        return ended.returncode, ended.stdout

    def _arguments(self) -> list[str]:
        return [f"--config={self.root / 'train.json'}", f"--output_dir={self.output_dir}"]

    def read(self, name: str) -> Any:
        return json.loads((self.output_dir / name).read_text())

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        stages: dict[str, dict[str, Any]] = self.read("run.json")["stages"]
        return stages

    @property
    def summary(self) -> dict[str, tuple[str, ...]]:
        """The last table: stage -> time, outcome, why."""
        rows: list[list[str]] = []
        for line in self.shown[self.shown.rindex("Finished in") :].splitlines():
            if line.startswith("│"):
                cells = [cell.strip() for cell in line.strip("│").split("│")]
                if cells[0]:
                    rows.append(cells)
                else:  # the line above goes on
                    rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
        return {cells[0]: tuple(cells[1:]) for cells in rows}

    def results(self) -> dict[str, Any]:
        """All that must be the same after any interruption."""
        (classifier,) = self.output_dir.glob("best_model/classifier/classifier_*.keras")
        trials = self.read("run.json")["tuning"]["trials"]
        metrics = self.read("evaluation/metrics.json")
        figures = ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")
        dataset = sorted(self.output_dir.glob("dataset/cap_data/1.0.0/*.tfrecord-*"))
        return {
            "dataset": {path.name: path.read_bytes() for path in dataset},
            "trials": [(one["state"], one["value"], one["params"]) for one in trials],
            "history": [[epoch[name] for name in figures] for epoch in metrics["history"]],
            "test": metrics["test"],
            "interrupted": metrics["interrupted"],
            "warnings": metrics["warnings"],
            "predictions": (self.output_dir / "evaluation/predictions_test.csv").read_bytes(),
            "weights": zipfile.ZipFile(classifier).read("model.weights.h5"),
        }

    def assert_is_like(self, other: "Run") -> None:
        mine, theirs = self.results(), other.results()
        for name in theirs:
            assert mine[name] == theirs[name], name
        assert "by Ctrl-C" not in (self.output_dir / "report.html").read_text()
        assert self.read("run.json")["interrupted"] == {}


def write_caps(directory: Path) -> None:
    """Signals whose mean tells the class."""
    for cap_class in range(CLASSES):
        for run in range(RUNS):
            rng = np.random.default_rng([cap_class, run])
            rows = [
                row(read_id(cap_class, run, n), cap_class, rng.normal(cap_class - 1, 1, size=30))
                for n in range(READS)
            ]
            write(directory / f"data__cap_{cap_class}_run{run}.csv", rows)


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("interrupts")
    write_caps(root / "caps")
    values = json.loads(json.dumps(VALUES))
    values["etl_params"]["caps_data_dir"] = str(root / "caps")
    values["runtime_params"] = {"compilation_cache_dir": str(root / "xla")}
    (root / "train.json").write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        patched.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")
        patched.setattr(log, "PLAIN_LINE_SECONDS", 0.0)  # each step of a bar is a line
        yield root


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Run:
    run = Run(root, "undisturbed")
    assert run() == 0, run.shown
    return run


@pytest.fixture(scope="module")
def processes(root: Path, undisturbed: Run) -> Iterator[dict[str, Future[Any]]]:
    """What happens in processes of their own, one after the other, beside the tests of this one."""

    def terminated() -> tuple[Run, list[tuple[int, str]]]:
        """One run ended by SIGTERM in the middle of each stage, then one that was started to ignore
        Ctrl-C."""
        run = Run(root, "terminated")
        ends = [run.alone((MIDDLE[stage], [SIGTERM])) for stage in MIDDLE]
        ignored = (MIDDLE["export"], [SIGINT])
        return run, [*ends, run.alone(ignored, before="trap '' INT;")]

    def compiling() -> list[tuple[int, str]]:
        run = Run(root, "compiling")
        return [run.alone((COMPILING, signals)) for signals in ([SIGTERM], [SIGINT, SIGINT])]

    with ThreadPoolExecutor(1) as pool:
        yield {"terminated": pool.submit(terminated), "compiling": pool.submit(compiling)}


def test_ctrl_c_in_etl_leaves_nothing_half_made_and_the_rerun_makes_it(
    root: Path, undisturbed: Run, processes: object
) -> None:
    run = Run(root, "etl")
    for words in ("Reading CSV files: ", "Parsing chosen reads: ", "Writing shards: "):
        assert run("--stage=etl", signals={words: [SIGINT]}) == 130, run.shown
        assert "error: etl: stopped by Ctrl-C; the same command goes on from here" in run.shown
        assert not list(run.output_dir.glob("dataset/cap_data/*"))
        assert not (run.output_dir / "run.json").exists()
    assert run("--stage=etl") == 0, run.shown
    made, same = (
        {path.name: path.read_bytes() for path in r.output_dir.glob("dataset/cap_data/1.0.0/*.tf*")}
        for r in (run, undisturbed)
    )
    assert made == same and made


def test_ctrl_c_in_tuning_goes_on_with_the_best_so_far_and_a_rerun_ends_the_study(
    root: Path, undisturbed: Run
) -> None:
    run = Run(root, "tune")

    def ended_early() -> tuple[dict[str, Any], str]:
        metrics = run.read("evaluation/metrics.json")
        assert run.read("run.json")["interrupted"] == metrics["interrupted"]
        (said,) = (line for line in metrics["warnings"] if "Ctrl-C" in line)
        assert said in (run.output_dir / "report.html").read_text()
        assert said in run.shown and "ended by Ctrl-C" in run.summary["tune"][1]
        return metrics, said

    twice = [SIGINT, SIGINT]
    assert run(signals={MIDDLE["tune"]: twice}) == 130, run.shown
    assert "error: tune: stopped by Ctrl-C" in run.shown
    assert not (run.output_dir / "evaluation").exists()

    assert run(signals={MIDDLE["tune"]: [SIGINT]}) == 0, run.shown
    metrics, said = ended_early()
    assert metrics["interrupted"] == {"tune": {"trials": 0, "max_trials": TRIALS}}
    assert said.endswith("after 0 of 3 trials; model_params were trained.")
    assert metrics["hyperparameters"]["learning_rate"] == SLOW_RATE
    slow = run.read("run.json")["exports"]

    assert run(signals={"trial 0: complete": [], "Tuning: ": [SIGINT]}) == 0, run.shown
    metrics, said = ended_early()
    assert metrics["interrupted"] == {"tune": {"trials": 1, "max_trials": TRIALS}}
    assert said.endswith("after 1 of 3 trials; the best of them was trained.")
    # The first trial is that of model_params, so its training and its export are there.
    assert run.summary["train"][2] == "reused: already trained to its end"
    assert run.summary["evaluate"][2].startswith("anew")
    assert run.summary["export"][0] == "earlier" and run.read("run.json")["exports"] == slow

    assert run() == 0, run.shown
    assert run.read("run.json")["tuning"]["trial"] != 0  # one that learns
    assert run.summary["etl"][2].startswith("reused")
    assert run.summary["tune"][2] == "went on: 1 of 3 trials were there"
    assert run.summary["train"][2].startswith("new: no checkpoint of these")
    assert "Ctrl-C" not in run.shown
    run.assert_is_like(undisturbed)


def test_ctrl_c_from_training_on_keeps_what_is_whole_and_a_rerun_ends_as_ever(
    root: Path, undisturbed: Run
) -> None:
    run = Run(root, "train")
    assert run(signals={MIDDLE["train"]: [SIGINT, SIGINT]}) == 130, run.shown
    assert "error: train: stopped by Ctrl-C" in run.shown
    assert not (run.output_dir / "evaluation").exists()

    assert run(signals={"epoch 3/": [SIGINT]}) == 0, run.shown
    metrics = run.read("evaluation/metrics.json")
    assert metrics["stopped"] == "interrupted" and len(metrics["history"]) == 3
    assert metrics["interrupted"] == {"train": {"epochs": 3, "max_epochs": EPOCHS}}
    assert run.read("run.json")["interrupted"] == metrics["interrupted"]
    (said,) = (line for line in metrics["warnings"] if "Ctrl-C" in line)
    assert said in run.shown and said in (run.output_dir / "report.html").read_text()
    assert "ended by Ctrl-C" in run.summary["train"][1]
    assert run.summary["train"][2].startswith("went on from epoch 3,")
    assert run.summary["tune"][2] == "reused: the study of these settings has its 3 trials"
    assert list(run.output_dir.glob("best_model/classifier/*.keras"))

    exported = run.stages["export"]["key"]
    before = (run.output_dir / "evaluation" / "metrics.json").read_bytes()
    assert run(signals={MIDDLE["evaluate"]: [SIGINT]}) == 130, run.shown
    assert "error: evaluate: stopped by Ctrl-C; the same command goes on from here" in run.shown
    assert (run.output_dir / "evaluation" / "metrics.json").read_bytes() == before
    assert run.stages["train"]["why"].startswith("went on from epoch 4,")

    assert run(signals={MIDDLE["export"]: [SIGINT]}) == 130, run.shown
    assert "error: export: stopped by Ctrl-C; the same command goes on from here" in run.shown
    assert run.read("evaluation/metrics.json")["interrupted"] == {}
    assert run.stages["export"]["key"] == exported  # not noted as done anew

    assert run() == 0, run.shown
    assert run.summary["train"][2] == "reused: already trained to its end"
    assert run.summary["export"][2].startswith("anew")
    run.assert_is_like(undisturbed)


def test_the_summary_says_what_was_reused_since_when_and_what_differs(
    root: Path, undisturbed: Run
) -> None:
    run = Run(root, "reused")
    shutil.copytree(undisturbed.output_dir, run.output_dir)
    first = run.stages
    assert run() == 0, run.shown
    assert run.summary["etl"][2] == ("reused; the local version has the same content and settings")
    for stage in ("train", "evaluate", "export"):
        assert run.summary[stage][0] == "earlier"
        assert run.summary[stage][1] == first[stage]["summary"]
        assert run.summary[stage][2] == f"reused: done {first[stage]['finished']}"
    for stage in ("etl", "tune"):  # how long it took is kept
        assert run.stages[stage]["seconds"] == first[stage]["seconds"]

    report = run.output_dir / "report.html"
    report.unlink()
    assert run() == 0 and report.exists()  # and nothing else
    assert run.summary["evaluate"][0] == run.summary["export"][0] == "earlier"

    assert run("--stage=evaluate", "--config.train_params.max_epochs_final_model=5") == 2
    assert "holds no finished training of these settings" in run.shown
    assert run("--stage=etl,train", "--config.train_params.max_epochs_final_model=5") == 0
    (previous,) = (run.output_dir / "previous").iterdir()  # by the command before
    assert run.summary["tune"][2] == "not asked for"
    assert run.summary["train"][2].startswith("new: ")
    assert run.summary["evaluate"] == ("-", "", "not asked for")

    shutil.rmtree(previous)
    assert run("--config.train_params.patience=3", "--config.shared_params.batch_size=12") == 0
    (previous,) = (run.output_dir / "previous").iterdir()
    after = run.shown[run.shown.rindex("Finished in") :]
    assert f"The earlier results are in {previous}: " in after
    for said in (
        "train_params.patience=3 (was 4)",
        "train_params.max_epochs_final_model=4 (was 5)",
        "shared_params.batch_size=12 (was 16)",
    ):
        assert said in after
    assert "dataset 1" not in after.split("The earlier results are in")[1].splitlines()[0]
    assert run.summary["tune"][2].startswith("new: ")

    assert run("--config.tune_params.max_trials=0", "--stage=etl,tune,train") == 0
    assert run.summary["tune"] == ("-", "", "tune_params.max_trials=0: model_params are trained")


def test_handlers_come_back_after_an_error_too(root: Path) -> None:
    """As after every run of these tests."""
    run = Run(root, "failed")
    assert run("--config.shared_params.num_classes=7") == 2
    assert "missing class" in run.shown


def test_presses_that_came_while_the_interpreter_was_held_up_all_count() -> None:
    """For all of them the handler runs once."""
    interrupt = Interrupt()
    with interrupt.graceful("ending early"):
        interrupt._pressed = 2  # as the watchdog has counted them
        with pytest.raises(StoppedError):
            interrupt._on_sigint(SIGINT, None)
    with interrupt.graceful("ending early"):  # a new stage, a new count
        interrupt._on_sigint(SIGINT, None)
        assert interrupt.requested


class Signalled:
    """Gets a signal where the interpreter ignores whatever is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), SIGINT)


def test_a_signal_that_comes_while_errors_are_ignored_comes_again() -> None:
    ends = time.monotonic() + 30
    with pytest.raises(StoppedError), Interrupt().installed():
        Signalled()
        while time.monotonic() < ends:
            time.sleep(0.01)


def test_sigterm_ends_every_stage_with_143_and_an_ignored_ctrl_c_none(
    undisturbed: Run, processes: dict[str, Future[Any]]
) -> None:
    run, ends = processes["terminated"].result()
    for stage, (code, shown) in zip(MIDDLE, ends[:-1], strict=True):
        assert code == 143, shown
        assert f"error: {stage}: stopped by SIGTERM; the same command goes on from" in shown
    code, shown = ends[-1]
    assert code == 0, shown
    assert "Ctrl-C is ignored" in shown
    assert "== evaluate ==" not in shown  # it was whole when the export was ended
    run.assert_is_like(undisturbed)


def test_signals_end_a_compilation_too(processes: dict[str, Future[Any]]) -> None:
    for code, what, (ended, shown) in zip(
        (143, 130), ("SIGTERM", "Ctrl-C"), processes["compiling"].result(), strict=True
    ):
        assert ended == code, shown
        assert f"error: tune: stopped by {what}; the same command goes on from here" in shown


def test_no_thread_of_a_run_stays() -> None:
    assert "signal-watchdog" not in {thread.name for thread in threading.enumerate()}
