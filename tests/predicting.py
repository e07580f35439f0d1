"""A small model that the pipeline has trained, and `capfinder predict` and `evaluate` with it."""

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path

import in_process
import jax_settings
import numpy as np
import pytest
from csv_input import write_classes

from capfinder import cli

LENGTH, CLASSES = 24, 3
NAMES = ("cap_0", "cap_1", "cap_2")
MODEL = {
    "conv_filters": (4,),
    "conv_kernels": (3,),
    "conv_dropouts": (0.1,),
    "lstm_units": (4,),
    "lstm_dropouts": (0.1,),
    "dense_units": 8,
    "learning_rate": 0.01,
}


class Ended(in_process.Ended):
    @property
    def lines(self) -> list[str]:
        return (self.output_dir / "predictions.csv").read_text("utf-8").splitlines()

    @property
    def rows(self) -> list[dict[str, str]]:
        with (self.output_dir / "predictions.csv").open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    @property
    def rejects(self) -> list[tuple[str, ...]]:
        with (self.output_dir / "rejects.csv").open(newline="") as stream:
            return [tuple(line) for line in csv.reader(stream)][1:]

    def probabilities(self) -> np.ndarray:
        return np.array([[float(r[f"p_{c}"]) for c in range(CLASSES)] for r in self.rows])


def capfinder(output_dir: Path, *arguments: object) -> Ended:
    words = [str(argument) for argument in arguments]
    return Ended(*in_process.shown_by(lambda: cli.main(words)), output_dir)


def predict(run_dir: Path, caps: Path, output_dir: Path, *options: object) -> Ended:
    given = ("--model", run_dir, "--caps_data_dir", caps, "--output_dir", output_dir)
    return capfinder(output_dir, "predict", *given, *options)


@contextlib.contextmanager
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a home of its own; JAX is as it was afterwards."""
    root = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        patched.setenv("HOME", str(root / "home"))
        patched.delenv("XDG_CACHE_HOME", raising=False)
        yield root


def evaluate(run_dir: Path, caps: Path, output_dir: Path, *options: object) -> Ended:
    given = ("--model", run_dir, "--caps_data_dir", caps, "--output_dir", output_dir)
    return capfinder(output_dir, "evaluate", *given, *options)


def train(root: Path, output_dir: Path, **groups: dict[str, object]) -> Path:
    """A run on the caps in root, trained for an epoch and evaluated."""
    values: dict[str, dict[str, object]] = {
        "etl_params": {
            "caps_data_dir": str(root / "caps"),
            "use_remote_dataset_version": "",
            "examples_per_class": None,
        },
        "tune_params": {"max_trials": 0},
        "train_params": {"max_epochs_final_model": 1},
        "shared_params": {
            "num_classes": CLASSES,
            "batch_size": 16,
            "target_length": LENGTH,
            "train_test_fraction": 0.5,
            "output_dir": str(output_dir),
        },
        "model_params": MODEL,
        "runtime_params": {"compilation_cache_dir": str(root / "xla")},
        "tracking_params": {"mode": "off"},
    }
    for name, group in groups.items():
        values[name] = values.get(name, {}) | group
    path = root / "train.json"
    path.write_text(json.dumps(values))
    stages = ("--config_file", path, "--stage=etl,train,evaluate")
    ended = capfinder(output_dir, "train-model", *stages)
    assert ended.code == 0, ended.shown
    return output_dir


_made: list[tuple[Path, Path]] = []


def trained_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The caps, and a run that was trained on them; one for all modules of a process."""
    if not _made:
        root = tmp_path_factory.mktemp("trained")
        caps = write_classes(root / "caps", classes=CLASSES, runs=2, reads=60)
        _made.append((caps, train(root, root / "run")))
    return _made[0]


def table(ended: Ended) -> list[list[str]]:
    """The cells of all tables' rows."""
    return [
        [part.strip() for part in line.strip("│").split("│")]
        for line in ended.shown.splitlines()
        if line.startswith("│")
    ]
