"""Processes of others: whole ones with what they took, and ones that work when told to."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
TAIL_LINES = 15  # of a failed command's output, shown


@dataclass(frozen=True)
class Usage:
    """`cpu`: user and system seconds of the process and of the processes it waited for."""

    wall: float
    cpu: float


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would make a run differ or go online."""
    dropped = ("COMET_API_KEY", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
    return {key: value for key, value in os.environ.items() if key not in dropped} | changes


def run(
    command: Sequence[str | Path],
    *,
    log_path: Path,
    env: dict[str, str],
    watch: Callable[[int], None] | None = None,
    interval_s: float = 0.2,
) -> Usage:
    """Runs `command` to its end; its output goes to `log_path`. `watch` gets the process's id every
    `interval_s` on a thread of its own; the process leads a session whose number is that id.

    Raises: SystemExit with the end of the output when the command fails."""
    words = [os.fspath(word) for word in command]
    over = threading.Event()
    with log_path.open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
        watcher = threading.Thread(target=_watch, args=(watch, process.pid, over, interval_s))
        if watch is not None:
            watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:  # Ctrl-C here
                process.kill()
                process.wait()
            over.set()
            if watch is not None:
                watcher.join()
    if process.returncode:
        raise _failed(words, process.returncode, log_path)
    return Usage(wall, usage.ru_utime + usage.ru_stime)


def _failed(words: Sequence[str], exit_code: int | None, log_path: Path) -> SystemExit:
    tail = "\n".join(log_path.read_text("utf-8", "replace").splitlines()[-TAIL_LINES:])
    return SystemExit(f"{' '.join(words)}: exit code {exit_code}\n{tail}")


class Worker:
    """A long-lived process that answers commands (worker.py is its inner side) and is idle between
    them, as it waits for its input. Leaving the context ends it."""

    def __init__(self, command: Sequence[str | Path], *, log_path: Path, env: dict[str, str]):
        self._words, self._log_path = [os.fspath(word) for word in command], log_path
        with log_path.open("w") as log:
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
                start_new_session=True,
            )

    def ask(self, command: str) -> dict[str, Any]:
        """The answer, waited for. Raises: SystemExit with the end of the log when it died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(command, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise _failed(self._words, self._process.wait(), self._log_path)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu(self) -> float:
        """CPU seconds so far, seen from outside, at the kernel's resolution of 10 ms."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text("utf-8", "replace")
        fields = text.rpartition(")")[2].split()  # state is the first: utime 12th, stime 13th
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=None if error[0] is None else 1.0)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()


def _watch(
    watch: Callable[[int], None] | None, pid: int, over: threading.Event, interval_s: float
) -> None:
    while watch is not None and not over.wait(interval_s):
        watch(pid)


class MemoryWatch:
    """Highest proportional set size (PSS) of all processes of a session, from /proc.

    PSS counts memory that several processes share once, mapped files that are in memory included;
    `peak_anonymous` is the part of it that isn't backed by a file."""

    def __init__(self) -> None:
        self.peak = self.peak_anonymous = self.samples = self.processes = 0  # bytes, counts

    def __call__(self, session: int) -> None:
        sizes = [_pss(process) for process in _session_members(session)]
        total, anonymous = (sum(part) for part in zip(*sizes, strict=True)) if sizes else (0, 0)
        self.samples += total > 0
        self.processes = max(self.processes, len(sizes))
        self.peak, self.peak_anonymous = (
            max(self.peak, total),
            max(self.peak_anonymous, anonymous),
        )


def _session_members(session: int) -> list[Path]:
    members = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # pid (name) state ppid pgrp session: the name may hold spaces and brackets
            fields = (process / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[3]) == session:
            members.append(process)
    return members


def _pss(process: Path) -> tuple[int, int]:
    """Bytes of PSS, and of its anonymous part."""
    try:
        lines = (process / "smaps_rollup").read_text("ascii").splitlines()[1:]
    except OSError:  # gone meanwhile, or a zombie
        return 0, 0
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return kib["Pss"] * 1024, kib["Pss_Anon"] * 1024


class DiskWatch:
    """Highest number of bytes that lie in a directory while a process works in it."""

    def __init__(self, directory: Path) -> None:
        self._directory, self.peak = directory, 0

    def __call__(self, _session: int) -> None:
        self.peak = max(self.peak, directory_bytes(self._directory))


def directory_bytes(directory: Path) -> int:
    """Bytes on disk of the files in `directory`, however deep."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total
