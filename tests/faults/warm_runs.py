"""Runs of the pipeline that needn't load its libraries, which takes ten seconds: forks of one
process that has done so.

python warm_runs.py: for each line of JSON on its standard input (see `WarmRuns.start`), it forks a
run, and answers with the number of its process and, when that is dead, with its exit code. No
thread runs and no device is in use before the fork, so a run finds all as in a process of its own
but for the imports."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

import stop_at_step
from kills import REPOSITORY, Place, Watch


class WarmRun:
    """As a subprocess.Popen."""

    def __init__(self, pid: int, server: "WarmRuns") -> None:
        self.pid = pid
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = int(self._server.answer(timeout))
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class WarmRuns:
    """The process to fork from. One run at a time: wait for its end before the next."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # TensorFlow greets there
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.kill()
        self._server.communicate()

    def start(self, arguments: Sequence[str], place: Place, watch: Watch | None = None) -> WarmRun:
        """As `kills.start`."""
        place.output.write_bytes(b"")  # so that nobody takes what an earlier run said for its words
        request = {
            "arguments": list(arguments),
            "environment": place.environment(),
            "output": str(place.output),
            "watch": watch and watch.arguments(),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        return WarmRun(int(self.answer()), self)

    def answer(self, timeout: float | None = None) -> bytes:
        """Raises: subprocess.TimeoutExpired."""
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self._server.args, timeout or 0.0)
        line = self._server.stdout.readline()
        if not line:
            raise SystemExit("the process that runs are forked from has died")
        return line


def _load() -> None:
    """All that the stages import when they come to it."""
    from capfinder import libraries

    libraries.tensorflow()
    libraries.keras()
    from jax._src import xla_bridge

    import capfinder.evaluation.report
    import capfinder.pipeline
    import capfinder.stages.etl
    import capfinder.stages.evaluate
    import capfinder.stages.export
    import capfinder.stages.study
    import capfinder.stages.train
    import capfinder.stages.tune  # noqa: F401

    assert not xla_bridge.backends_are_initialized()


def _run(request: dict[str, Any]) -> int:
    """In the fork: a session, streams, an environment of its own, then the command."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # TMPDIR is another
    if request["watch"] is not None:
        stop_at_step.watch(*request["watch"])
    from capfinder import cli

    return cli.main(request["arguments"])


def main() -> None:
    _load()
    for line in sys.stdin:
        process = os.fork()
        if not process:
            sys.exit(_run(json.loads(line)))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
