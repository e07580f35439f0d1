"""Seconds, CPU seconds and peak memory of a process, taken by itself."""

import resource
import time
from pathlib import Path


def usage() -> tuple[float, float]:
    """Seconds so far, and CPU seconds of this process and of its finished children."""
    parts = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(part.ru_utime + part.ru_stime for part in parts)


def since(before: tuple[float, float]) -> dict[str, float]:
    now = usage()
    return {"wall": now[0] - before[0], "cpu": now[1] - before[1]}


def peak_memory() -> int:
    """Bytes: the most that lay in memory at once so far, mapped files included (VmHWM)."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
