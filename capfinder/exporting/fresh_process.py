"""Asks a fresh process (`reload`) what exported files give, and ends it whatever happens here."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

import capfinder
from capfinder.exporting import reload
from capfinder.exporting.reload import Answer, Job

_ON_THE_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class FreshProcess:
    """said: what it and its libraries print."""

    process: "subprocess.Popen[bytes]"
    said: IO[bytes]

    def reloaded(
        self, jobs: Sequence[Job], signals: np.ndarray, *, done: Callable[[], None]
    ) -> list[Answer]:
        """What each file gives `signals` (n, T, 1); `done` is called after each. To be asked once.

        A file that the process ended over is the last that is answered for."""
        process, answers = self.process, list[Answer]()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it ended over its start; below it is said how
            reload.write_request(process.stdin, jobs, signals)
        for _ in jobs:
            answer = reload.read_answer(process.stdout)
            if answer is None:
                answers.append(Answer(None, self._how_it_ended(), ""))
                break
            answers.append(answer)
            done()
        return answers

    def _how_it_ended(self) -> str:
        code = self.process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return f"the process that reloads it ended {how}" + (f" ({lines[-1]})" if lines else "")


@contextmanager
def started(kinds: Iterable[str]) -> Iterator[FreshProcess]:
    """One that starts anew, and loads what files of these kinds need while they are written."""
    with tempfile.TemporaryFile() as said:  # not a pipe, which nobody would empty
        process = _start(kinds, said)
        try:
            yield FreshProcess(process, said)
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()


def _start(kinds: Iterable[str], said: IO[bytes]) -> "subprocess.Popen[bytes]":
    """In a session of its own: the terminal's Ctrl-C is for this process, which ends that one."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", reload.__name__, *kinds],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env=_environment(),
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """With this very package first, wherever it was started from."""
    package = str(Path(capfinder.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **_ON_THE_CPU, "PYTHONPATH": os.pathsep.join(paths)}
