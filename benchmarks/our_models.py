"""Our training and inference, a round at a time; models.py starts this and gives the commands:

warm_up   a training of two calls and two batches of predictions: compiles, and is thrown away
train     one epoch by loop.fit, from its order to its last step's results
predict   the training reads through the path of `capfinder predict` and of evaluation
product   a matrix product: what this machine can do
facts     parameters, device, peak memory"""

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import clock
import jax
import jax.numpy as jnp
import numpy as np
from our_setup import Setup
from worker import Commands

from capfinder.stages import inference

SIZE, REPEATS = 2048, 10  # of the matrix product
WARM_UP = 2  # calls, of training and of prediction


class Rounds:
    """Epochs of one long training that goes on only when told to."""

    def __init__(self, setup: Setup, commands: Commands) -> None:
        self._setup, self._commands = setup, commands
        self._model = setup.model()
        self._handlers = {
            "warm_up": self._warm_up,
            "predict": self._predict,
            "product": matrix_product,
            "facts": self._facts,
        }
        self._before = clock.usage()
        self._trained: dict[str, Any] = {}
        self._over = False

    def run(self) -> None:
        if self._commands.serve(self._handlers, until="train"):
            self._before = clock.usage()
            self._setup.fit(
                max_epochs=sys.maxsize,
                validation_batches=self,
                interrupted=lambda: self._over,
                on_epoch=self._on_epoch,
            )

    def __iter__(self) -> Iterator[Any]:
        """The validation begins, so the epoch's steps are done and their sums fetched."""
        examples = self._setup.train_batches.steps_per_epoch * self._setup.train_batches.batch_size
        self._trained = clock.since(self._before) | {"examples": examples}
        yield self._validation_batch()

    def _validation_batch(self) -> Any:
        return next(iter(self._setup.evaluation_batches("validation")))  # one is enough here

    def _on_epoch(self, row: dict[str, Any]) -> None:
        self._commands.answer(self._trained | {"loss": row["loss"]})
        self._over = not self._commands.serve(self._handlers, until="train")
        self._before = clock.usage()

    def _warm_up(self) -> dict[str, Any]:
        """Where a call takes many steps: one of these and one of the single steps that are left at
        an epoch's end. JAX knows the programs when the training that counts asks for them."""
        calls = itertools.count(1)
        self._setup.fit(
            max_epochs=1,
            validation_batches=[self._validation_batch()],
            interrupted=lambda: next(calls) >= WARM_UP,
        )
        block = next(iter(self._setup.split("train").blocks()))
        return self._predicted([block.signals[: WARM_UP * self._setup.train_batches.batch_size]])

    def _predict(self) -> dict[str, Any]:
        return self._predicted(block.signals for block in self._setup.split("train").blocks())

    def _predicted(self, signals: Iterable[np.ndarray]) -> dict[str, Any]:
        batching = inference.batching(
            self._setup.train_batches.batch_size, mesh=self._setup.config.runtime_params.mesh
        )
        before, examples = clock.usage(), 0
        parts = ((part, None) for part in signals)
        for logits, _ in inference.predict(self._model, parts, batching):
            examples += len(logits)
        return clock.since(before) | {"examples": examples}

    def _facts(self) -> dict[str, Any]:
        return {
            "parameters": self._model.num_parameters,
            "device": jax.devices()[0].device_kind,
            "peak_memory": clock.peak_memory(),
        }


def matrix_product() -> dict[str, float]:
    """FLOP/s of the fastest of some float32 matrix products."""
    matrix = jnp.ones((SIZE, SIZE), jnp.float32)
    product = jax.jit(jnp.dot)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return {"flops": 2 * SIZE**3 / min(seconds)}


def main() -> None:
    commands = Commands()
    told = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    setup = Setup(
        Path(told["version"]),
        told["model_type"],
        told["ours"],
        batch_size=told["batch_size"],
        seed=told["seed"],
    )
    Rounds(setup, commands).run()


if __name__ == "__main__":
    main()
