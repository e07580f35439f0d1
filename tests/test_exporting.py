"""Exported files give the Flax model's probabilities, in words that the oldest reader knows."""

import copy
import json
import os
import zipfile

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder import libraries
from capfinder.exporting import compat, keras, saved_model
from capfinder.models import ARCHITECTURES
from tests.small_models import CLASSES, LENGTH, SmallModel, small_model

SAME = 1e-6  # probabilities, two implementations of the same float32 arithmetic
ABOUT = {"class_names": ["cap_0", "cap_1", "cap_2"]}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Small models are compiled far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request) -> SmallModel:
    return small_model(request.param)


def build_twin(model, dtype="float32"):
    return keras.build_twin(
        model.model_type,
        model.hyperparameters,
        num_classes=CLASSES,
        target_length=LENGTH,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def twin(model):
    twin = build_twin(model)
    keras.copy_weights(twin, model.variables)
    return twin


@pytest.fixture(scope="module")
def archive(model, twin, tmp_path_factory):
    path = tmp_path_factory.mktemp("keras") / f"{model.model_type}.keras"
    keras.write_keras(twin, path, ABOUT)
    return path


@pytest.fixture(scope="module")
def cnn_lstm() -> SmallModel:
    return small_model("cnn_lstm")


def config_of(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def test_the_models_compared_here_tell_signals_apart(model):
    assert model.expected.std(axis=0).max() > 1000 * SAME


def test_keras_file_reloads_in_safe_mode_to_the_same_probabilities(model, archive):
    np.testing.assert_allclose(
        keras.run_keras(archive, model.signals), model.expected, rtol=0, atol=SAME
    )


def test_weights_file_gives_a_fresh_twin_the_same_probabilities(model, twin, tmp_path):
    path = tmp_path / "model.weights.h5"
    keras.write_weights(twin, path)
    fresh = build_twin(model)
    np.testing.assert_allclose(
        keras.run_weights(fresh, path, model.signals), model.expected, rtol=0, atol=SAME
    )


def test_saved_model_gives_the_same_probabilities_for_any_batch_size(model, tmp_path):
    saved_model.write_saved_model(
        model.probabilities, model.variables, tmp_path / "saved", target_length=LENGTH
    )
    # run_saved_model runs the first signal alone, then the other five together.
    probabilities = saved_model.run_saved_model(tmp_path / "saved", model.signals)
    np.testing.assert_allclose(probabilities, model.expected, rtol=0, atol=SAME)


def test_keras_file_says_nothing_that_keras_3_4_does_not_know(archive):
    assert compat.unknown_keys(config_of(archive)) == []


def test_without_the_rewriting_keras_would_say_more(twin):
    untouched = json.loads(twin.to_json())
    assert "GlorotUniform.input_axes" in compat.unknown_keys(untouched)


def test_keras_file_holds_what_it_was_told_of_the_model(archive):
    assert keras.read_about(archive) == ABOUT
    with zipfile.ZipFile(archive) as members:
        assert {"keras_version", "date_saved"} <= set(json.loads(members.read("metadata.json")))


def test_equal_models_give_equal_bytes(model, archive, tmp_path):
    again = build_twin(model)
    keras.copy_weights(again, model.variables)
    keras.write_keras(again, tmp_path / "again.keras", ABOUT)
    assert (tmp_path / "again.keras").read_bytes() == archive.read_bytes()


def test_twin_is_named_as_readers_are_told(twin):
    assert [tensor.name for tensor in twin.inputs] == ["signal"]
    assert twin.layers[-1].name == "probabilities"
    assert twin.input_shape == (None, LENGTH, 1)
    assert twin.output_shape == (None, CLASSES)


def test_twin_is_float32_whatever_keras_was_set_to(cnn_lstm):
    loaded = libraries.keras()
    before = loaded.config.dtype_policy()
    loaded.config.set_dtype_policy("mixed_float16")
    try:
        twin = build_twin(cnn_lstm)
        assert loaded.config.dtype_policy().name == "mixed_float16"  # the user's choice is back
    finally:
        loaded.config.set_dtype_policy(before)
    assert {layer.compute_dtype for layer in twin.layers} == {"float32"}
    assert {str(weight.dtype) for weight in twin.weights} == {"float32"}


def test_loading_keras_leaves_the_backend_of_other_processes_alone(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    libraries.keras()
    assert os.environ["KERAS_BACKEND"] == "torch"
    monkeypatch.delenv("KERAS_BACKEND")
    libraries.keras()
    assert "KERAS_BACKEND" not in os.environ


def test_float64_stays_float64(tmp_path):
    with jax.enable_x64(True):
        model = small_model("cnn_lstm", dtype="float64")
        twin = build_twin(model, "float64")
        keras.copy_weights(twin, model.variables)
        assert {str(weight.dtype) for weight in twin.weights} == {"float64"}
        keras.write_keras(twin, tmp_path / "model.keras", ABOUT)
        from_keras = keras.run_keras(tmp_path / "model.keras", model.signals)
        saved_model.write_saved_model(
            model.probabilities, model.variables, tmp_path / "saved", target_length=LENGTH
        )
        referee = saved_model.run_saved_model(tmp_path / "saved", model.signals)
    assert referee.dtype == np.float64
    np.testing.assert_allclose(referee, model.expected, rtol=0, atol=1e-14)
    # Keras normalises batches in float32, whatever its policy says.
    np.testing.assert_allclose(from_keras, model.expected, rtol=0, atol=SAME)


# Weights are copied by name, all of them.


def test_a_weight_that_flax_lacks_is_an_error(cnn_lstm):
    variables = copy.deepcopy(cnn_lstm.variables)
    del variables["params"]["lstm_1"]["bias"]
    with pytest.raises(ValueError, match="no lstm_1_bias"):
        keras.copy_weights(build_twin(cnn_lstm), variables)


def test_a_weight_that_keras_lacks_is_an_error(cnn_lstm):
    variables = copy.deepcopy(cnn_lstm.variables)
    variables["params"]["extra"] = {"kernel": np.zeros((2, 2))}
    with pytest.raises(ValueError, match="extra_kernel"):
        keras.copy_weights(build_twin(cnn_lstm), variables)


def test_a_statistic_that_keras_lacks_is_an_error(cnn_lstm):
    variables = copy.deepcopy(cnn_lstm.variables)
    variables["batch_stats"]["extra"] = {"mean": np.zeros(2)}
    with pytest.raises(ValueError, match="extra_mean"):
        keras.copy_weights(build_twin(cnn_lstm), variables)


def test_a_weight_of_another_shape_is_an_error(cnn_lstm):
    variables = copy.deepcopy(cnn_lstm.variables)
    variables["params"]["head"]["kernel"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"head_kernel has shape \(2, 2\)"):
        keras.copy_weights(build_twin(cnn_lstm), variables)


def test_two_weights_of_one_name_are_an_error(cnn_lstm):
    variables = copy.deepcopy(cnn_lstm.variables)
    variables["params"]["lstm"] = {"1": {"bias": np.zeros(16, np.float32)}}
    with pytest.raises(ValueError, match="lstm_1_bias"):
        keras.copy_weights(build_twin(cnn_lstm), variables)


def test_a_file_that_is_not_ours_tells_nothing(tmp_path):
    assert keras.read_about(tmp_path / "absent.keras") is None
    (tmp_path / "text.keras").write_text("not a zip")
    assert keras.read_about(tmp_path / "text.keras") is None
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.4.1"}')
    assert keras.read_about(tmp_path / "other.keras") is None


# The vocabulary of Keras 3.4.


def serialized(layer):
    return libraries.keras().saving.serialize_keras_object(layer)


def keras_defaults(node):
    loaded = libraries.keras()
    built = loaded.saving.deserialize_keras_object(node)
    return loaded.saving.serialize_keras_object(built)["config"]


def test_a_newer_key_at_its_default_is_dropped_and_keras_puts_it_back():
    node = serialized(libraries.keras().layers.BatchNormalization(name="norm"))
    assert "BatchNormalization.renorm" in compat.unknown_keys(node)
    older = compat.for_3_4(node, keras_defaults)
    assert compat.unknown_keys(older) == []
    assert older["config"]["epsilon"] == node["config"]["epsilon"]
    assert keras_defaults(older) == node["config"]


def test_a_newer_key_in_use_is_an_error():
    node = serialized(libraries.keras().layers.BatchNormalization(renorm=True))
    with pytest.raises(ValueError, match=r"BatchNormalization.renorm=True"):
        compat.for_3_4(node, keras_defaults)


def test_a_class_that_keras_3_4_may_lack_is_an_error():
    node = serialized(libraries.keras().layers.RMSNormalization())
    with pytest.raises(ValueError, match="RMSNormalization"):
        compat.for_3_4(node, keras_defaults)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "shared_object_id", "units"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(json_values)
def test_what_is_no_keras_object_is_left_as_it_is(value):
    assert compat.for_3_4(value, keras_defaults) == value
    assert compat.unknown_keys(value) == []


@given(st.lists(st.integers(0, 2**48)), st.integers(1, 2**47))
def test_shared_objects_are_numbered_the_same_wherever_memory_put_them(addresses, moved_by):
    def model(shift):
        return [{"shared_object_id": address + shift, "units": 1} for address in addresses]

    numbered = compat.number_shared_objects(model(0))
    assert numbered == compat.number_shared_objects(model(moved_by))
    same = {(a, node["shared_object_id"]) for a, node in zip(addresses, numbered, strict=True)}
    assert len(same) == len(set(addresses))
