"""Asks a fresh process (`reload`) what exported files give, and ends it whatever happens here."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

import capfinder
from capfinder.exporting import reload
from capfinder.exporting.reload import Answer, Job

_ON_THE_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def reloaded(jobs: Sequence[Job], signals: np.ndarray, *, done: Callable[[], None]) -> list[Answer]:
    """What each file gives `signals` (n, T, 1) in one process that starts anew; `done` is called
    after each. A file that the process ended over is the last that is answered for."""
    answers: list[Answer] = []
    # Not a pipe, which nobody would empty.
    with tempfile.TemporaryFile() as said, _started(said) as process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it ended over its start; below it is said how
            reload.write_request(process.stdin, jobs, signals)
        for _ in jobs:
            answer = reload.read_answer(process.stdout)
            if answer is None:
                answers.append(Answer(None, _how_it_ended(process, said), ""))
                break
            answers.append(answer)
            done()
    return answers


@contextmanager
def _started(said: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    """In a session of its own: the terminal's Ctrl-C is for this process, which ends that one."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", reload.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env=_environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def _environment() -> dict[str, str]:
    """With this very package first, wherever it was started from."""
    package = str(Path(capfinder.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **_ON_THE_CPU, "PYTHONPATH": os.pathsep.join(paths)}


def _how_it_ended(process: "subprocess.Popen[bytes]", said: IO[bytes]) -> str:
    code = process.wait()
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return f"the process that reloads it ended {how}" + (f" ({lines[-1]})" if lines else "")
