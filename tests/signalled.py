"""Signals that come at a known moment of a run: when a certain line is logged, or in a compilation.

As a program, for the processes that tests/test_interrupts.py starts: launch.py on the tiny
architecture. The first argument says when which signals come, in JSON: [["epoch 2/4", [15]]]."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from capfinder import cli, log, models
from capfinder.log import logger

COMPILING = "while compiling"
COMPILING_SECONDS = 0.5  # the interpreter must have been held up for so long
SORTS = 300  # what XLA takes seconds to compile


class Signals:
    """Inside a `with` block, each entry's signals come once, at the first line with its words that
    follows the entry before."""

    def __init__(self, *plan: tuple[str, Sequence[int]]) -> None:
        self._plan = list(plan)

    @property
    def are_sent(self) -> bool:
        return not self._plan

    def __enter__(self) -> "Signals":
        logger.addFilter(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        logger.removeFilter(self._see)

    def _see(self, record: logging.LogRecord) -> bool:
        if self._plan and self._plan[0][0] in record.getMessage():
            send(self._plan.pop(0)[1])
        return True


def send(signals: Sequence[int]) -> None:
    for signum in signals:
        os.kill(os.getpid(), signum)


def send_while_compiling(signals: Sequence[int]) -> None:
    main, since = threading.main_thread().ident, time.monotonic()
    assert main is not None
    while time.monotonic() - since < COMPILING_SECONDS:
        if "compile" not in sys._current_frames()[main].f_code.co_name:
            since = time.monotonic()
        time.sleep(0.01)
    for signum in signals:
        send([signum])
        time.sleep(0.3)  # else the kernel takes two for one


def compile_slowly() -> None:
    import tiny_architecture

    class Slow(tiny_architecture.Tiny):
        @nn.compact
        def __call__(self, signal: jax.Array, *, train: bool) -> jax.Array:
            x = signal[..., 0]
            for number in range(SORTS):
                x = jnp.sort(x + number)[:, ::-1]
            return nn.Dense(self.num_classes)(x)

    tiny_architecture.Tiny = Slow  # type: ignore[misc]


def main() -> int:
    plan = [(words, signals) for words, signals in json.loads(sys.argv[1])]
    models.ARCHITECTURES["cnn_lstm"] = "tiny_architecture"
    log.PLAIN_LINE_SECONDS = 0.0  # each step of a bar is a line
    if plan and plan[0][0] == COMPILING:
        compile_slowly()
        threading.Thread(target=send_while_compiling, args=(plan.pop(0)[1],), daemon=True).start()
    with Signals(*plan) as signals:
        code = cli.launch(sys.argv[2:])
    return code if signals.are_sent else 99


if __name__ == "__main__":
    sys.exit(main())
