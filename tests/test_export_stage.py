"""The export stage: only a file that gives the trained model's probabilities gets its name."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from capfinder import settings
from capfinder.errors import StageFailedError
from capfinder.exporting import keras, saved_model
from capfinder.stages import export
from capfinder.stages.assembly import TrainedModel
from tests.small_models import CLASSES, LENGTH, small_model

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


def run(output_dir: Path, model: TrainedModel, formats=("keras",)) -> export.ExportResult:
    config = settings.checked(
        settings.default_config(),
        {"shared_params.output_dir": str(output_dir), "export_params.formats": formats},
    )
    return export.run(config, model=model, signals=MODEL[0].signals, class_names=NAMES)


class Warmer(nn.Module):
    """A model that isn't what its weights say: its logits are 1 % larger."""

    inner: nn.Module

    def __call__(self, signal, *, train):
        variables = {name: self.variables[name] for name in ("params", "batch_stats")}
        return 1.01 * self.inner.apply(variables, signal, train=train)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> export.ExportResult:
    """Every format of the first model; tests that write take a copy."""
    return run(tmp_path_factory.mktemp("run"), trained(), ("keras", "h5", "saved_model"))


@pytest.fixture
def output_dir(exported, tmp_path) -> Path:
    """An earlier export of the first model, its classifier dated 2020."""
    shutil.copytree(exported.classifier.parents[2], tmp_path, dirs_exist_ok=True)
    copied = tmp_path / exported.classifier.relative_to(exported.classifier.parents[2])
    copied.rename(copied.with_name(EARLIER))
    return tmp_path


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
    }
    assert all(path.exists() for path in exported.paths.values())
    assert not list(best_model.rglob(".partial*"))
    assert exported.differences.keys() == exported.paths.keys()
    assert max(exported.differences.values()) < 1e-6


def test_the_result_is_told_in_a_line_and_for_the_record(exported):
    assert exported.summary().startswith("keras, h5, saved_model; within")
    record = exported.as_record(exported.classifier.parents[2])
    assert record[1]["path"] == "best_model/best_model_weights.weights.h5"
    assert {row["name"]: row["max_abs_difference"] for row in record} == exported.differences


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
    assert contents(tmp_path).keys() == {"best_model/classifier/labels.json"}


def test_the_same_model_keeps_its_classifier(output_dir):
    before = contents(output_dir)
    result = run(output_dir, trained())
    assert result.classifier.name == EARLIER
    assert result.classifier_reused
    assert result.differences["keras"] < 1e-6  # checked again
    assert contents(output_dir) == before


def test_another_model_replaces_the_classifier(output_dir):
    result = run(output_dir, trained(1))
    assert not result.classifier_reused
    assert classifiers(output_dir) == [result.classifier]


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
    assert result.differences["keras"] < 1e-6
    assert classifiers(output_dir) == [result.classifier]


@pytest.mark.parametrize("name", ["keras", "h5", "saved_model"])
def test_a_file_that_gives_other_probabilities_gets_no_name(output_dir, name, monkeypatch):
    before = contents(output_dir)
    if name == "saved_model":  # which would be as wrong as the model itself

        def write_other(probabilities, variables, directory, *, target_length):
            other = MODEL[1].variables
            write_saved_model(probabilities, other, directory, target_length=target_length)

        write_saved_model = saved_model.write_saved_model
        monkeypatch.setattr(saved_model, "write_saved_model", write_other)
        model = trained()
    else:
        model = trained(module=Warmer(MODEL[0].module))
    with pytest.raises(StageFailedError, match=r"best_model/.* differ .* up to 0\.\d+ \(0\.0001"):
        run(output_dir, model, (name,))
    assert contents(output_dir) == before


def test_a_model_that_gives_no_numbers_is_not_exported(tmp_path):
    variables = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), MODEL[0].variables)
    with pytest.raises(StageFailedError, match="nan"):
        run(tmp_path, trained(variables=variables), ("keras",))
    assert contents(tmp_path) == {}


def test_a_file_that_cannot_be_reloaded_is_named_in_the_error(tmp_path):
    exported = export._Export(
        tmp_path, trained(), {}, MODEL[0].signals.astype(np.float32), MODEL[0].expected
    )
    path = tmp_path / "model.keras"
    path.write_text("no archive")
    with pytest.raises(StageFailedError, match=r"model\.keras: .*can't be reloaded"):
        exported.difference(path, path, keras.run_keras)
