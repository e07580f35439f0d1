"""`capfinder predict`, the whole command, with a small model that the pipeline has trained."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax_settings
import numpy as np
import pytest
from csv_input import read_id, row, rows, write, write_classes

from capfinder import cli, files
from capfinder.evaluation import predictions
from capfinder.stages import inference

LENGTH, CLASSES = 24, 3
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
MODEL = {
    "conv_filters": (4,),
    "conv_kernels": (3,),
    "conv_dropouts": (0.1,),
    "lstm_units": (4,),
    "lstm_dropouts": (0.1,),
    "dense_units": 8,
    "learning_rate": 0.01,
}


@dataclass(frozen=True)
class Ended:
    code: int
    shown: str
    output_dir: Path

    @property
    def lines(self) -> list[str]:
        return (self.output_dir / "predictions.csv").read_text("utf-8").splitlines()

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(self.lines))

    @property
    def rejects(self) -> list[tuple[str, ...]]:
        with (self.output_dir / "rejects.csv").open(newline="") as stream:
            return [tuple(line) for line in csv.reader(stream)][1:]

    def probabilities(self) -> np.ndarray:
        return np.array([[float(r[f"p_{c}"]) for c in range(CLASSES)] for r in self.rows])


def capfinder(output_dir: Path, *arguments: object) -> Ended:
    with io.StringIO() as shown, contextlib.redirect_stdout(shown):
        with contextlib.redirect_stderr(shown):
            code = cli.main([str(argument) for argument in arguments])
        return Ended(code, shown.getvalue(), output_dir)


def predict(run_dir: Path, caps: Path, output_dir: Path, *options: object) -> Ended:
    given = ("--model", run_dir, "--caps_data_dir", caps, "--output_dir", output_dir)
    return capfinder(output_dir, "predict", *given, *options)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own, and JAX as it was afterwards."""
    root = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        patched.setenv("HOME", str(root / "home"))
        patched.delenv("XDG_CACHE_HOME", raising=False)
        yield root


def train(root: Path, output_dir: Path, **groups: dict[str, object]) -> Path:
    """A run on the caps in root, trained for an epoch and evaluated."""
    values = {
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


@pytest.fixture(scope="module")
def caps(surroundings: Path) -> Path:
    return write_classes(surroundings / "caps", classes=CLASSES, runs=2, reads=60)


@pytest.fixture(scope="module")
def run_dir(surroundings: Path, caps: Path) -> Path:
    return train(surroundings, surroundings / "run")


@pytest.fixture(scope="module")
def predicted(run_dir: Path, caps: Path, surroundings: Path) -> Ended:
    ended = predict(run_dir, caps, surroundings / "predicted")
    assert ended.code == 0, ended.shown
    return ended


# What is predicted


def test_a_read_of_the_test_set_gets_the_very_line_of_the_evaluation(run_dir, predicted):
    known = (run_dir / "evaluation" / "predictions_test.csv").read_text("utf-8").splitlines()
    assert len(known) == 1 + CLASSES * 60
    assert known[0] == predicted.lines[0]
    assert set(known) < set(predicted.lines)


def test_every_read_has_its_row_in_the_order_of_the_files_and_their_lines(caps, predicted):
    expected = [
        tuple(line.split(",")[:2])
        for path in sorted(caps.iterdir())
        for line in path.read_text().splitlines()[1:]
    ]
    assert [(r["read_id"], r["cap_class"]) for r in predicted.rows] == expected
    assert len(expected) == CLASSES * 2 * 60


def test_the_predicted_class_is_the_likeliest_and_has_its_name(predicted):
    best = predicted.probabilities().argmax(axis=1)
    assert [int(r["predicted_cap_class"]) for r in predicted.rows] == best.tolist()
    assert {r["predicted_cap"] for r in predicted.rows} <= {"cap_0", "cap_1", "cap_2"}
    np.testing.assert_allclose(predicted.probabilities().sum(axis=1), 1, atol=2e-6)


def test_names_are_the_users_and_those_of_the_classes_in_the_files(
    surroundings, caps, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".capfinder").mkdir()
    mapping = tmp_path / ".capfinder" / "custom_mapping.json"
    mapping.write_text(json.dumps({"0": "a, b", "2": "deux"}))
    run = train(
        surroundings,
        tmp_path / "run",
        etl_params={"class_map": {"2": 0, "0": 1}},
        shared_params={"num_classes": 2},
    )
    ended = predict(run, caps, tmp_path / "out")
    assert ended.code == 0, ended.shown
    names = {r["predicted_cap_class"]: r["predicted_cap"] for r in ended.rows}
    assert names.items() <= {"0": "deux", "1": "a, b"}.items() and names
    assert {r["cap_class"] for r in ended.rows} == {"0", "1", "2"}  # as in the files
    assert "a, b" in ended.shown


def test_gzipped_files_give_the_same_and_others_in_the_directory_are_left_alone(
    run_dir, caps, predicted, tmp_path
):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, path in enumerate(sorted(caps.iterdir())):
        packed = gzip.compress(path.read_bytes())
        target = mixed / (f"{path.name}.gz" if number % 2 else path.name)
        target.write_bytes(packed if number % 2 else path.read_bytes())
    for name in ("metadata__cap_0.csv", ".hidden.csv", "notes.txt"):
        (mixed / name).write_text("no cap signals")
    ended = predict(run_dir, mixed, tmp_path / "out")
    assert ended.code == 0, ended.shown
    assert ended.lines == predicted.lines


def test_reads_without_a_label_or_with_that_of_an_unknown_cap_are_predicted_all_the_same(
    run_dir, predicted, tmp_path
):
    lines = rows(0, 0, 60)
    names = [line.split(",")[0] for line in lines]
    given = ["", "-99", '""', '"-99"', "7", '"1"']
    changed = [line.replace(",0,", f",{given[k % len(given)]},", 1) for k, line in enumerate(lines)]
    write(tmp_path / "caps" / "data.csv", changed)
    ended = predict(run_dir, tmp_path / "caps", tmp_path / "out")
    assert ended.code == 0, ended.shown
    shown = itertools.cycle(["", "-99", "", "-99", "7", "1"])
    assert [(r["read_id"], r["cap_class"]) for r in ended.rows] == list(
        zip(names, shown, strict=False)
    )
    labelled = {r["read_id"]: r for r in predicted.rows}
    assert all(labelled[r["read_id"]] | {"cap_class": ""} == r | {"cap_class": ""}
               for r in ended.rows)  # fmt: skip
    assert ended.rejects == []


def test_rows_that_cannot_be_used_are_kept_apart_with_their_reasons(run_dir, tmp_path):
    good = [row(read_id(9, k), 0, [0.5] * 30) for k in range(3)]
    bad = {
        3: (row("no-number", 0, "1.0,x,2.0"), "no-number", "not a number"),
        5: (row("too-large", 0, "1.0,70000,2.0"), "too-large", "not finite"),  # in float16
        6: (row("no-signal", "", ""), "no-signal", "empty signal"),
        7: (row("no-class", "cap_1", [1.0]), "no-class", "bad cap_class"),
        9: ('cut,,"1.0,2', "cut", "truncated line"),
    }
    lines = {2: good[0], 4: good[1], 8: good[2]} | {k: v[0] for k, v in bad.items()}
    path = write(tmp_path / "caps" / "b.csv", [lines[k] for k in sorted(lines)])
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    write(tmp_path / "caps" / "a.csv", [bad[3][0], *good])
    ended = predict(run_dir, tmp_path / "caps", tmp_path / "out")
    assert ended.code == 0, ended.shown
    assert ended.rejects == [
        ("a.csv", "2", "no-number", "not a number"),
        *(("b.csv", str(line), name, reason) for line, (_, name, reason) in bad.items()),
    ]
    assert [r["read_id"] for r in ended.rows] == 2 * [line.split(",")[0] for line in good]
    assert "Rejects: 6 of 12 rows" in ended.shown
    assert "not a number" in ended.shown


def test_the_summary_counts_reads_per_cap_and_names_the_files(predicted):
    counts = {name: 0 for name in ("cap_0", "cap_1", "cap_2")}
    sums = dict.fromkeys(counts, 0.0)
    for line, best in zip(predicted.rows, predicted.probabilities().max(axis=1), strict=True):
        counts[line["predicted_cap"]] += 1
        sums[line["predicted_cap"]] += best
    for name, count in counts.items():
        mean = f"{sums[name] / count:.1%}" if count else "-"
        cells = [name, str(count), f"{count / 360:.1%}", mean]
        assert any(
            [part.strip() for part in line.strip("│").split("│")] == cells
            for line in predicted.shown.splitlines()
        ), cells
    assert "360 reads in" in predicted.shown and "MB/s" in predicted.shown
    for name in ("predictions.csv", "rejects.csv"):
        assert str(predicted.output_dir / name) in predicted.shown
    (log_path,) = (predicted.output_dir / "logs").iterdir()
    assert "Predictions" in log_path.read_text()


# Batches


def test_batch_size_is_what_is_compiled_and_changes_no_result(
    run_dir, caps, predicted, tmp_path, monkeypatch
):
    shapes, logits = [], inference._logits

    def noted(variables, signals, **more):
        shapes.append(signals.shape)
        return logits(variables, signals, **more)

    monkeypatch.setattr(inference, "_logits", noted)
    ended = predict(run_dir, caps, tmp_path, "--batch_size", 50)
    assert ended.code == 0, ended.shown
    assert shapes == [(50, LENGTH)] * 8  # 360 reads, the last batch filled up
    np.testing.assert_allclose(ended.probabilities(), predicted.probabilities(), atol=2e-6)
    assert [r["read_id"] for r in ended.rows] == [r["read_id"] for r in predicted.rows]
    shapes.clear()
    assert predict(run_dir, caps, tmp_path).code == 0
    assert shapes == [(inference.BATCH_SIZES["cpu"], LENGTH)]


def test_a_run_with_a_batch_size_of_its_own_predicts_with_it(run_dir, caps, tmp_path, monkeypatch):
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    record = json.loads((copied / "run.json").read_text())
    record["settings"]["evaluate_params"]["batch_size"] = 48
    (copied / "run.json").write_text(json.dumps(record))
    ended = predict(copied, caps, tmp_path / "out")
    assert "in batches of 48 reads" in ended.shown
    ended = predict(copied, caps, tmp_path / "out", "--batch_size", 96)
    assert "in batches of 96 reads" in ended.shown


# What can go wrong


def failed(ended: Ended) -> str:
    """Its one line; nothing was written."""
    assert ended.code == 2, ended.shown
    assert not list(ended.output_dir.glob("*.csv")) and not list(ended.output_dir.glob(".partial*"))
    (line,) = [line for line in ended.shown.splitlines() if line.startswith("error: ")]
    return line


def test_a_model_that_is_none_is_said_in_one_line(run_dir, caps, tmp_path):
    assert "no such directory" in failed(predict(tmp_path / "none", caps, tmp_path / "o"))
    keras = tmp_path / "model.keras"
    keras.touch()
    assert "is a file; expected the output directory" in failed(
        predict(keras, caps, tmp_path / "o")
    )
    assert "holds no run.json" in failed(predict(caps, caps, tmp_path / "o"))
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "checkpoints")
    line = failed(predict(copied, caps, tmp_path / "o"))
    assert "no finished training" in line and "train stage" in line
    (copied / "run.json").write_text('{"settings": {"shared_params": {"target_lenght": 3}}}')
    assert "target_lenght" in failed(predict(copied, caps, tmp_path / "o"))
    (copied / "run.json").write_text("{}")
    assert "isn't a run's record" in failed(predict(copied, caps, tmp_path / "o"))


def test_input_that_is_none_is_said_in_one_line(run_dir, tmp_path):
    assert "no such directory" in failed(predict(run_dir, tmp_path / "none", tmp_path / "o"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no *.csv or *.csv.gz file" in failed(predict(run_dir, empty, tmp_path / "o"))
    write(empty / "a.csv", rows(0, 0, 2))
    (empty / "b.csv").write_text("a,b,c\n1,2,3\n")
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert "b.csv, line 1" in line and "expected the header" in line
    write(empty / "a.csv", ["x,0,y"])
    write(empty / "b.csv", [])
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert "the only row can't be used, first in a.csv at line 2, read_id 'x'" in line
    write(empty / "b.csv", ["z,0,y", "z,0,y"])
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert "none of 3 rows can be used, first in a.csv at line 2, read_id 'x'" in line
    for name in ("a.csv", "b.csv"):
        write(empty / name, [])
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert f"--caps_data_dir={empty}: its files hold no rows below their headers" in line
    assert "Correct the files" not in line
    (empty / "b.csv").rename(empty / "b.csv.gz")
    assert "can't be decompressed" in failed(predict(run_dir, empty, tmp_path / "o"))
    line = failed(predict(run_dir, empty, tmp_path / "o", "--batch_size", 0))
    assert "--batch_size=0" in line


def test_the_input_directory_is_no_place_for_predictions(run_dir, caps):
    before = sorted(caps.iterdir())
    ended = predict(run_dir, caps, caps)
    assert ended.code == 2 and "choose another" in ended.shown
    assert sorted(caps.iterdir()) == before


def test_the_model_is_the_one_that_run_json_speaks_of(run_dir, caps, predicted, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    (own,) = (copied / "checkpoints").iterdir()
    other = own.with_name("0123456789abcdef")
    shutil.copytree(own, other)
    outcome = files.unsealed(files.read_json(other / "outcome.json"))
    outcome["about"]["settings"]["seed"] = 1
    files.write_json(other / "outcome.json", files.sealed(outcome))  # the newest
    shutil.rmtree(other / "best")
    outcome = files.unsealed(files.read_json(own / "outcome.json"))
    del outcome["about"]["settings"]["max_epochs"]
    outcome["about"]["settings"]["of_another_version"] = 1
    files.write_json(own / "outcome.json", files.sealed(outcome))
    os.utime(own / "outcome.json", (1, 1))
    ended = predict(copied, caps, tmp_path / "out")
    assert ended.code == 0, ended.shown
    assert ended.lines == predicted.lines
    shutil.rmtree(own)
    assert "no finished training" in failed(predict(copied, caps, tmp_path / "o"))


def test_ctrl_c_leaves_what_was_there_and_says_how_far_it_came(
    run_dir, caps, tmp_path, monkeypatch
):
    assert predict(run_dir, caps, tmp_path).code == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*.csv")}
    assert len(before) == 2
    lines = predictions.lines

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return lines(*given)

    monkeypatch.setattr(predictions, "lines", interrupted)
    ended = predict(run_dir, caps, tmp_path)
    assert ended.code == 130
    assert "Ctrl-C: stopping" in ended.shown
    assert "stopped after 60 reads, 0% of the input; no predictions were written" in ended.shown
    assert {path: path.read_bytes() for path in tmp_path.glob("*.csv")} == before
    assert not list(tmp_path.glob(".partial*"))


def test_earlier_predictions_are_replaced_and_that_is_said(run_dir, caps, predicted, tmp_path):
    (tmp_path / "predictions.csv").write_text("old")
    ended = predict(run_dir, caps, tmp_path)
    assert f"{tmp_path / 'predictions.csv'} of" in ended.shown and "is replaced" in ended.shown
    assert ended.lines == predicted.lines
    assert "is replaced" not in predicted.shown


def test_a_process_of_its_own_with_two_devices_loads_no_library_it_has_no_use_for(
    run_dir, caps, predicted, tmp_path
):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("dataset"))
    arguments = ["predict", "-m", tmp_path / "run", "-c", caps, "-o", tmp_path / "out"]
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "capfinder", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {TWO_DEVICES}"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Each of 2 devices takes 384 reads" in ended.stdout
    assert (tmp_path / "out" / "predictions.csv").read_text().splitlines() == predicted.lines
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in ended.stderr.splitlines()}
    assert "jax" in loaded
    heavy = {"tensorflow", "tensorflow_datasets", "keras", "comet_ml", "optuna", "polars"}
    assert not loaded & heavy
