"""ONNX files give the Flax model's probabilities for any batch size, and say what they are."""

import json

import jax
import numpy as np
import onnx as onnx_library
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from capfinder import libraries
from capfinder.etl import preprocess
from capfinder.exporting import fitting, keras, onnx
from capfinder.models import ARCHITECTURES
from tests.small_models import CLASSES, LENGTH, SmallModel, small_model

SAME = 1e-6
ABOUT = {
    "capfinder_version": "1.2.3",
    "class_names": ["cap_0", "cap_1", "cap_2"],
    "preprocessing": {"target_length": LENGTH, "input_length": LENGTH},
    "weights_sha256": "ab",
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Small models are compiled far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def trained_twin(model: SmallModel, dtype="float32", input_length=None):
    twin = keras.build_twin(
        model.model_type,
        model.hyperparameters,
        num_classes=CLASSES,
        target_length=LENGTH,
        dtype=dtype,
        input_length=input_length,
    )
    keras.copy_weights(twin, model.variables)
    return twin


def fitted(signals: np.ndarray, length: int) -> np.ndarray:
    return np.stack([preprocess.fit_length(one[:, 0], length) for one in signals])[..., None]


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request) -> SmallModel:
    return small_model(request.param)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "classifier.onnx"
    onnx.write_onnx(trained_twin(model), path, ABOUT)
    return path


def test_every_architecture_gives_the_same_probabilities_for_any_batch_size(model, path):
    # run_onnx runs the first signal alone, then the others together.
    probabilities = onnx.run_onnx(path, model.signals)
    np.testing.assert_allclose(probabilities, model.expected, rtol=0, atol=SAME)


def test_equal_models_give_equal_bytes(model, path, tmp_path):
    onnx.write_onnx(trained_twin(model), tmp_path / "again.onnx", ABOUT)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_the_file_says_what_it_takes_and_gives_and_of_which_opset_it_is(path):
    loaded = onnx_library.load(path)
    assert [(one.domain, one.version) for one in loaded.opset_import] == [("", onnx.OPSET)]
    assert (loaded.producer_name, loaded.producer_version) == ("capfinder", "1.2.3")
    said = {one.key: one.value for one in loaded.metadata_props}
    assert json.loads(said["class_names"]) == ABOUT["class_names"]
    assert json.loads(said["preprocessing"]) == ABOUT["preprocessing"]
    assert said["weights_sha256"] == "ab"
    assert said["opset"] == "17"
    shapes = {
        value.name: [one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim]
        for value in (*loaded.graph.input, *loaded.graph.output)
    }
    assert shapes == {"signal": ["batch", LENGTH, 1], "probabilities": ["batch", CLASSES]}


@pytest.mark.parametrize("length", [LENGTH + 13, LENGTH - 7])
def test_signals_of_another_length_are_fitted_inside_in_every_format(tmp_path, length):
    """The encoder: what is padded inside is masked as what was padded before."""
    from capfinder.exporting import saved_model

    model = small_model("encoder")
    signals = fitted(model.signals, length)
    fitted_before = fitted(signals, LENGTH)
    expected = np.asarray(jax.jit(model.probabilities)(model.variables, fitted_before))
    twin = trained_twin(model, input_length=length)
    keras.write_keras(twin, tmp_path / "model.keras", ABOUT)
    onnx.write_onnx(twin, tmp_path / "model.onnx", ABOUT)
    saved_model.write_saved_model(
        model.probabilities,
        model.variables,
        tmp_path / "saved",
        target_length=LENGTH,
        input_length=length,
    )
    found = {
        "keras": keras.run_keras(tmp_path / "model.keras", signals),
        "onnx": onnx.run_onnx(tmp_path / "model.onnx", signals),
        "saved_model": saved_model.run_saved_model(tmp_path / "saved", signals),
    }
    for name, probabilities in found.items():
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=SAME, err_msg=name)


def test_a_float64_model_is_float32_in_onnx(tmp_path):
    with jax.enable_x64(True):
        model = small_model("encoder", dtype="float64")
        onnx.write_onnx(trained_twin(model, "float64"), tmp_path / "model.onnx", ABOUT)
    probabilities = onnx.run_onnx(tmp_path / "model.onnx", model.signals)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, model.expected, rtol=0, atol=SAME)


def test_a_layer_that_is_not_known_is_an_error_that_names_it(tmp_path):
    library = libraries.keras()
    signal = library.Input((8, 1))
    twin = library.Model(signal, library.layers.GaussianNoise(0.1, name="noise")(signal))
    with pytest.raises(ValueError, match=r"noise: the Keras layer GaussianNoise"):
        onnx.write_onnx(twin, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


def test_an_activation_that_is_not_known_is_an_error_that_names_it(tmp_path):
    library = libraries.keras()
    signal = library.Input((8,))
    twin = library.Model(signal, library.layers.Dense(2, activation="gelu", name="wide")(signal))
    with pytest.raises(ValueError, match=r"wide: the activation gelu"):
        onnx.write_onnx(twin, tmp_path / "model.onnx", {})


# The length that files take.

lengths = st.integers(1, 60)


@given(lengths, lengths)
def test_margins_are_those_of_fitting_outside(length, target_length):
    signal = np.arange(1.0, length + 1)
    left, right = fitting.margins(length, target_length)
    cut = signal[max(-left, 0) : length - max(-right, 0)]
    inside = np.pad(cut, (max(left, 0), max(right, 0)))
    np.testing.assert_array_equal(inside, preprocess.fit_length(signal, target_length))


@hypothesis_settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40))
def test_keras_and_jax_fit_inside_as_is_fitted_outside(length, target_length):
    signal = np.arange(1.0, length + 1, dtype=np.float32)
    expected = preprocess.fit_length(signal, target_length)
    batch = signal[None, :, None]
    layers = libraries.keras().layers
    by_keras = fitting.keras_fitted(
        libraries.keras().ops.convert_to_tensor(batch), target_length, layers
    )
    np.testing.assert_array_equal(np.asarray(by_keras)[0, :, 0], expected)
    by_jax = fitting.jax_fitted(jax.numpy.asarray(batch), target_length)
    np.testing.assert_array_equal(np.asarray(by_jax)[0, :, 0], expected)


@given(lengths, lengths, lengths)
def test_fitting_twice_moves_a_signal_by_a_sample_at_most(length, input_length, target_length):
    """As it is fitted to the length that files take, and inside to the model's."""
    signal = np.arange(1.0, length + 1)
    once = preprocess.fit_length(signal, target_length)
    twice = preprocess.fit_length(preprocess.fit_length(signal, input_length), target_length)
    assert abs(start(once) - start(twice)) <= 1
    lost = max(min(length, target_length) - input_length, 0)
    assert np.count_nonzero(once) - np.count_nonzero(twice) == lost


def start(fitted: np.ndarray) -> float:
    """Where the signal's first sample, which is 1, lies or would lie."""
    first = np.flatnonzero(fitted)[0]
    return first - fitted[first] + 1
