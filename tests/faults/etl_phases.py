"""Where a run of the ETL stands, told from outside by what lies on disk."""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from kills import Run

POLL_SECONDS = 0.001
SCRATCH = r"dataset/cap_data/\.partial-[^./]+/"
VERSION = r"dataset/cap_data/\.partial-[0-9]+\.[0-9]+\.[0-9]+-[^/]*/"
WHOLE_VERSION = re.compile(r"dataset/cap_data/[0-9]+\.[0-9]+\.[0-9]+/")
# In the order of the ETL: a run is in the last one of which something is there.
PHASES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("lock, estimate", re.compile(r"dataset/\.lock$")),
    ("scan", re.compile(SCRATCH)),
    ("scan, spilled", re.compile(SCRATCH + "(identities|rejects|duplicates)")),
    ("plan and parse", re.compile(VERSION)),
    ("parse, spilled", re.compile(SCRATCH + ".*bucket")),
    ("shards and checks", re.compile(VERSION + r"cap_data-\w+\.tfrecord")),
    ("metadata", re.compile(VERSION + r"(features|dataset_info)\.json$")),
    ("rejects, manifest, sync", re.compile(VERSION + r".*(rejects\.csv|manifest\.json)")),
    ("renamed", WHOLE_VERSION),
    ("index, cache", re.compile(r"dataset/(.*sources\.json|cache/)")),
    ("run record, archive", re.compile(r"run\.json$|comet/")),
)
START = "start-up"
NAMES = [START, *(name for name, _ in PHASES)]


def paths_below(root: Path) -> list[str]:
    """Every file and directory (these end with "/") below `root`, relative to it."""
    found = []
    for directory, subdirectories, names in os.walk(root):
        place = os.path.relpath(directory, root)
        prefix = "" if place == "." else place + "/"
        found += [f"{prefix}{name}/" for name in subdirectories]
        found += [prefix + name for name in names]
    return sorted(found)


def phase_of(paths: Iterable[str]) -> str:
    paths = list(paths)
    reached = START
    for name, pattern in PHASES:
        if any(pattern.match(path) for path in paths):
            reached = name
    return reached


def current_phase(output_dir: Path, scratch: Path) -> str:
    return phase_of([*paths_below(output_dir), *paths_below(scratch)])


def wait_for(run: Run, wanted: str, output_dir: Path, scratch: Path) -> bool:
    """Waits for the phase `wanted` or a later one; False when the run ended before."""
    while run.poll() is None:
        if NAMES.index(current_phase(output_dir, scratch)) >= NAMES.index(wanted):
            return True
        time.sleep(POLL_SECONDS)
    return False


def timeline(run: Run, output_dir: Path, scratch: Path) -> dict[str, float]:
    """Follows a run to its end: the seconds that each phase took."""
    spent: dict[str, float] = {}
    last, since = START, time.monotonic()
    while run.poll() is None:
        now_in, now = current_phase(output_dir, scratch), time.monotonic()
        spent[last] = spent.get(last, 0.0) + now - since
        last, since = now_in, now
        time.sleep(POLL_SECONDS)
    return spent
