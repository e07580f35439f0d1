"""The steps of an epoch as calls of one compiled program, handed to the device ahead of results."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from capfinder.training.checkpoint import Checkpoints
from capfinder.training.run import Run, checked_sums, save_latest
from capfinder.training.step import Batch, Sums, TrainState, train_step

# A call costs the host some hundred microseconds, which a device that takes a millisecond or less
# for a step would wait for. On a CPU a scan over steps is slower than the steps: XLA runs the
# body of a loop with less parallelism. Measured there; not measured on the others.
STEPS_PER_CALL = {"cpu": 1, "gpu": 16, "tpu": 16}

# Calls handed over ahead of their results: one that runs and one that waits keep the device busy,
# as the host prepares the next one's data meanwhile. With more an interrupt would wait longer, and
# batches pile up.
CALLS_IN_FLIGHT = 2

Piece = Any  # PyTree of arrays whose leading axis is steps


class TrainBatches(Protocol):
    """The training data: equally many batches in every epoch, in an order the epoch decides."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def resident(self) -> Any:
        """PyTree of arrays that stay on the device; () for none."""

    @property
    def materialise(self) -> Callable[[Any, Piece], Batch]:
        """(resident, one step's part of a piece) -> its batch; pure, always the same function."""

    def pieces(self, epoch: int, start_step: int = 0, *, size: int = 1) -> Iterator[Piece]:
        """An epoch (counted from 0) from a step (counted from 0) on, `size` steps at a time:
        pieces end at multiples of `size` steps from the epoch's beginning, and at its end."""


def steps_per_call(wanted: int | None, steps_per_epoch: int) -> int:
    """How many steps a call takes; None: as many as suit the platform."""
    return min(wanted or STEPS_PER_CALL.get(jax.default_backend(), 1), steps_per_epoch)


class Calls:
    """How the steps of a training are handed to the device.

    microbatch: as in `step.train_step`. available_bytes: memory that a step may take beyond what
    is held already; None, or giving None: not known."""

    def __init__(
        self,
        batches: TrainBatches,
        *,
        steps_per_call: int,
        microbatch: int | None,
        available_bytes: Callable[[], int | None] | None,
    ) -> None:
        self.steps_per_call = steps_per_call
        self._batches = batches
        # The same function and static arguments every time: JAX knows what it has compiled.
        self._program = jax.jit(
            chunk, static_argnames=("materialise", "microbatch", "shards"), donate_argnums=(0, 1)
        )
        self._static = {"materialise": batches.materialise, "microbatch": microbatch}
        self._available_bytes = available_bytes
        self._checked: set[int] = set()

    def pieces(self, epoch: int, start_step: int) -> Iterator[tuple[Piece, int]]:
        """What each call takes, and its steps: `steps_per_call`, or 1 for what is left at an
        epoch's end or after a resume, so that there are no programs for other numbers."""
        size = self.steps_per_call
        for piece in self._batches.pieces(epoch, start_step, size=size):
            count = _steps_of(piece)
            if count == size:
                yield piece, count
            else:
                for number in range(count):
                    yield _take(piece, number), 1

    def __call__(
        self, state: TrainState, sums: Sums, piece: Piece
    ) -> tuple[TrainState, Sums, jax.Array]:
        """`chunk`. Raises: MemoryError when the program plainly needs more than there is."""
        arguments = (state, sums, self._batches.resident, piece)
        static = self._static | {"shards": len(state.step.sharding.device_set)}
        steps = _steps_of(piece)
        if self._available_bytes is not None and steps not in self._checked:
            self._checked.add(steps)
            # JAX keeps what is compiled here for the call below.
            needed = bytes_beyond_arguments(self._program.lower(*arguments, **static).compile())
            check_memory(needed, self._available_bytes(), what="a step")
        result: tuple[TrainState, Sums, jax.Array] = self._program(*arguments, **static)
        return result


def chunk(
    state: TrainState,
    sums: Sums,
    resident: Any,
    piece: Piece,
    *,
    materialise: Callable[[Any, Piece], Batch],
    microbatch: int | None,
    shards: int,
) -> tuple[TrainState, Sums, jax.Array]:
    """The steps of a piece, in turn; their sums are added to `sums`.

    The last value, whether the loss has been lost, is there to be waited for, as the others will
    be donated."""

    def one(carry: tuple[TrainState, Sums], part: Piece) -> tuple[tuple[TrainState, Sums], None]:
        state, totals = carry
        batch = materialise(resident, part)
        state, sums = train_step(state, batch, microbatch=microbatch, shards=shards)
        is_first = sums.pop("diverged") & (totals["diverged_at"] == 0)
        new = {name: totals[name] + value for name, value in sums.items()}
        new["diverged_at"] = jnp.where(is_first, state.step, totals["diverged_at"])
        return (state, new), None

    if _steps_of(piece) == 1:
        (state, sums), _ = one((state, sums), jax.tree.map(lambda array: array[0], piece))
    else:
        (state, sums), _ = jax.lax.scan(one, (state, sums), piece)
    return state, sums, sums["diverged_at"] > 0


def bytes_beyond_arguments(compiled: jax.stages.Compiled) -> int | None:
    """What a call allocates on a device; None where the backend doesn't tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    own_output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.temp_size_in_bytes + own_output)


def check_memory(needed: int | None, available: int | None, *, what: str) -> None:
    """Linux grants a process more than there is, and kills it when it comes to use that.

    Bytes; None: not known. Raises: MemoryError when there isn't enough for `what`."""
    if needed is not None and available is not None and needed > available:
        raise MemoryError(f"{what} needs {needed:,} bytes, {available:,} can be had")


def train_epoch(
    run: Run,
    calls: Calls,
    checkpoints: Checkpoints | None,
    interrupted: Callable[[], bool],
    on_step: Callable[[int], None],
) -> bool:
    """Trains to the end of the epoch; False when interrupted before. Raises: DivergedError."""
    steps_per_epoch = run.steps_per_epoch
    if run.steps_in_epoch == steps_per_epoch:  # interrupted during the validation
        return True
    steps_before = len(run.history) * steps_per_epoch
    started = time.monotonic() - run.seconds
    in_flight: deque[jax.Array] = deque()
    pieces = calls.pieces(len(run.history), run.steps_in_epoch)
    while run.steps_in_epoch < steps_per_epoch:
        asked = time.monotonic()
        item = next(pieces, None)
        if item is None:
            raise ValueError(f"{run.steps_in_epoch} batches in an epoch of {steps_per_epoch}")
        piece, count = item
        if not in_flight or in_flight[-1].is_ready():  # type: ignore[attr-defined]
            run.idle_seconds += time.monotonic() - asked
        if len(in_flight) == CALLS_IN_FLIGHT and in_flight.popleft():  # waits for it
            checked_sums(run)  # names the step
        state, sums, is_lost = calls(*run.live[:2], piece)
        run.live = (state, sums, run.steps_in_epoch + count)
        in_flight.append(is_lost)
        run.seconds = time.monotonic() - started
        on_step(steps_before + run.steps_in_epoch)
        if run.steps_in_epoch < steps_per_epoch:
            # A lost loss ends the epoch above, in all processes at the same step; one saves.
            if checkpoints is not None and checkpoints.is_due() and not is_lost:
                save_latest(run, checkpoints)
            if interrupted():
                checked_sums(run)
                return False
    jax.block_until_ready(run.live[1])
    run.seconds = time.monotonic() - started
    return True


def _steps_of(piece: Piece) -> int:
    return int(jax.tree.leaves(piece)[0].shape[0])


@jax.jit
def _take(piece: Piece, step: int) -> Piece:
    """One step of a piece, as a piece."""
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, step, 1), piece)
