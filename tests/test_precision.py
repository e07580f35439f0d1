import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from tiny_training import Batches, assert_same, run_fit, tiny_state

from capfinder.training.checkpoint import Checkpoints
from capfinder.training.precision import LARGEST_SCALE, LossScale, all_finite, policy
from capfinder.training.schedules import make_schedule, optimizer


@pytest.mark.parametrize(
    ("dtype", "platform", "compute", "scaling"),
    [
        ("float16", "cpu", "float32", False),
        ("float16", "gpu", "float16", True),
        ("float16", "tpu", "bfloat16", False),
        ("float32", "cpu", "float32", False),
        ("float32", "gpu", "float32", False),
        ("float32", "tpu", "float32", False),
    ],
)
def test_compute_dtype_follows_dtype_and_platform_over_float32_weights(
    dtype, platform, compute, scaling
):
    chosen = policy(dtype, None, platform)
    assert chosen.compute_dtype == jnp.dtype(compute)
    assert chosen.param_dtype == jnp.dtype("float32")
    assert chosen.loss_scaling is scaling


def test_float64_computes_and_stores_in_float64():
    with jax.enable_x64(True):
        chosen = policy("float64", None, "cpu")
    assert chosen.compute_dtype == chosen.param_dtype == jnp.dtype("float64")


def test_float64_without_x64_is_refused_rather_than_computed_in_float32():
    with pytest.raises(ValueError, match="jax_enable_x64"):
        policy("float64", None, "cpu")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_override_decides_whatever_the_storage_dtype(dtype):
    chosen = policy(dtype, "float16", "cpu")
    assert (chosen.compute_dtype, chosen.loss_scaling) == (jnp.dtype("float16"), True)
    assert policy(dtype, "bfloat16", "cpu").loss_scaling is False


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float8"):
        policy("float32", "float8", "cpu")


def test_loss_scale_doubles_after_each_interval_of_finite_steps():
    state = LossScale(scale=jnp.float32(8), finite_steps=jnp.int32(0), growth_interval=3)
    scales = []
    for _ in range(7):
        state = state.after(jnp.bool_(True))
        scales.append(float(state.scale))
    assert scales == [8, 8, 16, 16, 16, 32, 32]


def test_loss_scale_halves_at_an_overflow_and_starts_counting_anew():
    state = LossScale(scale=jnp.float32(8), finite_steps=jnp.int32(0), growth_interval=3)
    scales = []
    for is_finite in (True, True, False, True, True, True):
        state = state.after(jnp.bool_(is_finite))
        scales.append(float(state.scale))
    assert scales == [8, 8, 4, 4, 4, 8]


def test_loss_scale_stays_between_one_and_its_largest():
    low = high = LossScale(scale=jnp.float32(1), finite_steps=jnp.int32(0), growth_interval=1)
    for _ in range(40):
        low, high = low.after(jnp.bool_(False)), high.after(jnp.bool_(True))
    assert (float(low.scale), float(high.scale)) == (1.0, LARGEST_SCALE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_sees_one_bad_number_anywhere(bad):
    tree = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}
    assert all_finite(tree)
    tree["b"]["c"] = tree["b"]["c"].at[1, 0].set(bad)
    assert not all_finite(tree)


@pytest.mark.parametrize(
    ("dtype", "microbatch"),
    [("float16", None), ("bfloat16", None), ("float32", None), ("float64", None), ("float16", 4)],
)
def test_a_model_learns_in_every_precision(dtype, microbatch):
    with jax.enable_x64(dtype == "float64"):
        chosen = policy(dtype, dtype, "cpu")
        module = tiny_training.Tiny(dtype=chosen.compute_dtype, dropout_rate=0.0)
        state = tiny_training.tiny_state(module, precision=chosen)
        result = tiny_training.run_fit(
            state,
            train_batches=tiny_training.Batches(6),
            max_epochs=4,
            steps_per_call=3,
            microbatch=microbatch,
        )
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0] * 0.9
    assert result.best_val_loss < 1.0  # guessing one of three classes costs 1.1
    kinds = {leaf.dtype for leaf in jax.tree.leaves(result.state.params)}
    assert kinds == {chosen.param_dtype}


@pytest.mark.parametrize("kind", ["constant", "cyclic_lr", "sgdr"])
def test_float32_weights_in_x64_mode_stay_so_over_calls_and_a_resume(tmp_path, kind):
    """As dtype=float64 with compute_dtype=float32 has it."""
    params = {
        "constant": {},
        "cyclic_lr": {
            **{"base_lr": 0.01, "max_lr": 0.1, "mode": "triangular"},
            **{"step_size_factor": 1, "gamma": 1.0},
        },
        "sgdr": {
            **{"min_lr": 0.01, "max_lr": 0.1, "lr_decay": 0.9},
            **{"cycle_length": 2, "mult_factor": 1.0},
        },
    }[kind]
    with jax.enable_x64(True):
        chosen = policy("float64", "float32", "cpu")
        schedule = make_schedule(kind, params, learning_rate=0.1, steps_per_epoch=6)

        def train(max_epochs, checkpoints):
            module = tiny_training.Tiny(dtype=chosen.compute_dtype)
            return run_fit(
                tiny_state(module, optimizer(schedule.learning_rate), chosen),
                train_batches=Batches(6),
                schedule=schedule,
                max_epochs=max_epochs,
                steps_per_call=3,
                checkpoints=checkpoints,
            )

        whole = train(3, None)
        with Checkpoints(tmp_path) as checkpoints:
            train(2, checkpoints)
        with Checkpoints(tmp_path) as checkpoints:
            resumed = train(3, checkpoints)
    assert_same(resumed.state.params, whole.state.params)
    assert_same(resumed.state.opt_state, whole.state.opt_state)
    floats = [
        leaf.dtype
        for leaf in jax.tree.leaves((whole.state.params, whole.state.opt_state))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert set(floats) == {jnp.dtype("float32")}
