"""python stop_at_step.py STEP REPORT ROOT... -- ARGUMENTS: `python -m capfinder ARGUMENTS` that is
killed (SIGKILL) just before its STEP-th change of a ROOT or what is below it; STEP 0: never.

What is killed runs as ever: an audit hook counts the interpreter's own announcements of files
that are opened to write, renamed, made or removed. REPORT gets the steps of a run that ends."""

import atexit
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}

WITHIN = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}  # argument: a directory


def _directory(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""


class Steps:
    def __init__(self, last: int, roots: list[str]) -> None:
        self._last, self._roots = last, tuple(root + "/" for root in roots)
        self._lock = threading.Lock()
        self.done = 0

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
            self.done += 1
            if self.done == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    at = sys.argv.index("--")
    step, report, *roots = sys.argv[1:at]
    steps = Steps(int(step), roots)
    atexit.register(lambda: Path(report).write_text(str(steps.done)))
    sys.addaudithook(steps.hook)
    sys.argv = ["capfinder", *sys.argv[at + 1 :]]
    sys.path[0] = os.getcwd()
    runpy.run_module("capfinder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
