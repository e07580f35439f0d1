"""Memory that a training step needs, what there is, and what to say when it isn't enough."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from capfinder.errors import StageFailedError
from capfinder.log import format_bytes
from capfinder.stages import assembly
from capfinder.training import devices, schedules
from capfinder.training.accumulate import MIN_MICROBATCH
from capfinder.training.epoch import bytes_beyond_arguments
from capfinder.training.step import train_step

USABLE = 0.8  # of what is available: steps of many reads were seen to take 11 % more than foretold
ROWS = (16, 32)  # batch sizes that are compiled to see how a step grows; none is run
BATCH_COPIES = 3  # of the signals: as they come, divided into parts, and one more on the way

FAILURES = (MemoryError, jax.errors.JaxRuntimeError)


class OutOfMemoryError(StageFailedError):
    """A training ran out of memory, on the host or the device; the text says what would fit."""


@contextmanager
def explained(
    config: ConfigDict, hyperparameters: Any, *, every_process: bool, prefix: str = ""
) -> Iterator[None]:
    """Around a training of these hyperparameters. Raises: OutOfMemoryError, `prefix` before its
    text, when memory runs out inside; every_process as in `reason`."""
    try:
        yield
    except FAILURES as error:
        text = reason(error, config, hyperparameters, every_process=every_process)
        if text is None:
            raise
        raise OutOfMemoryError(f"{prefix}{text}") from error


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    is_device = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    return isinstance(error, MemoryError) or is_device


def reason(
    error: BaseException, config: ConfigDict, hyperparameters: Any, *, every_process: bool = True
) -> str | None:
    """What to say, in a line, when a training of these hyperparameters ran out of memory; None for
    any other error. Compiles the step twice, to find the batch size that would fit.

    every_process: whether all that there are share a batch, as in `devices.spread`."""
    if not is_out_of_memory(error):
        return None
    batch_size, microbatch = config.shared_params.batch_size, config.runtime_params.microbatch
    available = available_bytes()
    try:
        growth = step_growth(config, hyperparameters)
    except FAILURES:  # the compiler has run out of it, too
        growth = None
    if available is None or growth is None:
        return (
            f"out of memory; lower runtime_params.microbatch ({microbatch} now) or "
            f"shared_params.batch_size ({batch_size} now)"
        )
    sharing = devices.sharing(
        batch_size, limit=config.runtime_params.mesh, every_process=every_process
    )
    if sharing[0].platform == "cpu":  # those of a process have the host's memory in common
        available //= sum(device.process_index == jax.process_index() for device in sharing)
    return _advice(growth, available, batch_size, microbatch, len(sharing))


def _advice(
    growth: "Growth", available: int, batch_size: int, microbatch: int | None, shards: int
) -> str:
    """available: bytes of each of the `shards` devices that a batch is divided among."""
    reads, limit = min(batch_size, microbatch or batch_size), USABLE * available
    rows = -(-reads // shards)  # on each device
    whole_batch = BATCH_COPIES * -(-batch_size // shards) * growth.signal_bytes
    needed = growth.bytes(rows) + (whole_batch if reads < batch_size else 0)
    figures = (
        f"a step of {reads:,} reads needs about {format_bytes(needed)}"
        f"{'' if shards == 1 else f' on each of {shards} devices'}, {format_bytes(available)} can "
        "be had"
    )
    fitting = shards * rounded_down(min(growth.rows(limit), rows // 2))
    if fitting < 1:
        return f"out of memory: {figures}; choose a smaller model (model_params)"
    advice = f"--config.shared_params.batch_size={fitting}"
    part = shards * rounded_down(min(growth.rows(limit - whole_batch), rows // 2))
    if part >= MIN_MICROBATCH:
        advice = (
            f"--config.runtime_params.microbatch={part} (the same result but for batch norm and "
            f"dropout's draws) or {advice}"
        )
    if needed <= available:
        return f"out of memory: more was needed than foretold ({figures}). Try half: {advice}"
    return f"out of memory: {figures}. It would fit with {advice}"


@dataclass(frozen=True)
class Growth:
    """Bytes of a training step by its batch size, beyond its state: a straight line."""

    fixed: float
    per_read: float
    signal_bytes: int  # of one read

    def bytes(self, rows: int) -> float:
        return self.fixed + self.per_read * rows

    def rows(self, limit: float) -> int:
        """The largest batch that stays within `limit` bytes; 0 or less for none."""
        return int((limit - self.fixed) / self.per_read)


def step_growth(config: ConfigDict, hyperparameters: Any) -> Growth | None:
    """From the buffers that XLA plans for steps of two sizes; None where it doesn't tell."""
    dtype = assembly.policy(config).param_dtype
    state = jax.eval_shape(
        lambda: assembly.initial_state(config, hyperparameters, schedules.optimizer(1e-3), seed=0)
    )
    needed = []
    for rows in ROWS:
        signal = jax.ShapeDtypeStruct((rows, config.shared_params.target_length, 1), dtype)
        batch = {"signal": signal, "cap_class": jax.ShapeDtypeStruct((rows,), np.int32)}
        compiled = jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()
        beyond = bytes_beyond_arguments(compiled)
        if beyond is None:
            return None
        needed.append(beyond + sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values()))
    signal_bytes = config.shared_params.target_length * dtype.itemsize
    per_read = max((needed[1] - needed[0]) / (ROWS[1] - ROWS[0]), signal_bytes)
    return Growth(needed[0] - per_read * ROWS[0], per_read, signal_bytes)


def rounded_down(rows: int) -> int:
    """To three binary digits: 937 -> 896, 100 -> 96, 7 -> 7."""
    unit = 1 << max(0, rows.bit_length() - 3)
    return rows // unit * unit


def available_bytes() -> int | None:
    """What a step may still allocate on this process's first device; None where it isn't known.

    The device of a CPU is the host's memory, as far as the process may have it."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return host_bytes() if device.platform == "cpu" else None


def host_bytes(root: Path = Path("/")) -> int | None:
    """Memory this process may still take: of the machine, within the limits of its control groups
    and of its address space. root: where /proc and /sys lie.

    Linux only: None elsewhere, where nothing tells without another library."""
    limits = [*_machine_bytes(root), *_group_bytes(root), *_address_bytes(root)]
    return None if not limits else max(0, min(limits)) + _freed_bytes()


def _machine_bytes(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _group_bytes(root: Path) -> Iterator[int]:
    """Of each control group (version 2 or 1) around this process that has a limit."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
            limit, usage, prefix = "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, usage, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / path.strip("/")
        while group.is_relative_to(top):
            # Not there in a container that sees its own group alone, as the top.
            (most,), (used,) = _lines(group / limit) or ["max"], _lines(group / usage) or ["0"]
            if most != "max":
                names = (f"{prefix}active_file", f"{prefix}inactive_file")
                stat = (entry.split() for entry in _lines(group / "memory.stat"))
                cached = sum(int(value) for name, value in stat if name in names)
                yield int(most) - int(used) + cached  # the kernel takes back what caches files
            group = group.parent


def _address_bytes(root: Path) -> Iterator[int]:
    """Of the address space, which a cluster's scheduler may limit."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    for line in _lines(root / "proc/self/statm"):
        if most != resource.RLIM_INFINITY:
            yield most - resource.getpagesize() * int(line.split()[0])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _freed_bytes() -> int:
    """What the C library holds for this process's next allocations (`capfinder.memory`)."""
    if not sys.platform.startswith("linux"):
        return 0
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:  # glibc before 2.33, or musl
        return 0
    mallinfo.restype = _MallInfo
    return int(mallinfo().fordblks)
