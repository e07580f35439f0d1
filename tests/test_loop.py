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
    assert_same,
    run_fit,
    tiny_state,
    validation,
)

from capfinder.errors import StageFailedError, StoppedError
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.loop import DivergedError
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
    return [{k: v for k, v in row.items() if "second" not in k} for row in history]


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
        *("learning_rate", "seconds", "examples_per_second"),
    }
    assert all(row["seconds"] > 0 and row["examples_per_second"] > 0 for row in rows)
    assert result.stopped == "max_epochs"


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
    state = tiny_state()
    run_fit(state, max_epochs=2)
    with jax.log_compiles(), _compilations() as compiled:
        run_fit(state, max_epochs=3)
    assert [name for name in compiled if "and_add" in name] == []


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

    def epoch(self, epoch, start_step=0):
        for number, batch in enumerate(super().epoch(epoch, start_step), start_step):
            if (epoch, number) == (1, 1):
                batch["signal"] = batch["signal"] * np.float32(np.nan)
            yield batch


@pytest.mark.parametrize("minutes", [0, None])
def test_a_loss_that_is_no_number_ends_the_run_and_names_epoch_and_step(tmp_path, minutes):
    with (
        Checkpoints(tmp_path, minutes) as checkpoints,
        pytest.raises(DivergedError, match=r"in epoch 2, step 2 of 3: .* Lower the learning rate"),
    ):
        run_fit(train_batches=Broken(3), checkpoints=checkpoints)
    assert issubclass(DivergedError, StageFailedError)
    # The lost weights were never saved; those of the first epoch (or the step before) were.
    state, _ = Checkpoints(tmp_path).restore_latest((tiny_state(), _sums()))
    assert int(state[0].step) == (4 if minutes == 0 else 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0].params))


def _sums():
    zeros = {name: jnp.int32(0) for name in ("correct", "count", "diverged_at")}
    return {"loss": jnp.float32(0), **zeros}


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
