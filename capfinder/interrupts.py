"""Ctrl-C once ends a stage cleanly, twice ends the run at once; SIGTERM ends it within seconds.

A signal that was ignored when the process was started stays ignored: a script's background jobs
don't end with the Ctrl-C that is meant for the script."""

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from capfinder.errors import StoppedError
from capfinder.log import logger

# A step or a compilation may hold the interpreter: after so long the process ends without it.
SIGTERM_GRACE_SECONDS = 8.0  # schedulers wait 10 or more
SIGINT_GRACE_SECONDS = 2.0  # after a Ctrl-C that is to stop at once
AGAIN_SECONDS = 0.05
GOES_ON = "the same command goes on from here"
XLA_CALLER = os.path.join("jax", "_src", "compiler.py")


class Interrupt:
    """What the signals have asked for so far; stages look at `requested` between steps."""

    def __init__(self) -> None:
        self.requested = False
        self.ignores_ctrl_c = False
        self._graceful = ""
        # Ctrl-C in all: as they came, and as far as `_on_sigint` knows, which the interpreter runs
        # once for all that came while it was held up.
        self._pressed = self._answered = 0
        self._answered_before = 0  # this stage

    def say_if_ignored(self) -> None:
        if self.ignores_ctrl_c:
            logger.info("Ctrl-C is ignored, as this process was started so; SIGTERM ends it")

    @contextmanager
    def graceful(self, what_follows: str) -> Iterator[None]:
        """Inside, a first Ctrl-C only sets `requested`; the count starts anew at each entry."""
        self.requested, self._graceful = False, what_follows
        self._answered_before = self._answered
        try:
            yield
        finally:
            self._graceful = ""

    def _is_to_stop(self, count: int) -> bool:
        return count - self._answered_before > (1 if self._graceful else 0)

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        self._answered = max(self._answered + 1, self._pressed)
        if self._is_to_stop(self._answered):
            _stop("Ctrl-C", 130, frame)
        self.requested = True
        logger.warning("Ctrl-C: %s (Ctrl-C again stops at once)", self._graceful)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        _stop("SIGTERM", 143, frame)

    @contextmanager
    def installed(self) -> Iterator["Interrupt"]:
        """Handles SIGINT and SIGTERM while inside; the earlier handlers come back afterwards."""
        handlers = {signal.SIGINT: self._on_sigint, signal.SIGTERM: self._on_sigterm}
        self.ignores_ctrl_c = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        before = {
            signum: signal.signal(signum, handler)
            for signum, handler in handlers.items()
            if signal.getsignal(signum) is not signal.SIG_IGN
        }
        try:
            with _never_ignored(), self._watchdog():
                yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def _watchdog(self) -> Iterator[None]:
        """Ends the process also where no Python handler can run, as in a compilation.

        The interpreter writes each signal's number to the pipe at once; handlers wait for
        bytecode. After SIGTERM the process ends, whatever it does once it is out of here."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(
            target=self._watch, args=(reader,), name="signal-watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(earlier)
            os.close(writer)
            thread.join(timeout=1)
            os.close(reader)

    def _watch(self, reader: int) -> None:
        ends_at = {signal.SIGINT: float("inf"), signal.SIGTERM: float("inf")}
        while True:
            left = min(ends_at.values()) - time.monotonic()
            if select.select([reader], [], [], None if left == float("inf") else max(left, 0))[0]:
                received = os.read(reader, 1)
                if not received:  # `installed` is left
                    break
                if received[0] == signal.SIGTERM:
                    deadline = time.monotonic() + SIGTERM_GRACE_SECONDS
                    ends_at[signal.SIGTERM] = min(deadline, ends_at[signal.SIGTERM])
                elif received[0] == signal.SIGINT:
                    self._pressed += 1
                    if self._is_to_stop(max(self._pressed, self._answered)):
                        ends_at[signal.SIGINT] = time.monotonic() + SIGINT_GRACE_SECONDS
            elif time.monotonic() >= ends_at[signal.SIGTERM]:
                _end_at_once("SIGTERM", 143)
            elif self._answered < self._pressed:
                _end_at_once("Ctrl-C", 130)
            else:
                ends_at[signal.SIGINT] = float("inf")
        if ends_at[signal.SIGTERM] < float("inf"):
            time.sleep(max(ends_at[signal.SIGTERM] - time.monotonic(), 0))
            _end_at_once("SIGTERM", 143)


@contextmanager
def _never_ignored() -> Iterator[None]:
    """Inside, a StoppedError comes again a moment later where the interpreter ignores what is
    raised, as while it collects garbage, which JAX makes it do for all of XLA's."""
    earlier, main = sys.unraisablehook, threading.main_thread().ident
    assert main is not None
    timers: list[threading.Timer] = []

    def hook(ignored: "sys.UnraisableHookArgs") -> None:
        if not isinstance(ignored.exc_value, StoppedError):
            earlier(ignored)
            return
        signum = ignored.exc_value.exit_code - 128
        timers.append(threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, signum)))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = earlier
        for timer in timers:
            timer.cancel()


def _stop(what: str, exit_code: int, frame: FrameType | None) -> NoReturn:
    if _is_compiling(frame):
        # XLA goes on in a thread of its own, and crashes when the interpreter is taken down.
        atexit.register(_end_without_clearing_up, exit_code)
    raise StoppedError(f"stopped by {what}; {GOES_ON}", exit_code)


def _is_compiling(frame: FrameType | None) -> bool:
    """Whether JAX has handed a program to XLA, and looks for signals while it waits for it."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(XLA_CALLER):
            return True
        frame = frame.f_back
    return False


def _end_without_clearing_up(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _end_at_once(what: str, exit_code: int) -> None:
    os.write(2, f"error: stopped by {what}, at once; {GOES_ON}\n".encode())
    os._exit(exit_code)


def sentences(interrupted: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What Ctrl-C ended early, in words.

    interrupted: as in run.json and metrics.json, {"tune": {"trials": 3, "max_trials": 5}, "train":
    {"epochs": 4, "max_epochs": 300}}, without the stages that ran to their end."""
    found = []
    if tune := interrupted.get("tune"):
        trained = "the best of them was trained" if tune["trials"] else "model_params were trained"
        found.append(
            f"Tuning was ended by Ctrl-C after {tune['trials']} of {tune['max_trials']} trials; "
            f"{trained}."
        )
    if train := interrupted.get("train"):
        found.append(
            f"Training was ended by Ctrl-C in epoch {train['epochs']} of {train['max_epochs']} at "
            "most; the best epoch until then was kept."
        )
    return found
