import dataclasses
import functools
import json
import sys
import types

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import optuna
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import ODD, ODD_LENGTH, SMALL

from capfinder.errors import SettingsError
from capfinder.models import ARCHITECTURES, architecture, encoder, parse_hyperparameters
from capfinder.models.hyperparameters import hyperparameter

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)

RELEASED = {  # the classifier in Capfinder 0.4.3
    "conv_filters": [64, 128, 32],
    "conv_kernels": [3, 7, 3],
    "conv_dropouts": [0.1, 0.5, 0.1],
    "lstm_units": [64, 128, 128, 32],
    "lstm_dropouts": [0.3, 0.4, 0.4, 0.1],
    "dense_units": 32,
    "dense_dropout": 0.5,
    "learning_rate": 6.25e-5,
}


def _build(name, overrides, dtype="float32", num_classes=4):
    h = parse_hyperparameters(name, overrides)
    return architecture(name).build(h, num_classes=num_classes, dtype=dtype)


def _signals(length, batch=6, dtype="float32"):
    """Random signals, some of them padded with zeros as short reads are, one of nothing else."""
    signals = np.random.default_rng(1).normal(size=(batch, length, 1)).astype(dtype)
    signals[1, : length // 4], signals[1, -length // 3 :] = 0, 0
    signals[2, : length // 2] = 0
    signals[3] = 0
    return signals


def _score(module, variables, signals):
    """Logits, with the whole model compiled at once: op by op would take seconds."""
    return np.asarray(jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, signals))


def _init(module, signals):
    return jax.jit(lambda: module.init(jax.random.key(0), signals, train=False))()


def _trained_looking(module, signals):
    """Variables with no value left at what it starts from."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), signals, train=False))
    gain = 1.0 if type(module).__name__ == "ResNet" else 1.7  # sums of blocks would grow too large

    def value(path, leaf):
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        is_kernel = leaf.ndim > 1
        spread = gain / np.sqrt(np.prod(leaf.shape[:-1])) if is_kernel else 0.3
        return (spread * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def _count(name, h, length):
    """Parameters, and Keras's count, which has the running statistics in it."""
    module = architecture(name).build(h, num_classes=4, dtype="float32")
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, length, 1)), train=False)
    )
    trained = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    stats = flatten_dict(shapes.get("batch_stats", {}))
    return trained, trained + sum(s.size for path, s in stats.items() if path[-1] != "steps")


def test_the_released_classifier_has_the_parameters_it_is_known_for():
    h = parse_hyperparameters("cnn_lstm", RELEASED)
    assert _count("cnn_lstm", h, 500) == (348_228, 349_380)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cnn_lstm", 114_628),
        ("attention_cnn_lstm", 114_723),
        ("encoder", 154_692),
        ("resnet", 379_364),
    ],
)
def test_default_models_keep_their_size(name, parameters):
    assert _count(name, architecture(name).Hyperparameters(), 500)[0] == parameters


def _twin(name, h, length, dtype="float32"):
    keras.config.set_dtype_policy(dtype)
    signal = keras.Input((length, 1), dtype=dtype)
    twin = architecture(name).keras_twin(h, num_classes=4, layers=keras.layers)
    model = keras.Model(signal, twin(signal))
    keras.config.set_dtype_policy("float32")
    return model


def _copy(variables, twin):
    """By the rule that a layer is named like its Flax module's path joined by "_"."""
    arrays = {
        "_".join(path): leaf
        for collection in variables.values()
        for path, leaf in flatten_dict(collection).items()
        if path[-1] != "steps"
    }
    other = {
        "gamma": "scale",
        "beta": "bias",
        "moving_mean": "mean",
        "moving_variance": "var",
        "attention_output": "out",
    }
    for weight in twin.weights:
        path = weight.path.replace("lstm_cell/", "").split("/")
        weight.assign(arrays.pop("_".join(other.get(part, part) for part in path)))
    assert not arrays, f"without a Keras weight: {sorted(arrays)}"


@every_architecture
@pytest.mark.parametrize("variant", ["small", "odd"])
def test_keras_twin_gives_the_same_logits(name, variant):
    overrides, length = (SMALL[name], 500) if variant == "small" else (ODD[name], ODD_LENGTH)
    h = parse_hyperparameters(name, overrides)
    module, signals = _build(name, overrides), _signals(length)
    variables = _trained_looking(module, signals)
    logits = _score(module, variables, signals)
    twin = _twin(name, h, length)
    _copy(variables, twin)
    assert np.ptp(logits, axis=0).max() > 1e-2  # the signals tell something
    np.testing.assert_allclose(twin.predict(signals, verbose=0), logits, atol=1e-5)


@every_architecture
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_parameters_and_logits_stay_float32_whatever_the_compute_dtype(name, dtype):
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        module = _build(name, SMALL[name], dtype, num_classes=3)
        logits, variables = jax.eval_shape(
            lambda: module.init_with_output(
                jax.random.key(0), jnp.zeros((6, 64, 1), wide), train=False
            )
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(wide)}
    assert logits.shape == (6, 3)
    assert logits.dtype == wide


@every_architecture
def test_gradients_are_finite_in_half_precision_with_padding_and_all(name):
    module, signals = _build(name, SMALL[name], "float16"), _signals(64)
    variables = _trained_looking(module, signals)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = module.apply(
                variables | {"params": params},
                signals,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(6) % 4).sum()

        return jax.grad(loss)(params)

    leaves = gradient(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(leaves))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(leaves["head"]))


@every_architecture
def test_a_rows_logits_do_not_depend_on_its_batch_mates(name):
    module, signals = _build(name, SMALL[name]), _signals(64)
    variables = _trained_looking(module, signals)
    logits = _score(module, variables, signals)
    alone = _score(module, variables, signals[1:2])
    np.testing.assert_allclose(alone[0], logits[1], atol=1e-6)


@every_architecture
def test_dropout_acts_in_training_alone(name):
    module, signals = _build(name, SMALL[name]), _signals(64)
    variables = _trained_looking(module, signals)

    @functools.partial(jax.jit, static_argnames="train")
    def score(rng, *, train):
        rngs = {"dropout": rng}
        return module.apply(variables, signals, train=train, mutable=["batch_stats"], rngs=rngs)[0]

    one, two = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(score(one, train=False), score(two, train=False))
    np.testing.assert_array_equal(score(one, train=True), score(one, train=True))
    assert np.abs(score(one, train=True) - score(two, train=True)).max() > 1e-4


# Few reads, few steps: where plain momentum's averages are still those of the first weights.
@every_architecture
def test_training_reads_score_alike_with_running_and_with_batch_statistics(name):
    rng = np.random.default_rng(0)
    cap_class = np.arange(200) % 4
    signals = rng.normal(size=(200, 64, 1)).astype("float32")
    signals[:, 20:40] += 1.5 * cap_class[:, None, None]
    no_dropout = {
        field.name: jax.tree.map(lambda _: 0.0, field.default)
        for field in dataclasses.fields(architecture(name).Hyperparameters)
        if "dropout" in field.name
    }
    no_dropout |= {key: (0.0,) * len(v) for key, v in SMALL[name].items() if "dropouts" in key}
    module = _build(name, SMALL[name])
    without = _build(name, SMALL[name] | no_dropout)
    variables = _init(module, signals)
    params, stats = variables["params"], variables.get("batch_stats", {})
    optimizer = optax.adam(5e-3)
    adam = optimizer.init(params)

    @jax.jit
    def step(params, stats, adam, rows, rng):
        def loss(params):
            logits, updated = module.apply(
                {"params": params, "batch_stats": stats},
                jnp.asarray(signals)[rows],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": rng},
            )
            labels = jnp.asarray(cap_class)[rows]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated.get("batch_stats", {})

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        updates, adam = optimizer.update(gradient, adam)
        return optax.apply_updates(params, updates), stats, adam

    @functools.partial(jax.jit, static_argnames="use_batch")
    def accuracy(params, stats, *, use_batch):
        logits, _ = without.apply(
            {"params": params, "batch_stats": stats},
            signals,
            train=use_batch,
            mutable=["batch_stats"],
        )
        return jnp.mean(logits.argmax(-1) == cap_class)

    for epoch in range(1, 11):
        for rows in rng.permutation(200)[:192].reshape(6, 32):
            key = jax.random.key(int(rows[0]) + 1000 * epoch)
            params, stats, adam = step(params, stats, adam, rows, key)
        if epoch >= 3:
            running = accuracy(params, stats, use_batch=False)
            gap = abs(running - accuracy(params, stats, use_batch=True))
            assert gap < 0.1, f"epoch {epoch}"
    assert running > 0.4  # by chance 0.25


def test_the_encoder_tells_signals_with_equal_padding_apart():
    module, signals = _build("encoder", {}), _signals(100, batch=5)
    signals[3:] = np.random.default_rng(5).normal(size=(2, 100, 1))
    signals[3:, :30], signals[3:, -30:] = 0, 0
    variables = _init(module, signals)
    logits = _score(module, variables, signals)
    assert np.abs(logits[3] - logits[4]).max() > 1e-2


def test_the_encoder_does_not_see_how_much_padding_there_is():
    """Position codes aside, which say where in the signal a token lies: they are 0 here."""
    module = _build("encoder", SMALL["encoder"])
    # Both lengths and the shift between them are whole tokens.
    short, long = np.zeros((1, 120, 1), "float32"), np.zeros((1, 200, 1), "float32")
    short[0, 40:80] = long[0, 80:120] = np.random.default_rng(3).normal(size=(40, 1))
    params = _trained_looking(module, short)["params"]

    def logits(signal, tokens):
        positions = params["positions"] | {"bias": jnp.zeros((tokens, 16))}
        return _score(module, {"params": params | {"positions": positions}}, signal)

    np.testing.assert_allclose(logits(short, 15), logits(long, 25), atol=1e-5)


def test_a_token_is_padding_when_its_whole_window_is_zero():
    signal = np.zeros((3, 80, 1), "float32")
    signal[0, 33], signal[1, 20:40] = 1e-6, 1
    real = np.asarray(encoder.real_tokens(jnp.asarray(signal)))[..., 0]
    # 7 samples every 2, of those 5 every 2, of those 5 every 2, with padding 2, 1, 1 on the left:
    # token t sees samples 8t - 8 to 8t + 22.
    expected = [
        [1.0 if any(signal[row, max(0, 8 * t - 8) : 8 * t + 23]) else 0.0 for t in range(10)]
        for row in range(2)
    ]
    np.testing.assert_array_equal(real[:2], expected)
    np.testing.assert_array_equal(real[2], 1)


class DrawnTrial:
    """A trial whose values hypothesis draws; it keeps them as Optuna does."""

    def __init__(self, data):
        self._data = data
        self.params = {}

    def suggest_int(self, name, low, high, *, step=1):
        assert low <= high
        drawn = self._data.draw(st.integers(0, (high - low) // step), label=name)
        return self.params.setdefault(name, low + step * drawn)

    def suggest_float(self, name, low, high, *, step=None, log=False):
        if step is None:
            return self.params.setdefault(name, self._data.draw(st.floats(low, high), label=name))
        drawn = self._data.draw(st.integers(0, round((high - low) / step)), label=name)
        return self.params.setdefault(name, low + step * drawn)

    def suggest_categorical(self, name, choices):
        return self.params.setdefault(name, self._data.draw(st.sampled_from(choices), label=name))


class FixedTrial(DrawnTrial):
    """Gives the values it is told, and refuses those that the space doesn't have."""

    def __init__(self, params):
        self.params = params
        self.asked = set()

    def _value(self, name, low, high, step):
        self.asked.add(name)
        value = self.params[name]
        assert low <= value <= high, f"{name} {value}"
        assert step is None or abs((value - low) / step - round((value - low) / step)) < 1e-8
        return value

    def suggest_int(self, name, low, high, *, step=1):
        return self._value(name, low, high, step)

    def suggest_float(self, name, low, high, *, step=None, log=False):
        return self._value(name, low, high, step)

    def suggest_categorical(self, name, choices):
        self.asked.add(name)
        assert self.params[name] in choices
        return self.params[name]


@every_architecture
@given(data=st.data(), target_length=st.integers(8, 4000))
@settings(max_examples=40, deadline=None)
def test_trial_parameters_undo_the_search_space(name, data, target_length):
    trial = DrawnTrial(data)
    drawn = architecture(name).search_space(trial, target_length=target_length)
    parameters = architecture(name).trial_parameters(drawn)
    assert parameters == pytest.approx(trial.params)
    again = FixedTrial(parameters)
    assert architecture(name).search_space(again, target_length=target_length) == drawn
    assert again.asked == set(parameters)


@every_architecture
@given(data=st.data(), target_length=st.integers(1, 4000))
@settings(max_examples=40, deadline=None)
def test_whatever_is_drawn_is_allowed_and_fits_the_signal(name, data, target_length):
    drawn = architecture(name).search_space(DrawnTrial(data), target_length=max(2, target_length))
    as_json = json.loads(json.dumps(dataclasses.asdict(drawn)))
    assert parse_hyperparameters(name, as_json, target_length=max(2, target_length)) == drawn


@every_architecture
def test_a_study_can_start_from_the_defaults(name):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    module = architecture(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(module.trial_parameters(module.Hyperparameters()))
    trial = study.ask()
    assert module.search_space(trial, target_length=500) == module.Hyperparameters()
    for _ in range(5):
        trial = study.ask()
        drawn = module.search_space(trial, target_length=500)
        assert module.trial_parameters(drawn) == pytest.approx(trial.params)


@every_architecture
def test_defaults_survive_json(name):
    default = architecture(name).Hyperparameters()
    assert parse_hyperparameters(name, {}, target_length=500) == default
    as_json = json.loads(json.dumps(dataclasses.asdict(default)))
    assert parse_hyperparameters(name, as_json) == default
    assert hash(parse_hyperparameters(name, as_json)) == hash(default)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"conv_filter": [3]}, "model_params.conv_filter: .* mean 'conv_filters'"),
        ({"zzz": 1}, "no such hyperparameter; known: conv_filters, "),
        ({"dense_units": 2.5}, "dense_units: 2.5 is not a whole number from 1 to 4096"),
        ({"dense_units": True}, "dense_units: True is not"),
        ({"dense_units": "64"}, "dense_units: '64' is not"),
        ({"dense_dropout": 1.0}, "dense_dropout: 1.0 is not a number from 0 to 0.95"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not"),
        ({"lstm_units": 64}, "lstm_units: 64 is not a list"),
        ({"lstm_units": []}, "lstm_units: .* is not a list of one or more"),
        ({"lstm_units": [64, 0]}, "lstm_units: 0 is not a whole number"),
        ({"lstm_units": [64, 64, 64]}, "lstm_units has 3, lstm_dropouts has 2"),
    ],
)
def test_a_wrong_hyperparameter_is_named_with_what_is_allowed(overrides, message):
    with pytest.raises(SettingsError, match=message):
        parse_hyperparameters("cnn_lstm", overrides)


def test_whole_numbers_are_good_floats_and_lists_become_tuples():
    h = parse_hyperparameters("cnn_lstm", {"dense_dropout": 0, "lstm_units": [8, 9]})
    assert isinstance(h.dense_dropout, float)
    assert h.lstm_units == (8, 9)


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(SettingsError, match=r"'cnn_lstn' is not one of .* mean 'cnn_lstm'"):
        architecture("cnn_lstn")


def test_an_architecture_is_told_what_it_lacks(monkeypatch):
    whole = architecture("cnn_lstm")
    half = types.ModuleType("half")
    half.build, half.Hyperparameters = whole.build, whole.Hyperparameters
    monkeypatch.setitem(sys.modules, "half", half)
    monkeypatch.setitem(ARCHITECTURES, "half", "half")
    with pytest.raises(SettingsError, match=r"half: has no minimum_length, .*, from_keras, which"):
        architecture("half")


def test_hyperparameters_that_are_no_numbers_with_a_range_are_refused(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Plain:
        units: int = 3

    @dataclasses.dataclass(frozen=True)
    class Switched:
        residual: bool = hyperparameter(True, low=0, high=1, meaning="adds the input")

    for cls, name in ((Plain, "units"), (Switched, "residual")):
        monkeypatch.setattr(architecture("cnn_lstm"), "Hyperparameters", cls)
        with pytest.raises(SettingsError, match=rf"{cls.__name__}\.{name}: must be a number or"):
            parse_hyperparameters("cnn_lstm", {})


def test_a_signal_too_short_for_its_convolutions_is_refused_before_and_while_building():
    with pytest.raises(SettingsError, match=r"15 samples are too few for cnn_lstm .* 16 or more"):
        parse_hyperparameters("cnn_lstm", {}, target_length=15)
    parse_hyperparameters("cnn_lstm", {}, target_length=16)
    module = architecture("cnn_lstm").build(
        parse_hyperparameters("cnn_lstm", {}), num_classes=2, dtype="float32"
    )
    with pytest.raises(SettingsError, match="too short"):
        module.init(jax.random.key(0), jnp.zeros((1, 15, 1)), train=False)
    jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 16, 1)), train=False))
