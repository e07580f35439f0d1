"""A Keras model is recognised however it was written down, and refused whatever differs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capfinder import libraries, models
from capfinder.exporting import import_check, keras, recognise
from capfinder.exporting.keras_graph import UnlikeError
from tests.keras_models import chain, stack, with_weights
from tests.sizes import TINY
from tests.small_models import CLASSES, LENGTH

SAME = 1e-6  # probabilities, two implementations of the same float32 arithmetic


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Small models are compiled far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def layers() -> Any:
    return libraries.keras().layers


def build_twin(model_type: str, hyperparameters: Any) -> Any:
    return keras.build_twin(
        model_type,
        hyperparameters,
        num_classes=CLASSES,
        target_length=LENGTH,
        dtype="float32",
    )


def recognised(model: Any, learning_rate: float | None = 0.01) -> recognise.Recognised:
    return recognise.recognise(model, learning_rate=learning_rate)


def expect_same_probabilities(model: Any, found: recognise.Recognised) -> None:
    module = models.architecture(found.model_type).build(
        found.hyperparameters, num_classes=found.num_classes, dtype=found.dtype
    )

    @jax.jit
    def probabilities(signals: Any) -> Any:
        return jax.nn.softmax(module.apply(found.variables, signals, train=False))

    difference = import_check.largest_difference(
        model,
        probabilities,
        input_length=found.input_length,
        target_length=found.target_length,
        dtype=found.dtype,
    )
    assert difference <= SAME
    expected = import_check.probabilities(model, import_check.signals(found.input_length))
    assert expected.std(axis=0).max() > 1000 * SAME  # it tells signals apart


# A cnn_lstm as others write it


EXPECTED = {
    "conv_filters": (4,),
    "conv_kernels": (5,),
    "conv_dropouts": (0.2,),
    "lstm_units": (4, 4),
    "lstm_dropouts": (0.3, 0.0),
    "dense_units": 4,
    "dense_dropout": 0.5,
    "learning_rate": 0.01,
}


def test_a_model_with_keras_own_names_is_recognised(layers):
    model = with_weights(chain(stack(layers)))
    found = recognised(model)
    assert found.model_type == "cnn_lstm"
    assert dataclasses.asdict(found.hyperparameters) == EXPECTED
    assert (found.num_classes, found.input_length, found.target_length) == (CLASSES, LENGTH, LENGTH)
    assert found.dtype == "float32"
    assert found.remarks == []
    expect_same_probabilities(model, found)


def test_layers_for_activations_sequential_and_nested_models_change_nothing(layers):
    """One ReLU layer is used at two places, which shares no weights."""
    library, relu = libraries.keras(), layers.ReLU()
    conv = {"activation": None}
    stacked = stack(layers, conv=conv, after_conv=[relu], head={"activation": None})
    stacked[-3:-1] = [layers.Dense(4), layers.Activation("linear"), relu, layers.Dropout(0.5)]
    signal = library.Input((LENGTH // 2, 4))
    x = signal
    for layer in stacked[3:7]:  # dropout, norm, LSTM, dropout
        x = layer(x)
    middle = library.Model(signal, x)
    front = library.Sequential([library.Input((LENGTH, 1)), *stacked[:3]])
    rest = library.Sequential([*stacked[7:], layers.Softmax()])
    model = with_weights(library.Sequential([front, middle, rest]))
    found = recognised(model)
    assert dataclasses.asdict(found.hyperparameters) == EXPECTED
    expect_same_probabilities(model, found)


@pytest.mark.parametrize(
    ("length", "fit"), [(LENGTH + 7, ("Cropping1D", (3, 4))), (31, ("ZeroPadding1D", (8, 9)))]
)
def test_a_crop_or_padding_in_front_is_taken_off(length, fit, layers):
    kind, ends = fit
    model = with_weights(chain([getattr(layers, kind)(ends), *stack(layers)], length))
    found = recognised(model)
    assert (found.input_length, found.target_length) == (length, LENGTH)
    expect_same_probabilities(model, found)


def test_padding_after_a_crop_is_refused(layers):
    """It puts zeros where the signal was."""
    fit = [layers.Cropping1D((5, 5)), layers.ZeroPadding1D((5, 5), name="back")]
    with pytest.raises(
        UnlikeError, match="layer back: ZeroPadding1D where cnn_lstm has the signal"
    ):
        recognised(chain([*fit, *stack(layers)]))


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        (lambda layers: layers.Cropping1D((3, 2)), r"cropping=\[3, 2\]; expected \[2, 3\]"),
        (lambda layers: layers.ZeroPadding1D((0, 4)), r"padding=\[0, 4\]; expected \[2, 2\]"),
    ],
)
def test_a_crop_that_is_not_centred_is_refused(layers, fit, said):
    layer = fit(layers)
    with pytest.raises(UnlikeError, match=f"layer {layer.name}: {said}"):
        recognised(chain([layer, *stack(layers)]))


def test_what_was_computed_in_half_precision_is_computed_in_float32(layers):
    model = with_weights(chain(stack(layers, lstm={"dtype": "mixed_float16"})))
    found = recognised(model)
    assert found.remarks == ["it computes in float16, the import in float32"]
    assert found.dtype == "float32"
    expect_same_probabilities(model, found)


def test_a_learning_rate_that_is_not_known_is_said_to_be_the_default(layers):
    model = chain(stack(layers))
    found = recognised(model, learning_rate=None)
    default = models.parse_hyperparameters("cnn_lstm", {}).learning_rate
    assert found.hyperparameters.learning_rate == default
    assert found.remarks == ["learning_rate isn't in the file: 0.001, the default"]
    assert "learning_rate=7 becomes 0.001" in recognised(model, learning_rate=7.0).remarks[0]


def test_dropout_elsewhere_is_left_out_and_said(layers):
    stacked = stack(
        layers,
        after_conv=[layers.Dropout(0.25, name="early")],
        lstm={"recurrent_dropout": 0.1, "name": "inner"},
    )
    found = recognised(chain(stacked))
    assert found.remarks == [
        f"dropout after layer {stacked[0].name} becomes 0 (was 0.25)",
        "layer inner: recurrent_dropout=0.1 is left out",
    ]


def without(stacked: list[Any], kind: str) -> list[Any]:
    """The stack without its first layer of the kind."""
    first = next(layer for layer in stacked if type(layer).__name__ == kind)
    return [layer for layer in stacked if layer is not first]


WRONG: dict[str, tuple[Callable[[Any], list[Any]], str]] = {
    "backwards": (
        lambda k: stack(k, lstm={"go_backwards": True}),
        r"layer lstm\w*: go_backwards=True; cnn_lstm has False",
    ),
    "all states": (
        lambda k: [*stack(k, lstm={"return_sequences": True})[:-1], k.Flatten(), k.Dense(CLASSES)],
        r"layer dense\w*: Dense where cnn_lstm has the activation softmax",
    ),
    "lstm activation": (
        lambda k: stack(k, lstm={"recurrent_activation": "hard_sigmoid"}),
        r"layer lstm\w*: recurrent_activation='hard_sigmoid'; cnn_lstm has 'sigmoid'",
    ),
    "epsilon": (
        lambda k: stack(k, norm={"epsilon": 1e-5}),
        r"layer batch_normalization\w*: epsilon=1e-05; cnn_lstm has 0\.001",
    ),
    "no scale": (
        lambda k: stack(k, norm={"scale": False}),
        r"layer batch_normalization\w*: scale=False; cnn_lstm has True",
    ),
    "axis": (
        lambda k: stack(k, norm={"axis": 1}),
        r"layer batch_normalization\w*: axis=1; cnn_lstm has 2",
    ),
    "valid padding": (
        lambda k: stack(k, conv={"padding": "valid"}),
        r"layer conv1d\w*: padding='valid'; cnn_lstm has 'same'",
    ),
    "stride": (
        lambda k: stack(k, conv={"strides": 2}),
        r"layer conv1d\w*: strides=\[2\]; cnn_lstm has \[1\]",
    ),
    "dilation": (
        lambda k: stack(k, conv={"dilation_rate": 2}),
        r"layer conv1d\w*: dilation_rate=\[2\]; cnn_lstm has \[1\]",
    ),
    "no bias": (
        lambda k: stack(k, conv={"use_bias": False}),
        r"layer conv1d\w*: use_bias=False; cnn_lstm has True",
    ),
    "elu": (
        lambda k: stack(k, conv={"activation": "elu"}),
        r"layer conv1d\w*: activation='elu'; cnn_lstm has 'relu'",
    ),
    "an odd relu": (
        lambda k: stack(k, conv={"activation": None}, after_conv=[k.ReLU(max_value=6)]),
        r"layer re_lu\w*: ReLU where cnn_lstm has the activation relu",
    ),
    "no norm": (
        lambda k: without(stack(k), "BatchNormalization"),
        r"layer max_pooling1d\w*: MaxPooling1D where cnn_lstm has BatchNormalization",
    ),
    "no maximum": (
        lambda k: without(stack(k), "MaxPooling1D"),
        r"layer conv1d\w*: the activation relu where cnn_lstm has MaxPooling1D",
    ),
    "one layer more": (
        lambda k: stack(k, before_head=[k.BatchNormalization(name="more")]),
        r"layer more: BatchNormalization where cnn_lstm has the activation relu",
    ),
    "logits": (
        lambda k: stack(k, head={"activation": None}),
        r"layer dense\w*: Dense where cnn_lstm has the activation softmax",
    ),
    "sigmoids": (
        lambda k: stack(k, head={"activation": "sigmoid"}),
        r"layer dense\w*: activation='sigmoid'; cnn_lstm has 'softmax'",
    ),
    "softmax over the batch": (
        lambda k: [*stack(k)[:-1], k.Dense(CLASSES), k.Softmax(axis=0)],
        r"layer softmax\w*: axis=0; cnn_lstm has 1",
    ),
    "a layer of another kind": (
        lambda k: stack(k, before_head=[k.Rescaling(2.0, name="double")]),
        "layer double: Rescaling where cnn_lstm has the activation relu",
    ),
    "too much dropout": (
        lambda k: [*stack(k)[:-1], k.Dropout(0.98), k.Dense(CLASSES, activation="softmax")],
        r"cnn_lstm: model_params.dense_dropout: 0\.99",
    ),
    "no LSTM": (
        lambda k: [k.Conv1D(4, 5), k.Flatten(), k.Dense(CLASSES, activation="softmax")],
        r"its layers \(Conv1D, Dense, Flatten\) are those of none of the architectures, which are",
    ),
    "no Dense": (lambda k: stack(k)[:-4], "it has no Dense layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_differs_is_named_with_its_layer(name, layers):
    make, said = WRONG[name]
    with pytest.raises(UnlikeError, match=said):
        recognised(chain(make(layers)))


def test_dropout_that_never_ends_is_refused(layers):
    library = libraries.keras()
    signal = x = library.Input((LENGTH, 1))
    for layer in stack(layers):
        x = layer(x, training=True) if type(layer).__name__ == "Dropout" else layer(x)
    with pytest.raises(UnlikeError, match=r"layer dropout\w*: Dropout where cnn_lstm has the act"):
        recognised(library.Model(signal, x))


def test_norms_that_go_by_the_batch_are_refused(layers):
    library = libraries.keras()
    inner = chain(stack(layers))
    signal = library.Input((LENGTH, 1))
    with pytest.raises(UnlikeError, match=f"layer {inner.name}: is called with training"):
        recognised(library.Model(signal, inner(signal, training=True)))


def test_shared_weights_are_refused(layers):
    stacked = stack(layers)
    with pytest.raises(UnlikeError, match=r"layer lstm\w*: is used more than once"):
        recognised(chain([*stacked[:7], *stacked[4:]]))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((None, 1), r"the shape \(reads, any, 1\)"),
        ((LENGTH, 2), rf"the shape \(reads, {LENGTH}, 2\)"),
        ((LENGTH,), rf"the shape \(reads, {LENGTH}\)"),
    ],
)
def test_another_input_is_refused(layers, shape, said):
    library = libraries.keras()
    signal = library.Input(shape)
    with pytest.raises(UnlikeError, match=said):
        recognised(library.Model(signal, layers.Activation("softmax")(signal)))


def test_two_inputs_or_outputs_are_refused(layers):
    library = libraries.keras()
    one, other = (library.Input((LENGTH, 1)) for _ in range(2))
    with pytest.raises(UnlikeError, match="it takes 2 inputs"):
        recognised(library.Model([one, other], layers.Add()([one, other])))
    with pytest.raises(UnlikeError, match="it gives 2 outputs"):
        recognised(library.Model(one, [layers.ReLU()(one), layers.ReLU()(one)]))


# All architectures


class Named:
    """Keras's layers, those without a name given one of no meaning, sums written otherwise."""

    def __init__(self, layers: Any) -> None:
        self._layers = layers

    def __getattr__(self, kind: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("name", None)
            return getattr(self._layers, kind)(*args, **kwargs)

        return make

    def Add(self) -> Any:
        return lambda two: two[1] + two[0]  # keras.ops, in the other order

    def MultiHeadAttention(self, heads: int, *, key_dim: int, name: str) -> Any:
        layer = self._layers.MultiHeadAttention(heads, key_dim=key_dim)
        return lambda x, y, attention_mask: layer(
            key=x, query=x, value=y, attention_mask=attention_mask
        )


@pytest.mark.parametrize("model_type", ["encoder", "resnet"])
def test_sums_and_attention_may_be_written_otherwise(model_type, layers):
    library, named = libraries.keras(), Named(layers)
    hyperparameters = models.parse_hyperparameters(
        model_type, TINY[model_type] | {"learning_rate": 0.01}
    )
    network = models.architecture(model_type).keras_twin(
        hyperparameters, num_classes=CLASSES, layers=named
    )
    signal = library.Input((LENGTH, 1))
    model = with_weights(library.Model(signal, library.activations.softmax(network(signal))))
    found = recognised(model)
    assert (found.model_type, found.hyperparameters) == (model_type, hyperparameters)
    expect_same_probabilities(model, found)


def test_what_differs_behind_a_sum_is_found(layers):
    named = Named(layers)
    named.BatchNormalization = lambda epsilon, name: layers.BatchNormalization(
        epsilon=1e-5 if name == "stage_1_block_0_conv_0_norm" else epsilon, name=name
    )
    named.Conv1D = layers.Conv1D
    hyperparameters = models.parse_hyperparameters("resnet", TINY["resnet"])
    network = models.architecture("resnet").keras_twin(
        hyperparameters, num_classes=CLASSES, layers=named
    )
    library = libraries.keras()
    signal = library.Input((LENGTH, 1))
    model = library.Model(signal, layers.Softmax()(network(signal)))
    said = "layer stage_1_block_0_conv_0_norm: epsilon=1e-05; resnet has 0.001"
    with pytest.raises(UnlikeError, match=said):
        recognised(model)


rates = st.sampled_from([0.0, 0.1, 0.45])
widths = st.sampled_from([2, 4])  # Keras compiles an initialiser for each new shape
kernels = st.sampled_from([1, 3])


def tuples(values: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[Any]:
    return st.tuples(*[values] * size)


@st.composite
def trunks(draw: Any) -> dict[str, Any]:
    convolutions, lstms = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return {
        "conv_filters": draw(tuples(widths, convolutions)),
        "conv_kernels": draw(tuples(kernels, convolutions)),
        "conv_dropouts": draw(tuples(rates, convolutions)),
        "lstm_units": draw(tuples(widths, lstms)),
        "lstm_dropouts": draw(tuples(rates, lstms)),
        "dense_units": draw(widths),
        "dense_dropout": draw(rates),
    }


@st.composite
def resnets(draw: Any) -> dict[str, Any]:
    stages = draw(st.integers(1, 3))
    return {
        "stem_filters": draw(widths),
        "stem_kernel": draw(kernels),
        "stage_filters": draw(tuples(widths, stages)),
        "stage_kernels": draw(tuples(kernels, stages)),
        "stage_blocks": draw(tuples(st.integers(1, 2), stages)),
        "dense_units": draw(widths),
        "dense_dropout": draw(rates),
    }


encoders = st.fixed_dictionaries(
    {
        "d_model": widths,
        "num_heads": st.integers(1, 2),
        "head_size": widths,
        "num_blocks": st.integers(1, 2),
        "feed_forward_units": widths,
        "dropout": rates,
        "mlp_units": tuples(widths, 1) | tuples(widths, 2),
        "mlp_dropout": rates,
    }
)
DRAWN = {
    "cnn_lstm": trunks(),
    "attention_cnn_lstm": trunks(),
    "encoder": encoders,
    "resnet": resnets(),
}


@pytest.mark.parametrize("model_type", sorted(models.ARCHITECTURES))
@settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_hyperparameters_are_read_back(model_type, data):
    drawn = data.draw(DRAWN.get(model_type, st.just(TINY[model_type]))) | {"learning_rate": 0.01}
    hyperparameters = models.parse_hyperparameters(model_type, drawn)
    found = recognised(with_weights(build_twin(model_type, hyperparameters)))
    assert (found.model_type, found.hyperparameters) == (model_type, hyperparameters)
    assert found.remarks == []
