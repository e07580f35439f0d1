"""Several processes that train one model: how they meet, what they tell each other, how they end.

Process 0, the main one, does all that is done once, and writes everything; the others train along.
Words go through the store that JAX's coordination service keeps in process 0. Arrays are summed by
XLA, as in any program that all of them run alike.

A process that fails says so before it leaves, and the others end with its exit code. One that dies
without a word is missed by JAX after HEARTBEAT_SECONDS (on a CPU its closed connection tells at
once); JAX then ends the others with code 134. Without `joined` there is one process, and all
functions here are those of a main one that is alone."""

import atexit
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capfinder.errors import SettingsError, StageFailedError, StoppedError

HEARTBEAT_SECONDS = 60
LOOK_SECONDS = 0.5  # between two looks for a word
LEAVE_SECONDS = 5.0  # for the others to hear that it is over, and for a step that can't end
ASKED_AHEAD = 2  # answers of `agreed` under way: none is waited for while a step runs


class _Together:
    """This process among the others."""

    def __init__(self) -> None:
        # What Orbax uses too; JAX has no public name for it.
        from jax._src import distributed

        self.client: Any = distributed.global_state.client
        self.index, self.count = jax.process_index(), jax.process_count()
        self.lost: tuple[str, int] | None = None  # what ended another process, its exit code
        self._over, self._leaving = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="other-processes", daemon=True)
        self._watcher.start()

    def say(self, key: str, value: Any) -> None:
        self.client.key_value_set(f"capfinder/{key}", json.dumps(value), allow_overwrite=True)

    def said(self, kind: str) -> dict[str, Any]:
        """By the last part of the key."""
        found = self.client.key_value_dir_get(f"capfinder/{kind}/")
        return {key.rsplit("/", 1)[1]: json.loads(value) for key, value in found}

    def _watch(self) -> None:
        """Ends this process when another one has failed."""
        while not self._over.wait(LOOK_SECONDS):
            try:
                ended = self.said("ended")
            except jax.errors.JaxRuntimeError:
                return  # process 0 died: JAX ends this one
            for number, (message, code) in ended.items():
                self.lost = (f"process {number} ended: {message}", code)
                main = threading.main_thread().ident
                assert main is not None
                if not self._leaving.is_set():
                    signal.pthread_kill(main, signal.SIGTERM)  # as a scheduler would end it
                if not self._over.wait(LEAVE_SECONDS):  # it waits for the one that is gone
                    print(f"error: {self.lost[0]}", file=sys.stderr, flush=True)
                    self._leave(code)
                return

    def end(self, error: BaseException | None) -> None:
        """Raises: StoppedError or StageFailedError for what another process's end led to here."""
        if error is None:
            self._over.set()
            self._watcher.join()  # the interpreter can't end it while it asks
            jax.distributed.shutdown()
            return
        with contextlib.suppress(StoppedError):  # the watcher's signal, come late
            self._leaving.set()
            if _is_of_xla(error):
                self._over.wait(3 * LOOK_SECONDS)  # what broke a sum says why, if it can
        self._over.set()
        shown = error
        if self.lost is not None:
            shown = StoppedError(*self.lost)
        elif _is_of_xla(error):
            shown = StageFailedError(
                f"another process died, or the network failed ({str(error).splitlines()[0]}). "
                "The same command goes on from the last checkpoint"
            )
        code = getattr(shown, "exit_code", 130 if isinstance(shown, KeyboardInterrupt) else 1)
        if self.lost is None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody there to tell
                self.say(f"ended/{self.index}", (str(shown) or type(shown).__name__, code))
        # JAX would wait at the end of the program for processes that don't come.
        atexit.register(self._leave, code)
        if shown is not error:
            raise shown from error

    def _leave(self, code: int) -> None:
        """Process 0 goes last: JAX ends at once what is cut off from it."""
        sys.stdout.flush()
        sys.stderr.flush()
        deadline = time.monotonic() + LEAVE_SECONDS
        try:
            self.say(f"left/{self.index}", code)
            while not self.index and len(self.said("left")) < self.count:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            time.sleep(0.0 if self.index else 0.2)
        finally:
            os._exit(code)


def _is_of_xla(error: BaseException) -> bool:
    """What a sum with a process that died raises: JAX's own error or, by the place where it is met,
    a ValueError. The text of either begins with one of XLA's names for a status."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)) is not None
    )


_together: _Together | None = None


@contextmanager
def joined(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Inside, the processes are together; None for what the cluster's environment says.

    To be entered before JAX is first used, with SIGTERM handled as interrupts.py does.
    Raises: SettingsError when they can't meet; StoppedError when another process has failed."""
    global _together
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"runtime_params.distributed: the processes can't meet ({reason}). Start them by Slurm "
            "or mpirun or on a TPU pod, or set runtime_params.coordinator_address, num_processes "
            "and process_id"
        ) from error
    jax.devices()  # now: it takes all processes, and may not wait for an ETL
    _together = _Together()
    try:
        yield
    except BaseException as error:
        _together.end(error)
        raise
    else:
        _together.end(None)
    finally:
        _together = None


def is_main() -> bool:
    return _together is None or _together.index == 0


def tell(name: str, value: Any = None) -> None:
    """Process 0 says something to all others, in JSON's types; once for each name."""
    if _together is not None:
        _together.say(f"told/{name}", value)


def hear(*names: str) -> tuple[str, Any]:
    """The first of these that process 0 says, and its value; waits for it, signals are answered."""
    assert _together is not None
    while True:
        told = _together.said("told")
        for name in names:
            if name in told:
                return name, told[name]
        time.sleep(LOOK_SECONDS)


def agreed(asked: Callable[[], bool]) -> Callable[[], bool]:
    """The same question with one answer for all: true once it was true in any process.

    All must ask equally often. The answer is that of ASKED_AHEAD times before, which is there."""
    if _together is None:
        return asked
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[index] for index in sorted(firsts)]), ("process",))
    each = NamedSharding(mesh, PartitionSpec("process"))
    anyone = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    under_way: deque[jax.Array] = deque()
    answer = False

    def ask() -> bool:
        nonlocal answer
        if not answer:
            flag = np.array([asked()], np.int32)
            under_way.append(anyone(jax.make_array_from_process_local_data(each, flag)))
            if len(under_way) > ASKED_AHEAD:
                answer = bool(under_way.popleft())
        return answer

    return ask
