"""ONNX files give the Flax model's probabilities for any batch size, and say what they are; each
of Keras's layers that a twin may have gives what it gives in Keras, or is refused by name."""

import json
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import onnx as onnx_library
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from capfinder import libraries
from capfinder.errors import StageFailedError
from capfinder.etl import preprocess
from capfinder.exporting import compat, fitting, keras, onnx
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


# Layer by layer, as in Keras.

SAMPLES, CHANNELS = 7, 4


def several(layers, x, count=2):
    """Tensors like x, all different."""
    return [layers.Rescaling(1.0 + 0.3 * i, 0.2 * i)(x) for i in range(count)]


# "Layer: what is special" -> what makes of a signal (B, SAMPLES, CHANNELS) the model's output.
KERAS = {
    "Activation: every one": lambda layers, x: layers.Concatenate()(
        [layers.Activation(name)(x) for name in sorted(onnx._ACTIVATIONS)]
    ),
    "Add: three": lambda layers, x: layers.Add()(several(layers, x, 3)),
    "Add: the same twice": lambda layers, x: layers.Add()([x, x]),
    "Add: fewer axes": lambda layers, x: layers.Add()([layers.GlobalMaxPooling1D()(x), x]),
    "AveragePooling1D: same": lambda layers, x: layers.AveragePooling1D(3, 2, padding="same")(x),
    "AveragePooling1D: wide": lambda layers, x: layers.AveragePooling1D(9, 1, padding="same")(x),
    "AveragePooling1D: valid": lambda layers, x: layers.AveragePooling1D(2)(x),
    "BatchNormalization: time": lambda layers, x: layers.BatchNormalization(axis=1)(x),
    "BatchNormalization: plain": lambda layers, x: layers.BatchNormalization(
        center=False, scale=False, epsilon=0.1
    )(x, training=False),
    "Concatenate: time": lambda layers, x: layers.Concatenate(axis=-2)(several(layers, x, 3)),
    "Concatenate: channels": lambda layers, x: layers.Concatenate()(several(layers, x)),
    "Conv1D: softmax": lambda layers, x: layers.Conv1D(3, 2, activation="softmax")(x),
    "Cropping1D: one end": lambda layers, x: layers.Cropping1D((2, 0))(x),
    "Dense: no bias": lambda layers, x: layers.Dense(3, use_bias=False, activation="silu")(x),
    "Dense: softmax": lambda layers, x: layers.Dense(3, activation="softmax")(x),
    "Dot: last axes": lambda layers, x: layers.Dot(axes=-1)(several(layers, x)),
    "Dot: different axes": lambda layers, x: layers.Dot(axes=(1, 2))(
        [x, layers.Permute((2, 1))(x)]
    ),
    "Dot: a vector": lambda layers, x: layers.Dot(axes=(2, 1))([x, layers.GlobalMaxPooling1D()(x)]),
    "Dot: of a vector": lambda layers, x: layers.Dot(axes=(1, -1))(
        [layers.GlobalMaxPooling1D()(x), x]
    ),
    "Dot: vectors": lambda layers, x: layers.Dot(axes=1)(
        several(layers, layers.GlobalMaxPooling1D()(x))
    ),
    "Dropout: noise": lambda layers, x: layers.Dropout(0.5, noise_shape=(None, 1, CHANNELS))(x),
    "EinsumDense: no bias": lambda layers, x: layers.EinsumDense(
        "btc,co->bto", output_shape=(None, 3), activation="relu"
    )(x),
    "EinsumDense: time": lambda layers, x: layers.EinsumDense(
        "btc,tcuo->buo", output_shape=(2, 3), bias_axes="uo"
    )(x),
    "EinsumDense: ellipsis": lambda layers, x: layers.EinsumDense(
        "...c,co->...o", output_shape=3, bias_axes="o", activation="tanh"
    )(x),
    "Embedding: of rounded samples": lambda layers, x: layers.Embedding(5, 3)(
        layers.ReLU(max_value=4.0)(layers.Rescaling(2.0)(x))
    ),
    "Flatten: nothing special": lambda layers, x: layers.Flatten()(x),
    "GlobalAveragePooling1D: kept": lambda layers, x: layers.GlobalAveragePooling1D(keepdims=True)(
        x
    ),
    "GlobalMaxPooling1D: kept": lambda layers, x: layers.GlobalMaxPooling1D(keepdims=True)(x),
    "LSTM: backwards": lambda layers, x: layers.LSTM(3, go_backwards=True, return_sequences=True)(
        x
    ),
    "LSTM: others": lambda layers, x: layers.LSTM(
        3, go_backwards=True, use_bias=False, activation="relu", recurrent_activation="tanh"
    )(x),
    "LayerNormalization: time": lambda layers, x: layers.LayerNormalization(axis=1)(x),
    "LayerNormalization: both": lambda layers, x: layers.LayerNormalization(axis=(-1, 1))(x),
    "LayerNormalization: no shift": lambda layers, x: layers.LayerNormalization(center=False)(x),
    "LayerNormalization: no scale": lambda layers, x: layers.LayerNormalization(
        scale=False, epsilon=0.1
    )(x),
    "MaxPooling1D: same": lambda layers, x: layers.MaxPooling1D(3, 2, padding="same")(x),
    "MultiHeadAttention: sizes": lambda layers, x: layers.MultiHeadAttention(
        2, 3, value_dim=2, output_shape=5, use_bias=False, dropout=0.1
    )(x, *several(layers, x)),
    "MultiHeadAttention: by name": lambda layers, x: layers.MultiHeadAttention(2, 3)(
        value=layers.Cropping1D(1)(x), query=x, key=layers.Rescaling(0.5)(layers.Cropping1D(1)(x))
    ),
    "MultiHeadAttention: mask": lambda layers, x: layers.MultiHeadAttention(2, 3)(
        x, x, attention_mask=layers.ReLU()(layers.Dot(axes=2)([x, x]))
    ),
    "Multiply: fewer axes": lambda layers, x: layers.Multiply()(
        [*several(layers, x), layers.GlobalMaxPooling1D()(x)]
    ),
    "Permute: swapped": lambda layers, x: layers.Permute((2, 1))(x),
    "ReLU: slope": lambda layers, x: layers.ReLU(negative_slope=0.3)(x),
    "ReLU: most": lambda layers, x: layers.ReLU(max_value=0.5)(x),
    "ReLU: threshold": lambda layers, x: layers.ReLU(threshold=0.5)(x),
    "ReLU: all": lambda layers, x: layers.ReLU(1.5, negative_slope=0.3, threshold=0.5)(x),
    "RepeatVector: three times": lambda layers, x: layers.RepeatVector(3)(layers.Flatten()(x)),
    "Rescaling: by channel": lambda layers, x: layers.Rescaling([1, 2, 3, 4], [[0.5]] * SAMPLES)(x),
    "Reshape: one free": lambda layers, x: layers.Reshape((2, -1, 2))(x),
    "Softmax: time": lambda layers, x: layers.Softmax(axis=1)(x),
    "Softmax: both": lambda layers, x: layers.Softmax(axis=(1, 2))(x),
    "Subtract: fewer axes": lambda layers, x: layers.Subtract()(
        [x, layers.GlobalMaxPooling1D()(x)]
    ),
    "ZeroPadding1D: one end": lambda layers, x: layers.ZeroPadding1D((0, 3))(x),
}


def keras_model(build, shape=(SAMPLES, CHANNELS)):
    """`build(keras.layers, signal)` as a model with random weights."""
    library = libraries.keras()
    with keras.without_draws(library):
        signal = library.Input(shape)
        model = library.Model(signal, build(library.layers, signal))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        drawn = rng.uniform(0.5, 1, weight.shape) * rng.choice([-0.5, 0.5], weight.shape)
        weight.assign(np.abs(drawn) if weight.name == "moving_variance" else drawn)
    return model


def assert_same_as_keras(model, path):
    onnx.write_onnx(model, path, {})
    signals = np.random.default_rng(1).normal(size=(3, *model.inputs[0].shape[1:]))
    signals = signals.astype(np.float32)
    expected = np.asarray(model(signals, training=False))
    found = onnx.run_onnx(path, signals)  # the first alone, the others together
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("case", KERAS)
def test_a_layer_gives_what_it_gives_in_keras(case, tmp_path):
    assert_same_as_keras(keras_model(KERAS[case]), tmp_path / "model.onnx")


def test_every_layer_that_a_keras_file_may_have_can_be_written():
    twins = set(compat.LAYERS_3_4) - {"InputLayer"}
    assert set(onnx._LAYERS) == twins
    assert {case.split(":")[0] for case in KERAS} == twins


@hypothesis_settings(max_examples=20)
@given(
    st.integers(1, 4),
    st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]),  # Keras has no other pairs
    st.sampled_from(["valid", "same", "causal"]),
    st.sampled_from([1, 2]),
    st.integers(10, 13),
    st.booleans(),
)
def test_a_convolution_gives_what_it_gives_in_keras(
    width, steps, padding, groups, length, use_bias
):
    strides, dilation_rate = steps
    how = dict(strides=strides, dilation_rate=dilation_rate, groups=groups, use_bias=use_bias)

    def build(layers, signal):
        return layers.Conv1D(4, width, padding=padding, activation="relu", **how)(signal)

    with tempfile.TemporaryDirectory() as directory:
        assert_same_as_keras(keras_model(build, (length, 2)), Path(directory) / "model.onnx")


# What the error says of the layer "odd" -> what makes the output with that layer.
REFUSED = {
    "is a GaussianNoise": lambda layers, x: layers.GaussianNoise(0.1, name="odd")(x),
    "is a keras.src.ops.numpy.Add": lambda layers, x: libraries.keras().src.ops.numpy.Add(
        name="odd"
    )(x, x),
    "has activation='mish'": lambda layers, x: layers.Dense(2, activation="mish", name="odd")(x),
    "has activation='Softmax'": lambda layers, x: layers.Activation(
        layers.Softmax(axis=1), name="odd"
    )(x),
    "has recurrent_activation='hard_sigmoid'": lambda layers, x: layers.LSTM(
        2, recurrent_activation="hard_sigmoid", name="odd"
    )(x),
    "has data_format='channels_first'": lambda layers, x: layers.Flatten(
        data_format="channels_first", name="odd"
    )(x),
    "has normalize=True": lambda layers, x: layers.Dot(axes=1, normalize=True, name="odd")([x, x]),
    "has return_state=True": lambda layers, x: layers.LSTM(2, return_state=True, name="odd")(x)[0],
    "has mask_zero=True": lambda layers, x: layers.Embedding(2, 2, mask_zero=True, name="odd")(x),
    "has sliding_window=2": lambda layers, x: layers.MultiHeadAttention(
        1, 2, sliding_window=2, name="odd"
    )(x, x),
    "has attention_axes=(2,)": lambda layers, x: layers.MultiHeadAttention(
        1, 2, attention_axes=2, name="odd"
    )(*several(layers, layers.Reshape((SAMPLES, 2, 2))(x))),
    "has an attention_mask of 4 axes": lambda layers, x: layers.MultiHeadAttention(
        1, 2, name="odd"
    )(x, x, attention_mask=layers.Reshape((1, 1, SAMPLES))(layers.Dense(1)(x))),
    "gives 4 axes": lambda layers, x: layers.MultiHeadAttention(
        1, 2, output_shape=(2, 2), name="odd"
    )(x, x),
    "takes 4 and 3 axes": lambda layers, x: layers.Dot(axes=1, name="odd")(
        [layers.Reshape((SAMPLES, 2, 2))(x), x]
    ),
    "is called with use_causal_mask": lambda layers, x: layers.MultiHeadAttention(1, 2, name="odd")(
        x, x, use_causal_mask=True
    ),
    "is called with training": lambda layers, x: layers.Dropout(0.5, name="odd")(x, training=True),
    "is called more than once": lambda layers, x: (again := layers.Dense(CHANNELS, name="odd"))(
        again(x)
    ),
    "takes something other than": lambda layers, x: layers.Add(name="odd")(
        [x, np.ones((1, SAMPLES, CHANNELS), "float32")]
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_written_is_an_error_that_names_the_layer_and_the_reason(reason, tmp_path):
    model = keras_model(REFUSED[reason])
    said = re.escape(f"ONNX: the layer odd {reason}") + ".*, which isn't written"
    with pytest.raises(StageFailedError, match=said):
        onnx.write_onnx(model, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


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
