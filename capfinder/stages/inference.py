"""Logits of any number of reads: the one way by which evaluation and `capfinder predict` get them.

Every batch has the same shape, the last one filled up, so that a model is compiled once and a read
gets the same numbers wherever it comes from."""

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from flax import linen as nn

from capfinder.data.loader import ONE_DEVICE, Placement, as_input
from capfinder.errors import StageFailedError
from capfinder.stages import memory
from capfinder.stages.assembly import TrainedModel
from capfinder.training import devices
from capfinder.training.epoch import bytes_beyond_arguments, check_memory

Payload = TypeVar("Payload")

# Reads that a device scores at once. cpu: measured on 2 cores with 48 to 2,048, all four
# architectures at their defaults and 500 samples, in interleaved rounds: they differ by less than
# the rounds do, so the size is one that takes little memory, answers soon and has work for more
# cores. A multiple of 48, as that fills the blocks of rows that a CPU's matrix product works on:
# with a rest, some places of a batch get another rounding than the others (1e-8 to 5e-7 of the
# logits). gpu, tpu: not measured.
BATCH_SIZES = {"cpu": 384, "gpu": 2048, "tpu": 2048}
# Batches that a device works on at once. cpu: measured on 2 cores, a second one fills the gaps in
# which the first leaves a core idle (cnn_lstm: 1.25 times the reads a second); a third adds none.
# gpu, tpu: they take one after the other, and a second one waits for the first to end.
AT_ONCE = 2


@dataclass(frozen=True)
class Batching:
    """How many reads are scored at once, and on which devices."""

    batch_size: int
    placement: Placement


def batching(batch_size: int | None, *, mesh: int | None) -> Batching:
    """batch_size: None for this machine's.

    mesh: runtime_params.mesh, of which this process's part is used; None: all of its devices. It
    may be of a training on a larger machine."""
    limit = None if mesh is None else min(mesh, jax.device_count())
    each = BATCH_SIZES.get(jax.default_backend(), BATCH_SIZES["gpu"])
    size = batch_size or devices.own_part(limit) * each
    return Batching(size, devices.spread(size, limit=limit, every_process=False) or ONE_DEVICE)


@functools.partial(jax.jit, static_argnames="module")
def _logits(variables: dict[str, Any], signals: jax.Array, *, module: nn.Module) -> Any:
    """signals (B, T) in the storage dtype -> (B, C). The weights are an argument: as constants they
    would be compiled, and kept on disk, anew for every training."""
    logits: Any = module.apply(variables, as_input(signals), train=False)
    return logits


@contextlib.contextmanager
def _blamed_on(batch_size: int) -> Iterator[None]:
    """Memory that runs out in here does so for the size of a batch.

    Raises: StageFailedError."""
    try:
        yield
    except memory.FAILURES as error:
        if not memory.is_out_of_memory(error):
            raise
        raise StageFailedError(
            f"out of memory while scoring {batch_size:,} reads at once. Give a smaller number: "
            "evaluate_params.batch_size, or --batch_size of `capfinder predict`."
        ) from error


def predict(
    model: TrainedModel, parts: Iterable[tuple[np.ndarray, Payload]], batching: Batching
) -> Iterator[tuple[np.ndarray, Payload]]:
    """The logits (k, C) of each part's signals (k, T), in the parts' order, each with its payload.

    Parts of any size, storage dtype. A part is asked for when there is room for it: what is held at
    a time is a few batches, and the parts that these belong to.
    Raises: StageFailedError when memory runs out for a batch; what `parts` raises."""
    waiting: deque[tuple[int, Payload]] = deque()  # parts whose reads aren't all scored yet
    in_flight: deque[tuple[Future[np.ndarray], int]] = deque()
    scored = [np.zeros((0, model.num_classes), np.float32)]  # in order, not yet given out
    ready = filled = 0
    batch_size, placement = batching.batch_size, batching.placement
    variables = placement.replicate(model.variables)
    compiling = threading.Lock()
    checked = False

    def check(signals: jax.Array) -> None:
        compiled = _logits.lower(variables, signals, module=model.module).compile()
        if (each := bytes_beyond_arguments(compiled)) is not None:
            check_memory(AT_ONCE * each, memory.available_bytes(), what="scoring")

    def logits_of(batch: np.ndarray) -> np.ndarray:
        nonlocal checked
        # "highest" as exports are compared: else a GPU rounds
        with _blamed_on(batch_size), jax.default_matmul_precision("highest"):
            signals = placement.split(batch, axis=0)
            with compiling:  # two threads at once would both compile
                if not checked:
                    check(signals)
                    checked = True
                logits = _logits(variables, signals, module=model.module)
            return np.asarray(logits)

    def empty(length: int, dtype: np.dtype[Any]) -> np.ndarray:
        """(batch_size, length), new memory each time: the device may be reading the last one."""
        with _blamed_on(batch_size):
            if not checked:  # as many are on their way to the device or there
                needed = 2 * AT_ONCE * batch_size * length * dtype.itemsize
                check_memory(needed, memory.host_bytes(), what="scoring")
            return np.zeros((batch_size, length), dtype)

    def collect(at_most: int) -> None:
        nonlocal ready
        while len(in_flight) > at_most:
            logits, count = in_flight.popleft()
            scored.append(logits.result()[:count])
            ready += count

    def finished() -> Iterator[tuple[np.ndarray, Payload]]:
        nonlocal ready
        while waiting and waiting[0][0] <= ready:
            count, payload = waiting.popleft()
            logits = np.concatenate(scored)
            scored[:] = [logits[count:]]
            ready -= count
            yield logits[:count], payload

    with ThreadPoolExecutor(AT_ONCE) as threads:
        batch = np.zeros((0, 0))
        for signals, payload in parts:
            waiting.append((len(signals), payload))
            at = 0
            while at < len(signals):
                if not filled:
                    batch = empty(signals.shape[1], signals.dtype)
                count = min(batch_size - filled, len(signals) - at)
                batch[filled : filled + count] = signals[at : at + count]
                filled, at = filled + count, at + count
                if filled == batch_size:
                    in_flight.append((threads.submit(logits_of, batch), filled))
                    filled = 0
                    collect(at_most=AT_ONCE)
            yield from finished()
        if filled:
            in_flight.append((threads.submit(logits_of, batch), filled))
        collect(at_most=0)
        yield from finished()
