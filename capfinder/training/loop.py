"""The epochs of a training: steps, validation, early stopping; interrupts and resume."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import jax

from capfinder.training import epoch
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.epoch import CALLS_IN_FLIGHT, Calls, TrainBatches, train_epoch
from capfinder.training.run import (
    DivergedError,
    Row,
    Run,
    checked_sums,
    no_sums,
    on_host,
    resumed,
    roll_back,
    save_best,
    save_latest,
    saved_if_stopped,
    written_at_the_end,
)
from capfinder.training.schedules import Schedule, learning_rate_of, with_learning_rate
from capfinder.training.step import Batch, Sums, TrainState, eval_step

__all__ = ["DivergedError", "FitResult", "TrainBatches", "evaluate", "fit"]


@dataclass(frozen=True)
class FitResult:
    state: TrainState  # parameters and batch statistics of the best epoch, the rest of the last
    history: list[Row]  # one row an epoch
    best_epoch: int  # 1-based
    best_val_loss: float
    stopped: str  # "max_epochs", "patience" or "interrupted"
    resumed_at: int  # steps that earlier runs had taken


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
    steps_per_call: int | None = None,
    microbatch: int | None = None,
    max_rollbacks: int = 0,
    available_bytes: Callable[[], int | None] | None = None,
) -> FitResult:
    """Trains until `max_epochs`, or until val_loss wasn't lowered for `patience` epochs in a row.

    Patience 0 and 1 both stop at the first epoch that doesn't go below the lowest val_loss before
    it, as in Keras's EarlyStopping.

    With checkpoints, a run that was cut short goes on from `latest` and ends with the very weights
    of one that never stopped; a run that had ended gives its result again at once, unless
    max_epochs or patience now allows more.

    interrupted: asked after every call and, once an epoch was validated, between the batches of
    a validation. True ends the training with the best epoch so far; the steps of the unfinished
    epoch stay in `latest` for a rerun to go on from. They don't compete for the best (Keras would
    validate them: an extra wait, and a result that no undisturbed run has), unless no epoch was
    validated yet: then they count as epoch 1 of this result, and of this result only.
    on_step: after every call, gets the number of steps taken since the training began, in earlier
    runs included.
    on_epoch: gets each new row of the history once its checkpoints are on their way: epoch
    (1-based), loss, accuracy, val_loss, val_accuracy, learning_rate (of the epoch's last step),
    seconds, examples_per_second (of the training steps), idle_share (at most this share of their
    time the device waited for data: all the time it took to get a call's data is counted when
    the steps before were done by then), rollbacks, steps, best_epoch and best_val_loss (up to here,
    of earlier runs too).

    steps_per_call, microbatch, available_bytes: see `epoch.Calls`. The weights are the same for
    any steps_per_call, up to how XLA rounds within and outside of a loop.
    max_rollbacks: that often a loss that is no longer a finite number doesn't end the training:
    it goes back to the end of the last good epoch, or to the start, and takes half the learning
    rate from there on, whatever the schedule (a plateau's min_lr is halved with it).

    `state` itself is left untouched. Raises: DivergedError naming epoch and step;
    StageFailedError when a checkpoint can't be written or read; MemoryError before the first step
    when that plainly needs more than available_bytes; what the callables raise (StoppedError, also
    from a signal handler, first saves `latest` where that can be done)."""
    if max_epochs < 1:
        raise ValueError(f"max_epochs is {max_epochs}, must be at least 1")
    steps_per_epoch = train_batches.steps_per_epoch
    calls = Calls(
        train_batches,
        steps_per_call=epoch.steps_per_call(steps_per_call, steps_per_epoch),
        microbatch=microbatch,
        available_bytes=available_bytes,
    )
    run = resumed(state, steps_per_epoch, checkpoints, may_roll_back=max_rollbacks > 0)
    resumed_at = len(run.history) * steps_per_epoch + run.steps_in_epoch
    with written_at_the_end(checkpoints):
        while (stopped := _stop_reason(run, max_epochs, patience)) is None:
            row = None
            try:
                with saved_if_stopped(run, checkpoints):
                    if train_epoch(run, calls, checkpoints, interrupted, on_step):
                        give_up = interrupted if run.history else _never
                        row = _finish(run, validation_batches, give_up)
            except DivergedError as error:
                roll_back(run, error, checkpoints, max_rollbacks)
                continue
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
    return FitResult(best, run.history, run.best_epoch, run.best_val_loss, stopped, resumed_at)


def _finish(run: Run, batches: Iterable[Batch], give_up: Callable[[], bool]) -> Row | None:
    """The history row of the steps taken; None when `give_up` ended the validation.

    Fetches the sums from the device, once for training and once for validation."""
    started = time.monotonic()
    trained = checked_sums(run)
    if not trained["count"]:  # float16: each step's loss was too large a number
        raise DivergedError(f"in epoch {len(run.history) + 1}")
    validated = evaluate(run.state, batches, give_up)
    if validated is None:
        return None
    if not math.isfinite(validated["loss"]):
        raise DivergedError(f"in the validation of epoch {len(run.history) + 1}")
    epoch, val_loss = len(run.history) + 1, validated["loss"]
    is_best = val_loss < run.best_val_loss
    return {
        "epoch": epoch,
        "loss": float(trained["loss"] / trained["count"]),
        "accuracy": float(trained["correct"] / trained["count"]),
        "val_loss": val_loss,
        "val_accuracy": validated["accuracy"],
        "learning_rate": float(run.state.learning_rate),
        "seconds": run.seconds + time.monotonic() - started,
        "examples_per_second": float(trained["count"]) / max(run.seconds, 1e-9),
        "idle_share": run.idle_seconds / max(run.seconds, 1e-9),
        "rollbacks": run.rollbacks,
        "steps": len(run.history) * run.steps_per_epoch + run.steps_in_epoch,
        "best_epoch": epoch if is_best else run.best_epoch,
        "best_val_loss": val_loss if is_best else run.best_val_loss,
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
        if len(in_flight) == CALLS_IN_FLIGHT:
            in_flight.popleft().block_until_ready()
        sums = add(state, sums, batch)
        in_flight.append(sums["count"])
    fetched = jax.device_get(sums)
    if not fetched["count"]:
        raise ValueError("no rows to evaluate")
    return {
        name: float(fetched[key] / fetched["count"])
        for name, key in (("loss", "loss"), ("accuracy", "correct"))
    }


def _close_epoch(run: Run, row: Row, schedule: Schedule, checkpoints: Checkpoints | None) -> None:
    state = run.state
    if schedule.plateau is not None:
        learning_rate = float(learning_rate_of(state.opt_state))  # without the rollbacks' factor
        run.plateau, learning_rate = schedule.plateau.after_epoch(
            run.plateau, row["val_loss"], learning_rate
        )
        opt_state = with_learning_rate(state.opt_state, learning_rate)
        state = replace(state, opt_state=opt_state)
    if run.good is not None:
        run.good = on_host(state)
    run.live, run.seconds, run.idle_seconds = (state, no_sums(state), 0), 0.0, 0.0
    if row["best_epoch"] == row["epoch"]:
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


def _evaluate_and_add(state: TrainState, totals: Sums, batch: Batch) -> Sums:
    sums = eval_step(state, batch)
    return totals | {name: totals[name] + value for name, value in sums.items()}
