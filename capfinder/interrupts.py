"""Ctrl-C once ends a stage cleanly, twice ends the run at once; SIGTERM ends it within seconds."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from capfinder.errors import StoppedError
from capfinder.log import logger

SIGTERM_GRACE_SECONDS = 8.0  # a step or a compilation may hold the interpreter; schedulers wait 10+


class Interrupt:
    """What the signals have asked for so far; stages look at `requested` between steps."""

    def __init__(self) -> None:
        self.requested = False
        self._graceful = ""

    @contextmanager
    def graceful(self, what_follows: str) -> Iterator[None]:
        """Inside, a first Ctrl-C only sets `requested`; the count starts anew at each entry."""
        self.requested, self._graceful = False, what_follows
        try:
            yield
        finally:
            self._graceful = ""

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        if self._graceful and not self.requested:
            self.requested = True
            logger.warning("Ctrl-C: %s (Ctrl-C again stops at once)", self._graceful)
            return
        raise StoppedError("stopped by Ctrl-C; the same command goes on from here", 130)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped by SIGTERM; the same command goes on from here", 143)

    @contextmanager
    def installed(self) -> Iterator["Interrupt"]:
        """Handles SIGINT and SIGTERM while inside; the earlier handlers come back afterwards."""
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, self._on_sigint),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_sigterm),
        }
        try:
            with _watchdog():
                yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


@contextmanager
def _watchdog() -> Iterator[None]:
    """Ends the process after SIGTERM even where no Python handler can run, as in a compilation.

    The interpreter writes each signal's number to the pipe at once; handlers wait for bytecode."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGTERM:
                time.sleep(SIGTERM_GRACE_SECONDS)
                os._exit(143)

    thread = threading.Thread(target=watch, name="sigterm-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(writer)
        thread.join(timeout=1)
        os.close(reader)
