"""python stop_at_step.py STAGE STEP REPORT ROOT... -- ARGUMENTS: `python -m capfinder ARGUMENTS`
that is killed (SIGKILL) just before its STEP-th change of a ROOT or what is below it, counted from
where STAGE begins ("": from the start); STEP 0: never.

What is killed runs as ever: an audit hook counts the interpreter's own announcements of files
that are opened to write, renamed, made or removed. REPORT gets, of a run that ends, the steps and
the seconds of each stage, as JSON; stages are told by what is logged."""

import atexit
import collections
import json
import logging
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

STAGE_LINE = re.compile(r"^== (\w+) ==$", re.MULTILINE)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}

WITHIN = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}  # argument: a directory


def _directory(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""


class Steps:
    """Of this process; `stage` "" is what comes before the first."""

    def __init__(self, stage: str, last: int, roots: list[str]) -> None:
        self._wanted, self._last = stage, last
        self._roots = tuple(root + "/" for root in roots)
        self._lock = threading.Lock()
        self._counts = not stage  # since the wanted stage has begun
        self._since = 0
        self._entered = time.monotonic()
        self.stage = ""
        self.done: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def see(self, record: logging.LogRecord) -> bool:
        """A filter of the log, which lets everything pass."""
        if found := STAGE_LINE.match(record.getMessage()):
            self._enter(found[1])
            self._counts = self._counts or found[1] == self._wanted
        return True

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[self.stage] += now - self._entered
        self.stage, self._entered = stage, now

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        name = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        if event in WITHIN and isinstance(directory := arguments[WITHIN[event]], int):
            # shutil.rmtree names what it removes relative to an open directory
            name = os.path.join(_directory(directory), name)
        if not f"{name}/".startswith(self._roots):
            return
        with self._lock:
            self.done[self.stage] += 1
            self._since += self._counts
            if self._since and self._since == self._last:
                os.kill(os.getpid(), signal.SIGKILL)

    def report(self) -> str:
        self._enter("")
        return json.dumps({"steps": self.done, "seconds": self.seconds})


def watch(stage: str, step: str, report: str, *roots: str) -> None:
    """From here on in this process."""
    steps = Steps(stage, int(step), list(roots))
    logging.getLogger("capfinder").addFilter(steps.see)
    atexit.register(lambda: Path(report).write_text(steps.report()))
    sys.addaudithook(steps.hook)


def main() -> None:
    at = sys.argv.index("--")
    watch(*sys.argv[1:at])
    sys.argv = ["capfinder", *sys.argv[at + 1 :]]
    sys.path[0] = os.getcwd()
    runpy.run_module("capfinder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
