import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder.training.schedules import (
    Plateau,
    PlateauState,
    cyclic,
    learning_rate_of,
    make_schedule,
    optimizer,
    sgdr,
    with_learning_rate,
)


def rates(schedule, steps):
    """What a jitted schedule gives for each of the steps, as one (n,) array."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32)))


# Cyclic


def smith(step, base_lr, max_lr, step_size, mode, gamma):
    """Smith 2017, section 3, as printed there, in Python's float64."""
    cycle = math.floor(1 + step / (2 * step_size))
    x = abs(step / step_size - 2 * cycle + 1)
    rise = (max_lr - base_lr) * max(0, 1 - x)
    if mode == "triangular2":
        rise /= 2 ** (cycle - 1)
    if mode == "exp_range":
        rise *= gamma**step
    return base_lr + rise


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("step_size", [1, 7, 24])
def test_cyclic_follows_smith_s_formulas_over_many_cycles(mode, step_size):
    given = {"base_lr": 1e-3, "max_lr": 5e-2, "mode": mode, "gamma": 0.997}
    steps = range(600)
    expected = [smith(step, step_size=step_size, **given) for step in steps]
    np.testing.assert_allclose(
        rates(cyclic(step_size=step_size, **given), steps), expected, rtol=3e-5
    )


def test_cyclic_starts_low_peaks_after_a_step_size_and_halves_its_height():
    schedule = cyclic(base_lr=0.1, max_lr=0.9, step_size=4, mode="triangular2", gamma=1.0)
    np.testing.assert_allclose(
        rates(schedule, range(17)),
        [0.1, 0.3, 0.5, 0.7, 0.9, 0.7, 0.5, 0.3, 0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1],
        rtol=1e-6,
    )


def test_cyclic_is_as_exact_late_in_a_long_training_as_at_its_start():
    schedule = cyclic(base_lr=1e-3, max_lr=5e-2, step_size=1000, mode="triangular", gamma=1.0)
    late = 2000 * 500_000
    np.testing.assert_array_equal(
        rates(schedule, range(late, late + 2000)), rates(schedule, range(2000))
    )


def test_cyclic_settings_count_the_step_size_in_epochs():
    params = {
        "base_lr": 1e-3,
        "max_lr": 5e-2,
        "step_size_factor": 8,
        "mode": "triangular",
        "gamma": 0.9999,
    }
    schedule = make_schedule("cyclic_lr", params, learning_rate=0.7, steps_per_epoch=5)
    assert schedule.plateau is None
    np.testing.assert_allclose(
        rates(schedule.learning_rate, [0, 20, 40, 80]), [1e-3, 2.55e-2, 5e-2, 1e-3], rtol=1e-6
    )


def test_an_unknown_mode_or_schedule_is_refused():
    with pytest.raises(ValueError, match="square"):
        cyclic(base_lr=0.1, max_lr=1.0, step_size=2, mode="square", gamma=1.0)
    with pytest.raises(ValueError, match="linear"):
        make_schedule("linear", {}, learning_rate=0.1, steps_per_epoch=1)


# SGDR


def loshchilov(steps, min_lr, max_lr, lr_decay, cycle_length, mult_factor, steps_per_epoch):
    """Loshchilov and Hutter 2017, equation 5, walked through cycle by cycle in float64."""
    found, length, top = [], Decimal(cycle_length), max_lr
    while len(found) < steps:
        total = int(length) * steps_per_epoch
        for t in range(total):
            rise = 0.5 * (max(min_lr, top) - min_lr) * (1 + math.cos(math.pi * t / total))
            found.append(min_lr + rise)
        length = (length * Decimal(str(mult_factor))).to_integral_value("ROUND_CEILING")
        top *= lr_decay
    return found[:steps]


@pytest.mark.parametrize("mult_factor", [1.0, 1.1, 1.5, 2.0])
@pytest.mark.parametrize("cycle_length", [1, 5, 10])
@pytest.mark.parametrize("lr_decay", [0.9, 1.0])
def test_sgdr_follows_the_paper_through_restarts_and_decays(mult_factor, cycle_length, lr_decay):
    given = {
        "min_lr": 1e-3,
        "max_lr": 2e-3,
        "lr_decay": lr_decay,
        "cycle_length": cycle_length,
        "mult_factor": mult_factor,
        "steps_per_epoch": 4,
    }
    np.testing.assert_allclose(
        rates(sgdr(**given), range(700)), loshchilov(700, **given), rtol=1e-5
    )


def test_sgdr_equals_optax_where_optax_can_say_it():
    """Optax lists its cycles: here tops that decay and lengths that double."""
    cycles = [
        {
            "init_value": 0.1 * 0.8**i,
            "peak_value": 0.1 * 0.8**i,
            "end_value": 0.01,
            "warmup_steps": 0,
            "decay_steps": 2 * 2**i * 6,
        }
        for i in range(6)
    ]
    ours = sgdr(
        min_lr=0.01, max_lr=0.1, lr_decay=0.8, cycle_length=2, mult_factor=2.0, steps_per_epoch=6
    )
    steps = range(sum(cycle["decay_steps"] for cycle in cycles))
    np.testing.assert_allclose(
        rates(ours, steps), rates(optax.sgdr_schedule(cycles), steps), rtol=2e-5
    )


def test_the_first_step_of_a_new_cycle_has_its_top_rate():
    schedule = sgdr(
        min_lr=1e-3, max_lr=2e-3, lr_decay=0.9, cycle_length=5, mult_factor=1.5, steps_per_epoch=10
    )
    starts = [0, 5, 5 + 8, 5 + 8 + 12, 5 + 8 + 12 + 18]  # epochs: each 1.5 times as long, up
    np.testing.assert_allclose(
        rates(schedule, [10 * start for start in starts]),
        [2e-3 * 0.9**i for i in range(5)],
        rtol=1e-6,
    )


def test_sgdr_s_top_never_falls_below_its_bottom():
    schedule = sgdr(
        min_lr=1e-3, max_lr=2e-3, lr_decay=0.5, cycle_length=1, mult_factor=1.0, steps_per_epoch=3
    )
    np.testing.assert_allclose(rates(schedule, range(6, 60)), 1e-3, rtol=1e-6)


def test_sgdr_goes_on_for_as_many_steps_as_the_counter_holds():
    constant = sgdr(
        min_lr=0.1, max_lr=1.0, lr_decay=1.0, cycle_length=5, mult_factor=1.0, steps_per_epoch=7
    )
    late = 35 * 10_000_000
    np.testing.assert_allclose(
        rates(constant, range(late, late + 35)), rates(constant, range(35)), rtol=1e-6
    )
    growing = sgdr(
        min_lr=0.1, max_lr=1.0, lr_decay=1.0, cycle_length=5, mult_factor=1.01, steps_per_epoch=1
    )
    found = rates(growing, [10**9, 2 * 10**9, 2**31 - 1])
    assert ((found >= 0.1) & (found <= 1.0)).all()


# Plateau


class Optimizer:
    """The part of a Keras optimiser that the callback sees; the rate is float32 there too."""

    def __init__(self, rate):
        self._rate = np.float32(rate)

    @property
    def learning_rate(self):
        return self._rate

    @learning_rate.setter
    def learning_rate(self, rate):
        self._rate = np.float32(rate)


class Model:
    stop_training = False

    def __init__(self, rate):
        self.optimizer = Optimizer(rate)


def keras_plateau(losses, rate, **settings_):
    import keras

    callback = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", mode="min", **settings_)
    callback.set_model(Model(rate))
    callback.on_train_begin()
    found = []
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        found.append(float(callback.model.optimizer.learning_rate))
    return found


def our_plateau(losses, rate, **settings_):
    plateau, state = Plateau(**settings_), PlateauState()
    opt_state = optimizer(rate).init({"w": jnp.zeros(1)})
    found = []
    for loss in losses:
        state, rate = plateau.after_epoch(state, loss, float(learning_rate_of(opt_state)))
        opt_state = with_learning_rate(opt_state, rate)
        found.append(float(learning_rate_of(opt_state)))
    return found


def random_losses(seed):
    """A noisy descent that levels off, with ties and falls about as small as Keras's min_delta."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 60)
    fall = np.cumsum(rng.choice([0.0, 5e-5, 1e-4, 2e-4, 0.05], size) * rng.random(size).round(1))
    return (1 - fall + rng.choice([0, 0, 1e-4, 0.02], size)).tolist()


@pytest.mark.parametrize("factor", [0.1, 0.5])
def test_plateau_does_what_keras_does_for_hundreds_of_random_runs(factor):
    for seed in range(120):
        rng = np.random.default_rng(1000 + seed)
        given = {
            "factor": factor,
            "patience": int(rng.integers(0, 6)),
            "min_lr": float(rng.choice([0.0, 1e-6, 1e-3])),
        }
        losses = random_losses(seed)
        assert our_plateau(losses, 1e-2, **given) == keras_plateau(losses, 1e-2, **given), seed


def test_plateau_cuts_after_patience_epochs_and_waits_as_long_again():
    found = our_plateau([1.0] * 8, 0.8, factor=0.5, patience=3, min_lr=0.25)
    np.testing.assert_allclose(found, [0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.25, 0.25], rtol=1e-6)


def test_plateau_starts_from_the_tuned_rate_and_keeps_its_own_settings():
    params = {"factor": 0.5, "patience": 5, "min_lr": 1e-6}
    schedule = make_schedule("reduce_lr_on_plateau", params, learning_rate=0.03, steps_per_epoch=9)
    assert schedule.learning_rate == 0.03
    assert schedule.plateau == Plateau(factor=0.5, patience=5, min_lr=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.integers(0, 5),
    st.floats(0.1, 0.9),
    st.floats(1e-6, 1e-2),
)
def test_plateau_never_raises_the_rate_nor_goes_below_its_floor(losses, patience, factor, floor):
    plateau, state, rate = Plateau(factor, patience, floor), PlateauState(), 0.1
    for loss in losses:
        state, new = plateau.after_epoch(state, loss, rate)
        assert floor <= new <= rate
        rate = new


# Through Optax


def test_a_schedule_of_the_step_acts_on_the_very_step_it_is_for():
    """A constant gradient makes Adam move by the rate, at every step."""
    schedule = cyclic(base_lr=0.1, max_lr=0.9, step_size=4, mode="triangular", gamma=1.0)
    tx = optimizer(schedule)
    params = {"w": jnp.zeros(())}
    state = tx.init(params)
    update = jax.jit(tx.update)
    moved, held = [], []
    for _ in range(12):
        updates, state = update({"w": jnp.ones(())}, state, params)
        moved.append(-float(updates["w"]))
        held.append(float(learning_rate_of(state)))
    np.testing.assert_allclose(moved, rates(schedule, range(12)), rtol=1e-4)
    np.testing.assert_allclose(held, rates(schedule, range(12)), rtol=1e-6)


def test_a_rate_that_is_set_acts_from_the_next_step_on():
    tx = optimizer(0.5)
    params = {"w": jnp.zeros(())}
    state = tx.init(params)
    moved = []
    for rate in (0.5, 0.25, 0.125):
        state = with_learning_rate(state, rate)
        updates, state = tx.update({"w": jnp.ones(())}, state, params)
        moved.append(-float(updates["w"]))
    np.testing.assert_allclose(moved, [0.5, 0.25, 0.125], rtol=1e-4)


def test_constant_holds_the_tuned_rate():
    schedule = make_schedule("constant", {}, learning_rate=0.02, steps_per_epoch=3)
    assert (schedule.learning_rate, schedule.plateau) == (0.02, None)
