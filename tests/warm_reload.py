"""The process that reloads exported files, as a fork of one that has loaded TensorFlow and Keras:
all else is as the export has it. `used` puts it in the place of a process that starts anew."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from forks import Fork, become

from capfinder.exporting import fresh_process, reload

COLD = fresh_process._start


@contextmanager
def used(address: Callable[[], Path]) -> Iterator[None]:
    """address: of the server, asked when one is needed."""

    def start(kinds: Iterable[str], said: IO[bytes]) -> Fork:
        its_input, our_output = os.pipe()
        our_input, its_output = os.pipe()
        argument = {"kinds": list(kinds), "environment": fresh_process._environment()}
        fork = Fork(address(), argument, [its_input, its_output, said.fileno()])
        os.close(its_input)
        os.close(its_output)
        fork.stdin, fork.stdout = os.fdopen(our_output, "wb"), os.fdopen(our_input, "rb")
        return fork

    fresh_process._start = start
    try:
        yield
    finally:
        fresh_process._start = COLD


def load() -> None:
    reload.load(["keras", "saved_model"])
    from capfinder.exporting import keras, onnx, saved_model  # noqa: F401


def run(argument: dict[str, Any]) -> None:
    become(argument["environment"])
    sys.argv[1:] = argument["kinds"]
    reload.main()
