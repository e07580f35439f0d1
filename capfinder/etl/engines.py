"""What does the heavy part of the ETL: the threads of this process, or Apache Beam's workers.

Heavy is what touches text and signals. The plan, which decides about the reads in between, is made
on the launching machine in either case, by the same code: so the dataset is the same, too."""

import contextlib
import importlib.util
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from capfinder.errors import SettingsError
from capfinder.etl import scan, shuffle
from capfinder.etl.plan import Plan
from capfinder.etl.scan import FileFacts, ScannedBlock
from capfinder.etl.shuffle import ParsedBlock, WrittenShard
from capfinder.etl.sources import Source

NOT_INSTALLED = (
    "etl_params.engine=beam: Apache Beam isn't installed. Install it with pip install '.[beam]', "
    "or set etl_params.engine=local."
)


class PassTwo(Protocol):
    """Parses the reads of one plan and writes them into shards."""

    def parse(self) -> Iterator[ParsedBlock]:
        """The chosen rows in any order; their `fitted` signals may have been left out."""

    def write(self, directory: Path) -> list[WrittenShard]:
        """Every shard, in order; called when no signal that `parse` gave had a problem."""


class Engine(Protocol):
    def scan_files(
        self, found: Sequence[Source], facts: Sequence[FileFacts], *, seed: int
    ) -> Generator[tuple[int, ScannedBlock | None]]:
        """As scan.scan_files."""

    def pass_two(
        self,
        plan: Plan,
        found: Sequence[Source],
        *,
        target_length: int,
        dtype: str,
        scratch: Path,
    ) -> PassTwo:
        """`scratch`: for what is temporary, while this plan is tried."""


class LocalEngine:
    scan_files = staticmethod(scan.scan_files)
    pass_two = shuffle.LocalPassTwo


def check(name: str, beam_options: Sequence[str]) -> None:
    """Raises: SettingsError when the engine can't be had, or its options are wrong."""
    if name == "beam":
        if importlib.util.find_spec("apache_beam") is None:
            raise SettingsError(NOT_INSTALLED)
        from capfinder.etl.beam import options

        options.parse(beam_options)


@contextlib.contextmanager
def make(name: str, beam_options: Sequence[str], *, scratch: Path) -> Iterator[Engine]:
    """The engine, for a version that is built in `scratch`. Raises: as `check`."""
    check(name, beam_options)
    if name == "local":
        yield LocalEngine()
        return
    from capfinder.etl.beam.engine import BeamEngine

    with BeamEngine(beam_options, scratch) as engine:
        yield engine
