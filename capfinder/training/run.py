"""Where a training stands, and how that is saved and taken up again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from capfinder.errors import InputError, StageFailedError, StoppedError
from capfinder.log import logger
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.schedules import PlateauState
from capfinder.training.step import Sums, TrainState

Row = dict[str, Any]


class DivergedError(StageFailedError):
    """The loss stopped being a finite number."""


@dataclass
class Run:
    """All that `latest` has to hold, and the best weights so far."""

    # State, sums over the epoch so far, steps taken in it: one field, so that a signal handler
    # that raises between two assignments can't leave them out of step with each other.
    live: tuple[TrainState, Sums, int]
    steps_per_epoch: int
    seconds: float = 0.0  # spent on the epoch's steps so far
    history: list[Row] = field(default_factory=list)  # one row an epoch
    best_epoch: int = 0  # 1-based; 0: none validated yet
    best: dict[str, Any] | None = None  # its "params" and "batch_stats"
    plateau: PlateauState = field(default_factory=PlateauState)

    @property
    def state(self) -> TrainState:
        return self.live[0]

    @property
    def steps_in_epoch(self) -> int:
        return self.live[2]

    @property
    def best_val_loss(self) -> float:
        return self.history[self.best_epoch - 1]["val_loss"] if self.best_epoch else math.inf

    @property
    def holds_best(self) -> bool:
        """The weights at hand are those of the best epoch."""
        return self.steps_in_epoch == 0 and 0 < self.best_epoch == len(self.history)


def no_sums(state: TrainState) -> Sums:
    """Sums over no step: loss, correct, count, and diverged_at, the step (0: none) that was first
    to lose the loss."""
    loss_dtype = jax.tree.leaves(state.params)[0].dtype
    zeros = {name: jnp.int32(0) for name in ("correct", "count", "diverged_at")}
    return {"loss": jnp.zeros((), loss_dtype), **zeros}


def checked_sums(run: Run) -> dict[str, Any]:
    """The epoch's sums so far, fetched from the device. Raises: DivergedError."""
    state, sums, steps = run.live
    fetched: dict[str, Any] = jax.device_get(sums)
    if fetched["diverged_at"] or not fetched["count"]:
        taken = int(state.step)
        step = steps - (taken - int(fetched["diverged_at"] or taken))
        raise diverged(f"in epoch {len(run.history) + 1}, step {step} of {run.steps_per_epoch}")
    return fetched


def diverged(where: str) -> DivergedError:
    return DivergedError(
        f"training diverged {where}: the loss is no longer a finite number. Lower the learning "
        "rate (learning_rate in model_params, or lr_scheduler_params); with dtype float16, "
        "runtime_params.compute_dtype=float32 may help too."
    )


def resumed(state: TrainState, steps_per_epoch: int, checkpoints: Checkpoints | None) -> Run:
    """A run at its beginning, or where its latest checkpoint stands."""
    # A copy: the steps donate their state, and the caller's stays the caller's.
    run = Run((jax.tree.map(jnp.copy, state), no_sums(state), 0), steps_per_epoch)
    found = checkpoints.restore_latest(run.live[:2]) if checkpoints is not None else None
    if checkpoints is None or found is None:
        return run
    (state, sums), meta = found
    if meta["steps_per_epoch"] != steps_per_epoch:
        raise StageFailedError(
            f"{checkpoints.directory}: saved by a run of {meta['steps_per_epoch']} steps an epoch, "
            f"this one has {steps_per_epoch}. Remove it, or choose another "
            "shared_params.output_dir."
        )
    run.live, run.seconds = (state, sums, meta["steps_in_epoch"]), meta["seconds"]
    run.history, run.best_epoch = meta["history"], meta["best_epoch"]
    run.plateau = PlateauState(**meta["plateau"])
    logger.info("training resumed at epoch %d, step %d", len(run.history) + 1, run.steps_in_epoch)
    if run.best_epoch:
        try:
            run.best = checkpoints.restore_variables(run.best_epoch)
        except InputError:
            if not run.holds_best:
                raise
            # The writer was killed when `latest` was whole and `best` of the same epoch wasn't.
            save_best(run, checkpoints)
    return run


def save_best(run: Run, checkpoints: Checkpoints | None) -> None:
    """Takes the weights at hand, which are those of `run.best_epoch`, as the best."""
    run.best = jax.tree.map(jnp.copy, run.state.variables)  # the originals will be donated
    if checkpoints is not None:
        meta = {"best_val_loss": run.best_val_loss, "history": list(run.history)}
        checkpoints.save_best(run.best_epoch, run.best, meta)


def save_latest(run: Run, checkpoints: Checkpoints | None) -> None:
    """Raises: DivergedError rather than save a state that is lost."""
    if checkpoints is None:
        return
    state, sums, steps = run.live
    if steps:
        checked_sums(run)
    meta = {
        "steps_in_epoch": steps,
        "steps_per_epoch": run.steps_per_epoch,
        "seconds": run.seconds,
        "history": list(run.history),  # it grows while Orbax writes in the background
        "plateau": asdict(run.plateau),
    }
    checkpoints.save_latest(
        int(state.step),
        (state, sums),
        meta,
        best_epoch=run.best_epoch,
        holds_best=run.holds_best,
    )


@contextmanager
def saved_if_stopped(run: Run, checkpoints: Checkpoints | None) -> Iterator[None]:
    """When a signal ends the run inside, saves the steps taken, if the state is whole."""
    try:
        yield
    except StoppedError:
        is_whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.live[:2]))
        if run.steps_in_epoch and is_whole:  # not so while a step that took it over is under way
            try:
                save_latest(run, checkpoints)
            except StageFailedError as error:
                logger.warning("%s", error)
        raise


@contextmanager
def written_at_the_end(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Waits for the checkpoints under way, also when what is inside fails; then quietly."""
    try:
        yield
    except BaseException:
        try:
            if checkpoints is not None:
                checkpoints.wait()
        except StageFailedError as error:
            logger.warning("%s", error)
        raise
    if checkpoints is not None:
        checkpoints.wait()
