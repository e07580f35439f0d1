"""etl_params.beam_options: two options of our own, the others are Apache Beam's."""

import argparse
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from capfinder.errors import SettingsError

DIRECT = "DirectRunner"


@dataclass(frozen=True)
class BeamOptions:
    """runner: its name. flags: for Beam. exchange_dir: where the machines leave files for each
    other, None: below output_dir. worker_paths: (directory here, the same for the workers)."""

    runner: str
    flags: tuple[str, ...]
    exchange_dir: str | None
    worker_paths: tuple[tuple[str, str], ...]

    def pipeline_options(self) -> Any:
        from apache_beam.options.pipeline_options import PipelineOptions

        return PipelineOptions(list(self.flags))

    def for_workers(self, path: Path) -> str:
        """What the workers call a file or directory; without a name of its own: its path."""
        whole = path.absolute()
        for here, there in self.worker_paths:
            if whole.is_relative_to(here):
                rest = whole.relative_to(here).as_posix()
                return there if rest == "." else f"{there}/{rest}"
        return str(whole)


def parse(flags: Sequence[str]) -> BeamOptions:
    """Raises: SettingsError when they are no options, or Beam has no such runner."""
    ours, others = _Parser().parse_known_args(list(flags))
    paths = []
    for pair in ours.worker_path:
        here, is_pair, there = pair.partition("=")
        if not (is_pair and Path(here).is_absolute() and there):
            raise _error(f"--worker_path={pair}", "must be /directory/here=directory or URL there")
        paths.append((here, there.rstrip("/")))
    if ours.runner == DIRECT:
        # By itself it downloads Prism, another runner, and uses that where it can. This flag, of no
        # other effect on a pipeline without triggers, makes it do the work itself.
        others.append("--allow_unsafe_triggers")
    options = BeamOptions(
        ours.runner, (f"--runner={ours.runner}", *others), ours.exchange_dir, tuple(paths)
    )
    _check_with_beam(options)
    return options


class _Parser(argparse.ArgumentParser):
    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--runner", default=DIRECT)
        self.add_argument("--exchange_dir")
        self.add_argument("--worker_path", action="append", default=[])

    def error(self, message: str) -> NoReturn:
        raise _error("", message)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Beam warns of each of its own extras that isn't installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_with_beam(options: BeamOptions) -> None:
    with _no_warnings():
        from apache_beam.runners import runner
    try:
        runner.create_runner(options.runner)
        options.pipeline_options().get_all_options()
    except (ValueError, ImportError, SystemExit) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else "can't be read"
        raise _error(" ".join(options.flags), reason) from None


def _error(flag: str, reason: str) -> SettingsError:
    return SettingsError(f"etl_params.beam_options: {flag}: {reason}".replace(": : ", ": "))
