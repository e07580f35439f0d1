"""The epochs of a training: steps, validation, early stopping; interrupts and resume."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp

from capfinder.training.checkpoint import Checkpoints
from capfinder.training.run import (
    DivergedError,
    Row,
    Run,
    checked_sums,
    diverged,
    no_sums,
    resumed,
    save_best,
    save_latest,
    saved_if_stopped,
    written_at_the_end,
)
from capfinder.training.schedules import Schedule, learning_rate_of, with_learning_rate
from capfinder.training.step import Batch, Sums, TrainState, eval_step, train_step

# Steps handed to the device ahead of their results: enough to keep it busy, few enough that an
# interrupt waits for little and batches don't pile up.
STEPS_IN_FLIGHT = 3

__all__ = ["DivergedError", "FitResult", "TrainBatches", "evaluate", "fit"]


class TrainBatches(Protocol):
    """The training data: equally many batches in every epoch, in an order the epoch decides."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (counted from 0), from a step (counted from 0) on."""


@dataclass(frozen=True)
class FitResult:
    state: TrainState  # parameters and batch statistics of the best epoch, the rest of the last
    history: list[Row]  # one row an epoch
    best_epoch: int  # 1-based
    best_val_loss: float
    stopped: str  # "max_epochs", "patience" or "interrupted"


def fit(
    state: TrainState,
    *,
    train_batches: TrainBatches,
    validation_batches: Iterable[Batch],
    schedule: Schedule,
    max_epochs: int,
    patience: int,
    checkpoints: Checkpoints | None,
    interrupted: Callable[[], bool],
    on_step: Callable[[int], None],
    on_epoch: Callable[[Row], None],
) -> FitResult:
    """Trains until `max_epochs`, or until val_loss wasn't lowered for `patience` epochs in a row.

    Patience 0 and 1 both stop at the first epoch that doesn't go below the lowest val_loss before
    it, as in Keras's EarlyStopping.

    With checkpoints, a run that was cut short goes on from `latest` and ends with the very weights
    of one that never stopped; a run that had ended gives its result again at once, unless
    max_epochs or patience now allows more.

    interrupted: asked after every step and, once an epoch was validated, between the batches of
    a validation. True ends the training with the best epoch so far; the steps of the unfinished
    epoch stay in `latest` for a rerun to go on from. They don't compete for the best (Keras would
    validate them: an extra wait, and a result that no undisturbed run has), unless no epoch was
    validated yet: then they count as epoch 1 of this result, and of this result only.
    on_step: gets the number of steps taken since the training began, in earlier runs included.
    on_epoch: gets each new row of the history once its checkpoints are on their way: epoch
    (1-based), loss, accuracy, val_loss, val_accuracy, learning_rate (of the epoch's last step),
    seconds, examples_per_second (of the training steps).

    `state` itself is left untouched. Raises: DivergedError naming epoch and step;
    StageFailedError when a checkpoint can't be written or read; what the callables raise
    (StoppedError, also from a signal handler, first saves `latest` where that can be done)."""
    if max_epochs < 1:
        raise ValueError(f"max_epochs is {max_epochs}, must be at least 1")
    run = resumed(state, train_batches.steps_per_epoch, checkpoints)
    with written_at_the_end(checkpoints):
        while (stopped := _stop_reason(run, max_epochs, patience)) is None:
            row = None
            with saved_if_stopped(run, checkpoints):
                if _train_epoch(run, train_batches, checkpoints, interrupted, on_step):
                    give_up = interrupted if run.history else _never
                    row = _finish(run, validation_batches, give_up)
            if row is None:
                stopped = "interrupted"
                break
            _close_epoch(run, row, schedule, checkpoints)
            on_epoch(row)
            if interrupted():
                stopped = _stop_reason(run, max_epochs, patience) or "interrupted"
                break
        if run.steps_in_epoch:
            save_latest(run, checkpoints)
        if not run.history:  # stopped within the first epoch
            row = _finish(run, validation_batches, _never)
            assert row is not None
            _take_as_best(run, row, checkpoints)
            on_epoch(row)
    assert run.best is not None
    best = replace(run.state, **run.best)
    return FitResult(best, run.history, run.best_epoch, run.best_val_loss, stopped)


def _train_epoch(
    run: Run,
    batches: TrainBatches,
    checkpoints: Checkpoints | None,
    interrupted: Callable[[], bool],
    on_step: Callable[[int], None],
) -> bool:
    """Trains to the end of the epoch; False when interrupted before."""
    steps_per_epoch = run.steps_per_epoch
    if run.steps_in_epoch == steps_per_epoch:  # interrupted during the validation
        return True
    train = jax.jit(_train_and_add, donate_argnums=(0, 1))
    steps_before = len(run.history) * steps_per_epoch
    started = time.monotonic() - run.seconds
    in_flight: deque[jax.Array] = deque()
    remaining = batches.epoch(len(run.history), run.steps_in_epoch)
    for step, batch in enumerate(remaining, run.steps_in_epoch + 1):
        state, sums, done = train(run.state, run.live[1], batch)
        run.live = (state, sums, step)
        _limit(in_flight, done)
        run.seconds = time.monotonic() - started
        on_step(steps_before + step)
        if step == steps_per_epoch:
            break
        if checkpoints is not None and checkpoints.is_due():
            save_latest(run, checkpoints)
        if interrupted():
            return False
    if run.steps_in_epoch != steps_per_epoch:
        raise ValueError(f"{run.steps_in_epoch} batches in an epoch of {steps_per_epoch}")
    jax.block_until_ready(run.live[1])
    run.seconds = time.monotonic() - started
    return True


def _finish(run: Run, batches: Iterable[Batch], give_up: Callable[[], bool]) -> Row | None:
    """The history row of the steps taken; None when `give_up` ended the validation.

    Fetches the sums from the device, once for training and once for validation."""
    started = time.monotonic()
    trained = checked_sums(run)
    validated = evaluate(run.state, batches, give_up)
    if validated is None:
        return None
    epoch = len(run.history) + 1
    if not math.isfinite(validated["loss"]):
        raise diverged(f"in the validation of epoch {epoch}")
    return {
        "epoch": epoch,
        "loss": float(trained["loss"] / trained["count"]),
        "accuracy": float(trained["correct"] / trained["count"]),
        "val_loss": validated["loss"],
        "val_accuracy": validated["accuracy"],
        "learning_rate": float(learning_rate_of(run.state.opt_state)),
        "seconds": run.seconds + time.monotonic() - started,
        "examples_per_second": float(trained["count"]) / max(run.seconds, 1e-9),
    }


def evaluate(
    state: TrainState, batches: Iterable[Batch], give_up: Callable[[], bool]
) -> dict[str, float] | None:
    """Mean loss and accuracy over the batches' real rows; None when `give_up` said true."""
    add = jax.jit(_evaluate_and_add)
    sums = no_sums(state)
    in_flight: deque[jax.Array] = deque()
    for batch in batches:
        if give_up():
            return None
        sums = add(state, sums, batch)
        _limit(in_flight, sums["count"])
    fetched = jax.device_get(sums)
    if not fetched["count"]:
        raise ValueError("no rows to evaluate")
    return {
        name: float(fetched[key] / fetched["count"])
        for name, key in (("loss", "loss"), ("accuracy", "correct"))
    }


def _close_epoch(run: Run, row: Row, schedule: Schedule, checkpoints: Checkpoints | None) -> None:
    state, learning_rate = run.state, row["learning_rate"]
    if schedule.plateau is not None:
        run.plateau, learning_rate = schedule.plateau.after_epoch(
            run.plateau, row["val_loss"], learning_rate
        )
        opt_state = with_learning_rate(state.opt_state, learning_rate)
        state = replace(state, opt_state=opt_state)
    run.live, run.seconds = (state, no_sums(state), 0), 0.0
    if row["val_loss"] < run.best_val_loss:
        _take_as_best(run, row, checkpoints)
    else:
        run.history.append(row)
    save_latest(run, checkpoints)


def _take_as_best(run: Run, row: Row, checkpoints: Checkpoints | None) -> None:
    run.history.append(row)
    run.best_epoch = row["epoch"]
    save_best(run, checkpoints)


def _stop_reason(run: Run, max_epochs: int, patience: int) -> str | None:
    if run.history and len(run.history) - run.best_epoch >= max(patience, 1):
        return "patience"
    return "max_epochs" if len(run.history) >= max_epochs else None


def _never() -> bool:
    return False


def _train_and_add(
    state: TrainState, totals: Sums, batch: Batch
) -> tuple[TrainState, Sums, jax.Array]:
    """One step; the last value is there to be waited for, as the others will be donated."""
    state, sums = train_step(state, batch)
    is_first = sums.pop("diverged") & (totals["diverged_at"] == 0)
    new = {name: totals[name] + value for name, value in sums.items()}
    new["diverged_at"] = jnp.where(is_first, state.step, totals["diverged_at"])
    return state, new, sums["loss"]


def _evaluate_and_add(state: TrainState, totals: Sums, batch: Batch) -> Sums:
    sums = eval_step(state, batch)
    return totals | {name: totals[name] + value for name, value in sums.items()}


def _limit(in_flight: deque[jax.Array], newest: jax.Array) -> None:
    in_flight.append(newest)
    if len(in_flight) > STEPS_IN_FLIGHT:
        in_flight.popleft().block_until_ready()
