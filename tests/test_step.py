import copy
import functools
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

from capfinder import settings
from capfinder.errors import SettingsError
from capfinder.training.accumulate import MIN_MICROBATCH, over_parts
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


# Part by part


class Wide(nn.Module):
    """Activations that outweigh everything else; no batch norm and no dropout."""

    @nn.compact
    def __call__(self, signal, *, train):
        x = signal
        for _ in range(3):
            x = nn.relu(nn.Dense(64)(x))  # (B, T, 64)
        return nn.Dense(CLASSES)(x.mean(1))


def in_parts(microbatch, shards=1):
    return jax.jit(functools.partial(train_step, microbatch=microbatch, shards=shards))


class Plain(nn.Module):
    """Neither batch norm nor dropout."""

    @nn.compact
    def __call__(self, signal, *, train):
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(10)(signal[..., 0])))


@pytest.fixture(scope="module")
def whole_batches():
    states, sums = [tiny_state(Plain())], []
    for batch in batches(3):
        state, new = step(states[-1], batch)
        states.append(state)
        sums.append(new)
    return states, sums


@pytest.mark.parametrize(("microbatch", "shards"), [(1, 1), (3, 1), (4, 2), (5, 2), (7, 1)])
def test_parts_of_a_batch_make_the_step_of_the_whole(whole_batches, microbatch, shards):
    states, sums = whole_batches
    state, take_step = states[0], in_parts(microbatch, shards)
    for batch, expected in zip(batches(3), sums, strict=True):
        state, new = take_step(state, batch)
        np.testing.assert_allclose(new["loss"], expected["loss"], rtol=1e-5)
        assert (int(new["count"]), int(new["correct"])) == (BATCH, int(expected["correct"]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, states[-1].params
    )


@pytest.mark.parametrize("microbatch", [None, BATCH, BATCH + 1])
def test_a_part_that_holds_the_whole_batch_is_no_part(microbatch):
    (batch,) = batches(1)
    assert_same(in_parts(microbatch)(tiny_state(), batch), step(tiny_state(), batch))


@pytest.mark.parametrize(
    ("microbatch", "shards", "parts"),
    [
        (4, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (3, 1, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (5, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (2, 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (3, 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (6, 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (3, 4, [[0, 1, 2], [3, 4, 5], [6, 7]]),
    ],
)
def test_parts_take_their_rows_in_turn_and_equally_many_from_each_device(microbatch, shards, parts):
    """Each part marks its rows with its number, known from its dropout key."""
    rng = jax.random.key(5)

    def mark(part, batch_stats, key):
        rows = jnp.zeros(BATCH).at[part["row"]].set(jax.random.uniform(key) + 1)
        return rows, (batch_stats + 1, rows.sum() * 0)

    rows, (stats, _) = over_parts(
        mark, {"row": jnp.arange(BATCH)}, 0, rng, microbatch=microbatch, shards=shards
    )
    expected = np.zeros(BATCH)
    for number, part in enumerate(parts):
        expected[part] = jax.random.uniform(jax.random.fold_in(rng, number)) + 1
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    assert int(stats) == len(parts)


@pytest.mark.parametrize(
    ("size", "microbatch", "shards", "smallest"),
    [(9, 8, 1, 4), (65, 8, 1, 7), (57, 50, 1, 28), (57, 8, 3, 3), (63, 31, 3, 21), (65, 8, 4, 7)],
)
def test_no_part_is_much_smaller_than_another(size, microbatch, shards, smallest):
    def size_of_part(part, batch_stats, key):
        rows = len(part["row"])
        return jnp.zeros(size, int).at[part["row"]].add(rows), (batch_stats, jnp.int32(0))

    sizes, _ = over_parts(
        size_of_part,
        {"row": jnp.arange(size)},
        0,
        jax.random.key(0),
        microbatch=microbatch,
        shards=shards,
    )
    assert sizes.min() == smallest and sizes.max() <= microbatch
    assert sizes.max() - sizes.min() in (0, 1, shards)


@pytest.mark.parametrize("microbatch", [MIN_MICROBATCH, 16, 31])
def test_every_part_of_an_lstm_s_batch_teaches_it_something(microbatch):
    """Batch norm of a single row is 0, whatever the row: such a part has no gradient."""
    module = LastStep()
    state = tiny_state(module)
    signal = np.random.default_rng(0).normal(size=(65, LENGTH, 1)).astype(np.float32)
    cap_class = np.arange(65, dtype=np.int32) % CLASSES

    def kernel_gradient(part, batch_stats, rng):
        def loss(params):
            logits, updated = module.apply(
                {"params": params, "batch_stats": batch_stats},
                part["signal"],
                train=True,
                mutable=["batch_stats"],
            )
            chosen = jnp.take_along_axis(logits, part["cap_class"][:, None], 1)
            return (jax.nn.logsumexp(logits, axis=1) - chosen[:, 0]).sum(), updated["batch_stats"]

        gradient, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        size = jnp.abs(gradient["Dense_0"]["kernel"]).max()
        return jnp.where(size < 1e-6, 1, 0), (batch_stats, jnp.int32(0))

    batch = {"signal": signal, "cap_class": cap_class}
    silent, _ = over_parts(
        kernel_gradient,
        batch,
        state.batch_stats,
        jax.random.key(0),
        microbatch=microbatch,
        shards=1,
    )
    assert int(silent) == 0


class LastStep(nn.Module):
    """Batch norm over a batch of vectors, as behind an LSTM."""

    @nn.compact
    def __call__(self, signal, *, train):
        x = nn.Dense(5)(signal[..., 0])
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(CLASSES)(x)


@pytest.mark.parametrize("microbatch", [1, MIN_MICROBATCH - 1])
def test_a_microbatch_too_small_for_batch_norm_is_refused(microbatch):
    config = settings.default_config()
    settings.checked(config, {"runtime_params.microbatch": MIN_MICROBATCH})
    with pytest.raises(SettingsError, match=f"microbatch.*at least {MIN_MICROBATCH}"):
        settings.checked(config, {"runtime_params.microbatch": microbatch})


def test_batch_norm_takes_each_part_for_its_batch_in_turn():
    module = Tiny(dropout_rate=0.0)
    state, (batch,) = tiny_state(module), batches(1)
    variables = state.variables
    for rows in (slice(0, 4), slice(4, 8)):
        _, updated = module.apply(
            variables, batch["signal"][rows], train=True, mutable=["batch_stats"]
        )
        variables = variables | updated
    new, _ = in_parts(4)(state, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        new.batch_stats,
        variables["batch_stats"],
    )


def test_an_overflow_in_one_part_skips_the_whole_step():
    state, (batch,), take_step = float16_state(2.0**10), batches(1), in_parts(4)
    batch["signal"][6] = 1e6  # infinite in float16
    new, sums = take_step(state, batch)
    kept = ("params", "batch_stats", "opt_state")
    assert_same([getattr(new, n) for n in kept], [getattr(state, n) for n in kept])
    assert (int(sums["count"]), float(new.loss_scale.scale)) == (0, 2.0**9)
    batch["signal"][6] = 1
    new, sums = take_step(state, batch)
    assert int(sums["count"]) == BATCH
    assert float(jnp.abs(new.params["Dense_0"]["kernel"] - kernel_of(state)).max()) > 0


def kernel_of(state):
    return state.params["Dense_0"]["kernel"]


def test_small_parts_need_a_fraction_of_the_memory():
    state = tiny_state(Wide())
    batch = {
        "signal": jax.ShapeDtypeStruct((256, LENGTH, 1), np.float32),
        "cap_class": jax.ShapeDtypeStruct((256,), np.int32),
    }
    needed = {
        size: in_parts(size).lower(state, batch).compile().memory_analysis().temp_size_in_bytes
        for size in (None, 32)
    }
    assert needed[32] < 0.2 * needed[None]


# Loss scaling


class Faint(nn.Module):
    """Its gradients are too small for float16, whose smallest number is 6e-8."""

    dtype: object = np.float16

    @nn.compact
    def __call__(self, signal, *, train):
        x = jnp.asarray(signal[..., 0] * 3e-4, self.dtype)
        return nn.Dense(CLASSES, dtype=self.dtype)(x) * jnp.asarray(1e-4, self.dtype)


def test_gradients_are_unscaled_in_float32_so_that_small_ones_survive():
    (batch,) = batches(1)

    def gradients(state):
        new, _ = step(state, batch)
        return np.asarray(new.opt_state.inner_state[0].mu["Dense_0"]["kernel"]) * 10

    exact = gradients(tiny_state(Faint(np.float32)))
    assert np.abs(exact).max() < 6e-8
    faint = tiny_state(Faint(), ADAM, policy("float16", "float16", "cpu"))
    np.testing.assert_allclose(gradients(faint), exact, rtol=0.05, atol=1e-10)
    unscaled = LossScale(jnp.float32(1), jnp.int32(0))
    assert np.abs(gradients(replace(faint, loss_scale=unscaled)) - exact).max() > 1e-9


def test_a_skipped_step_moves_dropout_on_but_neither_adam_nor_the_schedule():
    def schedule(step):
        return 0.01 * (step + 1)

    state = new_state(
        FLOAT16.apply,
        tiny_state(FLOAT16).variables,
        optimizer(schedule),
        jax.random.key(7),
        policy("float16", "float16", "cpu"),
    )
    high = replace(state.loss_scale, scale=jnp.float32(2.0**24))
    first, second = batches(2)
    skipped, _ = step(replace(state, loss_scale=high), first)
    after, _ = step(replace(skipped, loss_scale=state.loss_scale), second)
    assert (int(skipped.step), int(skipped.opt_state.count)) == (1, 0)
    assert (int(after.step), int(after.opt_state.count)) == (2, 1)
    assert float(after.learning_rate) == pytest.approx(0.01)


def test_the_rate_factor_scales_what_a_step_changes():
    state, (batch,) = tiny_state(), batches(1)
    whole, _ = step(state, batch)
    half, _ = step(replace(state, rate_factor=jnp.float32(0.5)), batch)
    np.testing.assert_allclose(
        2 * (kernel_of(half) - kernel_of(state)), kernel_of(whole) - kernel_of(state), atol=1e-6
    )
    assert float(half.learning_rate) == float(whole.learning_rate) / 2
