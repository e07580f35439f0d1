import math
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_training import (
    BATCH,
    Batches,
    Tiny,
    assert_same,
    run_fit,
    tiny_state,
    validation,
)

from capfinder.errors import StageFailedError, StoppedError
from capfinder.training import epoch as epoch_module
from capfinder.training import loop
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.loop import DivergedError
from capfinder.training.run import copied, no_sums
from capfinder.training.schedules import (
    Plateau,
    PlateauState,
    make_schedule,
    optimizer,
    with_learning_rate,
)
from capfinder.training.step import eval_step, train_step

PLATEAU = make_schedule(
    "reduce_lr_on_plateau",
    {"factor": 0.5, "patience": 1, "min_lr": 1e-4},
    learning_rate=0.1,
    steps_per_epoch=3,
)
step, evaluate = jax.jit(train_step), jax.jit(eval_step)


class Scripted(nn.Module):
    """Learns when training; in evaluation the logits are read off the signal itself."""

    @nn.compact
    def __call__(self, signal, *, train):
        x = signal[..., 0]
        learnt = nn.Dense(3)(x)
        return learnt if train else x[:, :3]


SCRIPTED = Scripted()


class KilledError(Exception):
    """Stands for a killed process: raised out of fit, past all its own handling."""


def kill_at(wanted):
    def callback(value):
        if (value["epoch"] if isinstance(value, dict) else value) == wanted:
            raise KilledError

    return callback


def interrupt_after(steps):
    """(on_step, interrupted): a Ctrl-C during the step that this number names."""
    taken = []
    return {
        "on_step": taken.append,
        "interrupted": lambda: bool(taken) and taken[-1] >= steps,
    }


def timeless(history):
    timed = ("seconds", "examples_per_second", "idle_share")
    return [{k: v for k, v in row.items() if k not in timed} for row in history]


def assert_same_result(left, right):
    assert_same(left.state, right.state)
    assert timeless(left.history) == timeless(right.history)
    assert (left.best_epoch, left.best_val_loss) == (right.best_epoch, right.best_val_loss)
    assert left.stopped == right.stopped


def assert_same_files(left, right):
    """Both runs' best checkpoints hold the same: what a later stage reads."""
    one, other = Checkpoints(left), Checkpoints(right)
    assert_same(one.restore_variables(), other.restore_variables())
    assert one.read_meta()["best_epoch"] == other.read_meta()["best_epoch"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    with Checkpoints(directory, minutes=0) as checkpoints:
        result = run_fit(schedule=PLATEAU, max_epochs=4, checkpoints=checkpoints)
    # A middle epoch is the best, and the rate was cut: something to get wrong.
    assert 1 < result.best_epoch < 4
    assert result.history[-1]["learning_rate"] < 0.1
    return directory, result


# What an undisturbed fit does


def test_history_and_best_weights_are_those_of_a_loop_written_out():
    state, batches, rows, weights = tiny_state(), Batches(3), [], []
    for epoch in range(4):
        sums = []
        for batch in batches.epoch(epoch):
            state, new = step(state, batch)
            sums.append(new)
        checked = [evaluate(state, batch) for batch in validation()]
        row = []
        for part in (sums, checked):
            count = sum(int(s["count"]) for s in part)
            row += [sum(float(s[key]) for s in part) / count for key in ("loss", "correct")]
        rows.append(row)
        weights.append(state.variables)
    result = run_fit()
    found = [
        [row[key] for key in ("loss", "accuracy", "val_loss", "val_accuracy")]
        for row in result.history
    ]
    np.testing.assert_allclose(found, rows, rtol=1e-4)
    best = int(np.argmin([row[2] for row in rows]))
    assert result.best_epoch == best + 1
    assert result.best_val_loss == result.history[best]["val_loss"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        result.state.variables,
        weights[best],
    )


def test_callbacks_hear_of_every_step_and_every_epoch():
    steps, rows = [], []
    result = run_fit(on_step=steps.append, on_epoch=rows.append)
    assert steps == list(range(1, 13))
    assert rows == result.history
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == {
        *("epoch", "loss", "accuracy", "val_loss", "val_accuracy"),
        *("learning_rate", "seconds", "examples_per_second", "idle_share", "rollbacks"),
        *("steps", "best_epoch", "best_val_loss"),
    }
    assert all(row["seconds"] > 0 and row["examples_per_second"] > 0 for row in rows)
    assert result.stopped == "max_epochs"


def test_a_row_says_which_epoch_is_the_best_up_to_it_and_how_many_steps_were_taken(undisturbed):
    _, result = undisturbed
    assert [row["steps"] for row in result.history] == [3, 6, 9, 12]
    for number, row in enumerate(result.history, 1):
        losses = val_losses(result)[:number]
        assert row["best_val_loss"] == min(losses)
        assert row["best_epoch"] == losses.index(min(losses)) + 1
    (tie,) = fit_losses([0.5, 0.5], 3).history[1:]
    assert (tie["best_epoch"], tie["best_val_loss"]) == (1, tie["val_loss"])


def test_a_training_begins_with_few_programs_whatever_shapes_its_weights_have():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, signal, *, train):
            x = signal[..., 0]
            for units in (21, 22, 23, 24, 25, 26, 27):
                x = nn.Dense(units)(x)
            return nn.Dense(3)(x)

    state = tiny_state(Odd())
    with jax.log_compiles(), _compilations() as compiled:
        run_fit(state, max_epochs=1)
    # Of the state, of its variables, and of the rollback's random key.
    assert len([name for name in compiled if "cop" in name]) <= 3, compiled


def test_copies_have_buffers_of_their_own():
    state = tiny_state()
    copy = copied(state)
    assert_same(copy, state)
    for one, other in zip(jax.tree.leaves(copy), jax.tree.leaves(state), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()


def test_the_caller_s_state_stays_usable():
    state = tiny_state()
    first, second = run_fit(state, max_epochs=1), run_fit(state, max_epochs=1)
    assert_same_result(first, second)


def test_epochs_are_asked_for_in_turn_from_zero():
    batches = Batches(2)
    run_fit(train_batches=batches, max_epochs=3)
    assert batches.asked == [(0, 0), (1, 0), (2, 0)]


def test_batches_that_run_out_early_are_an_error():
    batches = Batches(2)
    batches.steps_per_epoch = 3
    with pytest.raises(ValueError, match="2 batches in an epoch of 3"):
        run_fit(train_batches=batches)


def test_nothing_is_compiled_twice():
    """Neither by a second epoch nor by a second fit of the same model."""
    state = tiny_state(Tiny(dropout_rate=0.21))
    with jax.log_compiles(), _compilations() as compiled:
        run_fit(state, max_epochs=1)
        assert len([name for name in compiled if "chunk" in name]) == 1
        compiled.clear()
        run_fit(state, schedule=PLATEAU, max_epochs=4)
    assert [name for name in compiled if "and_add" in name or "chunk" in name] == []


@pytest.mark.parametrize(("steps", "per_call", "programs"), [(6, 3, 1), (7, 3, 2), (5, 9, 1)])
def test_a_program_is_compiled_for_whole_calls_and_one_for_single_steps(steps, per_call, programs):
    state = tiny_state(Tiny(dropout_rate=0.2 + 0.01 * steps))
    batches = Batches(steps, on_device=True)
    with jax.log_compiles(), _compilations() as compiled:
        run_fit(
            state,
            schedule=PLATEAU,
            train_batches=batches,
            steps_per_call=per_call,
            available_bytes=lambda: 2**40,
        )
    assert len([name for name in compiled if "chunk" in name]) == programs


class _compilations:
    def __enter__(self):
        import logging

        self._names, outer = [], self

        class Handler(logging.Handler):
            def emit(self, record):
                if "Compiling" in record.getMessage():
                    outer._names.append(record.getMessage())

        self._logger, self._handler = logging.getLogger("jax"), Handler()
        self._logger.addHandler(self._handler)
        return self._names

    def __exit__(self, *error):
        self._logger.removeHandler(self._handler)


# Several steps a call


@pytest.fixture(scope="module")
def steps_alone():
    return run_fit(train_batches=Batches(5), schedule=PLATEAU, steps_per_call=1)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("per_call", [1, 2, 3, 5, 8])
def test_weights_are_the_same_however_many_steps_a_call_takes(steps_alone, per_call, on_device):
    result = run_fit(
        train_batches=Batches(5, on_device=on_device), schedule=PLATEAU, steps_per_call=per_call
    )
    assert int(result.state.step) == 20
    assert_near(result.state.variables, steps_alone.state.variables)
    assert_near([row["val_loss"] for row in result.history], val_losses(steps_alone))


def assert_near(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), left, right)


def val_losses(result):
    return [row["val_loss"] for row in result.history]


def test_no_more_steps_a_call_than_an_epoch_has_and_by_default_one_on_a_cpu():
    taken = {}
    for per_call in (2, 9, None):
        taken[per_call] = []
        run_fit(
            train_batches=Batches(5),
            steps_per_call=per_call,
            max_epochs=2,
            on_step=taken[per_call].append,
        )
    assert taken == {2: [2, 4, 5, 7, 9, 10], 9: [5, 10], None: list(range(1, 11))}


@pytest.mark.parametrize("steps", [2, 4, 5, 9])
def test_a_run_killed_between_calls_ends_as_if_it_had_not_been(tmp_path, steps):
    def run(directory, **changed):
        with Checkpoints(directory, minutes=0) as checkpoints:
            return run_fit(
                train_batches=Batches(5),
                steps_per_call=2,
                schedule=PLATEAU,
                checkpoints=checkpoints,
                **changed,
            )

    with pytest.raises(KilledError):
        run(tmp_path / "killed", on_step=kill_at(steps))
    expected = run(tmp_path / "whole")
    assert_same_result(run(tmp_path / "killed"), expected)


def test_an_interrupt_waits_for_its_call_and_a_rerun_may_take_other_calls(tmp_path, steps_alone):
    with Checkpoints(tmp_path) as checkpoints:
        result = run_fit(
            train_batches=Batches(5),
            schedule=PLATEAU,
            steps_per_call=3,
            checkpoints=checkpoints,
            **interrupt_after(6),
        )
        assert int(result.state.step) == 8
        steps = []
        result = run_fit(
            train_batches=Batches(5),
            schedule=PLATEAU,
            steps_per_call=2,
            checkpoints=checkpoints,
            on_step=steps.append,
        )
    assert steps[:4] == [9, 10, 12, 14]  # one step to the end of a piece of two
    assert_near(result.state.variables, steps_alone.state.variables)


# How busy the device is


class Clock:
    """Moves when it is told."""

    now = 0.0

    def monotonic(self):
        return self.now


def test_the_wait_for_data_counts_as_idle_when_the_device_had_finished(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(epoch_module, "time", clock)

    class Slow(Batches):
        def rows(self, *arguments):
            jax.block_until_ready(jax.live_arrays())  # the steps handed over so far
            clock.now += 1
            return super().rows(*arguments)

    def on_step(step):
        clock.now += 1  # of the host, not for data

    (row,) = run_fit(train_batches=Slow(4), max_epochs=1, on_step=on_step).history
    assert row["idle_share"] == 4 / 8


def test_data_got_while_the_device_works_leave_it_busy(monkeypatch):
    clock, idle = Clock(), []
    monkeypatch.setattr(epoch_module, "time", clock)

    class Ahead(Batches):
        materialise = staticmethod(slow)

        def rows(self, *arguments):
            clock.now += 1
            idle.append(all(array.is_ready() for array in jax.live_arrays()))
            return super().rows(*arguments)

    (row,) = run_fit(train_batches=Ahead(4), max_epochs=1).history
    assert row["idle_share"] == sum(idle) / 4 < 1


def slow(resident, piece):
    grown = jax.lax.fori_loop(0, 100, lambda _, x: jnp.cos(x @ x), jnp.ones((400, 400)))
    return piece | {"signal": piece["signal"] + grown[0, 0] * 1e-9}


def test_no_more_than_two_calls_are_under_way(monkeypatch):
    under_way, lost = [], []

    class Watched(epoch_module.Calls):
        def __call__(self, *arguments):
            under_way.append(1 + sum(not one.is_ready() for one in lost))
            result = super().__call__(*arguments)
            lost.append(result[2])
            return result

    class Slow(Batches):
        materialise = staticmethod(slow)

    monkeypatch.setattr(loop, "Calls", Watched)
    run_fit(train_batches=Slow(6), max_epochs=1)
    assert len(under_way) == 6 and max(under_way) == epoch_module.CALLS_IN_FLIGHT == 2


# Learning rates


def test_plateau_sets_the_rate_of_the_next_epochs():
    result = run_fit(schedule=PLATEAU, max_epochs=6)
    rule, state, rate, expected = Plateau(0.5, 1, 1e-4), PlateauState(), float(np.float32(0.1)), []
    for row in result.history:
        expected.append(rate)
        state, rate = rule.after_epoch(state, row["val_loss"], rate)
    assert len(set(expected)) > 1
    assert [row["learning_rate"] for row in result.history] == expected


def test_a_schedule_of_the_step_shows_in_the_history_with_each_epoch_s_last_rate():
    schedule = make_schedule(
        "cyclic_lr",
        {
            "base_lr": 0.01,
            "max_lr": 0.04,
            "step_size_factor": 1,
            "mode": "triangular",
            "gamma": 1.0,
        },
        learning_rate=0.5,
        steps_per_epoch=3,
    )
    state = tiny_state(SCRIPTED, tx=optimizer(schedule.learning_rate))
    result = run_fit(state, schedule=schedule, max_epochs=3)
    np.testing.assert_allclose(
        [row["learning_rate"] for row in result.history], [0.03, 0.02, 0.03], rtol=1e-5
    )


# Early stopping


class ScriptedValidation:
    """Each pass over it has the next val_loss of a list."""

    def __init__(self, losses):
        self.losses = iter(losses)

    def __iter__(self):
        # Cross-entropy of logits (a, 0, 0) and class 0 is log(1 + 2 exp(-a)).
        a = -math.log(math.expm1(next(self.losses)) / 2)
        signal = np.zeros((BATCH, 12, 1), np.float32)
        signal[:, 0] = a
        yield {
            "signal": signal,
            "cap_class": np.zeros(BATCH, np.int32),
            "weight": np.ones(BATCH, np.float32),
        }


def fit_losses(losses, patience):
    return run_fit(
        tiny_state(SCRIPTED),
        train_batches=Batches(1),
        validation_batches=ScriptedValidation(losses),
        max_epochs=len(losses),
        patience=patience,
    )


def test_early_stopping_does_what_keras_does_on_random_losses():
    import keras

    class Model:
        stop_training = False

        def get_weights(self):
            return []

    for seed in range(40):
        rng = np.random.default_rng(seed)
        patience = int(rng.integers(0, 5))
        losses = rng.choice([0.3, 0.5, 0.7, 0.9, 1.1, 1.3], int(rng.integers(1, 25)))
        result = fit_losses(losses - 0.005 * np.arange(len(losses)), patience)

        callback = keras.callbacks.EarlyStopping("val_loss", patience=patience, mode="min")
        callback.set_model(Model())
        callback.on_train_begin()
        for epoch in range(len(losses)):
            callback.on_epoch_end(epoch, {"val_loss": result.history[epoch]["val_loss"]})
            if callback.model.stop_training:
                break
        assert len(result.history) == epoch + 1, seed
        assert result.best_epoch == callback.best_epoch + 1, seed
        stopped = "patience" if callback.model.stop_training else "max_epochs"
        assert result.stopped == stopped or epoch + 1 == len(losses), seed


@pytest.mark.parametrize(
    ("patience", "epochs"),
    [(0, 3), (1, 3), (2, 6), (3, 7), (4, 8)],
)
def test_patience_counts_epochs_in_a_row_without_a_lower_val_loss(patience, epochs):
    losses = [1.0, 0.9, 0.95, 0.8, 0.8, 0.85, 0.9, 0.7]
    result = fit_losses(losses, patience)
    assert len(result.history) == epochs
    assert result.stopped == ("patience" if patience < 4 else "max_epochs")
    assert result.best_epoch == {3: 2, 6: 4, 7: 4, 8: 8}[epochs]


# Killed and resumed


@pytest.mark.parametrize("minutes", [0, None])
@pytest.mark.parametrize(
    "kill",
    [*({"on_step": n} for n in (1, 3, 5, 7, 9, 12)), *({"on_epoch": n} for n in (1, 2, 3, 4))],
    ids=str,
)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, undisturbed, minutes, kill):
    directory, expected = undisturbed
    ((where, number),) = kill.items()
    with Checkpoints(tmp_path, minutes) as checkpoints, pytest.raises(KilledError):
        run_fit(schedule=PLATEAU, checkpoints=checkpoints, **{where: kill_at(number)})
    batches = Batches(3)
    with Checkpoints(tmp_path, minutes) as checkpoints:
        result = run_fit(schedule=PLATEAU, checkpoints=checkpoints, train_batches=batches)
    assert_same_result(result, expected)
    assert_same_files(tmp_path, directory)
    if where == "on_step" and minutes == 0:
        done = number - 1  # the killed step itself wasn't saved yet
        epoch, start = divmod(done, 3)
        assert batches.asked[0] == (epoch, start)


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, undisturbed):
    directory, expected = undisturbed
    for number in range(2, 13, 2):
        with Checkpoints(tmp_path, minutes=0) as checkpoints, pytest.raises(KilledError):
            run_fit(schedule=PLATEAU, checkpoints=checkpoints, on_step=kill_at(number))
    with Checkpoints(tmp_path, minutes=0) as checkpoints:
        result = run_fit(schedule=PLATEAU, checkpoints=checkpoints)
    assert_same_result(result, expected)
    assert_same_files(tmp_path, directory)


def test_a_best_epoch_lost_with_its_writer_is_written_again(tmp_path, undisturbed):
    """`latest` was whole when the process died, `best` of the same epoch wasn't."""
    directory, expected = undisturbed
    with Checkpoints(tmp_path, minutes=None) as checkpoints, pytest.raises(KilledError):
        run_fit(schedule=PLATEAU, checkpoints=checkpoints, on_epoch=kill_at(expected.best_epoch))
    shutil.rmtree(tmp_path / "best" / str(expected.best_epoch))
    with Checkpoints(tmp_path, minutes=None) as checkpoints:
        result = run_fit(schedule=PLATEAU, checkpoints=checkpoints)
    assert_same_result(result, expected)
    assert_same_files(tmp_path, directory)


def test_a_finished_run_is_given_back_without_a_step(undisturbed):
    directory, expected = undisturbed
    batches, rows = Batches(3), []
    with Checkpoints(directory, minutes=0) as checkpoints:
        result = run_fit(
            schedule=PLATEAU, checkpoints=checkpoints, train_batches=batches, on_epoch=rows.append
        )
    assert_same_result(result, expected)
    assert batches.asked == rows == []


def test_more_epochs_than_before_are_trained_as_if_asked_for_at_once(tmp_path):
    for epochs in (2, 5):
        with Checkpoints(tmp_path) as checkpoints:
            extended = run_fit(schedule=PLATEAU, max_epochs=epochs, checkpoints=checkpoints)
    assert_same_result(extended, run_fit(schedule=PLATEAU, max_epochs=5))


def test_a_changed_batch_size_is_refused_rather_than_resumed_at_the_wrong_place(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        run_fit(max_epochs=1, checkpoints=checkpoints)
        with pytest.raises(StageFailedError, match="3 steps an epoch, this one has 2"):
            run_fit(train_batches=Batches(2), checkpoints=checkpoints)


# Interrupted


def test_an_interrupt_ends_after_its_step_with_the_best_epoch_so_far(tmp_path):
    expected = run_fit(max_epochs=2)
    result = run_fit(**interrupt_after(8))
    assert result.stopped == "interrupted"
    assert timeless(result.history) == timeless(expected.history)
    assert_same(result.state.variables, expected.state.variables)
    assert int(result.state.step) == 8


@pytest.mark.parametrize("steps", [1, 4, 6, 8])
def test_a_rerun_after_an_interrupt_goes_on_as_if_there_had_been_none(tmp_path, undisturbed, steps):
    directory, expected = undisturbed
    with Checkpoints(tmp_path) as checkpoints:
        first = run_fit(schedule=PLATEAU, checkpoints=checkpoints, **interrupt_after(steps))
    assert first.stopped == "interrupted"
    assert_same(Checkpoints(tmp_path).restore_variables(), first.state.variables)
    batches = Batches(3)
    with Checkpoints(tmp_path) as checkpoints:
        result = run_fit(schedule=PLATEAU, checkpoints=checkpoints, train_batches=batches)
    assert batches.asked[0] == divmod(steps, 3) if steps % 3 else batches.asked[0][1] == 0
    assert_same_result(result, expected)
    assert_same_files(tmp_path, directory)


def test_an_interrupt_before_the_first_epoch_s_end_validates_the_weights_at_hand(tmp_path):
    state = tiny_state()
    for batch in list(Batches(3).epoch(0))[:2]:
        state, _ = step(state, batch)
    sums = [evaluate(state, batch) for batch in validation()]
    rows = []
    with Checkpoints(tmp_path) as checkpoints:
        result = run_fit(checkpoints=checkpoints, on_epoch=rows.append, **interrupt_after(2))
    assert (result.stopped, result.best_epoch, len(result.history)) == ("interrupted", 1, 1)
    assert rows == result.history
    expected = sum(float(s["loss"]) for s in sums) / sum(int(s["count"]) for s in sums)
    np.testing.assert_allclose(result.best_val_loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        Checkpoints(tmp_path).restore_variables(),
        state.variables,
    )


def test_an_interrupt_in_a_validation_leaves_it_and_a_rerun_repeats_it(tmp_path, undisturbed):
    _, expected = undisturbed
    seen = []

    class Watched:
        def __iter__(self):
            for batch in validation():
                seen.append(None)
                yield batch

    with Checkpoints(tmp_path) as checkpoints:
        first = run_fit(
            schedule=PLATEAU,
            checkpoints=checkpoints,
            validation_batches=Watched(),
            interrupted=lambda: len(seen) == 5,  # the second of the second epoch's three
        )
    assert (first.stopped, len(first.history), len(seen)) == ("interrupted", 1, 5)
    batches = Batches(3)
    with Checkpoints(tmp_path) as checkpoints:
        result = run_fit(schedule=PLATEAU, checkpoints=checkpoints, train_batches=batches)
    assert batches.asked[0] == (2, 0)  # no step of the second epoch again
    assert_same_result(result, expected)


def test_an_interrupt_after_all_is_done_is_an_ordinary_end():
    rows = []
    result = run_fit(on_epoch=rows.append, interrupted=lambda: len(rows) == 4)
    assert result.stopped == "max_epochs"


def test_a_signal_that_ends_the_run_saves_the_steps_taken(tmp_path, undisturbed):
    _, expected = undisturbed

    def terminated(taken):
        if taken == 5:
            raise StoppedError("stopped by SIGTERM", 143)

    with Checkpoints(tmp_path) as checkpoints, pytest.raises(StoppedError):
        run_fit(schedule=PLATEAU, checkpoints=checkpoints, on_step=terminated)
    batches = Batches(3)
    with Checkpoints(tmp_path) as checkpoints:
        result = run_fit(schedule=PLATEAU, checkpoints=checkpoints, train_batches=batches)
    assert batches.asked[0] == (1, 2)
    assert_same_result(result, expected)


# Diverged


class Broken(Batches):
    """One batch of an epoch isn't made of numbers."""

    def rows(self, epoch, first_step, rows):
        piece = super().rows(epoch, first_step, rows)
        if epoch == 1 and first_step <= 1 < first_step + len(rows):
            piece["signal"][1 - first_step] = np.nan
        return piece


@pytest.mark.parametrize("minutes", [0, None])
def test_a_loss_that_is_no_number_ends_the_run_and_names_epoch_and_step(tmp_path, minutes):
    with (
        Checkpoints(tmp_path, minutes) as checkpoints,
        pytest.raises(DivergedError, match=r"in epoch 2, step 2 of 3: .* Lower the learning rate"),
    ):
        run_fit(train_batches=Broken(3), checkpoints=checkpoints)
    assert issubclass(DivergedError, StageFailedError)
    # The lost weights were never saved; those of the first epoch (or the step before) were.
    template = (tiny_state(), no_sums(tiny_state()), tiny_state(), tiny_state().variables)
    state, _ = Checkpoints(tmp_path).restore_latest(template)
    assert int(state[0].step) == (4 if minutes == 0 else 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0].params))


def test_a_val_loss_that_is_no_number_ends_the_run_too():
    batches = validation()
    batches[0]["signal"][0] = np.nan
    with pytest.raises(DivergedError, match="in the validation of epoch 1"):
        run_fit(validation_batches=batches)


def test_a_rate_far_too_high_diverges_with_advice():
    state = tiny_state()
    state = replace(state, opt_state=with_learning_rate(state.opt_state, 1e30))
    with pytest.raises(DivergedError, match="epoch 1, step"):
        run_fit(state)


def test_a_lost_loss_is_noticed_within_a_few_calls():
    steps = []
    with pytest.raises(DivergedError, match="in epoch 2, step 2 of 30"):
        run_fit(train_batches=Broken(30), on_step=steps.append)
    assert max(steps) < 30 + 2 + 5


# Rolled back


class Explodes(nn.Module):
    """Diverges in a few steps at a rate of 0.1, and learns at rates below."""

    @nn.compact
    def __call__(self, signal, *, train):
        kernel = self.param("kernel", nn.initializers.zeros, (3,))
        bias = self.param("bias", nn.initializers.zeros, (3,))
        limit = 0.34  # Adam moves every weight by about the rate in each step
        lost = jnp.abs(bias).max() > limit
        return jnp.where(lost & train, jnp.nan, signal[:, :1, 0] * kernel + bias)


EXPLODES = Explodes()


def one_class(steps):
    """The bias climbs by the rate in each step."""
    batches = Batches(steps)
    batches.cap_class[:] = 0
    return batches


def run_exploding(**changed):
    checked = [batch | {"cap_class": np.zeros(BATCH, np.int32)} for batch in validation()]
    arguments = {
        **{"train_batches": one_class(3), "validation_batches": checked},
        **{"max_epochs": 2, "max_rollbacks": 3},
    }
    return run_fit(tiny_state(EXPLODES), **(arguments | changed))


def test_a_lost_loss_takes_training_back_to_the_last_good_epoch_at_half_the_rate(caplog):
    caplog.set_level("WARNING", "capfinder")
    result = run_exploding()
    # Epoch 1 ends at a bias of 0.3; from there 3 steps of 0.05, then of 0.025 are too far, too.
    assert [row["learning_rate"] for row in result.history] == pytest.approx([0.1, 0.0125])
    assert [row["rollbacks"] for row in result.history] == [0, 3]
    assert int(result.state.step) == 6
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "diverged in epoch 2, step 2 of 3" in lines[0]
    assert "back to the end of epoch 1" in lines[0]
    assert "half the learning rate, 0.05 (rollback 1 of 3)" in lines[0]


def test_what_follows_a_rollback_is_a_training_with_that_rate_from_the_good_epoch_on():
    result = run_exploding()
    state = tiny_state(EXPLODES)
    for number in range(2):
        for batch in one_class(3).epoch(number):
            state, _ = step(state, batch)
        rate = with_learning_rate(state.opt_state, 0.0125)
        state = replace(state, opt_state=rate)
    assert result.best_epoch == 2
    assert_near(result.state.params, state.params)


def test_a_divergence_in_the_first_epoch_goes_back_to_the_start():
    result = run_exploding(train_batches=one_class(5))
    assert result.history[0]["learning_rate"] == pytest.approx(0.05)
    assert result.history[0]["rollbacks"] == 1


def test_a_training_that_keeps_diverging_ends_with_advice_and_its_best_epoch(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(DivergedError, match=r"in epoch 2, step 2 of 3: .*\(2x\)") as caught:
            run_fit(train_batches=Broken(3), checkpoints=checkpoints, max_rollbacks=2)
        assert f"best epoch so far (1) is in {tmp_path}" in str(caught.value)
        assert "Lower the learning rate" in str(caught.value)
        assert Checkpoints(tmp_path).read_meta()["best_epoch"] == 1
        # A rerun that may roll back more often goes on from there, with the rate it had come to.
        result = run_fit(checkpoints=checkpoints, max_epochs=2, max_rollbacks=3)
    assert result.history[1]["learning_rate"] == pytest.approx(0.025)
    assert result.history[1]["rollbacks"] == 2


def test_without_rollbacks_a_lost_loss_ends_the_training_at_once():
    with pytest.raises(DivergedError, match="in epoch 2, step 2 of 3") as caught:
        run_exploding(max_rollbacks=0)
    assert "Rolling back" not in str(caught.value)


@pytest.mark.parametrize("minutes", [0, None])
@pytest.mark.parametrize("kill", [3, 4, 6, 8, 10, 12], ids=str)
def test_a_run_killed_around_its_rollbacks_ends_as_if_it_had_not_been(tmp_path, minutes, kill):
    expected = run_exploding()
    calls = []

    def on_step(taken):
        calls.append(taken)
        if len(calls) == kill:
            raise KilledError

    with Checkpoints(tmp_path, minutes) as checkpoints, pytest.raises(KilledError):
        run_exploding(checkpoints=checkpoints, on_step=on_step)
    with Checkpoints(tmp_path, minutes) as checkpoints:
        result = run_exploding(checkpoints=checkpoints)
    assert_same_result(result, expected)


@pytest.mark.parametrize("kind", ["cyclic_lr", "sgdr", "reduce_lr_on_plateau"])
def test_rollbacks_halve_the_rates_of_every_schedule(kind):
    params = {
        "cyclic_lr": {
            **{"base_lr": 0.1, "max_lr": 0.12, "mode": "triangular"},
            **{"step_size_factor": 1, "gamma": 1.0},
        },
        "sgdr": {
            **{"min_lr": 0.1, "max_lr": 0.12, "lr_decay": 0.9},
            **{"cycle_length": 2, "mult_factor": 1.0},
        },
        "reduce_lr_on_plateau": {"factor": 0.5, "patience": 1, "min_lr": 1e-4},
    }[kind]
    schedule = make_schedule(kind, params, learning_rate=0.1, steps_per_epoch=3)

    class BrokenOnce(Batches):
        broken = True

        def rows(self, epoch, first_step, rows):
            piece = super().rows(epoch, first_step, rows)
            if epoch == 0 and first_step == 2 and self.broken:
                piece["signal"] = piece["signal"] * np.float32(np.nan)
                self.broken = False
            return piece

    rates = []
    for batches in (Batches(3), BrokenOnce(3)):
        state = tiny_state(SCRIPTED, optimizer(schedule.learning_rate))
        result = run_fit(
            state,
            schedule=schedule,
            train_batches=batches,
            validation_batches=ScriptedValidation([1.0, 1.0, 1.0, 1.0, 1.0]),
            max_rollbacks=1,
        )
        rates.append([row["learning_rate"] for row in result.history])
    assert len(set(rates[0])) > 1
    np.testing.assert_allclose(np.array(rates[0]) / 2, rates[1], rtol=1e-6)


def test_a_rolled_back_state_lies_on_the_host_until_it_is_needed():
    def of_a_state(kept):
        batches, sizes = Batches(3), []

        def on_epoch(row):
            sizes.append(sum(array.nbytes for array in jax.live_arrays()))

        before = sum(array.nbytes for array in jax.live_arrays())
        run_fit(train_batches=batches, on_epoch=on_epoch, max_epochs=1, max_rollbacks=kept)
        return sizes[0] - before

    assert of_a_state(2) - of_a_state(0) <= 64  # a random key and some numbers


def test_more_memory_than_there_is_ends_the_run_before_its_first_step():
    steps = []
    with pytest.raises(MemoryError, match=r"a step needs .* bytes, 10 can be had"):
        run_fit(on_step=steps.append, available_bytes=lambda: 10)
    assert steps == []
    assert len(run_fit(available_bytes=lambda: 2**40).history) == 4
    assert len(run_fit(available_bytes=lambda: None).history) == 4
