"""`capfinder tune-worker`."""

import argparse
import contextlib
from pathlib import Path

from capfinder import settings
from capfinder.commands.parsing import Commands, command


def add_tune_worker(commands: Commands) -> None:
    parser = command(
        commands,
        "tune-worker",
        _tune_worker,
        "Help a run with its tuning from another process, on this machine or another.",
    )
    add = parser.add_argument
    add(
        "-r",
        "--run",
        required=True,
        type=Path,
        help="the run's output directory; its run.json has the settings",
    )
    add(
        "-s",
        "--storage",
        help="URL of the study's database, where run.json doesn't have it whole; CAPFINDER_STORAGE "
        "in the environment does the same and hides a password better",
    )
    add("-t", "--timeout_minutes", help="no new trial starts after this long; None: as in the run")
    add(
        "-w",
        "--wait_minutes",
        type=_minutes,
        default=0.0,
        help="how long to wait for a run that hasn't begun its study",
    )


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text}: must be a number of minutes, 0 or more")


def _tune_worker(known: argparse.Namespace) -> None:
    given = {"storage": known.storage, "timeout_minutes": known.timeout_minutes}
    values = {
        name: settings.parse_override(f"tune_params.{name}", text)[1]
        for name, text in given.items()
        if text is not None
    }
    from capfinder.stages import tune_worker

    tune_worker.run(known.run, wait_minutes=known.wait_minutes, **values)
