"""Whether the worker of a trial still lives where no file lock can tell, as on another host.

Clocks of hosts differ and jump, so no time is written down: a living worker keeps changing a
number beside its trial, and who looks counts how often it was found unchanged."""

import itertools
import threading
import time
from collections.abc import Callable

from capfinder.log import logger

BEAT_SECONDS = 20.0
MISSED_BEATS = 6  # found unchanged this often, a beat or more apart: two minutes without a sign


class Heart:
    """Calls `beat` with a growing number until it is stopped, from a thread: training, compiling
    and reading leave it the time for that."""

    def __init__(self, beat: Callable[[int], None]) -> None:
        self._beat, self._stopped = beat, threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        for count in itertools.count(1):
            if self._stopped.wait(BEAT_SECONDS):
                return
            try:
                self._beat(count)
            except Exception as error:  # the trial has just ended, or the database is away
                logger.debug("no heartbeat: %s", error)

    def stop(self) -> None:
        """Doesn't wait for a beat that is on its way: a lost network may hold it for minutes."""
        self._stopped.set()


class Watch:
    """What one looker has seen of the trials of others."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, float, int]] = {}  # trial -> mark, when, misses

    def is_dead(self, trial: int, mark: object) -> bool:
        """Whether `mark`, which a living worker changes, has been the same for too many looks.

        Looks are counted, not time alone: after a pause of this process, or of the database, the
        others get the time to beat again."""
        now = time.monotonic()
        before, at, missed = self._seen.get(trial, (None, now, 0))
        if trial not in self._seen or mark != before:
            missed = 0
        elif now - at >= BEAT_SECONDS:
            missed += 1
        else:
            return missed >= MISSED_BEATS
        self._seen[trial] = (mark, now, missed)
        return missed >= MISSED_BEATS
