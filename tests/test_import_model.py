"""`capfinder import-model`, and `.keras` files and imports where a trained model is wanted."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax_settings
import numpy as np
import pytest
from in_process import Ended, shown_by

from capfinder import capmap, cli, files, libraries, trained
from capfinder.errors import InputError, StageFailedError
from capfinder.exporting import import_check, keras, keras_archive
from capfinder.models import ARCHITECTURES
from capfinder.stages import assembly
from capfinder.trained import imported, stored
from tests.keras_models import chain, stack, with_weights
from tests.small_models import CLASSES, LENGTH, small_model

NAMES = ["cap_0", "m6A, cap", "cap_2-1"]
FIGURES = {
    "accuracy": 0.9,
    "accuracy_interval": [0.7, 0.97],
    "confusion_matrix": [[5, 1, 0], [0, 6, 0], [1, 0, 5]],
}
SAME = 1e-6  # probabilities, two implementations of the same float32 arithmetic


def import_model(keras_file: object, output_dir: object) -> Ended:
    words = ["import-model", str(keras_file), "--output_dir", str(output_dir)]
    return Ended(*shown_by(lambda: cli.main(words)), Path(str(output_dir)))


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own, and JAX as it was afterwards; small models are compiled far longer than
    they run."""
    root = tmp_path_factory.mktemp("import")
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        patched.setenv("HOME", str(root / "home"))
        (root / "none").touch()  # compiled programs aren't kept: they are many and small
        patched.setenv("XDG_CACHE_HOME", str(root / "none"))
        jax.config.update("jax_disable_most_optimizations", True)
        yield root
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def keras_file(surroundings: Path) -> Path:
    """Like the released classifier, with fewer and smaller layers, as a training leaves it."""
    library = libraries.keras()
    model = with_weights(chain(stack(library.layers)))
    model.compile(library.optimizers.Adam(2e-4), loss="sparse_categorical_crossentropy")
    path = surroundings / "classifier.keras"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def done(surroundings: Path, keras_file: Path) -> Ended:
    ended = import_model(keras_file, surroundings / "imported")
    assert ended.code == 0, ended.shown
    return ended


@pytest.fixture(scope="module")
def directory(surroundings: Path, done: Ended) -> Path:
    return surroundings / "imported"


def probabilities(classifier: trained.Classifier, signals: np.ndarray) -> np.ndarray:
    model = classifier.model
    logits = model.module.apply(model.variables, signals, train=False)
    return np.asarray(jax.nn.softmax(logits))


def rewritten(path: Path, to: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(to, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return to


# What is imported


def test_an_import_predicts_as_keras_does(keras_file, directory):
    classifier = trained.load(directory)
    model = classifier.model
    assert (model.model_type, model.num_classes, model.target_length) == ("cnn_lstm", 3, LENGTH)
    assert model.hyperparameters.conv_dropouts == (0.2,)
    assert model.hyperparameters.lstm_dropouts == (0.3, 0.0)
    assert model.hyperparameters.dense_dropout == 0.5
    assert model.hyperparameters.learning_rate == pytest.approx(2e-4)
    assert classifier.dtype == "float32"
    signals = import_check.signals(LENGTH, seed=5).astype("float32")
    expected = keras.run_keras(keras_file, signals)
    assert expected.std(axis=0).max() > 1000 * SAME  # it tells signals apart
    np.testing.assert_allclose(probabilities(classifier, signals), expected, rtol=0, atol=SAME)


def test_the_record_says_where_the_model_is_from(keras_file, directory):
    record = stored.read_record(directory)
    assert record["source"] == keras_file.name
    assert record["source_sha256"] == files.sha256_file(keras_file)
    assert record["keras_version"] == libraries.keras().__version__
    assert record["input_length"] == record["target_length"] == LENGTH
    assert record["class_names"] == capmap.class_names({}, CLASSES)
    assert 0 <= record["max_abs_difference"] <= imported.LARGEST_DIFFERENCE
    variables = trained.load(directory).model.variables
    assert record["weights_sha256"] == assembly.weights_sha256(variables)
    assert record["num_parameters"] == 371


def test_averages_of_batches_are_begun_anew_when_it_is_fine_tuned(directory):
    variables = trained.load(directory).model.variables
    assert float(variables["batch_stats"]["conv_norm_0"]["steps"]) == 0


def test_the_command_shows_what_it_found_and_how_to_go_on(directory, done):
    for text in (
        "cnn_lstm",
        "conv_dropouts",
        "0.3, 0",
        "0.0002",
        "largest |Δp| from Keras",
        f"capfinder predict --model {directory}",
        f"init_from={directory}",
        f"capfinder export --run {directory}",
    ):
        assert text in done.shown


def test_a_keras_file_is_as_good_as_its_import(keras_file, directory):
    from_file, from_import = trained.load(keras_file), trained.load(directory)
    pairs = ((one.model, one.class_names, one.facts) for one in (from_file, from_import))
    (one, *rest), (other, *same) = pairs
    assert rest == same
    assert assembly.weights_sha256(one.variables) == assembly.weights_sha256(other.variables)
    assert one.module is other.module


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_our_own_export_comes_back_to_the_bit(model_type, tmp_path):
    model = small_model(model_type)
    twin = keras.build_twin(
        model_type,
        model.hyperparameters,
        num_classes=CLASSES,
        target_length=LENGTH,
        dtype="float32",
        input_length=LENGTH + 5,
    )
    keras.copy_weights(twin, model.variables)
    about = {
        "class_names": NAMES,
        "class_map": {"0": 0, "5": 1, "3": 2},
        "hyperparameters": {"learning_rate": 0.0123},
        "facts": {"test": FIGURES},
    }
    keras.write_keras(twin, tmp_path / "own.keras", about)
    classifier = trained.load(tmp_path / "own.keras")
    assert classifier.model.target_length == LENGTH
    for collection in ("params", "batch_stats"):
        expected = jax.tree.leaves_with_path(model.variables.get(collection, {}))
        found = dict(jax.tree.leaves_with_path(classifier.model.variables[collection]))
        assert len(found) == len(expected)
        for path, value in expected:
            if path[-1].key != "steps":
                np.testing.assert_array_equal(found[path], value)
    learning_rate = {"learning_rate": 0.0123}
    assert classifier.model.hyperparameters == replace(model.hyperparameters, **learning_rate)
    assert classifier.class_names == NAMES
    assert classifier.class_map == {"0": 0, "5": 1, "3": 2}
    assert classifier.facts.test == FIGURES


@pytest.mark.parametrize(
    "about",
    [
        {"class_names": ["a", "b"], "class_map": {"0": 0}},
        {"class_names": ["a", "b", 3], "class_map": {"0": 0, "1": 1, "x": 2}},
        {"class_names": ["a", "b", "line\nbreak"], "class_map": [0, 1, 2]},
        {"class_names": "abc", "class_map": {"0": 0, "1": [1], "2": 2}, "facts": 7},
    ],
)
def test_what_a_file_claims_is_used_only_where_it_can_be(about):
    class_map = imported._class_map(about, CLASSES)
    assert class_map == {}
    assert imported._class_names(about, class_map, CLASSES) == capmap.class_names({}, CLASSES)


def test_float64_stays_float64(tmp_path):
    hyperparameters = small_model("cnn_lstm").hyperparameters
    try:
        with jax.enable_x64(True):
            twin = keras.build_twin(
                "cnn_lstm",
                replace(hyperparameters, conv_filters=(4,), conv_kernels=(5,), conv_dropouts=(0,)),
                num_classes=CLASSES,
                target_length=LENGTH,
                dtype="float64",
            )
            keras.write_keras(with_weights(twin), tmp_path / "double.keras", {})
            expected = {weight.path: np.asarray(weight) for weight in twin.weights}
        ended = import_model(tmp_path / "double.keras", tmp_path / "double")
        assert ended.code == 0, ended.shown
        classifier = trained.load(tmp_path / "double")
        assert classifier.dtype == "float64"
        kernel = np.asarray(classifier.model.variables["params"]["head"]["kernel"])
        np.testing.assert_array_equal(kernel, expected["head/kernel"], strict=True)
        assert kernel.dtype == np.float64
    finally:
        jax.config.update("jax_enable_x64", False)


# What is there already


def test_importing_again_keeps_what_is_there(keras_file, directory):
    before = (directory / "import.json").stat().st_mtime_ns
    ended = import_model(keras_file, directory)
    assert ended.code == 0
    assert f"is imported already: {directory} is kept" in ended.shown
    assert "0.3, 0" in ended.shown
    assert (directory / "import.json").stat().st_mtime_ns == before


def test_another_file_does_not_take_its_place(directory, keras_file, tmp_path):
    other = rewritten(keras_file, tmp_path / "b.keras", lambda members: None)
    ended = import_model(other, directory)
    assert ended.code == 2
    assert f"{directory}: holds the import of another file, classifier.keras" in ended.shown
    assert import_model(tmp_path / "absent.keras", directory).code == 2


def test_a_directory_with_something_else_is_left_alone(keras_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ended = import_model(keras_file, tmp_path)
    assert ended.code == 2
    assert "is there and holds no import; choose a directory that is new or empty" in ended.shown
    ended = import_model(keras_file, tmp_path / "notes.txt")
    assert ended.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_place_that_can_not_be_written_to_is_named(keras_file, tmp_path):
    (tmp_path / "file").write_text("")
    ended = import_model(keras_file, tmp_path / "file" / "import")
    assert ended.code == 2
    assert "can't be written to (File exists)" in ended.shown


# Damage


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def test_an_import_may_be_moved(copy):
    assert trained.load(copy).model.num_classes == CLASSES


def test_a_record_that_was_changed_is_not_used(copy):
    path = copy / "import.json"
    path.write_text(path.read_text().replace('"cap_0"', '"cap_9"'))
    with pytest.raises(InputError, match=r"import.json: the checksum is wrong.*Import the model"):
        trained.load(copy)
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"import.json: .*Import the model again"):
        trained.load(copy)


def test_a_record_of_another_version_is_not_used(copy):
    record = stored.read_record(copy)
    for changed in ({"model_type": "gru"}, {"hyperparameters": {"depth": 3}}, {"target_length": 1}):
        files.write_json(copy / "import.json", files.sealed({**record, **changed}))
        with pytest.raises(InputError, match=r"import.json: .*another version of capfinder"):
            trained.load(copy)
    del record["class_names"]
    files.write_json(copy / "import.json", files.sealed(record))
    with pytest.raises(InputError, match=r"import.json: 'class_names'.*another version"):
        trained.load(copy)


def test_damaged_or_foreign_weights_are_not_used(copy, keras_file):
    record = stored.read_record(copy)
    files.write_json(copy / "import.json", files.sealed({**record, "weights_sha256": "0" * 64}))
    with pytest.raises(InputError, match="its weights are another model's"):
        trained.load(copy)
    files.write_json(copy / "import.json", files.sealed(record))
    for path in (copy / "best" / "0" / "variables").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match=f"{copy}: its weights can't be read"):
        trained.load(copy)
    assert import_model(keras_file, copy).code == 2


# Files that can't be imported


def config_with(keras_file: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    def changed(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        change(config)
        members["config.json"] = json.dumps(config).encode()

    return rewritten(keras_file, to, changed)


def layer(config: dict[str, Any], number: int) -> dict[str, Any]:
    found: dict[str, Any] = config["config"]["layers"][number]
    return found


def as_capfinders_attention(config: dict[str, Any]) -> None:
    layer(config, 1).update(
        module="capfinder.attention_cnnlstm_model",
        class_name="AttentionLayer",
        registered_name="AttentionLayer",
        config={"name": "attention_layer"},
    )


def as_lambda(config: dict[str, Any]) -> None:
    code = {"class_name": "__lambda__", "config": {"code": "4wAAAA==", "defaults": None}}
    layer(config, 1).update(
        class_name="Lambda", config={"name": "mask", "function": code, "arguments": {}}
    )


def as_gru(config: dict[str, Any]) -> None:
    layer(config, 1).update(class_name="GRU", config={"name": "gru", "units": 4})


def as_program(config: dict[str, Any]) -> None:
    call = {"module": "os", "class_name": "function", "config": "system", "registered_name": None}
    layer(config, 1)["config"]["kernel_initializer"] = call


def as_download(config: dict[str, Any]) -> None:
    call = {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "http://x"}}
    layer(config, 1)["config"]["bias_regularizer"] = call


CUSTOM = {
    "attention": (
        as_capfinders_attention,
        "layer attention_layer is of class AttentionLayer, which isn't Keras's own; code that "
        "comes with a model isn't run. Of Capfinder 0.4.3's own models cnn_lstm ones alone",
    ),
    "lambda": (as_lambda, "layer mask is of class Lambda, which none of the architectures has"),
    "gru": (as_gru, "layer gru is of class GRU, which none of the architectures has"),
    "program": (as_program, "something in it is of class function, which isn't Keras's own"),
    "download": (as_download, "something in it is of class get_file, which isn't Keras's own"),
    "no class": (
        lambda config: layer(config, 2).update(class_name=["Dense"]),
        "has no class; expected a .keras file",
    ),
    "no module": (
        lambda config: layer(config, 2).update(module={}),
        "has no class; expected a .keras file",
    ),
    "no model": (lambda config: config.clear(), "its config.json names no model"),
    "a layer": (
        lambda config: config.update(layer(dict(config), 1)),
        "holds a Conv1D, not a model",
    ),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_classes_that_none_of_ours_has_are_refused_before_keras_sees_them(
    name, keras_file, tmp_path
):
    change, said = CUSTOM[name]
    path = config_with(keras_file, tmp_path / "m.keras", change)
    with pytest.raises(InputError) as refused:
        keras_archive.read(path)
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")


def drop(name: str) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.pop(name) and None


BROKEN: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "no config": (drop("config.json"), "holds no config.json"),
    "no weights": (drop("model.weights.h5"), "holds no weights"),
    "an asset": (
        lambda members: members.update({"assets/../../x": b""}),
        "holds 'assets/../../x', which no file of such a model does",
    ),
    "text for a config": (lambda members: members.update({"config.json": b"x"}), "isn't JSON"),
    "a list for a config": (lambda members: members.update({"config.json": b"[]"}), "JSON object"),
    "a deep config": (
        lambda members: members.update({"config.json": b"[" * 200_000}),
        "its config.json isn't JSON",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_archive_of_something_else_is_refused(name, keras_file, tmp_path):
    change, said = BROKEN[name]
    path = rewritten(keras_file, tmp_path / "m.keras", change)
    with pytest.raises(InputError, match=said):
        keras_archive.read(path)


def test_a_huge_config_is_not_unpacked(keras_file, tmp_path):
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * (keras_archive._MOST_BYTES + 1))
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(InputError, match=r"its config.json is larger than any model's"):
        keras_archive.read(path)


@pytest.mark.parametrize("initializer", ["GlorotUniform", "Ones"])
def test_more_weights_than_a_file_holds_take_no_memory(keras_file, tmp_path, initializer):
    def enlarge(config: dict[str, Any]) -> None:
        layer(config, 1)["config"]["kernel_initializer"].update(class_name=initializer, config={})
        layer(config, 1)["config"]["filters"] = 2**34

    archive = keras_archive.read(config_with(keras_file, tmp_path / "m.keras", enlarge))
    with pytest.raises(InputError, match=r"its layers have more than 0\.1 GB of weights"):
        keras_archive.load(archive)


def test_what_is_no_keras_file_is_refused_in_one_line(keras_file, tmp_path):
    def expect(path: Path, said: str) -> None:
        ended = import_model(path, tmp_path / "out")
        assert ended.code == 2
        assert ended.shown.splitlines()[-1].startswith(f"error: {path}: ")
        assert said in ended.shown.splitlines()[-1]
        assert "Traceback" not in ended.shown
        assert not (tmp_path / "out").exists()

    expect(tmp_path / "absent.keras", "no such file")
    (tmp_path / "text.keras").write_text("cap_0,cap_1\n")
    expect(tmp_path / "text.keras", "isn't a zip archive, or a damaged one")
    (tmp_path / "cut.keras").write_bytes(keras_file.read_bytes()[:-100])
    expect(tmp_path / "cut.keras", "isn't a zip archive, or a damaged one")
    shutil.copy(keras_file, tmp_path / "model.h5")
    expect(tmp_path / "model.h5", "isn't called .keras")
    no_weights = rewritten(
        keras_file,
        tmp_path / "empty.keras",
        lambda members: members.update({"model.weights.h5": b"nothing"}),
    )
    expect(no_weights, "Keras can't load it (")

    def turned_round(config: dict[str, Any]) -> None:
        layer(config, 8)["config"].update(go_backwards=True)

    backwards = config_with(keras_file, tmp_path / "backwards.keras", turned_round)
    name = libraries.keras().models.load_model(keras_file, compile=False).layers[8].name
    expect(backwards, f"can't be imported: layer {name}: go_backwards=True; cnn_lstm has False")


def test_a_model_that_predicts_otherwise_is_not_used(keras_file, directory):
    """The check itself, given weights that aren't the file's."""
    model = trained.load(directory).model
    archive = keras_archive.read(keras_file)
    loaded = keras_archive.load(archive)
    found = imported.recognise.recognise(loaded, learning_rate=0.01)
    loaded.layers[-1].set_weights([0.5 * weight for weight in loaded.layers[-1].get_weights()])
    with pytest.raises(StageFailedError, match=r"differ from the Keras model's by up to 0\.\d+"):
        imported._difference(keras_file, loaded, model, found)
    loaded.layers[-1].set_weights([np.nan * weight for weight in loaded.layers[-1].get_weights()])
    with pytest.raises(StageFailedError, match="by up to nan"):
        imported._difference(keras_file, loaded, model, found)
