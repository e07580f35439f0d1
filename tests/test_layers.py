import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder.errors import SettingsError
from capfinder.models import chunks, convolution, lstm
from capfinder.models.dropout import random_bits
from capfinder.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Lstm,
    PositionDense,
    max_pool,
    max_pool_same,
    weighted_average,
)

RNG = np.random.default_rng(0)


def _normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def _train_on(norm, batches):
    """The norm's variables after one training step on each batch."""
    variables = norm.init(jax.random.key(0), batches[0])
    for batch in batches:
        _, updated = norm.apply(variables, batch, mutable=["batch_stats"])
        variables = {**variables, **updated}
    return variables


def test_batch_norm_forgets_its_initial_values_at_the_first_step():
    batch = 3 + 2 * _normal(32, 10, 4)
    stats = _train_on(BatchNorm(False), [batch])["batch_stats"]
    np.testing.assert_allclose(stats["mean"], batch.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], batch.var((0, 1)), rtol=1e-5)


def test_batch_norm_scores_like_training_when_every_batch_is_the_same():
    batch = _normal(32, 10, 4)
    variables = _train_on(BatchNorm(False), [batch] * 3)
    trained, _ = BatchNorm(False).apply(variables, batch, mutable=["batch_stats"])
    np.testing.assert_allclose(BatchNorm(True).apply(variables, batch), trained, atol=1e-6)


@given(steps=st.integers(1, 12), forgetting=st.floats(1, 32), momentum=st.floats(0.5, 0.99))
@settings(max_examples=10, deadline=None)
def test_batch_norms_running_average_is_a_weighted_mean_of_the_batches(steps, forgetting, momentum):
    batches = [_normal(8, 3) + i for i in range(steps)]
    weights = np.zeros(steps)
    for t in range(steps):
        weight = max(1 - momentum, forgetting / (t + forgetting))
        weights[:t] *= 1 - weight
        weights[t] = weight
    assert weights.sum() == pytest.approx(1)
    norm = BatchNorm(False, momentum=momentum, forgetting=forgetting)
    stats = _train_on(norm, batches)["batch_stats"]
    expected = sum(w * batch.mean(0) for w, batch in zip(weights, batches, strict=True))
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_with_forgetting_1_and_momentum_1_averages_all_batches_alike():
    batches = [_normal(8, 3) + i for i in range(5)]
    stats = _train_on(BatchNorm(False, momentum=1.0, forgetting=1.0), batches)["batch_stats"]
    np.testing.assert_allclose(stats["var"], np.mean([b.var(0) for b in batches], 0), rtol=1e-5)


def test_batch_norm_learns_statistics_of_what_dropout_let_it_miss():
    whole, dropped = _normal(64, 3), 2 * _normal(64, 3)
    variables = BatchNorm(False).init(jax.random.key(0), dropped)
    y, updated = BatchNorm(False).apply(
        variables, dropped, undropped=whole, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(updated["batch_stats"]["var"], whole.var(0), rtol=1e-5)
    np.testing.assert_allclose(y.var(0), 1, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_norm_keeps_float32_statistics_of_half_precision_inputs(dtype):
    batch = jnp.asarray(100 + _normal(256, 20, 2), dtype)
    norm = BatchNorm(False, dtype=jnp.dtype(dtype))
    stats = _train_on(norm, [batch])["batch_stats"]
    exact = np.asarray(batch, "float64")
    assert stats["var"].dtype == jnp.float32
    np.testing.assert_allclose(stats["mean"], exact.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], exact.var((0, 1)), rtol=1e-4)
    assert (
        norm.apply(
            {"params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}, batch, mutable=["batch_stats"]
        )[0].dtype
        == dtype
    )


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_computes_what_keras_computes(train):
    x = _normal(16, 7, 5)
    weights = [_normal(5), _normal(5), _normal(5), np.abs(_normal(5))]
    layer = keras.layers.BatchNormalization()
    layer.build(x.shape)
    layer.set_weights(weights)
    scale, bias, mean, var = weights
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var, "steps": jnp.float32(9)},
    }
    y, _ = BatchNorm(not train).apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, layer(x, training=train), atol=1e-5)


def _plain_norm(x, scale, bias):
    mean, var = x.mean((0, 1)), x.var((0, 1))
    return (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias


def test_batch_norms_gradient_is_that_of_its_formula():
    x, scale, bias, weights = 2 + _normal(16, 7, 5), _normal(5), _normal(5), _normal(16, 7, 5)
    norm = BatchNorm(False)
    stats = norm.init(jax.random.key(0), x)["batch_stats"]

    def ours(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, _ = norm.apply(variables, x, mutable=["batch_stats"])
        return (y**2 * weights).sum()

    def plain(x, scale, bias):
        return (_plain_norm(x, scale, bias) ** 2 * weights).sum()

    for a, b in zip(
        jax.grad(ours, (0, 1, 2))(x, scale, bias),
        jax.grad(plain, (0, 1, 2))(x, scale, bias),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate):
    x = jnp.ones((64, 250, 64))
    y = Dropout(rate, False).apply({}, x, rngs={"dropout": jax.random.key(3)})
    kept = np.asarray(y != 0)
    deviation = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
    # Every row, position and channel loses its share as well.
    for axes in ((1, 2), (0, 2), (0, 1)):
        means = kept.mean(axes)
        spread = np.sqrt(rate * (1 - rate) * len(means) / kept.size)
        assert np.abs(means - (1 - rate)).max() < 5 * spread
        assert 0.6 * spread < means.std() < 1.5 * spread


def test_dropout_acts_in_training_alone_and_not_at_rate_0():
    x = _normal(4, 5)
    assert Dropout(0.5, True).apply({}, x) is x
    assert Dropout(0.0, False).apply({}, x) is x


def test_random_bits_are_balanced_and_independent_of_their_neighbours_layers_and_steps():
    key = jax.random.key(0)
    words = np.asarray(random_bits(key, (512, 64, 8)))
    others = np.asarray(random_bits(jax.random.fold_in(key, 1), words.shape))
    pairs = {
        "itself": None,
        "next channel": (words[..., 1:], words[..., :-1]),
        "next position": (words[:, 1:], words[:, :-1]),
        "next row": (words[1:], words[:-1]),
        "next step": (words, others),
    }
    for name, pair in pairs.items():
        mixed = words if pair is None else pair[0] ^ pair[1]
        bits = (mixed.reshape(-1, 1) >> np.arange(32, dtype=np.uint32)) & 1
        deviation = 0.5 / np.sqrt(len(bits))
        assert np.abs(bits.mean(0) - 0.5).max() < 5 * deviation, name
    assert len(np.unique(words)) > 0.9999 * words.size * (1 - words.size / 2**33)


def test_random_bits_are_the_same_everywhere():
    # From the published finaliser, computed with Python's own integers.
    def finaliser(word):
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    key = jax.random.key(7)
    first, second = (int(word) for word in jax.random.bits(key, (2,), jnp.uint32))
    expected = [finaliser(finaliser(place ^ first) ^ second) for place in range(24)]
    assert random_bits(key, (2, 3, 4)).ravel().tolist() == expected


FORMS = [*lstm.FORMS.values(), lstm.Form("before", 3), lstm.Form("inside", 2)]


def _lstm_weights(channels, units):
    return _normal(channels, 4 * units), _normal(units, 4 * units), _normal(4 * units)


@pytest.mark.parametrize(("batch", "length", "channels", "units"), [(1, 1, 1, 1), (3, 20, 5, 7)])
def test_lstm_computes_what_keras_computes(batch, length, channels, units):
    x = _normal(batch, length, channels)
    layer = keras.layers.LSTM(units, return_sequences=True)
    layer.build(x.shape)
    kernel, recurrent_kernel, bias = _lstm_weights(channels, units)
    layer.set_weights([kernel, recurrent_kernel, bias])
    expected = np.asarray(layer(x)).swapaxes(0, 1)
    params = {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}
    y = Lstm(units).apply({"params": params}, x.swapaxes(0, 1))
    np.testing.assert_allclose(y, expected, atol=1e-6)


def _plain_lstm(x, kernel, recurrent_kernel, bias):
    hidden = cell = jnp.zeros((x.shape[1], recurrent_kernel.shape[0]), x.dtype)
    states = []
    for x_t in x:
        gates = x_t @ kernel + hidden @ recurrent_kernel + bias
        i, f, g, o = jnp.split(gates, 4, axis=1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        states.append(hidden)
    return jnp.stack(states)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_form_of_lstm_gives_the_states_and_gradients_of_a_plain_loop(form):
    inputs = (_normal(7, 3, 4), *_lstm_weights(4, 5))
    weights = _normal(7, 3, 5)  # every state counts, each differently

    def value_and_gradients(function):
        def loss(*inputs):
            states = function(*inputs)
            return (states * weights).sum(), states

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)

    ours = value_and_gradients(functools.partial(lstm.lstm, form))
    plain = value_and_gradients(_plain_lstm)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, plain)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_lstm_in_half_precision_stays_close_to_float32(form):
    inputs = (_normal(30, 4, 6), *_lstm_weights(6, 5))
    inputs = (inputs[0], *(0.3 * weight for weight in inputs[1:]))
    half = [value.astype(jnp.bfloat16) for value in inputs[:3]]

    def gradients(*inputs):
        return jax.grad(lambda *i: (lstm.lstm(form, *i).astype(jnp.float32) ** 2).sum(), (1, 2, 3))(
            *inputs
        )

    low, high = gradients(*half, inputs[3]), gradients(*inputs)
    assert [leaf.dtype for leaf in low] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(low, high, strict=True):
        assert np.abs(a.astype(np.float32) - b).max() <= 0.03 * np.abs(b).max()


def test_lstm_starts_as_keras_does():
    params = Lstm(8).init(jax.random.key(0), _normal(1, 2, 6))["params"]
    np.testing.assert_array_equal(params["bias"], np.repeat([0, 1, 0, 0], 8))
    recurrent = params["recurrent_kernel"]
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(8), atol=1e-5)
    assert np.abs(params["kernel"]).max() <= np.sqrt(6 / (6 + 32))


@pytest.mark.parametrize(
    ("layer", "x", "fan_in", "fan_out"),
    [
        (Dense(30), _normal(1, 20), 20, 30),
        (Conv(30, 7), _normal(1, 9, 20), 140, 210),
        (PositionDense(30), _normal(1, 9, 20), 20, 30),
    ],
)
def test_kernels_start_glorot_uniform_and_biases_at_zero(layer, x, fan_in, fan_out):
    params = layer.init(jax.random.key(0), x)["params"]
    limit = np.sqrt(6 / (fan_in + fan_out))
    assert 0.95 * limit < np.abs(params["kernel"]).max() <= limit
    assert np.std(params["kernel"]) == pytest.approx(limit / np.sqrt(3), rel=0.1)
    assert not params["bias"].any()


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("length", [3, 4, 7, 12])
def test_max_pool_computes_what_keras_computes(window, length):
    x = _normal(2, length, 3)
    np.testing.assert_array_equal(
        max_pool(jnp.asarray(x), window), keras.layers.MaxPooling1D(window)(x)
    )


def _reference_pool(x, window, stride, padding):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window, 1), (1, stride, 1), padding)


def _same_values_and_gradients(pool, reference, x):
    weights = RNG.integers(-9, 9, pool(x).shape)  # sums of them are exact
    for function in (lambda f: f(x), lambda f: jax.grad(lambda x: (f(x) * weights).sum())(x)):
        np.testing.assert_array_equal(function(pool), function(reference))


@pytest.mark.parametrize(("window", "length"), [(2, 8), (2, 9), (3, 11), (4, 4)])
def test_max_pools_gradient_goes_to_the_first_maximum_as_in_reduce_window(window, length):
    x = jnp.asarray(RNG.integers(0, 3, (4, length, 5)), jnp.float32)  # many ties
    _same_values_and_gradients(
        lambda x: max_pool(x, window), lambda x: _reference_pool(x, window, window, "VALID"), x
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_pooling_over_the_ends_is_that_of_reduce_window(window, stride, length):
    x = jnp.asarray(RNG.integers(-9, 9, (3, length, 2)), jnp.float32)
    _same_values_and_gradients(
        lambda x: max_pool_same(x, window, stride),
        lambda x: _reference_pool(x, window, stride, "SAME"),
        x,
    )


def test_max_pool_says_when_a_signal_is_too_short():
    with pytest.raises(SettingsError, match="too short: 1 samples"):
        max_pool(jnp.zeros((1, 1, 1)), 2)


def test_position_dense_computes_what_einsum_dense_computes():
    x = _normal(2, 6, 4)
    layer = keras.layers.EinsumDense("btc,co->bto", (6, 3), bias_axes="to")
    layer.build(x.shape)
    kernel, bias = _normal(4, 3), _normal(6, 3)
    layer.set_weights([kernel, bias])
    y = PositionDense(3).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, layer(x), atol=1e-5)


def test_weighted_average_is_the_plain_one_for_equal_scores_and_picks_a_high_one():
    x = _normal(2, 5, 3)
    np.testing.assert_allclose(weighted_average(x, jnp.ones((2, 5, 1))), x.mean(1), atol=1e-6)
    scores = jnp.zeros((2, 5, 1)).at[:, 3].set(1e9)
    np.testing.assert_array_equal(weighted_average(x, scores), x[:, 3])


FORMS_OF_CONVOLUTION = {
    "compiler": convolution.Form(),
    "sums": convolution.Form(sums=True),
    "toom_cook": convolution.Form(outputs={3: 4, 5: 4, 7: 2}),
    **convolution.FORMS,
}


@pytest.mark.parametrize("name", FORMS_OF_CONVOLUTION)
@pytest.mark.parametrize(
    ("length", "channels", "features", "width"),
    [
        (33, 1, 8, 3),
        (40, 1, 8, 7),
        (37, 64, 70, 3),
        (50, 64, 64, 5),
        (33, 65, 64, 7),
        (9, 64, 64, 5),
    ],
)
def test_every_form_of_convolution_computes_what_keras_computes(
    name, length, channels, features, width
):
    x, scale = _normal(3, length, channels), (channels * width) ** -0.5
    kernel, bias = _normal(width, channels, features) * scale, _normal(features)
    layer = keras.layers.Conv1D(features, width, padding="same")
    layer.build(x.shape)
    layer.set_weights([kernel, bias])
    y = convolution.convolve(FORMS_OF_CONVOLUTION[name], x, kernel) + bias
    np.testing.assert_allclose(y, layer(x), atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("length", [8, 9])
def test_a_convolution_with_strides_computes_what_keras_computes(stride, length):
    x, kernel, bias = _normal(2, length, 3), _normal(5, 3, 4), _normal(4)
    layer = keras.layers.Conv1D(4, 5, strides=stride, padding="same")
    layer.build(x.shape)
    layer.set_weights([kernel, bias])
    y = Conv(4, 5, stride).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, layer(x), atol=1e-5)


@pytest.mark.parametrize(("channels", "width"), [(1, 3), (1, 6), (64, 5), (64, 7)])
def test_every_form_of_convolution_has_the_compilers_gradient(channels, width):
    x, kernel = _normal(2, 33, channels), _normal(width, channels, 64) * 0.1
    towards = _normal(2, 33, 64)

    def gradients(form):
        def loss(x, kernel):
            return (convolution.convolve(form, x, kernel) * towards).sum()

        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    for ours, theirs in zip(
        gradients(convolution.FORMS["cpu"]), gradients(convolution.Form()), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@given(width=st.integers(2, 7), data=st.data())
@settings(max_examples=20, deadline=None)
def test_toom_cook_is_exact_to_rounding_for_any_kernel_and_number_of_outputs(width, data):
    outputs = data.draw(st.integers(1, 9 - width))
    length = data.draw(st.integers(1, 40))
    x, kernel = _normal(2, length, 2), _normal(width, 2, 3)
    padded = np.pad(x, ((0, 0), ((width - 1) // 2, width // 2), (0, 0))).astype("float64")
    expected = sum(padded[:, k : k + length] @ kernel[k] for k in range(width))
    toom_cook = jax.jit(convolution.toom_cook, static_argnames="outputs")  # fewer programs
    y = toom_cook(x, kernel, outputs=outputs)
    np.testing.assert_allclose(y, expected, atol=3e-4)


def test_half_precision_is_convolved_as_the_compiler_does_it():
    x, kernel = (jnp.asarray(v, "bfloat16") for v in (_normal(2, 40, 64), _normal(5, 64, 64)))
    ours = convolution.convolve(convolution.FORMS["cpu"], x, kernel)
    np.testing.assert_array_equal(ours, convolution.compilers(x, kernel))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("rows", [4, 32, 33])
def test_reads_scored_in_chunks_get_the_whole_batchs_numbers(rows, times, monkeypatch):
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            def layers(x):
                seen.append(len(x))
                return BatchNorm(not train)(Conv(4, 3)(x))

            return chunks.in_chunks(self, layers, x, train=train, times=times)

    seen = []
    monkeypatch.setattr(chunks, "CHUNKS", {"cpu": 8})
    x = _normal(rows, 9, 2)
    variables = Layers().init(jax.random.key(0), x, False)
    seen.clear()
    y = Layers().apply(variables, x, False)
    assert set(seen) == {8 * times if rows == 32 else rows}
    monkeypatch.setattr(chunks, "CHUNKS", {})
    np.testing.assert_allclose(y, Layers().apply(variables, x, False), atol=1e-6)
    monkeypatch.setattr(chunks, "CHUNKS", {"cpu": 8})
    seen.clear()
    Layers().apply(variables, x, True, mutable=["batch_stats"])
    assert set(seen) == {rows}
