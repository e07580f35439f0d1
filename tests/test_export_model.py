"""`capfinder export`: a trained model in other formats, from wherever it lies."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import predicting
import pytest
from predicting import LENGTH, capfinder

from capfinder import export_model
from capfinder.stages import export_result
from capfinder.stages.export_result import NOTE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with predicting.surroundings(tmp_path_factory) as root:
        yield root


@pytest.fixture(scope="module")
def run_dir(root, tmp_path_factory) -> Path:
    """A run, of which its own settings asked for no file; others share the original."""
    original = predicting.trained_run(tmp_path_factory)[1]
    return Path(shutil.copytree(original, root / "run"))


@pytest.fixture(scope="module")
def exported(run_dir):
    ended = capfinder(run_dir, "export", "--run", run_dir, "--formats", "keras , onnx")
    assert ended.code == 0, ended.shown
    return ended


@pytest.fixture(scope="module")
def classifier(exported, run_dir) -> Path:
    [path] = (run_dir / "best_model" / "classifier").glob("*.keras")
    return path


def rows(run_dir: Path) -> dict[str, dict]:
    record = json.loads((run_dir / "run.json").read_text("utf-8"))
    return {row["name"]: row for row in record["exports"]}


def probabilities(path: Path, signals: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(["probabilities"], {"signal": signals})[0]


def test_a_run_gets_its_files_beside_its_own_and_its_record_tells_of_them(exported, run_dir):
    assert "reads of the run's test set" in exported.shown
    found = rows(run_dir)
    assert found.keys() >= {"keras", "onnx"}
    assert found["onnx"]["path"] == "best_model/classifier/classifier.onnx"
    assert (run_dir / found["keras"]["path"]).exists()
    card = (run_dir / "best_model" / "classifier" / "model_card.md").read_text("utf-8")
    assert "classifier.onnx" in card
    for row in found.values():
        assert str(run_dir / row["path"]) in exported.shown
    assert not (run_dir / NOTE).exists()


def test_a_keras_file_goes_to_another_directory_of_another_input_length(
    classifier, run_dir, tmp_path
):
    """What is cut and padded inside are samples that the model, or the reads, don't have."""
    (tmp_path / "classifier").mkdir()
    mine = Path(shutil.copy(classifier, tmp_path / "classifier" / "classifier_mine.keras"))
    (tmp_path / "other.h5").touch()
    export_result.note(tmp_path, [{"name": "h5", "path": "other.h5", "model": "another"}])
    given = ("--run", classifier, "--formats", "onnx", "--input_length", LENGTH + 6)
    ended = capfinder(tmp_path, "export", *given, "--output_dir", tmp_path)
    assert ended.code == 0, ended.shown
    assert "made-up signals" in ended.shown
    assert f"Removed {tmp_path / 'other.h5'}, of an earlier model" in ended.shown
    assert mine.exists() and not (tmp_path / "other.h5").exists()
    [row] = export_result.noted(tmp_path)
    assert (row["name"], row["model"]) == ("onnx", rows(run_dir)["keras"]["model"])
    made = export_model.made_signals(LENGTH)
    longer = np.pad(made, ((0, 0), (3, 3), (0, 0)), mode="wrap")
    np.testing.assert_allclose(
        probabilities(tmp_path / "classifier" / "classifier.onnx", longer),
        probabilities(run_dir / "best_model" / "classifier" / "classifier.onnx", made),
        atol=1e-6,
    )


def test_a_run_whose_dataset_is_gone_is_compared_on_made_up_signals(exported, run_dir, tmp_path):
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    shutil.rmtree(copy / "dataset")
    before = rows(copy)
    ended = capfinder(copy, "export", "--run", copy, "--formats", "onnx")
    assert ended.code == 0, ended.shown
    assert "made-up signals" in ended.shown
    assert rows(copy).keys() == before.keys()  # those of the same model stay


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--formats", "onnxx"), "onnxx"),
        (("--formats", ""), "--formats names no format; give --formats some of keras,h5,saved"),
        (("--formats", "[]"), "--formats names no format; give --formats some of keras,h5,saved"),
        (("--formats", "onnx", "--input_length", "3"), "export_params.input_length"),
    ],
)
def test_a_wrong_option_is_an_error_that_changes_nothing(exported, run_dir, options, said):
    before = rows(run_dir)
    ended = capfinder(run_dir, "export", "--run", run_dir, *options)
    assert ended.code == 2
    assert said in ended.shown
    assert rows(run_dir) == before


def test_a_keras_file_needs_an_output_directory(classifier):
    ended = capfinder(classifier, "export", "--run", classifier)
    assert ended.code == 2
    assert "--output_dir: must be given" in ended.shown


def test_a_model_that_is_not_there_is_named(tmp_path):
    ended = capfinder(tmp_path, "export", "--run", tmp_path / "absent")
    assert ended.code == 2
    assert f"{tmp_path / 'absent'}: no such file or directory" in ended.shown


@pytest.mark.parametrize("options", [(), ("--output_dir", "new")])
def test_a_directory_that_is_no_model_s_is_left_as_it_is(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caps").mkdir()
    ended = capfinder(tmp_path, "export", "--run", "caps", *options)
    assert ended.code == 2
    assert "caps: holds neither run.json nor import.json" in ended.shown
    assert [path.name for path in tmp_path.rglob("*")] == ["caps"]
    ended = capfinder(tmp_path, "export", "--run", "x" * 300, *options)
    assert ended.code == 2, ended.shown


def test_a_run_that_asked_for_no_format_is_to_be_told_which(run_dir, tmp_path):
    record = json.loads((run_dir / "run.json").read_text("utf-8"))
    record["settings"]["export_params"]["formats"] = []
    (tmp_path / "run.json").write_text(json.dumps(record), "utf-8")
    ended = capfinder(tmp_path, "export", "--run", tmp_path)
    assert ended.code == 2
    assert f"{tmp_path}: its export_params.formats names no format" in ended.shown


def test_a_directory_that_cannot_be_made_is_named(classifier, tmp_path):
    (tmp_path / "file").touch()
    output_dir = tmp_path / "file" / "new"
    ended = capfinder(tmp_path, "export", "--run", classifier, "--output_dir", output_dir)
    assert ended.code == 2
    assert f"{output_dir}: can't be written to" in ended.shown


def test_made_up_signals_are_the_same_every_time_and_like_real_ones():
    signals = export_model.made_signals(100)
    assert signals.shape == (export_model.MADE_SIGNALS, 100, 1)
    np.testing.assert_array_equal(signals, export_model.made_signals(100))
    is_padded = (signals[:, 0, 0] == 0) & (signals[:, -1, 0] == 0)
    assert 0.2 < is_padded.mean() < 0.8
    whole = signals[~is_padded]
    assert abs(whole.mean()) < 0.1
    assert 0.8 < whole.std() < 1.2
    assert np.abs(signals).max() <= 4
