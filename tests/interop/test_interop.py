"""What the check of readers rests on: that a cell shows a model as it is, and that what is wrong
is told. The environments themselves are for `make interop`."""

import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras_cell
import matrix
import model_cases
import numpy as np
import original_caps
import original_check
import pytest
from environments import KERAS, Environment, Environments
from original_check import Named

from capfinder.errors import StageFailedError
from capfinder.models import ARCHITECTURES

(CASE,) = (case for case in model_cases.cases(["cnn_lstm"]) if case.variant == "odd")
OURS = {"a": Named("cap_0", 0.9), "b": Named("cap_1", 0.002), "c": Named("cap_1", 0.5)}
VERSIONS = {"keras": "3.8.0", "backend": "jax"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    model_cases.write(CASE, directory)
    return directory


@pytest.fixture
def models(written: Path, tmp_path: Path) -> Path:
    """A copy, to damage."""
    return shutil.copytree(written, tmp_path / "models")


def _opened(models: Path) -> dict[str, Any]:
    return keras_cell.opened(models, CASE.name)


def _faults(found: dict[str, Any]) -> list[str]:
    return matrix.cell_faults("3.8-jax", {"versions": VERSIONS, "models": {CASE.name: found}})


def _changed(models: Path, **arrays: np.ndarray) -> None:
    path = models / f"{CASE.name}.npz"
    with np.load(path, allow_pickle=False) as before:
        np.savez(path, **{**before, **arrays})


def test_an_exported_model_opens_and_agrees_and_a_wrong_one_does_not(models: Path) -> None:
    found = _opened(models)
    assert found.keys() == {"keras", "h5"}
    assert max(found.values()) < 2e-6
    assert _faults(found) == []
    with np.load(models / f"{CASE.name}.npz", allow_pickle=False) as arrays:
        expected, signals = arrays["expected"], arrays["signals"]
    assert expected.std(axis=0).max() > 0.01  # signals are told apart
    assert (signals == 0).all(axis=(1, 2)).sum() == model_cases.ALL_ZERO
    assert ((signals == 0).any(axis=(1, 2))).sum() > len(signals) / 4  # padded ones
    _changed(models, expected=expected + 2e-4)
    assert len(_faults(_opened(models))) == 2  # one a file


def test_a_model_that_names_other_classes_is_refused(models: Path) -> None:
    _changed(models, class_names=np.array(["cap_0", "cap_1", "cap_2", "cap_7"]))
    with pytest.raises(ValueError, match="class names"):
        _opened(models)


def test_a_model_for_another_length_is_refused(models: Path) -> None:
    with np.load(models / f"{CASE.name}.npz", allow_pickle=False) as arrays:
        _changed(models, signals=arrays["signals"][:, 1:])
    with pytest.raises(ValueError, match="input shape"):
        _opened(models)


def test_a_fault_is_one_line_in_the_report(models: Path) -> None:
    with zipfile.ZipFile(models / f"{CASE.name}.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    found = keras_cell.report(models, [CASE.name], say=lambda _: None)
    assert found["versions"]["keras"]
    (fault,) = _faults(found["models"][CASE.name])
    assert CASE.name in fault
    assert "\n" not in fault


def test_a_cell_that_could_use_our_code_shows_nothing() -> None:
    command = [
        sys.executable,
        keras_cell.__file__,
        "--models",
        ".",
        "--report",
        "x",
        "--names",
        "y",
    ]
    repository = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": repository}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: capfinder can be imported here, so nothing would be shown\n"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"keras": 9e-5, "h5": 1e-7}, 0),
        ({"keras": 2e-4, "h5": 1e-7}, 1),
        ({"keras": math.nan, "h5": 1e-7}, 1),
        ({"fault": "TypeError: no"}, 1),
    ],
)
def test_what_differs_or_does_not_open_is_told(found: dict[str, Any], told: int) -> None:
    assert len(_faults(found)) == told


@pytest.mark.parametrize(
    ("cell", "told"), [("3.8-jax", 0), ("newest-jax", 0), ("3.4.1-jax", 1), ("3.8-torch", 1)]
)
def test_a_cell_that_ran_another_keras_than_its_own_is_told(cell: str, told: int) -> None:
    assert len(matrix.cell_faults(cell, {"versions": VERSIONS, "models": {}})) == told


def test_the_table_has_the_worst_model_of_each_architecture() -> None:
    models = {
        "cnn_lstm-default": {"keras": 1e-7, "h5": 2e-7},
        "cnn_lstm-odd": {"keras": 3e-6, "h5": 1e-7},
        "attention_cnn_lstm-odd": {"keras": 8e-1, "h5": 8e-1},
        "resnet-odd": {"fault": "TypeError: no"},
    }
    reports: dict[str, dict[str, Any]] = {
        "3.8-tensorflow": {"versions": VERSIONS, "models": models},
        "newest-torch": {"fault": "newest-torch: no"},
    }
    text = matrix.table(reports, ["cnn_lstm", "resnet"])
    assert [line.split() for line in text.splitlines()] == [
        ["max", "|dp|", "3.8-tf", "newest-torch"],
        ["cnn_lstm", "3.0e-06", "fault"],
        ["resnet", "fault", "fault"],
        ["with", "Keras", "3.8.0"],
    ]
    assert matrix.cell_faults("newest-torch", reports["newest-torch"]) == ["newest-torch: no"]


def test_every_architecture_is_opened_and_run_in_capfinder_0_4_3() -> None:
    assert {case.model_type for case in model_cases.cases()} == {*ARCHITECTURES}
    assert {run.model_type for run in original_check.RUNS} == {*ARCHITECTURES}


SAME = {read_id: named.cap for read_id, named in OURS.items()}


def _compared(
    fed_alike: dict[str, Named], usual: dict[str, Named] = OURS, theirs: dict[str, str] = SAME
) -> original_check.Comparison:
    return original_check.compare(
        fed_alike, usual, theirs, run="cnn_lstm", keras="3.4.1", dtype="float16"
    )


def test_a_read_that_is_called_differently_is_told_with_its_margin() -> None:
    assert _compared(OURS).faults == []
    other = _compared({**OURS, "b": Named("cap_2", 0.002)})
    (fault,) = other.faults
    assert "read b is cap_1, ours says cap_2 by 2.0e-03" in fault
    text = matrix.original_table([other])
    assert [line.split() for line in text.splitlines()][1][-2:] == ["3", "2"]
    assert "b cap_1, ours cap_2 by 0.002000 of probability" in text


def test_what_the_rounding_of_the_input_changes_is_told_and_is_no_fault() -> None:
    other = _compared(OURS, usual={**OURS, "b": Named("cap_2", 0.0001)})
    assert other.faults == []
    text = matrix.original_table([other])
    assert "b cap_1, ours cap_2 by 0.000100 of probability in the rounding" in text


def test_a_model_that_names_one_cap_shows_nothing() -> None:
    one = {"a": Named("cap_0", 0.9)}
    (fault,) = _compared(one, usual=one, theirs={"a": "cap_0"}).faults
    assert "only one cap" in fault


@pytest.mark.parametrize("lacks", ["fed_alike", "usual"])
def test_a_read_that_one_of_the_two_lacks_is_an_error(lacks: str) -> None:
    fewer = {"a": OURS["a"], "b": OURS["b"]}
    given = {"fed_alike": OURS, "usual": OURS, lacks: fewer}
    with pytest.raises(StageFailedError, match="only one of the two names read c"):
        _compared(given["fed_alike"], given["usual"])


def test_rounded_caps_hold_the_float16_of_every_number_exactly(tmp_path: Path) -> None:
    caps, rounded = tmp_path / "caps.csv", tmp_path / "rounded" / "caps.csv"
    caps.write_text(f'{original_caps.HEADER}r,-99,"0.1,-3.99999,0.00000012,2.5"\n')
    original_caps.write_rounded(caps, rounded)
    (row,) = rounded.read_text().splitlines()[1:]
    values = np.array([0.1, -3.99999, 1.2e-7, 2.5], np.float16)
    numbers = row.split('"')[1].split(",")
    assert [float(number) for number in numbers] == values.astype(float).tolist()


def test_the_test_caps_are_shorter_and_longer_than_what_the_original_feeds(tmp_path: Path) -> None:
    path = tmp_path / "caps" / "data.csv"
    original_caps.write_test_caps(path)
    header, *rows = path.read_text().splitlines()
    assert header == "read_id,cap_class,timeseries"
    assert len(rows) == original_caps.CLASSES * original_caps.TEST_READS
    longer = sum(row.count(",") - 1 > 500 for row in rows)
    assert len(rows) / 10 < longer < len(rows) * 9 / 10


def test_a_process_in_an_environment_has_no_settings_of_the_users(tmp_path: Path) -> None:
    overlay = tmp_path / "keras"
    variables = Environment(Path("/x/bin/python"), (overlay,)).variables(tmp_path / "home")
    assert variables["PYTHONPATH"] == str(overlay)
    assert variables["HOME"] == str(tmp_path / "home")
    assert "KERAS_BACKEND" not in variables


def test_what_pip_cannot_install_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    environments = Environments(tmp_path, torch="torch", say=lambda _: None)
    with pytest.raises(StageFailedError, match="No matching distribution") as told:
        environments.cell("newest", "jax")
    assert "\n" not in str(told.value)
    assert KERAS["newest"] in str(told.value)
