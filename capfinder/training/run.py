"""Where a training stands, and how that is saved and taken up again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capfinder.errors import StageFailedError, StoppedError
from capfinder.log import logger
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.devices import put_like
from capfinder.training.schedules import PlateauState
from capfinder.training.step import Sums, TrainState

Row = dict[str, Any]


class DivergedError(StageFailedError):
    """The loss stopped being a finite number; `where` names epoch and step."""

    def __init__(self, where: str, note: str = "") -> None:
        super().__init__(
            f"training diverged {where}: the loss is no longer a finite number. {note}Lower the "
            "learning rate (learning_rate in model_params, or lr_scheduler_params); with dtype "
            "float16, runtime_params.compute_dtype=float32 may help too."
        )
        self.where = where


@dataclass
class Run:
    """All that `latest` has to hold, and the best weights so far."""

    # State, sums over the epoch so far, steps taken in it: one field, so that a signal handler
    # that raises between two assignments can't leave them out of step with each other.
    live: tuple[TrainState, Sums, int]
    steps_per_epoch: int
    seconds: float = 0.0  # spent on the epoch's steps so far
    idle_seconds: float = 0.0  # of these, those in which the device may have had nothing to do
    history: list[Row] = field(default_factory=list)  # one row an epoch
    best_epoch: int = 0  # 1-based; 0: none validated yet
    best: dict[str, Any] | None = None  # its "params" and "batch_stats"
    plateau: PlateauState = field(default_factory=PlateauState)
    # What a divergence goes back to: the state at the last epoch's end, in the host's memory;
    # None where it needn't be kept.
    good: TrainState | None = None
    rollbacks: int = 0  # so far

    @property
    def state(self) -> TrainState:
        return self.live[0]

    @property
    def steps_in_epoch(self) -> int:
        return self.live[2]

    @property
    def best_val_loss(self) -> float:
        return self.history[self.best_epoch - 1]["val_loss"] if self.best_epoch else math.inf


def no_sums(state: TrainState) -> Sums:
    """Sums over no step: loss, correct, count, and diverged_at, the step (0: none) that was first
    to lose the loss."""
    loss_dtype = jax.tree.leaves(state.params)[0].dtype
    dtypes = dict.fromkeys(("correct", "count", "diverged_at"), state.step.dtype)
    # Where the state lies: on the devices of a mesh, another place would be another program.
    return {
        name: put_like(np.zeros((), dtype), state.step)
        for name, dtype in {"loss": loss_dtype, **dtypes}.items()
    }


def checked_sums(run: Run) -> dict[str, Any]:
    """The epoch's sums so far, fetched from the device. Raises: DivergedError."""
    state, sums, steps = run.live
    fetched: dict[str, Any] = jax.device_get(sums)
    if fetched["diverged_at"]:
        step = steps - (int(state.step) - int(fetched["diverged_at"]))
        raise DivergedError(
            f"in epoch {len(run.history) + 1}, step {step} of {run.steps_per_epoch}"
        )
    return fetched


def roll_back(
    run: Run, error: DivergedError, checkpoints: Checkpoints | None, max_rollbacks: int
) -> None:
    """Back to the end of the last good epoch (or the start), to go on with half the learning rate.

    A run that is killed after it comes by here again, or goes on from what is saved now: the
    weights are the same. Raises: DivergedError when no rollback is left."""
    if run.rollbacks >= max_rollbacks or run.good is None:
        note = ""
        if run.rollbacks:
            note = f"Rolling back and halving the learning rate ({run.rollbacks}x) didn't help. "
        if run.best_epoch and checkpoints is not None:
            note += f"The best epoch so far ({run.best_epoch}) is in {checkpoints.directory}. "
        raise DivergedError(error.where, note) from error
    state = from_host(run.good, run.state)
    state = replace(state, rate_factor=state.rate_factor / 2)
    run.good = on_host(state)
    run.live, run.seconds, run.idle_seconds = (state, no_sums(state), 0), 0.0, 0.0
    run.rollbacks += 1
    logger.warning(
        "training diverged %s: back to %s, going on with half the learning rate, %.3g "
        "(rollback %d of %d)",
        error.where,
        f"the end of epoch {len(run.history)}" if run.history else "its start",
        float(state.learning_rate),
        run.rollbacks,
        max_rollbacks,
    )
    save_latest(run, checkpoints)


def on_host(state: TrainState) -> TrainState:
    """A copy that takes no memory of the device, but for the random key."""

    def fetched(leaf: jax.Array) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jnp.copy(leaf) if is_key else np.array(leaf)

    return jax.tree.map(fetched, state)


def from_host(state: TrainState, like: TrainState) -> TrainState:
    """A copy of the state where `like` lies; it may be donated."""
    return copied(jax.tree.map(put_like, state, like))


def copied(tree: Any) -> Any:
    """The tree in buffers of its own, which may be donated."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _copies(leaves))


@jax.jit  # one program, where copies one by one would be one for each shape
def _copies(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]


def resumed(
    state: TrainState,
    steps_per_epoch: int,
    checkpoints: Checkpoints | None,
    *,
    may_roll_back: bool,
) -> Run:
    """A run at its beginning, or where its latest checkpoint stands."""
    # A copy: the steps donate their state, and the caller's stays the caller's.
    run = Run((copied(state), no_sums(state), 0), steps_per_epoch)
    if may_roll_back or checkpoints is not None:  # which a rerun may take up that may roll back
        run.good = on_host(state)
    if checkpoints is None:
        return run
    found = checkpoints.restore_latest((*run.live[:2], state, state.variables))
    if found is None:
        return run
    (state, sums, good, best), meta = found
    if meta["steps_per_epoch"] != steps_per_epoch:
        raise StageFailedError(
            f"{checkpoints.directory}: saved by a run of {meta['steps_per_epoch']} steps an epoch, "
            f"this one has {steps_per_epoch}. Remove it, or choose another "
            "shared_params.output_dir."
        )
    run.live, run.good = (state, sums, meta["steps_in_epoch"]), on_host(good)
    run.seconds, run.idle_seconds = meta["seconds"], meta["idle_seconds"]
    run.history, run.best_epoch = meta["history"], meta["best_epoch"]
    run.plateau, run.rollbacks = PlateauState(**meta["plateau"]), meta["rollbacks"]
    logger.info("training resumed at epoch %d, step %d", len(run.history) + 1, run.steps_in_epoch)
    if run.best_epoch:
        run.best = best
        checkpoints.mend_best(run.best_epoch, best, _best_meta(run))
    return run


def save_best(run: Run, checkpoints: Checkpoints | None) -> None:
    """Takes the weights at hand, which are those of `run.best_epoch`, as the best."""
    run.best = copied(run.state.variables)  # the originals will be donated
    if checkpoints is not None:
        checkpoints.save_best(run.best_epoch, run.best, _best_meta(run))


def _best_meta(run: Run) -> dict[str, Any]:
    return {"best_val_loss": run.best_val_loss, "history": run.history[: run.best_epoch]}


def save_latest(run: Run, checkpoints: Checkpoints | None) -> None:
    """Raises: DivergedError rather than save a state that is lost."""
    if checkpoints is None:
        return
    state, sums, steps = run.live
    assert run.good is not None
    if steps:
        checked_sums(run)
    meta = {
        "steps_in_epoch": steps,
        "steps_per_epoch": run.steps_per_epoch,
        "seconds": run.seconds,
        "idle_seconds": run.idle_seconds,
        "rollbacks": run.rollbacks,
        "history": list(run.history),  # it grows while Orbax writes in the background
        "plateau": asdict(run.plateau),
    }
    # The best too, though it has a place of its own: from here it is written again if it is lost.
    best = state.variables if run.best is None else run.best
    checkpoints.save_latest(
        int(state.step), (state, sums, run.good, best), meta, best_epoch=run.best_epoch
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
