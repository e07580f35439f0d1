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
from capfinder.exporting.record import ExportedFile
from capfinder.stages import export, export_result
from capfinder.stages.assembly import TrainedModel
from capfinder.stages.export_failure import Asked
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


def test_classifiers_that_no_export_wrote_and_the_one_it_was_made_from_stay(output_dir, exported):
    directory = output_dir / "best_model" / "classifier"
    earlier, mine, foreign, source, new = (
        directory / f"classifier_{name}.keras"
        for name in ("20200101_000000", "mine", "20200102_000000", "20200103_000000", "2020")
    )
    foreign.write_text("no model")
    for path in (mine, source, new):
        shutil.copy(earlier, path)
    written = (ExportedFile("keras", new, 0.0, "", None),)
    result = dataclasses.replace(exported, files=written, source=source)
    export_result.remove_earlier(result)
    assert set(classifiers(output_dir)) == {mine, foreign, source, new}


def test_of_another_model_what_was_changed_since_and_what_it_was_made_from_stay(exported, tmp_path):
    earlier = [
        {"name": "h5", "path": "a.h5", "model": "another", "bytes": 3},
        {"name": "saved_model", "path": "saved", "model": "another", "bytes": 3},
        {"name": "onnx", "path": "a.onnx", "model": "another", "bytes": 3},
        {"name": "keras", "path": "a.keras", "model": "another", "bytes": 3},
    ]
    (tmp_path / "saved").mkdir()
    for name in ("a.h5", "saved/pb", "a.keras"):
        (tmp_path / name).write_text("abc")
    (tmp_path / "a.onnx").write_text("other")
    mine = ExportedFile("new", tmp_path / "a.onnx", 0.0, "", None)
    result = dataclasses.replace(exported, files=(mine,), source=tmp_path / "a.keras")
    for _ in range(2):
        assert [row["name"] for row in export_result.merged(earlier, result, tmp_path)] == ["new"]
        assert sorted(os.listdir(tmp_path)) == ["a.keras", "a.onnx"]


def test_what_only_training_needs_tells_no_models_apart(exported):
    def without_steps(tree):
        inner = {k: without_steps(v) if isinstance(v, dict) else v for k, v in tree.items()}
        return {k: v for k, v in inner.items() if k != "steps"}

    assert without_steps(MODEL[0].variables) != MODEL[0].variables
    assert export._weights_sha256(without_steps(MODEL[0].variables)) == exported.weights_sha256
    assert export._weights_sha256(MODEL[1].variables) != exported.weights_sha256


def test_what_is_noted_of_a_directory_is_read_back(exported, tmp_path):
    assert export_result.noted(tmp_path) == []
    rows = exported.as_record(exported.classifier.parents[2])
    export_result.note(tmp_path, rows)
    assert export_result.noted(tmp_path) == rows


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}"]
    + [f'{{"exports": {rows}}}' for rows in ("3", "[3]", "[{}]", '[{"path": "/a"}]')],
)
def test_a_note_that_is_not_ours_says_nothing(tmp_path, content):
    (tmp_path / export_result.NOTE).write_text(content)
    assert export_result.noted(tmp_path) == []


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
        StageFailedError,
        match=r"best_model/saved_model: .* differ .* up to 0\.\d+ \(0\.0001 .*"
        r"--stage=export --config\.export_params\.formats=onnx exports it without saved_model$",
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


def test_a_twin_that_is_not_the_network_is_named_with_the_formats_that_need_none(tmp_path):
    params = {**MODEL[0].variables["params"], "stem": {"kernel": np.zeros((2, 2), np.float32)}}
    variables = {**MODEL[0].variables, "params": params}
    with pytest.raises(StageFailedError) as failed:
        run(tmp_path, trained(variables=variables), ("saved_model", "onnx", "h5"))
    assert "models/cnn_lstm.py: keras_twin " in str(failed.value)
    assert "stem_kernel" in str(failed.value)
    assert "formats=saved_model exports it without onnx, h5" in str(failed.value)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StageFailedError("no such layer"), "a.onnx: no such layer."),
        (KeyError("GRU"), "a.onnx: can't be written (KeyError: 'GRU')."),
        (ValueError("in\ntwo lines"), "a.onnx: can't be written (ValueError: in two lines)."),
    ],
)
def test_a_format_that_cannot_be_written_is_named_with_the_others(error, reason):
    asked = Asked(("keras", "onnx"), "--formats ")
    with pytest.raises(StageFailedError) as failed, asked.written("onnx", Path("a.onnx")):
        raise error
    kept = "Nothing was exported; the model isn't lost"
    assert str(failed.value) == f"{reason} {kept}: --formats keras exports it without onnx"


def test_a_full_disk_is_no_failure_of_a_format():
    asked = Asked(("onnx",), "--formats ")
    with pytest.raises(OSError, match="full"), asked.written("onnx", Path("a.onnx")):
        raise OSError("full")


@pytest.mark.parametrize(
    ("formats", "failed", "advice"),
    [
        (FORMATS, ["h5", "onnx"], ": --formats keras,saved_model exports it without h5, onnx"),
        (["onnx"], ["onnx"], ": --formats keras,h5,saved_model exports it without onnx"),
        (FORMATS, FORMATS, ""),
    ],
)
def test_who_lacks_a_format_is_told_how_to_have_others(formats, failed, advice):
    error = Asked(formats, "--formats ").failure("why", failed)
    assert str(error) == f"why. Nothing was exported; the model isn't lost{advice}"


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
