"""The export stage: only a file that gives the trained model's probabilities gets its name."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
import pytest
from flax import linen as nn

from capfinder import settings
from capfinder.errors import InputError, StageFailedError, StoppedError
from capfinder.evaluation.facts import Facts
from capfinder.exporting import fresh_process, keras, onnx, record, reload, saved_model
from capfinder.stages import export, export_result
from capfinder.stages.assembly import TrainedModel
from tests.small_models import CLASSES, LENGTH, small_model

FORMATS = ("keras", "h5", "saved_model", "onnx")
NAMES = ["cap_0", "cap_1", "cap_2"]
EARLIER = "classifier_20200101_000000.keras"
MODEL = {seed: small_model("cnn_lstm", seed=seed) for seed in (0, 1)}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Small models are compiled far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def trained(seed: int = 0, **changed: Any) -> TrainedModel:
    model = MODEL[seed]
    whole = TrainedModel(
        model_type=model.model_type,
        hyperparameters=model.hyperparameters,
        module=model.module,
        variables=model.variables,
        num_classes=CLASSES,
        target_length=LENGTH,
        best_epoch=3,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"])),
    )
    return dataclasses.replace(whole, **changed)


def run(
    output_dir: Path, model: TrainedModel, formats=("keras",), input_length=None, **known: Any
) -> export.ExportResult:
    config = settings.checked(
        settings.default_config(),
        {
            "shared_params.output_dir": str(output_dir),
            "export_params.formats": formats,
            "export_params.input_length": input_length,
        },
    )
    return export.run(config, model=model, signals=MODEL[0].signals, class_names=NAMES, **known)


class Warmer(nn.Module):
    """A model that isn't what its weights say: its logits are 1 % larger."""

    inner: nn.Module

    def __call__(self, signal, *, train):
        variables = {name: self.variables[name] for name in ("params", "batch_stats")}
        return 1.01 * self.inner.apply(variables, signal, train=train)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> export.ExportResult:
    """Every format of the first model; tests that write take a copy."""
    return run(tmp_path_factory.mktemp("run"), trained(), FORMATS)


@pytest.fixture
def output_dir(exported, tmp_path) -> Path:
    """An earlier export of the first model, its classifier dated 2020."""
    shutil.copytree(exported.classifier.parents[2], tmp_path, dirs_exist_ok=True)
    copied = tmp_path / exported.classifier.relative_to(exported.classifier.parents[2])
    copied.rename(copied.with_name(EARLIER))
    return tmp_path


def differences(result: export.ExportResult) -> dict[str, float]:
    return {file.name: file.difference for file in result.files}


def classifiers(output_dir: Path) -> list[Path]:
    return list((output_dir / "best_model" / "classifier").glob("*.keras"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_format_is_written_where_readers_look_for_it(exported):
    best_model = exported.classifier.parents[1]
    assert exported.classifier.match("best_model/classifier/classifier_????????_??????.keras")
    assert exported.paths == {
        "keras": exported.classifier,
        "h5": best_model / "best_model_weights.weights.h5",
        "saved_model": best_model / "saved_model",
        "onnx": best_model / "classifier" / "classifier.onnx",
    }
    assert all(path.exists() for path in exported.paths.values())
    assert not list(best_model.rglob(".partial*"))
    assert differences(exported).keys() == exported.paths.keys()
    assert max(differences(exported).values()) < 1e-6


def test_the_result_is_told_in_a_line_and_for_the_record(exported):
    assert exported.summary().startswith("keras, h5, saved_model, onnx; within")
    rows = {row["name"]: row for row in exported.as_record(exported.classifier.parents[2])}
    assert rows["h5"]["path"] == "best_model/best_model_weights.weights.h5"
    found = {name: row["max_abs_difference"] for name, row in rows.items()}
    assert found == differences(exported)
    assert rows["keras"]["bytes"] == exported.classifier.stat().st_size
    readers = {name: row["reader"].split()[0] for name, row in rows.items()}
    assert readers == {
        "keras": "keras",
        "h5": "keras",
        "saved_model": "tensorflow",
        "onnx": "onnxruntime",
    }
    assert {name: row.get("opset") for name, row in rows.items()} == {
        **dict.fromkeys(FORMATS),
        "onnx": 17,
    }


def test_the_classifier_tells_its_classes_and_how_signals_are_prepared(exported):
    labels = json.loads((exported.classifier.parent / "labels.json").read_text())
    assert labels == {"0": "cap_0", "1": "cap_1", "2": "cap_2"}
    about = keras.read_about(exported.classifier)
    assert about["class_names"] == NAMES
    assert about["preprocessing"]["target_length"] == LENGTH
    assert about["hyperparameters"]["conv_filters"] == [4, 4]


def test_formats_not_asked_for_are_not_written(tmp_path):
    result = run(tmp_path, trained(), ())
    assert (result.classifier, result.paths) == (None, {})
    assert result.summary()
    names = ("labels.json", "model_card.md")
    assert contents(tmp_path).keys() == {f"best_model/classifier/{name}" for name in names}


def test_the_model_card_names_every_file(exported):
    card = (exported.classifier.parent / "model_card.md").read_text()
    for name in (exported.classifier.name, "classifier.onnx", "../saved_model"):
        assert name in card


def test_the_same_model_keeps_its_classifier(output_dir):
    before = contents(output_dir)
    result = run(output_dir, trained())
    assert result.classifier.name == EARLIER
    assert result.classifier_reused
    assert differences(result)["keras"] < 1e-6  # checked again
    after = contents(output_dir)
    card = "best_model/classifier/model_card.md"  # of one file now, as no record of others is given
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {card}


def test_another_model_replaces_the_classifier_and_what_it_does_not_write_again(output_dir):
    earlier = [
        {"name": "onnx", "path": "best_model/classifier/classifier.onnx", "model": "another"},
        {"name": "saved_model", "path": "best_model/saved_model", "model": "another"},
        {"name": "h5", "path": "best_model/best_model_weights.weights.h5"},  # not known of which
    ]
    result = run(output_dir, trained(1), ("keras", "onnx"), earlier=earlier)
    assert not result.classifier_reused
    assert classifiers(output_dir) == [result.classifier]
    rows = export_result.merged(earlier, result, output_dir)
    assert [row["name"] for row in rows] == ["keras", "onnx"]
    assert not (output_dir / "best_model" / "saved_model").exists()
    assert (output_dir / "best_model" / "best_model_weights.weights.h5").exists()


def test_files_of_the_same_model_stay_in_the_record(output_dir, exported):
    earlier = exported.as_record(exported.classifier.parents[2])
    classifiers(output_dir)[0].rename(output_dir / earlier[0]["path"])
    result = run(output_dir, trained(), ("onnx",), earlier=earlier)
    rows = export_result.merged(earlier, result, output_dir)
    assert [row["name"] for row in rows] == ["keras", "h5", "saved_model", "onnx"]
    card = (output_dir / "best_model" / "classifier" / "model_card.md").read_text()
    assert "saved_model" in card
    assert record.missing(rows, FORMATS, input_length=LENGTH, output_dir=output_dir) == []
    assert record.missing(rows, FORMATS, input_length=40, output_dir=output_dir) == list(FORMATS)
    (output_dir / rows[1]["path"]).unlink()
    assert record.missing(rows, FORMATS, input_length=LENGTH, output_dir=output_dir) == ["h5"]


def test_a_record_of_files_elsewhere_removes_none(output_dir, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "kept"
    elsewhere.touch()
    earlier = [{"name": "h5", "path": str(elsewhere), "model": "another"}]
    with pytest.raises(InputError, match="isn't in"):
        run(output_dir, trained(), ("onnx",), earlier=earlier)
    assert elsewhere.exists()


def test_a_classifier_damaged_since_is_written_anew(output_dir):
    [path] = classifiers(output_dir)
    content = path.read_bytes()
    weights = MODEL[0].variables["params"]["head"]["kernel"].tobytes()
    assert weights in content
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member.replace(weights, bytes(len(weights))))
    result = run(output_dir, trained())
    assert not result.classifier_reused
    assert differences(result)["keras"] < 1e-6
    assert classifiers(output_dir) == [result.classifier]


def test_one_file_that_gives_other_probabilities_keeps_all_from_their_names(
    output_dir, monkeypatch
):
    """Also those that are right: the SavedModel here, which is read last, alone is wrong."""
    before = contents(output_dir)
    write_saved_model = saved_model.write_saved_model

    def write_other(probabilities, variables, directory, **lengths):
        write_saved_model(probabilities, MODEL[1].variables, directory, **lengths)

    monkeypatch.setattr(saved_model, "write_saved_model", write_other)
    with pytest.raises(
        StageFailedError, match=r"best_model/saved_model: .* differ .* up to 0\.\d+ \(0\.0001"
    ):
        run(output_dir, trained(), ("onnx", "saved_model"))
    assert contents(output_dir) == before


def test_a_model_that_is_not_what_its_weights_say_is_not_exported(output_dir):
    before = contents(output_dir)
    with pytest.raises(StageFailedError, match=r"classifier\.onnx: .* differ .* up to 0\.\d+"):
        run(output_dir, trained(module=Warmer(MODEL[0].module)), ("onnx",))
    assert contents(output_dir) == before


def test_a_model_that_gives_no_numbers_is_not_exported(tmp_path):
    variables = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), MODEL[0].variables)
    with pytest.raises(StageFailedError, match="nan"):
        run(tmp_path, trained(variables=variables), ("onnx",))
    assert contents(tmp_path) == {}


def test_a_file_that_cannot_be_reloaded_is_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "write_onnx", lambda twin, path, about: path.write_text("no model"))
    with pytest.raises(StageFailedError) as failed:
        run(tmp_path, trained(), ("onnx",))
    assert f"{tmp_path}/best_model/classifier/classifier.onnx: " in str(failed.value)
    assert "can't be reloaded" in str(failed.value)
    assert "partial" not in str(failed.value)
    assert "\n" not in str(failed.value)
    assert contents(tmp_path) == {}


def test_files_may_take_signals_of_another_length(tmp_path):
    """Longer and shorter; each is compared with the model on signals of that length."""
    for length in (LENGTH + 13, LENGTH - 7):
        result = run(tmp_path, trained(), ("onnx",), input_length=length)
        assert differences(result)["onnx"] < 1e-6
        assert result.about["preprocessing"]["input_length"] == length
        assert result.about["preprocessing"]["target_length"] == LENGTH
        assert result.as_record(tmp_path)[0]["input_length"] == length
        session = onnxruntime.InferenceSession(result.paths["onnx"])
        assert session.get_inputs()[0].shape == ["batch", length, 1]


def test_what_is_known_of_the_model_is_told_of_it(tmp_path):
    facts = Facts(test={"accuracy": 0.5, "confusion_matrix": [[1, 0, 0]] * 3})
    result = run(tmp_path, trained(), (), facts=facts, class_map={"7": 0, "8": 1, "9": 2})
    assert result.about["facts"] == facts.as_json()
    assert result.about["class_map"] == {"7": 0, "8": 1, "9": 2}


def test_a_signal_ends_the_process_that_reloads_and_leaves_nothing(
    tmp_path, monkeypatch, cold_reloads
):
    def stop(signum, frame):
        raise StoppedError("stopped", 143)

    def ask_nothing(*request):
        """As if it took its time: there is never an answer."""
        started.extend(set(children.read_text().split()) - before)
        threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1)).start()

    monkeypatch.setattr(reload, "write_request", ask_nothing)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    earlier = signal.signal(signal.SIGUSR1, stop)
    started = []
    try:
        with pytest.raises(StoppedError):
            run(tmp_path, trained(), ("onnx",))
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    assert contents(tmp_path) == {}
    assert len(started) == 1
    assert not Path(f"/proc/{started[0]}").exists()


def test_the_process_that_reloads_ends_with_who_asks(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "capfinder.exporting.reload"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        os.mkfifo(tmp_path / "never.onnx")  # whoever opens it waits
        job = reload.Job("onnx", tmp_path / "never.onnx")
        reload.write_request(process.stdin, [job], MODEL[0].signals)
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == 1


def test_a_process_that_dies_is_an_answer_in_one_line(tmp_path, monkeypatch, cold_reloads):
    monkeypatch.setenv("PYTHONHASHSEED", "no number")  # Python itself ends over it
    job = reload.Job("onnx", tmp_path / "model.onnx")
    with fresh_process.started(["onnx"]) as process:
        [answer] = process.reloaded([job], MODEL[0].signals, done=lambda: None)
    assert answer.probabilities is None
    assert "ended with exit code 1" in answer.error
    assert "\n" not in answer.error
