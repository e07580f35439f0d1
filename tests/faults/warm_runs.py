"""Runs of the pipeline that needn't load its libraries, and reload what they export in processes
that needn't either."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stop_at_step
from kills import Place, Watch

sys.path.append(str(Path(__file__).parents[1]))
import warm_reload
from forks import Fork, Forks, become


class WarmRuns(Forks):
    """The process to fork runs from."""

    def __init__(self) -> None:
        self._reloads = Forks("warm_reload")
        super().__init__("warm_runs")

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._reloads.__exit__(*error)

    def start(self, arguments: Sequence[str], place: Place, watch: Watch | None = None) -> Fork:
        """As `kills.start`."""
        place.output.write_bytes(b"")  # so that nobody takes what an earlier run said for its words
        argument = {
            "arguments": list(arguments),
            "environment": place.environment(),
            "reloads": str(self._reloads.address),
            "watch": watch and watch.arguments(),
        }
        with open(os.devnull) as nothing, place.output.open("wb") as output:
            return Fork(
                self.address, argument, [nothing.fileno(), output.fileno(), output.fileno()]
            )


def load() -> None:
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


def run(argument: dict[str, Any]) -> int:
    become(argument["environment"])
    if argument["watch"] is not None:
        stop_at_step.watch(*argument["watch"])
    from capfinder import cli

    with warm_reload.used(lambda: Path(argument["reloads"])):
        return cli.main(argument["arguments"])
