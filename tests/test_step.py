import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_training import (
    ADAM,
    BATCH,
    CLASSES,
    LENGTH,
    Batches,
    Tiny,
    assert_same,
    tiny_state,
    validation,
)

from capfinder.training.precision import LossScale, policy
from capfinder.training.schedules import optimizer, with_learning_rate
from capfinder.training.step import eval_step, new_state, predict_step, train_step

FLOAT16 = Tiny(dtype=np.float16)
step, evaluate = jax.jit(train_step), jax.jit(eval_step)


class Linear(nn.Module):
    """No dropout and no batch norm: batch_stats stays empty."""

    @nn.compact
    def __call__(self, signal, *, train):
        return nn.Dense(CLASSES)(signal[..., 0])


def batches(steps, seed=3):
    return list(Batches(steps, seed).epoch(0))


def test_a_step_is_adam_on_the_mean_cross_entropy():
    """Against the formulas of Kingma and Ba 2015 (end of section 2), in float64."""
    state = tiny_state(Linear(), optimizer(0.02))
    theta = np.concatenate([np.asarray(state.params["Dense_0"]["kernel"]), np.zeros((1, CLASSES))])
    theta = theta.astype(np.float64)
    m = v = np.zeros_like(theta)
    for t, batch in enumerate(batches(30), 1):
        x = np.concatenate([batch["signal"][..., 0], np.ones((BATCH, 1))], axis=1)
        p = np.exp(x @ theta)
        p /= p.sum(1, keepdims=True)
        rows = np.arange(BATCH), batch["cap_class"]
        loss = -np.log(p[rows]).mean()
        p[rows] -= 1
        gradient = x.T @ p / BATCH
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 0.02 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        theta = theta - rate * m / (np.sqrt(v) + 1e-7)
        state, sums = step(state, batch)
        np.testing.assert_allclose(sums["loss"] / sums["count"], loss, rtol=1e-5)
    np.testing.assert_allclose(state.params["Dense_0"]["kernel"], theta[:-1], atol=1e-5)
    np.testing.assert_allclose(state.params["Dense_0"]["bias"], theta[-1], atol=1e-5)
    assert state.batch_stats == {}


def test_many_steps_end_at_the_weights_that_keras_reaches():
    import keras

    rate = 0.01
    net = keras.Sequential(
        [
            keras.Input((LENGTH, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    net.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, signal, *, train):
            hidden = nn.relu(nn.Dense(10)(signal[..., 0]))
            return nn.Dense(CLASSES)(hidden)

    def net_weights():
        return [np.array(weight.value) for weight in net.trainable_variables]

    kernels = net_weights()
    params = {
        f"Dense_{n}": {"kernel": kernels[2 * n], "bias": kernels[2 * n + 1]} for n in range(2)
    }
    module = Net()
    state = new_state(
        module.apply,
        {"params": params},
        optimizer(rate),
        jax.random.key(0),
        policy("float32", None, "cpu"),
    )
    for batch in batches(60):
        net.train_on_batch(batch["signal"], batch["cap_class"])
        state, _ = step(state, batch)
    ours = [state.params[f"Dense_{n}"][k] for n in range(2) for k in ("kernel", "bias")]
    moved = max(np.abs(a - b).max() for a, b in zip(net_weights(), kernels, strict=True))
    assert moved > 0.1
    for one, other in zip(ours, net_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_step_changes_nothing_but_what_it_returns():
    state = tiny_state()
    before = copy.deepcopy(jax.tree.map(np.asarray, (state.params, state.opt_state)))
    (batch,) = batches(1)
    new, _ = step(state, batch)
    assert_same((state.params, state.opt_state), before)
    assert int(new.step) == int(state.step) + 1
    with pytest.raises(AttributeError):
        state.step = 3


def test_dropout_depends_on_the_step_and_the_run_s_key_alone():
    state, (batch,) = tiny_state(), batches(1)
    first, again = step(state, batch)[1]["loss"], step(state, batch)[1]["loss"]
    later = step(replace(state, step=jnp.int32(5)), batch)[1]["loss"]
    other = step(replace(state, rng=jax.random.key(8)), batch)[1]["loss"]
    assert first == again
    assert len({float(first), float(later), float(other)}) == 3


def test_scanned_steps_are_the_same_as_steps_one_by_one():
    parts = batches(6)
    state = tiny_state()
    losses = []
    for batch in parts:
        state, sums = step(state, batch)
        losses.append(sums["loss"])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    scanned, sums = jax.jit(lambda s, b: jax.lax.scan(train_step, s, b))(tiny_state(), stacked)
    np.testing.assert_allclose(sums["loss"], jnp.stack(losses), rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), scanned.params, state.params
    )
    assert int(scanned.step) == 6


def test_raw_and_typed_keys_give_the_same_run():
    (batch,) = batches(1)
    typed, _ = step(tiny_state(rng=jax.random.key(3)), batch)
    raw, _ = step(tiny_state(rng=jax.random.PRNGKey(3)), batch)
    assert_same(typed.params, raw.params)


def test_padding_has_no_part_in_the_evaluation_sums():
    state = tiny_state()
    sums = [evaluate(state, batch) for batch in validation(20)]
    signal = np.concatenate([b["signal"][b["weight"] > 0] for b in validation(20)])
    cap_class = np.concatenate([b["cap_class"][b["weight"] > 0] for b in validation(20)])
    logits = np.asarray(predict_step(state, signal), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert sum(int(s["count"]) for s in sums) == 20
    assert sum(int(s["correct"]) for s in sums) == (logits.argmax(-1) == cap_class).sum()
    np.testing.assert_allclose(
        sum(float(s["loss"]) for s in sums), -log_p[np.arange(20), cap_class].sum(), rtol=1e-5
    )


def test_padding_that_is_not_a_number_does_no_harm_either():
    state, batch = tiny_state(), validation(4)[0]
    clean = evaluate(state, batch)
    batch["signal"][4:] = np.nan
    assert_same(evaluate(state, batch), clean)


def test_evaluation_uses_running_statistics_and_no_dropout():
    state, (batch,) = tiny_state(), batches(1)
    alone = predict_step(state, batch["signal"][:1])
    together = predict_step(state, batch["signal"])
    np.testing.assert_allclose(alone[0], together[0], atol=1e-6)


def float16_state(scale):
    state = tiny_state(FLOAT16, ADAM, policy("float16", "float16", "cpu"))
    assert state.loss_scale is not None
    kept = LossScale(jnp.float32(scale), jnp.int32(0), growth_interval=4)
    return replace(state, loss_scale=kept)


def test_mixed_precision_keeps_float32_weights_near_a_float32_run():
    mixed, plain = (
        replace(state, opt_state=with_learning_rate(state.opt_state, 1e-3))
        for state in (float16_state(2.0**10), tiny_state())
    )
    for batch in batches(5):
        mixed, mixed_sums = step(mixed, batch)
        plain, plain_sums = step(plain, batch)
        np.testing.assert_allclose(mixed_sums["loss"], plain_sums["loss"], rtol=0.01)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((mixed.params, mixed.batch_stats))}
    assert dtypes == {jnp.dtype("float32")}


def test_overflowing_gradients_skip_the_update_and_halve_the_scale():
    state, (batch,) = float16_state(2.0**24), batches(1)
    new, sums = step(state, batch)
    kept = ("params", "batch_stats", "opt_state")
    assert_same([getattr(new, n) for n in kept], [getattr(state, n) for n in kept])
    assert float(new.loss_scale.scale) == 2.0**23
    assert int(new.step) == 1
    assert int(sums["count"]) == BATCH  # the loss itself was fine, and counts
    assert not sums["diverged"]


def test_the_scale_falls_until_steps_count_again_and_then_grows():
    state = float16_state(2.0**24)
    scales = []
    for batch in batches(40):
        state, sums = step(state, batch)
        scales.append(float(state.loss_scale.scale))
        assert np.isfinite(sums["loss"])
    lowest = scales.index(min(scales))
    assert 3 < lowest < 20 and max(scales[lowest:]) > scales[lowest]
    assert np.isfinite(jax.tree.leaves(state.params)[0]).all()


def test_a_signal_that_overflows_float16_is_left_out_and_diverges_only_at_scale_one():
    (batch,) = batches(1)
    batch["signal"] = batch["signal"] * np.float32(1e6)  # infinite in float16
    _, sums = step(float16_state(4.0), batch)
    assert (int(sums["count"]), float(sums["loss"]), bool(sums["diverged"])) == (0, 0.0, False)
    _, sums = step(float16_state(1.0), batch)
    assert bool(sums["diverged"])


def test_a_loss_that_is_not_a_number_is_reported_in_float32():
    (batch,) = batches(1)
    state = tiny_state()
    assert not step(state, batch)[1]["diverged"]
    batch["signal"] = batch["signal"] * np.float32(np.nan)
    assert step(state, batch)[1]["diverged"]


def test_float64_trains_in_float64_throughout():
    with jax.enable_x64(True):
        precision = policy("float64", None, "cpu")
        state = tiny_state(Linear(), optimizer(0.01), precision)
        (batch,) = batches(1)
        batch["signal"] = batch["signal"].astype(np.float64)
        state, sums = step(state, batch)
        floats = [
            leaf.dtype
            for leaf in jax.tree.leaves((state.params, state.opt_state, sums))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        assert set(floats) == {jnp.dtype("float64")}
