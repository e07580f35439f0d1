"""Several processes that train one model, through the command line, on the loopback interface."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from csv_input import write_classes

from capfinder import cli, settings
from capfinder.errors import SettingsError
from capfinder.training import hosts, reading

TESTS = Path(__file__).parent
EPOCHS, STEPS_PER_EPOCH = 8, 9  # 144 reads in batches of 16
SECONDS = 100  # after which a process that should have ended hangs


class Processes:
    """Started with the same command, `count` of them; their output goes to files.

    beside: an option that the others have and process 0 hasn't."""

    def __init__(
        self, root: Path, output_dir: Path, count: int, *options: str, beside: str | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            TESTS / "host_process.py",
            f"--config={root / 'train.json'}",
            f"--output_dir={output_dir}",
            "--stage=etl,tune,train",
            *options,
        ]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        self.shown, self.running = [], []
        for index in range(count):
            together = {
                "distributed": "true",
                "coordinator_address": f"127.0.0.1:{port}",
                "num_processes": count,
                "process_id": index,
            }
            added = [f"--config.runtime_params.{key}={value}" for key, value in together.items()]
            if beside is not None and index:
                added.append(beside)
            self.shown.append(root / f"{output_dir.name}_{time.monotonic_ns()}")
            with self.shown[-1].open("w") as stream:
                self.running.append(
                    subprocess.Popen(
                        command + (added if count > 1 else []),
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                    )
                )

    def send(self, number: int, signum: int, *, after: str) -> None:
        """Signals one of them once process 0 has shown a text."""
        deadline = time.monotonic() + SECONDS
        while after not in self.text(0):
            assert time.monotonic() < deadline and self.running[0].poll() is None, self.text(0)
            time.sleep(0.02)
        self.running[number].send_signal(signum)

    def ended(self) -> list[int]:
        """Their exit codes."""
        try:
            return [process.wait(SECONDS) for process in self.running]
        finally:
            for process in self.running:
                process.kill()

    def text(self, number: int) -> str:
        """So far: it may end within a character."""
        return self.shown[number].read_text(errors="replace")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hosts")
    write_classes(root / "caps", classes=3, runs=2, reads=40)
    values: dict[str, Any] = {
        "etl_params": {
            "use_remote_dataset_version": "",
            "examples_per_class": None,
            "caps_data_dir": str(root / "caps"),
        },
        "tune_params": {"max_trials": 1, "max_epochs_hpt": 1},
        "train_params": {"max_epochs_final_model": EPOCHS, "patience": EPOCHS},
        "shared_params": {
            "num_classes": 3,
            "batch_size": 16,
            "target_length": 24,
            "train_test_fraction": 0.8,
            "train_val_fraction": 0.75,
            "dtype": "float32",
            "use_augmentation": False,
        },
        "runtime_params": {"compilation_cache_dir": str(root / "xla")},
        "tracking_params": {"mode": "off"},
    }
    (root / "train.json").write_text(json.dumps(values))
    return root


def outcome(output_dir: Path) -> dict[str, Any]:
    (path,) = output_dir.glob("checkpoints/*/outcome.json")
    return json.loads(path.read_text())


def last_state(output_dir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint: weights, statistics, optimiser."""
    (latest,) = output_dir.glob("checkpoints/*/latest")
    step = max(int(path.name) for path in latest.iterdir())
    assert step == EPOCHS * STEPS_PER_EPOCH
    return reading.read_arrays(latest / str(step) / "state")


@pytest.fixture(scope="module")
def story(root: Path) -> dict[str, Any]:
    """A training by two processes that Ctrl-C ends, that goes on until one of them is killed, and
    that goes on to its end; and the same by one process that nothing disturbed."""
    told: dict[str, Any] = {}
    out = root / "two"
    ended_early = Processes(root, out, 2)
    ended_early.send(1, signal.SIGINT, after="epoch 2/")
    told["ended early"] = (ended_early.ended(), ended_early.text(0), ended_early.text(1))
    told["early outcome"] = outcome(out)
    killed = Processes(root, out, 2)
    killed.send(1, signal.SIGKILL, after="epoch 5/")
    told["killed"] = (killed.ended(), killed.text(0), killed.text(1))
    # It is process 0 that says where the data lie, as each for itself might find another place.
    to_the_end = Processes(root, out, 2, beside="--config.runtime_params.data_residency=host")
    told["to the end"] = (to_the_end.ended(), to_the_end.text(0), to_the_end.text(1))
    alone = Processes(root, root / "one", 1)
    assert alone.ended() == [0], alone.text(0)
    return told


def test_two_processes_end_with_the_weights_of_one(root, story):
    """Also when they were stopped and killed in between."""
    codes, shown, _ = story["to the end"]
    assert codes == [0, 0], shown
    assert "Each of 2 devices takes 8 reads of a batch" in shown
    one, two = last_state(root / "one"), last_state(root / "two")
    assert one.keys() == two.keys() and one["float32"].size > 1000
    for dtype, array in one.items():
        np.testing.assert_allclose(two[dtype], array, rtol=0, atol=1e-5)
    histories = [outcome(root / name)["history"] for name in ("one", "two")]
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        curves = [[row[name] for row in history] for history in histories]
        assert len(curves[0]) == EPOCHS
        np.testing.assert_allclose(*curves, rtol=0, atol=1e-5)


def test_ctrl_c_in_any_process_ends_the_training_in_all(story):
    codes, shown, beside = story["ended early"]
    assert codes == [0, 0], shown + beside
    assert "ended by Ctrl-C" in shown and "Ctrl-C: finishing" in beside
    assert story["early outcome"]["stopped"] == "interrupted"
    assert 2 <= len(story["early outcome"]["history"]) < EPOCHS


def test_when_a_process_dies_the_others_end_with_a_line(story):
    codes, shown, _ = story["killed"]
    assert codes == [1, -signal.SIGKILL]
    (line,) = (line for line in shown.splitlines() if line.startswith("error: "))
    assert "another process died, or the network failed" in line
    assert "goes on from the last checkpoint" in line


def test_the_main_process_alone_writes_and_speaks(root, story):
    for _, shown, beside in (story["ended early"], story["to the end"]):
        assert "== train ==" in shown and f"epoch {EPOCHS}/" in story["to the end"][1]
        said = [line for line in beside.splitlines() if "[Gloo]" not in line]
        assert all(line.startswith("Ctrl-C") for line in said), beside
    assert len(list((root / "two" / "logs").iterdir())) == 3  # one for each time
    assert len(list((root / "two" / "checkpoints").iterdir())) == 1


def test_when_the_main_process_fails_the_others_end_with_its_code(root):
    missing = f"--config.etl_params.caps_data_dir={root / 'nowhere'}"
    failed = Processes(root, root / "failed", 2, missing)
    codes, main, beside = failed.ended(), failed.text(0), failed.text(1)
    assert codes == [2, 2], main + beside
    (line,) = (line for line in main.splitlines() if line.startswith("error: "))
    reason = line.removeprefix("error: ").split(" [log:")[0]
    assert beside.strip() == f"error: process 0 ended: {reason}"


def test_what_only_processes_together_need_is_refused_without_them():
    for name, value in (("coordinator_address", "a:1"), ("num_processes", 2), ("process_id", 0)):
        with pytest.raises(SettingsError, match=r"only for runtime_params\.distributed=true"):
            settings.check({"runtime_params": {name: value}})
    together = {"distributed": True, "num_processes": 2, "process_id": 2}
    with pytest.raises(SettingsError, match="process_id=2: must be below"):
        settings.check({"runtime_params": together})


def test_without_a_cluster_the_processes_must_be_told_where_to_meet(root, capsys):
    options = [f"--config={root / 'train.json'}", f"--output_dir={root / 'nothing'}"]
    assert cli.launch([*options, "--config.runtime_params.distributed=true"]) == 2
    shown = capsys.readouterr().err
    assert "the processes can't meet" in shown and "coordinator_address" in shown
    assert not (root / "nothing").exists()


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_a_broken_sum_is_known_by_its_text_whatever_raises_it(kind):
    assert hosts._is_of_xla(kind("UNKNOWN: Gloo all-reduce failed: connection closed by peer"))


def test_an_error_of_the_program_is_not_taken_for_a_broken_sum():
    for error in (ValueError("shapes (2,) and (3,)"), KeyError("UNKNOWN: x"), ValueError()):
        assert not hosts._is_of_xla(error)


def test_one_process_is_the_main_one_and_asks_itself():
    assert hosts.is_main()
    hosts.tell("anything")
    answers = iter([False, True])
    ask = hosts.agreed(lambda: next(answers))
    assert [ask(), ask()] == [False, True]
