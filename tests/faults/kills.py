"""What the kills of the ETL and of the whole pipeline share: a moment, the place where a run works,
how it is started and how it ends."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 300.0  # a rerun that takes longer hangs
SECOND_KILL_SHARE = 0.25  # of the kills: the rerun is killed too
MAX_DRAWS = 8  # a run may end before it can be killed in a short phase; then another is drawn


@dataclass(frozen=True)
class Moment:
    """`seconds` after `phase` was entered or, with a `step`, just before that one of the changes
    to files since then; in a phase without a name: since the run began."""

    phase: str
    seconds: float
    step: int

    def __str__(self) -> str:
        if self.step:
            return f"{self.phase} step {self.step}".lstrip()
        return f"{self.phase} + {self.seconds:.3f} s"

    @classmethod
    def parse(cls, text: str) -> "Moment":
        if at_step := re.fullmatch(r"(.*?) ?step (\d+)", text):
            return cls(at_step[1], 0.0, int(at_step[2]))
        phase, _, seconds = text.removesuffix(" s").rpartition(" + ")
        return cls(phase, float(seconds), 0)


def shown(moments: Sequence[Moment]) -> str:
    return ", then ".join(map(str, moments))


def parsed(text: str) -> list[Moment]:
    """`shown`, the other way round."""
    return [Moment.parse(part) for part in text.split(", then ")]


class Place:
    """Where one run works: its output directory, its own system temporary directory, its words."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output_dir = directory / "out"
        self.scratch = directory / "tmp"
        self.home = directory / "home"
        self.output = directory / "output.txt"
        for path in (self.scratch, self.home):
            path.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """No key for Comet from the user's home; compiled kernels from the user's cache."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        own = {"HOME": str(self.home), "XDG_CACHE_HOME": cache, "TMPDIR": str(self.scratch)}
        return kept | own


@dataclass(frozen=True)
class Watch:
    """Counts a run's changes to `roots` and what is below them, by stage, and notes the seconds of
    each stage in `report` when it ends; `before`: the moment, one with a step, of its kill."""

    roots: tuple[Path, ...]
    before: Moment | None = None
    report: Path = Path(os.devnull)

    def arguments(self) -> list[str]:
        """Of stop_at_step.py."""
        phase, step = (self.before.phase, self.before.step) if self.before else ("", 0)
        return [phase, str(step), str(self.report), *map(str, self.roots)]


class Run(Protocol):
    """What a subprocess.Popen can do, as far as it is needed."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def start(
    arguments: Sequence[str], place: Place, watch: Watch | None = None
) -> "subprocess.Popen[bytes]":
    """`python -m capfinder ARGUMENTS` in a session of its own."""
    command = [sys.executable, "-m", "capfinder"]
    if watch is not None:
        launcher = str(Path(__file__).with_name("stop_at_step.py"))
        command = [sys.executable, launcher, *watch.arguments(), "--"]
    with place.output.open("wb") as output:
        return subprocess.Popen(
            [*command, *arguments],
            cwd=REPOSITORY,
            env=place.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def was_killed(run: Run) -> bool:
    """Waits for the death of a run; False when it had ended before."""
    try:
        return run.wait(LIMIT_SECONDS) < 0
    finally:
        run.kill()


def end_of(run: Run, place: Place) -> str:
    """Waits for the end of a run that should succeed; what is wrong with it, else ""."""
    try:
        code = run.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        return f"no end within {LIMIT_SECONDS:.0f} s"
    last = place.output.read_text(errors="replace").strip().splitlines()[-1:]
    return f"exit code {code}: {' '.join(last)}" if code else ""
