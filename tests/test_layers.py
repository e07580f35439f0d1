import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder.errors import SettingsError
from capfinder.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    Lstm,
    PositionDense,
    max_pool,
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


@pytest.mark.parametrize("return_sequences", [True, False])
@pytest.mark.parametrize(("batch", "length", "channels", "units"), [(1, 1, 1, 1), (3, 20, 5, 7)])
def test_lstm_computes_what_keras_computes(return_sequences, batch, length, channels, units):
    x = _normal(batch, length, channels)
    layer = keras.layers.LSTM(units, return_sequences=return_sequences)
    layer.build(x.shape)
    kernel, recurrent_kernel, bias = (_normal(*w.shape) for w in layer.weights)
    layer.set_weights([kernel, recurrent_kernel, bias])
    expected = layer(x)
    params = {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}
    y = Lstm(units, return_sequences).apply({"params": params}, x)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def _plain_lstm(params, x):
    hidden = cell = jnp.zeros((x.shape[0], params["recurrent_kernel"].shape[0]), x.dtype)
    for t in range(x.shape[1]):
        gates = x[:, t] @ params["kernel"] + hidden @ params["recurrent_kernel"] + params["bias"]
        i, f, g, o = jnp.split(gates, 4, axis=1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return hidden


def test_lstms_gradient_is_that_of_a_plain_loop():
    x = _normal(3, 6, 4)
    lstm = Lstm(5, False)
    params = lstm.init(jax.random.key(1), x)["params"]
    ours = jax.jit(jax.grad(lambda p: (lstm.apply({"params": p}, x) ** 2).sum()))(params)
    plain = jax.jit(jax.grad(lambda p: (_plain_lstm(p, x) ** 2).sum()))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, plain)


def test_lstm_starts_as_keras_does():
    params = Lstm(8, True).init(jax.random.key(0), _normal(1, 2, 6))["params"]
    np.testing.assert_array_equal(params["bias"], np.repeat([0, 1, 0, 0], 8))
    recurrent = params["recurrent_kernel"]
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(8), atol=1e-5)
    assert np.abs(params["kernel"]).max() <= np.sqrt(6 / (6 + 32))


@pytest.mark.parametrize(
    ("layer", "x", "fan_in", "fan_out"),
    [
        (Dense(30), _normal(1, 20), 20, 30),
        (Conv(30, (7,)), _normal(1, 9, 20), 140, 210),
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
